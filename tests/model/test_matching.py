import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from casc.model import matching, noise
from casc.model.detector_config import STAGES
from casc.model.matching import (
    Matches,
    Sample,
    best_all,
    best_present,
    match_anchors,
    match_rois,
    meet_all,
    meet_present,
    sample,
    take,
)
from casc.model.rpn import RPNConfig

RPN = {
    "positive_iou": RPNConfig.positive_iou,
    "negative_iou": RPNConfig.negative_iou,
    "low_quality_iou": RPNConfig.low_quality_iou,
}


def falling(batch: int, count: int) -> Tensor:
    """Keys that make the sample "the first k"."""
    return (1 - torch.arange(count) / count).expand(batch, -1)


def overlaps(gt: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU in float32, box by box."""
    result = np.zeros((len(gt), len(boxes)), np.float32)
    for i, a in enumerate(gt.astype(np.float32)):
        for j, b in enumerate(boxes.astype(np.float32)):
            w = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
            h = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
            result[i, j] = w * h / max(union, np.float32(1e-6))
    return result


def max_iou_assigner(
    iou: np.ndarray, positive: float, negative: float, low_quality: float | None
) -> list[int]:
    """The reference's assigner, literally: -1 ignored, 0 background, k ground truth k - 1."""
    count = iou.shape[1]
    assigned = [-1] * count
    if iou.shape[0] == 0:
        return [0] * count
    for n in range(count):
        best = max(iou[:, n])
        if 0 <= best < np.float32(negative):
            assigned[n] = 0
        if best >= np.float32(positive):
            assigned[n] = int(np.argmax(iou[:, n])) + 1
    if low_quality is not None:
        for i in range(iou.shape[0]):
            best = max(iou[i])
            if best >= np.float32(low_quality):
                for n in range(count):
                    if iou[i, n] == best:
                        assigned[n] = i + 1
    return assigned


def as_assigned(matches: Matches, image: int = 0) -> list[int]:
    """Matches in the reference's coding."""
    gt, _, positive, negative = (t[image] for t in matches)
    assert not (positive & negative).any()
    return torch.where(positive, gt + 1, torch.where(negative, 0, -1)).tolist()


# ---- against the reference's own assignments ----


def golden_matches(goldens: dict[str, Tensor]) -> dict[str, Matches]:
    boxes, gt = goldens["assign.boxes"], goldens["assign.gt"][None]
    gt_valid = torch.ones(1, 5, dtype=torch.bool)
    everywhere = torch.ones(1, len(boxes), dtype=torch.bool)
    return {
        "rpn": match_anchors(boxes, everywhere, gt, gt_valid, **RPN),
        **{
            f"s{i}": match_rois(boxes[None], everywhere, gt, gt_valid, iou=stage.iou)
            for i, stage in enumerate(STAGES)
        },
    }


def test_assignments_reproduce_the_reference(unit_goldens, mode):
    for name, matches in mode(golden_matches)(unit_goldens).items():
        assert as_assigned(matches) == unit_goldens[f"assign.{name}.gt_inds"].tolist(), name
        best = unit_goldens[f"assign.{name}.max_overlaps"]
        torch.testing.assert_close(matches.iou[0], best, rtol=1e-6, atol=1e-7)


def test_the_rpns_sample_reproduces_the_reference(unit_goldens, mode):
    matches = golden_matches(unit_goldens)["rpn"]
    keys = falling(1, matches.iou.shape[1])
    drawn = mode(sample)(matches.positive, matches.negative, keys, count=256, max_positive=128)
    index, valid, positive = (t[0] for t in drawn)
    assert valid.all()
    assert index[positive].tolist() == unit_goldens["assign.rpn.pos_inds"].tolist()
    assert index[~positive].tolist() == unit_goldens["assign.rpn.neg_inds"].tolist()
    gt = matches.gt[0, index[positive]]
    assert gt.tolist() == unit_goldens["assign.rpn.pos_assigned_gt_inds"].tolist()
    rois = unit_goldens["assign.boxes"][index]
    assert torch.equal(rois, unit_goldens["assign.rpn.rois"])


# ---- against the literal assigner, on integer boxes: ties abound ----

B, N, G = 2, 24, 4
corner, side = st.integers(0, 6), st.integers(0, 5)
box = st.tuples(corner, corner, side, side).map(lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3]))
scene = st.tuples(
    st.lists(box, min_size=N, max_size=N),
    st.lists(st.lists(box, min_size=G, max_size=G), min_size=B, max_size=B),
    st.lists(st.lists(st.booleans(), min_size=G, max_size=G), min_size=B, max_size=B),
    st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=B, max_size=B),
    st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, 0.1), (0.25, 0.2, 0.0), (0.5, 0.2, 0.4)]),
)


