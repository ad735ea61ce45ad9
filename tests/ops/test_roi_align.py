import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import roi_align, roi_levels

STRIDES = (4, 8, 16, 32)


def make_levels(batch: int, channels: int, height: int, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, height // s, width // s, generator=generator) for s in STRIDES
    ]


def make_boxes(count: int, height: int, width: int, seed: int = 1) -> Tensor:
    """All sizes, inside and over every border, and a few empty ones."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.tensor([float(width), float(height)])
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(max(height, width))) * 2
    centre = (torch.rand(count, 2, generator=generator) * 1.4 - 0.2) * canvas
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    boxes[0] = torch.tensor([0.0, 0, width, height])
    boxes[1] = 0
    boxes[2] = torch.tensor([30.0, 20, 30, 60])
    boxes[3] = torch.tensor([-500.0, -500, -400, -400])
    boxes[4] = torch.tensor([width - 5.0, height - 5.0, width + 40.0, height + 60.0])
    return boxes


def by_torchvision(
    levels: list[Tensor], boxes: Tensor, image: Tensor, cells: int, grid: int
) -> Tensor:
    """Each RoI from its level, the level computed in Python floats."""
    result = torch.zeros(len(boxes), levels[0].shape[1], cells, cells)
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        side = math.sqrt(max((x2 - x1) * (y2 - y1), 0))
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), len(levels) - 1)
        roi = torch.cat([image[i : i + 1, None].float(), boxes[i : i + 1]], dim=1)
        result[i] = torchvision_roi_align(
            levels[level], roi, (cells, cells), 1 / STRIDES[level], grid, aligned=True
        )[0]
    return result


def run(levels, boxes, image, cells, sampling):
    return roi_align(flatten_pyramid(levels, STRIDES), boxes, image, cells, sampling)


# ---- the reference's adaptive grid ----


def test_levels_reproduce_the_reference(unit_goldens, mode):
    boxes = unit_goldens["roi.rois"][:, 1:]
    assert torch.equal(mode(roi_levels)(boxes, 4), unit_goldens["roi.levels"])
    assert unit_goldens["roi.levels"].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "cells"), [("bbox", 7), ("mask", 14)])
def test_adaptive_reproduces_the_reference(unit_goldens, mode, name, cells):
    levels = [unit_goldens[f"roi.feat.{i}"].clone().requires_grad_() for i in range(4)]
    rois = unit_goldens["roi.rois"]
    image = rois[:, 0].long()
    out = mode(run)(levels, rois[:, 1:], image, cells, "adaptive")
    torch.testing.assert_close(out, unit_goldens[f"roi.{name}.out"], rtol=1e-5, atol=1e-6)
    out.backward(unit_goldens[f"roi.{name}.grad_out"])
    for i, level in enumerate(levels):
        assert level.grad is not None
        norm = level.grad.flatten(2).norm(dim=2)
        expected = unit_goldens[f"roi.{name}.grad_feat_l2_per_ch.{i}"]
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)


# ---- the fixed grid against torchvision's ----


def test_fixed_grid_is_torchvisions_with_two_samples(mode):
    levels, boxes = make_levels(2, 5, 128, 160), make_boxes(48, 128, 160)
    image = torch.arange(48) % 2
    ours = [level.clone().requires_grad_() for level in levels]
    theirs = [level.clone().requires_grad_() for level in levels]
    made = mode(run)(ours, boxes, image, 7, "fixed")
    expected = by_torchvision(theirs, boxes, image, 7, 2)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    made.backward(weight)
    expected.backward(weight)
    for a, b in zip(ours, theirs, strict=True):
        # torchvision's loop never touches a level without RoIs.
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, expected, rtol=1e-5, atol=1e-5)


def test_the_test_boxes_reach_every_level_and_border():
    boxes = make_boxes(48, 128, 160)
    assert roi_levels(boxes, 4).unique().tolist() == [0, 1, 2]
    assert (boxes[:, :2] < 0).any()
    assert (boxes[:, 2:] > 160).any()


def test_large_boxes_read_coarse_levels():
    levels, boxes = make_levels(1, 3, 1024, 1024), make_boxes(24, 1024, 1024, seed=3)
    image = torch.zeros(24, dtype=torch.long)
    assert roi_levels(boxes, 4).max() == 3
    made = run(levels, boxes, image, 14, "fixed")
    torch.testing.assert_close(
        made, by_torchvision(levels, boxes, image, 14, 2), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("sampling", ["fixed", "adaptive"])
def test_bfloat16_is_float32_rounded(mode, sampling):
    exact, boxes = make_levels(2, 8, 128, 160), make_boxes(24, 128, 160)
    image = torch.arange(24) % 2
    levels = [level.bfloat16().requires_grad_() for level in exact]
    made = mode(run)(levels, boxes, image, 7, sampling)
    assert made.dtype == torch.bfloat16
    grid = 2 if sampling == "fixed" else 0
    expected = by_torchvision([level.detach().float() for level in levels], boxes, image, 7, grid)
    torch.testing.assert_close(made.float(), expected, rtol=0.02, atol=0.03)
    made.float().sum().backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in levels)


def test_constant_features_stay_constant_inside():
    levels = [torch.full((1, 2, 128 // s, 160 // s), 3.5) for s in STRIDES]
    boxes = torch.tensor([[10.0, 10, 60, 70], [0, 0, 160, 128], [100, 90, 104, 91]])
    for sampling in ("fixed", "adaptive"):
        made = run(levels, boxes, torch.zeros(3, dtype=torch.long), 7, sampling)
        torch.testing.assert_close(made, torch.full_like(made, 3.5))


def test_no_gradient_flows_to_the_boxes():
    boxes = make_boxes(8, 128, 160).requires_grad_()
    levels = [level.requires_grad_() for level in make_levels(1, 2, 128, 160)]
    for sampling in ("fixed", "adaptive"):
        run(levels, boxes, torch.zeros(8, dtype=torch.long), 7, sampling).sum().backward()
    assert boxes.grad is None


def test_channels_last_features_give_the_same():
    levels, boxes = make_levels(2, 6, 128, 160), make_boxes(24, 128, 160)
    image = torch.arange(24) % 2
    for sampling in ("fixed", "adaptive"):
        made = run(
            [x.contiguous(memory_format=torch.channels_last) for x in levels],
            boxes,
            image,
            7,
            sampling,
        )
        torch.testing.assert_close(made, run(levels, boxes, image, 7, sampling))


def test_the_operators_are_registered_correctly():
    levels, boxes = make_levels(2, 3, 64, 64), make_boxes(6, 64, 64)
    rois = torch.cat([(torch.arange(6) % 2).float()[:, None], boxes], dim=1)
    here = roi_levels(boxes, 4) == torch.arange(4)[:, None]
    scales = [1 / s for s in STRIDES]
    levels = [x.requires_grad_() for x in levels]
    torch.library.opcheck(
        torch.ops.casc.roi_align_adaptive.default, (levels, rois, here, scales, 3, 0)
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(30, 4, generator=generator, requires_grad=True)
    index = torch.randint(0, 30, (5, 16), generator=generator)
    weight = torch.rand(5, 16, generator=generator)
    torch.library.opcheck(torch.ops.casc.bag.default, (pixels, index, weight))
