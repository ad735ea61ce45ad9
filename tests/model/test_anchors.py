import math

import numpy as np
import torch

from casc.model.anchors import AnchorConfig, base_anchors, grid_anchors, inside

CPU = torch.device("cpu")


def cells(height: int, width: int, strides=(4, 8, 16, 32, 64)) -> list[tuple[int, int]]:
    return [(-(-height // s), -(-width // s)) for s in strides]


def test_anchors_reproduce_the_reference(unit_goldens, mode):
    def make(size):
        anchors = grid_anchors(AnchorConfig(), cells(800, 1088), CPU)
        return anchors, inside(torch.cat(anchors), size)

    anchors, within = mode(make)(torch.tensor([[750.0, 1000.0]]))
    assert [len(a) for a in anchors] == unit_goldens["anchor.count"].tolist()
    sums = torch.stack([a.double().sum(0) for a in anchors])
    torch.testing.assert_close(sums, unit_goldens["anchor.sum_f64"], rtol=1e-7, atol=0.5)
    first = torch.stack([a[:9] for a in anchors])
    torch.testing.assert_close(first, unit_goldens["anchor.first9"], rtol=1e-6, atol=1e-5)
    packed = torch.from_numpy(np.packbits(within[0].numpy()))
    assert torch.equal(packed, unit_goldens["anchor.inside_packed"])


def test_anchors_are_where_the_definition_puts_them():
    config = AnchorConfig(strides=(4, 16), scale=6.0, ratios=(0.25, 1.0, 3.0))
    sizes = [(3, 5), (2, 1)]
    for stride, (height, width), anchors in zip(
        config.strides, sizes, grid_anchors(config, sizes, CPU), strict=True
    ):
        expected = []
        for y in range(height):
            for x in range(width):
                for ratio in config.ratios:
                    w, h = (stride * 6 * math.sqrt(r) for r in (1 / ratio, ratio))
                    cx, cy = x * stride, y * stride
                    expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        torch.testing.assert_close(anchors, torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_base_anchors_are_the_published_ones():
    expected = [
        [-22.6274, -11.3137, 22.6274, 11.3137],
        [-16.0, -16.0, 16.0, 16.0],
        [-11.3137, -22.6274, 11.3137, 22.6274],
    ]
    made = base_anchors(AnchorConfig(), 0, CPU)
    torch.testing.assert_close(made, torch.tensor(expected), rtol=0, atol=1e-4)


def test_inside_is_strict_at_the_far_edge_only():
    anchors = torch.tensor(
        [
            [0.0, 0.0, 9.0, 7.0],
            [0.0, 0.0, 10.0, 7.0],  # touches the right edge
            [0.0, 0.0, 9.0, 8.0],  # touches the bottom
            [-0.5, 0.0, 9.0, 7.0],
            [0.0, -0.5, 9.0, 7.0],
        ]
    )
    size = torch.tensor([[8.0, 10.0], [9.0, 11.0]])
    assert inside(anchors, size).tolist() == [
        [True, False, False, False, False],
        [True, True, True, False, False],
    ]