def check_anchors(match, drawn) -> None:
    boxes, gt, gt_valid, inside, thresholds = drawn
    boxes, gt = np.array(boxes, np.float32), np.array(gt, np.float32)
    gt_valid, inside = np.array(gt_valid), np.array(inside)
    matches = match(
        torch.from_numpy(boxes),
        torch.from_numpy(inside),
        torch.from_numpy(gt),
        torch.from_numpy(gt_valid),
        *thresholds,
    )
    for i in range(B):
        real = np.flatnonzero(gt_valid[i])
        iou = overlaps(gt[i, real], boxes[inside[i]])
        positive, negative, low_quality = thresholds
        expected = np.full(N, -1)
        expected[inside[i]] = max_iou_assigner(iou, positive, negative, low_quality)
        expected = [int(real[k - 1]) + 1 if k > 0 else int(k) for k in expected]
        assert as_assigned(matches, i) == expected
        if len(real) and inside[i].any():
            assert matches.iou[i, torch.from_numpy(inside[i])].tolist() == iou.max(0).tolist()
        else:
            assert (matches.iou[i] == -1).all()


def anchors_by_position(anchors, inside, gt, gt_valid, positive, negative, low_quality):
    return match_anchors(
        anchors,
        inside,
        gt,
        gt_valid,
        positive_iou=positive,
        negative_iou=negative,
        low_quality_iou=low_quality,
    )


@settings(max_examples=200)
@given(scene)
def test_anchors_match_like_the_literal_assigner(drawn):
    check_anchors(anchors_by_position, drawn)


def test_compiled_anchors_match_like_the_literal_assigner(compiled):
    # Thresholds are constants of a graph: one pair, so that one compilation serves all.
    match = compiled(anchors_by_position)

    @settings(max_examples=100)
    @given(scene)
    def check(drawn):
        check_anchors(match, (*drawn[:4], (0.7, 0.3, 0.3)))

    check()


def check_rois(match, drawn) -> None:
    boxes, gt, gt_valid, valid, _ = drawn
    boxes, gt = np.array([boxes, boxes[::-1]], np.float32), np.array(gt, np.float32)
    gt_valid, valid = np.array(gt_valid), np.array(valid)
    arguments = [torch.from_numpy(a) for a in (boxes, valid, gt, gt_valid)]
    matches = match(*arguments, iou=0.5)
    for i in range(B):
        real = np.flatnonzero(gt_valid[i])
        assigned = max_iou_assigner(overlaps(gt[i, real], boxes[i]), 0.5, 0.5, None)
        expected = [int(real[k - 1]) + 1 if k > 0 else k for k in assigned]
        expected = [k if v else -1 for k, v in zip(expected, valid[i], strict=True)]
        assert as_assigned(matches, i) == expected


@given(scene)
def test_rois_match_like_the_literal_assigner(drawn):
    check_rois(match_rois, drawn)


def test_compiled_rois_match_like_the_literal_assigner(compiled):
    match = compiled(match_rois)
    given(scene)(lambda drawn: check_rois(match, drawn))()


