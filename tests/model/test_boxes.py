import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou, clip_boxes_to_image

from casc.model import boxes as boxes_module
from casc.model.boxes import MAX_LOG_RATIO, area, clip, decode, encode, iou_matrix
from casc.model.detector_config import STAGES
from casc.model.rpn import STDS

CODERS = {"rpn": STDS} | {f"s{i}": stage.stds for i, stage in enumerate(STAGES)}


def random_boxes(count: int, seed: int, low: float = 1, high: float = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 500 - 50
    side = low + torch.rand(count, 2, generator=generator) * (high - low)
    return torch.cat([corner, corner + side], dim=1)


def test_coders_reproduce_the_reference(unit_goldens, mode):
    size = torch.tensor([[800.0, 1088.0]])

    def all_coders(boxes, gt, deltas):
        return {
            name: (
                encode(boxes, gt, stds),
                decode(boxes, deltas, stds, None),
                decode(boxes, deltas, stds, size),
            )
            for name, stds in CODERS.items()
        }

    inputs = [unit_goldens[f"coder.{k}"][None] for k in ("boxes", "gt", "deltas")]
    result = mode(all_coders)(*inputs)
    for name in CODERS:
        encoded, decoded, clipped = (t[0] for t in result[name])
        torch.testing.assert_close(
            encoded, unit_goldens[f"coder.{name}.encode"], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            decoded, unit_goldens[f"coder.{name}.decode"], rtol=1e-5, atol=1e-3
        )
        torch.testing.assert_close(
            clipped, unit_goldens[f"coder.{name}.decode_clip"], rtol=1e-5, atol=1e-3
        )


def test_iou_matrix_is_torchvisions(mode):
    a, b = random_boxes(40, 0), random_boxes(30, 1)
    b[:5] = a[:5]
    torch.testing.assert_close(mode(iou_matrix)(a[None], b[None])[0], box_iou(a, b))


integer = st.integers(-20, 20)


@given(st.lists(st.tuples(integer, integer, st.integers(0, 9), st.integers(0, 9)), min_size=2))
def test_iou_of_any_boxes(rows):
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float32)
    iou = iou_matrix(boxes, boxes)
    assert (iou >= 0).all()
    assert (iou <= 1).all()
    torch.testing.assert_close(iou, iou.T)
    full = area(boxes) > 0
    torch.testing.assert_close(iou[full][:, full], box_iou(boxes[full], boxes[full]))
    # Empty boxes overlap nothing, themselves included, and are never NaN.
    assert (iou[~full] == 0).all()
    assert (iou.diagonal()[full] == 1).all()


@pytest.mark.parametrize("launches_each", [False, True])
def test_iou_matrix_shares_boxes_over_a_batch_of_any_size(monkeypatch, launches_each):
    """Two images, too: as many as a box has corners."""
    monkeypatch.setattr(boxes_module, "_launches_each", lambda _: launches_each)
    b = random_boxes(5, 1)
    for batch in (1, 2, 3, 4):
        a = torch.stack([random_boxes(7, 10 + i) for i in range(batch)])
        for i in range(batch):
            torch.testing.assert_close(iou_matrix(a, b)[i], box_iou(a[i], b))
            torch.testing.assert_close(iou_matrix(b, a)[i], box_iou(b, a[i]))


def test_iou_matrix_keeps_batches_apart():
    a, b = random_boxes(12, 0).reshape(2, 6, 4), random_boxes(8, 1).reshape(2, 4, 4)
    result = iou_matrix(a, b)
    for i in range(2):
        torch.testing.assert_close(result[i], iou_matrix(a[i], b[i]))


@pytest.mark.parametrize("name", CODERS)
def test_decode_inverts_encode(name):
    # Sides differ by a factor of 30 at most, within the clamp of 62.5.
    boxes, targets = random_boxes(200, 2, 10, 300), random_boxes(200, 3, 10, 300)
    deltas = encode(boxes, targets, CODERS[name])[None]
    torch.testing.assert_close(
        decode(boxes, deltas, CODERS[name], None)[0], targets, rtol=1e-5, atol=1e-3
    )


def test_sides_change_by_a_bounded_factor():
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    for sign in (1, -1):
        deltas = torch.tensor([[[0.0, 0, sign * 1e9, sign * 1e9]]])
        x1, y1, x2, y2 = decode(boxes, deltas, STDS, None)[0, 0].tolist()
        assert x2 - x1 == pytest.approx(10 * 62.5**sign, rel=1e-5)
        assert y2 - y1 == pytest.approx(10 * 62.5**sign, rel=1e-5)
    assert pytest.approx(4.135, abs=1e-3) == MAX_LOG_RATIO


def test_encoding_padded_rows_is_finite():
    boxes = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [5, 5, 20, 30], [7, 7, 7, 7]])
    targets = torch.tensor([[0.0, 0, 0, 0], [3, 4, 50, 60], [0, 0, 0, 0], [7, 7, 7, 7]])
    deltas = encode(boxes, targets, STAGES[2].stds)
    assert deltas.isfinite().all()
    assert (deltas[[0, 3]] == 0).all()


def test_clip_is_torchvisions_per_image():
    boxes = random_boxes(60, 4).reshape(2, 30, 4)
    size = torch.tensor([[100.0, 300.0], [240.0, 120.0]])
    clipped = clip(boxes, size)
    for i in range(2):
        height, width = size[i].int().tolist()
        torch.testing.assert_close(clipped[i], clip_boxes_to_image(boxes[i], (height, width)))


def test_clipped_boxes_are_within_the_image_whatever_they_were(mode):
    wild = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30])
    boxes = torch.cartesian_prod(wild, wild, wild, wild)[None]
    clipped = mode(clip)(boxes, torch.tensor([[50.0, 70.0]]))
    assert clipped.unique().tolist() == [0, 50, 70]
    assert (clipped[..., 1::2] <= 50).all()


def test_decoding_shares_boxes_over_the_batch():
    boxes, deltas = random_boxes(7, 5), torch.randn(3, 7, 4, generator=torch.manual_seed(0))
    shared = decode(boxes, deltas, STDS, None)
    for i in range(3):
        torch.testing.assert_close(shared[i], decode(boxes, deltas[i], STDS, None))
