"""The suppression kernels by Triton's interpreter; `test_triton.py` runs this file.

Against a loop in numpy that is as plain as the rule, torchvision's operator, and the forms in
plain ATen, which all have to agree to the last tie.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms as torchvision_batched_nms

from casc.ops import nms_triton
from casc.ops.fixed_nms import greedy
from casc.ops.nms import batched_nms

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)


def by_hand(boxes, scores, group, valid, iou, count) -> list[int]:
    """Survivors of one image: best first, of equal scores the one that comes first."""
    boxes = boxes.numpy()
    kept: list[int] = []
    for j in sorted(range(len(boxes)), key=lambda k: (-float(scores[k]), k)):
        rivals = [i for i in kept if group[i] == group[j]]
        if valid[j] and not any(overlap(boxes[i], boxes[j]) > iou for i in rivals):
            kept.append(j)
    return kept[:count]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        width = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
        height = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
        inter = width * height
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return float(inter / (areas - inter))


@st.composite
def cases(draw):
    """Few distinct corners and scores: many ties, copies, empty boxes and exact overlaps."""
    batch, size, groups = draw(st.integers(1, 2)), draw(st.integers(1, 80)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    spread, levels = draw(st.sampled_from([3, 8, 30])), draw(st.sampled_from([1, 4, 1000]))
    # As boxes on a canvas are: shifting groups by the largest coordinate keeps only these apart.
    corner = torch.randint(0, spread + 5, (batch, size, 2), generator=generator)
    side = torch.randint(0, 6, (batch, size, 2), generator=generator)
    # Powers of two: shifting groups apart rounds nothing.
    boxes = torch.cat([corner, corner + side], dim=2).float() * draw(
        st.sampled_from([1.0, 2.0**-3, 2.0**12])
    )
    scores = torch.randint(0, levels, (batch, size), generator=generator) / levels
    group = torch.randint(0, groups, (batch, size), generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    valid = torch.rand(batch, size, generator=generator) < share
    iou = draw(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7]))
    return boxes, scores, group, valid, iou, draw(st.sampled_from([1, 5, size, size + 3])), groups


@settings(max_examples=10)
@given(cases(), st.booleans())
def test_the_survivors_are_those_of_the_rule(case, apart):
    boxes, scores, group, valid, iou, count, groups = case
    sizes = {"groups": groups, "largest": boxes.shape[1]} if apart else {}
    results = [
        batched_nms(boxes, scores, group, valid, iou=iou, count=count, kernel=kernel, **sizes)
        for kernel in ("triton", "fixed", "greedy")
    ]
    index, kept = results[0]
    for other in results[1:]:
        assert torch.equal(kept, other[1])
        assert torch.equal(index, other[0])
    for i in range(len(boxes)):
        right = by_hand(boxes[i], scores[i], group[i], valid[i], iou, count)
        assert index[i, kept[i]].tolist() == right
        assert kept[i].sum() == len(right)


def test_several_blocks_against_torchvision():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(2, 150, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 20 * torch.rand(2, 150, 2, generator=generator)], dim=2)
    scores = torch.rand(2, 150, generator=generator)
    group = torch.arange(150).expand(2, -1) % 2
    valid = torch.ones(2, 150, dtype=torch.bool)
    every: tuple[dict[str, Any], ...] = ({}, {"groups": 2, "largest": 75})
    for sizes in every:
        index, kept = batched_nms(
            boxes, scores, group, valid, iou=0.5, count=150, kernel="triton", **sizes
        )
        for i in range(2):
            right = torchvision_batched_nms(boxes[i], scores[i], group[i], 0.5)
            assert index[i, kept[i]].tolist() == right.tolist()


@pytest.mark.parametrize("words", [8, nms_triton.MOST_WORDS])
def test_a_chain_through_all_blocks(monkeypatch, words):
    """Each box overlaps the next one only, so every other one survives; any rows at a time."""
    monkeypatch.setattr(nms_triton, "MOST_WORDS", words)
    x = torch.arange(140.0) * 4
    boxes = torch.stack([x, torch.zeros(140), x + 7, torch.ones(140)], dim=1)[None]
    valid = torch.ones(1, 140)
    keep = nms_triton.greedy(boxes, valid, 0.2, 140)
    assert keep[0].tolist() == [1.0, 0.0] * 70
    valid[0, 100] = 0
    assert nms_triton.greedy(boxes, valid, 0.2, 140)[0, 97:104].tolist() == [0, 1, 0, 0, 1, 0, 1]


def test_a_set_ends_when_enough_have_survived():
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(3, 130, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 12], dim=2)
    valid = (torch.rand(3, 130, generator=generator) < 0.8).float()
    valid[2] = 0
    every = greedy(boxes, valid, 0.4)
    for count in (1, 7, 130):
        keep = nms_triton.greedy(boxes, valid, 0.4, count)
        assert torch.equal(keep, every * (every.cumsum(dim=1) <= count))


def test_boxes_without_end_and_without_area():
    huge = [3e38, 1e20, 1e19, 1.0, 0.0]
    boxes = torch.tensor([[-a, -a, b, b] for a in huge for b in huge] * 2)[None]
    boxes = torch.cat([boxes, torch.tensor([[[0.0, 0, torch.inf, 1], [5, 5, 5, 5]]])], dim=1)
    valid = torch.ones(boxes.shape[:2])
    keep = nms_triton.greedy(boxes, valid, 0.5, boxes.shape[1])
    assert torch.equal(keep, greedy(boxes, valid, 0.5))