def test_the_last_claim_wins_even_over_a_better_match():
    # Both objects' best anchor is the first one; it fits the first object perfectly.
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    gt = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 6]]])
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    assert as_assigned(match_anchors(anchors, everywhere, gt, everywhere, **RPN)) == [2, 0]
    assert as_assigned(match_anchors(anchors, everywhere, gt.flip(1), everywhere, **RPN)) == [2, 0]


def test_thresholds_belong_to_the_upper_side():
    # Overlaps of 1, exactly 0.5, and exactly 0.25 with the one object.
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4], [0, 0, 8, 2]])
    gt, everywhere = boxes[None, :1], torch.ones(1, 3, dtype=torch.bool)

    def anchors(positive: float, negative: float) -> list[int]:
        thresholds = {"positive_iou": positive, "negative_iou": negative, "low_quality_iou": 0.9}
        return as_assigned(match_anchors(boxes, everywhere, gt, everywhere[:, :1], **thresholds))

    assert anchors(0.5, 0.25) == [1, 1, -1]
    assert anchors(0.5 + 1e-6, 0.25 + 1e-6) == [1, -1, 0]

    def rois(iou: float) -> list[int]:
        return as_assigned(match_rois(boxes[None], everywhere, gt, everywhere[:, :1], iou=iou))

    assert rois(0.5) == [1, 1, 0]
    assert rois(0.5 + 1e-6) == [1, 0, 0]


# ---- sampling ----

COUNT, MAX_POSITIVE = 12, 5
kinds = st.lists(st.lists(st.sampled_from("pni"), min_size=16, max_size=16), min_size=B, max_size=B)


def check_sample(draw, drawn: Sample, positive: Tensor, negative: Tensor, keys: Tensor) -> None:
    """The documented result, drawn one image at a time by sorting."""
    for i in range(len(keys)):
        order = keys[i].argsort(descending=True).tolist()
        pos = [k for k in order if positive[i, k]][:MAX_POSITIVE]
        neg = [k for k in order if negative[i, k]][: draw - len(pos)]
        valid = drawn.valid[i]
        assert drawn.indices[i, valid].tolist() == pos + neg
        assert drawn.positive[i].tolist() == [k < len(pos) for k in range(draw)]
        assert valid.tolist() == [k < len(pos) + len(neg) for k in range(draw)]
        assert (drawn.indices[i] >= 0).all()
        assert (drawn.indices[i] < keys.shape[1]).all()


@given(kinds, st.integers(0, 2**32 - 1))
def test_sample_takes_the_largest_keys(rows, seed):
    positive = torch.tensor([[k == "p" for k in row] for row in rows])
    negative = torch.tensor([[k == "n" for k in row] for row in rows])
    keys = noise.uniform(torch.tensor([seed, seed ^ 1]), noise.RPN, 16)
    drawn = sample(positive, negative, keys, count=COUNT, max_positive=MAX_POSITIVE)
    check_sample(COUNT, drawn, positive, negative, keys)


def test_compiled_sample_takes_the_largest_keys(compiled):
    draw = compiled(sample)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kind = torch.randint(0, 3, (B, 16), generator=generator)
        keys = torch.rand(B, 16, generator=generator)
        drawn = draw(kind == 0, kind == 1, keys, count=COUNT, max_positive=MAX_POSITIVE)
        check_sample(COUNT, drawn, kind == 0, kind == 1, keys)


@pytest.mark.parametrize("boxes", [1, 3, 11])
def test_fewer_boxes_than_samples(boxes):
    positive = torch.arange(boxes)[None] % 3 == 0
    keys = noise.uniform(torch.tensor([5]), noise.RPN, boxes)
    drawn = sample(positive, ~positive, keys, count=COUNT, max_positive=MAX_POSITIVE)
    check_sample(COUNT, drawn, positive, ~positive, keys)
    assert drawn.indices.shape == drawn.valid.shape == (1, COUNT)


def test_nothing_to_sample():
    none = torch.zeros(B, 16, dtype=torch.bool)
    drawn = sample(none, none, torch.rand(B, 16), count=COUNT, max_positive=MAX_POSITIVE)
    assert not drawn.valid.any()
    assert not drawn.positive.any()


