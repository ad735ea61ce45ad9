import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms as torchvision_batched_nms

from casc.ops.nms import batched_nms, nms


def scene(count: int, seed: int, groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Crowded boxes with distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    side = 10 + torch.rand(count, 2, generator=generator) * 30
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    group = torch.randint(0, groups, (count,), generator=generator)
    return torch.cat([corner, corner + side], dim=1), scores, group


def brute_force(boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, iou: float) -> list:
    """Greedy suppression, box by box, in Python floats."""
    rows, keep = boxes.double().tolist(), []
    for i in sorted(valid.nonzero()[:, 0].tolist(), key=lambda k: -scores[k].item()):
        for j in keep:
            if group[i] != group[j]:
                continue
            a, b = rows[i], rows[j]
            w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
            if union > 0 and w * h / union > iou:
                break
        else:
            keep.append(i)
    return keep


def check(index: Tensor, kept: Tensor, expected: list[int], count: int) -> None:
    """One image's result: the survivors by falling score, then padding."""
    survivors = expected[:count]
    assert index.shape == kept.shape == (count,)
    assert index[kept].tolist() == survivors
    assert kept.tolist() == [k < len(survivors) for k in range(count)]
    assert (index[~kept] == 0).all()


@pytest.mark.parametrize("count", [100, 2000])
def test_keep_list_reproduces_the_reference(unit_goldens, mode, count):
    boxes, scores, levels, keep = (
        unit_goldens[f"nms.{k}"] for k in ("boxes", "scores", "levels", "keep")
    )
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    index, kept = mode(batched_nms)(boxes[None], scores[None], levels, valid, iou=0.7, count=count)
    check(index[0], kept[0], keep.tolist(), count)
    dets = unit_goldens["nms.dets"][:count]
    survivors = index[0, kept[0]]
    assert torch.equal(torch.cat([boxes, scores[:, None]], dim=1)[survivors], dets)


def test_images_groups_and_padding_are_torchvisions(mode):
    suppress = mode(batched_nms)
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        images = [scene(80, 10 * seed + i) for i in range(2)]
        boxes, scores, group = (torch.stack(t) for t in zip(*images, strict=True))
        valid = torch.rand(2, 80, generator=generator) < 0.8
        index, kept = suppress(boxes, scores, group, valid, iou=0.5, count=30)
        for i in range(2):
            rows = valid[i].nonzero()[:, 0]
            keep = torchvision_batched_nms(boxes[i, rows], scores[i, rows], group[i, rows], 0.5)
            check(index[i], kept[i], rows[keep].tolist(), 30)


side = st.sampled_from([0, 4, 8, 12])
box = st.tuples(st.integers(0, 5), st.integers(0, 5), side, side)


@given(
    st.lists(st.tuples(box, st.integers(0, 2), st.booleans()), min_size=1, max_size=24),
    st.sampled_from([0.0, 0.35, 0.7]),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_any_scene_follows_the_greedy_rule(rows, iou, count, random):
    boxes = torch.tensor([[4 * x, 4 * y, 4 * x + w, 4 * y + h] for (x, y, w, h), _, _ in rows])
    boxes = boxes.float()
    group = torch.tensor([g for _, g, _ in rows])
    valid = torch.tensor([v for _, _, v in rows])
    scores = torch.tensor(random.sample(range(1, len(rows) + 1), len(rows))) / 32
    arguments = (boxes[None], scores[None], group, valid[None])
    index, kept = batched_nms(*arguments, iou=iou, count=count)
    check(index[0], kept[0], brute_force(boxes, scores, group, valid, iou), count)


def test_exactly_the_threshold_survives():
    # 8 x 8 against its half: an overlap of exactly 0.5.
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]])
    scores, group = torch.tensor([[0.9, 0.8]]), torch.zeros(2, dtype=torch.long)
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert batched_nms(boxes, scores, group, valid, iou=0.5, count=2)[1].tolist() == [[True, True]]
    assert batched_nms(boxes, scores, group, valid, iou=0.49, count=2)[1].tolist() == [
        [True, False]
    ]


def test_nothing_valid():
    boxes, scores, group = scene(20, 0)
    none = torch.zeros(1, 20, dtype=torch.bool)
    index, kept = batched_nms(boxes[None], scores[None], group, none, iou=0.5, count=7)
    check(index[0], kept[0], [], 7)


def test_all_but_the_best_suppressed():
    boxes, scores = torch.tensor([1.0, 2, 30, 40]).expand(1, 20, 4), scene(20, 0)[1]
    group, valid = torch.zeros(20, dtype=torch.long), torch.ones(1, 20, dtype=torch.bool)
    index, kept = batched_nms(boxes, scores[None], group, valid, iou=0.5, count=5)
    check(index[0], kept[0], [int(scores.argmax())], 5)


def test_more_survivors_than_count_leaves_the_best():
    x = torch.arange(50.0) * 100
    boxes = torch.stack([x, x, x + 50, x + 50], dim=1)
    scores = scene(50, 1)[1]
    group, valid = torch.zeros(50, dtype=torch.long), torch.ones(1, 50, dtype=torch.bool)
    index, kept = batched_nms(boxes[None], scores[None], group, valid, iou=0.5, count=8)
    check(index[0], kept[0], scores.argsort(descending=True)[:8].tolist(), 8)


def test_invalid_boxes_do_not_move_the_groups_apart():
    # The shift between groups follows the largest valid coordinate: garbage in padded
    # rows must not cost the others their precision, nor suppress them.
    boxes, scores, group = scene(40, 2)
    group = group + 1
    padded = torch.cat([boxes, torch.full((3, 4), 1e30)])
    more_scores, more_groups = torch.cat([scores, torch.ones(3)]), torch.cat([group, group[:3]])
    valid = torch.arange(43)[None] < 40
    index, kept = batched_nms(
        padded[None], more_scores[None], more_groups, valid, iou=0.5, count=40
    )
    keep = torchvision_batched_nms(boxes, scores, group, 0.5).tolist()
    assert len(keep) < 40
    check(index[0], kept[0], keep, 40)


def test_many_boxes_are_suppressed_like_few(monkeypatch):
    """Group by group or all at once: the same survivors in the same order, ties included."""
    for seed in range(4):
        boxes, scores, group = scene(1500, seed, groups=5)
        boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) / 4
        scores = (scores * 40).round() / 40
        valid = torch.arange(1500)[None] % 7 > 0
        arguments = (boxes[None], scores[None], group, valid)
        results = []
        for many in (1, 10_000):
            monkeypatch.setattr("casc.ops.nms.MANY", many)
            results.append(batched_nms(*arguments, iou=0.5, count=1400))
        assert 100 < results[0][1].sum() < 1200
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_padding_of_the_canvas_has_no_gradient():
    boxes, scores, group = scene(10, 3)
    boxes, scores = boxes[None].requires_grad_(), scores[None].requires_grad_()
    valid = torch.ones(1, 10, dtype=torch.bool)
    index, kept = batched_nms(boxes, scores, group, valid, iou=0.5, count=4)
    assert not index.requires_grad
    assert not kept.requires_grad


def test_the_operator_is_registered_correctly():
    boxes, scores, group = scene(12, 4)
    valid = torch.arange(12)[None] % 5 > 0
    torch.library.opcheck(nms, (boxes[None], scores[None], group[None], valid, 0.5, 6))