def test_a_key_of_zero_can_be_drawn():
    one = torch.tensor([[False, True]])
    drawn = sample(one, ~one, torch.zeros(1, 2), count=2, max_positive=1)
    assert drawn.indices.tolist() == [[1, 0]]
    assert drawn.valid.all()


def test_sampling_is_uniform():
    # 20,000 images of 9 positives and 21 negatives: each is drawn equally often.
    images, pos, neg = 20_000, 9, 21
    positive = (torch.arange(pos + neg) < pos).expand(images, -1)
    keys = noise.uniform(torch.arange(images), noise.STAGE, pos + neg)
    drawn = sample(positive, ~positive, keys, count=COUNT, max_positive=MAX_POSITIVE)
    assert drawn.valid.all()
    drawn_once = drawn.indices.sort(dim=1).values.diff(dim=1) > 0
    assert drawn_once.all()
    counts = torch.bincount(drawn.indices.flatten(), minlength=pos + neg).double()
    for share, part in ((MAX_POSITIVE / pos, counts[:pos]), (7 / neg, counts[pos:])):
        expected = images * share
        chi2 = ((part - expected) ** 2 / (expected * (1 - share))).sum().item()
        # Draws without replacement: n boxes leave n - 1 degrees of freedom.
        degrees = len(part) - 1
        scaled = chi2 * degrees / len(part)
        assert abs(scaled - degrees) < 5 * (2 * degrees) ** 0.5
    # Pairs as well: neighbours are drawn together as often as others.
    chosen = torch.zeros(images, pos + neg).scatter_(1, drawn.indices, 1.0)[:, :pos]
    together = (chosen.T @ chosen) / images
    expected = MAX_POSITIVE * (MAX_POSITIVE - 1) / (pos * (pos - 1))
    off = together[~torch.eye(pos, dtype=torch.bool)]
    assert (off - expected).abs().max() < 5 * (expected * (1 - expected) / images) ** 0.5


def test_take_reads_each_images_rows():
    values = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take(values, index), torch.stack([values[0, [4, 0]], values[1, [1, 1]]]))
    assert take(values[..., 0], index).tolist() == [[12, 0], [18, 18]]


@pytest.mark.parametrize(
    ("mode", "blocks"),
    # A graph has every block by itself: a few show what many are.
    [("eager", 1), ("eager", 4), ("eager", 40), ("compiled", 3)],
    indirect=["mode"],
)
def test_only_present_objects_cost_and_all_say_the_same(mode, monkeypatch, blocks):
    """Valid objects anywhere among many slots: as the fixed form, block by block."""
    monkeypatch.setattr(matching, "LARGEST_BLOCK", 3 * 60 * 37 // blocks)
    rng = np.random.default_rng(blocks)
    corner = torch.from_numpy(rng.integers(0, 12, (3, 37, 2)).astype(np.float32))
    boxes = torch.cat([corner, corner + torch.from_numpy(rng.integers(1, 9, (3, 37, 2)))], dim=-1)
    valid = torch.from_numpy(rng.random((3, 37)) < np.array([[0.3], [1.0], [0.0]]))
    corner = torch.from_numpy(rng.integers(0, 12, (60, 2)).astype(np.float32))
    anchors = torch.cat([corner, corner + torch.from_numpy(rng.integers(1, 9, (60, 2)))], dim=-1)
    inside = torch.from_numpy(rng.random((3, 60)) < 0.8)
    anchors[:9] += torch.tensor([0.0, 40, 0, 40])  # with nothing beside them
    found = mode(meet_present)(anchors, inside, boxes.float(), valid, 0.3)
    expected = mode(meet_all)(anchors, inside, boxes.float(), valid, 0.3)
    assert (expected[0] == 0).any()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    rois = anchors + torch.arange(3)[:, None, None]
    found = mode(best_present)(rois, boxes.float(), valid)
    expected = best_all(rois, boxes.float(), valid)
    assert found[0].amax() > 0.5
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
