"""Which ground truth each box answers for, and which boxes a loss looks at.

Legend: B images, G ground-truth capacity, N boxes, S samples.
Everything has a fixed shape: a missing object or sample is a false mask, never a
shorter tensor.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.device.devices import traits
from casc.model.boxes import iou_matrix

# Accelerators, where each block is launched anew, let anchors meet all ground truths at once, if
# there aren't more overlaps than this.
LARGEST_BLOCK = 2**27
# Where reading is free, as many blocks as there are objects, of so many at most: what a block's
# objects overlap stays in a processor's cache.
PRESENT_BLOCK = 16


class Matches(NamedTuple):
    """The assignment of boxes to ground truth."""

    gt: Tensor
    """[B, N] int64, index of the box's ground truth (meaningful where positive)."""
    iou: Tensor
    """[B, N] float32, the best overlap with any ground truth; -1 if there is none."""
    positive: Tensor
    """[B, N] bool."""
    negative: Tensor
    """[B, N] bool; a box that is neither is ignored."""


IGNORED_SHARE = 0.7
"""Boxes that a region to ignore covers by more than this share of their own area are neither
positive nor negative: TRAIN.CROWD_FILTER_THRESH of py-faster-rcnn and Detectron."""


class Sample(NamedTuple):
    """A fixed number of boxes per image: positives first, then negatives, then padding."""

    indices: Tensor
    """[B, S] int64 into the boxes (arbitrary where invalid)."""
    valid: Tensor
    """[B, S] bool."""
    positive: Tensor
    """[B, S] bool."""


def match_anchors(
    anchors: Tensor,
    inside: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float,
) -> Matches:
    """Match the RPN's anchors (MaxIoUAssigner with low-quality matches).

    An anchor is positive from `positive_iou`, negative below `negative_iou`. Then each
    ground truth in turn claims every anchor that shares its very best overlap, if that
    is at least `low_quality_iou`; the last claim wins, even over a better match.

    Args:
        anchors: [N, 4] xyxy.
        inside: [B, N] bool; the other anchors take no part.
        gt_boxes: [B, G, 4] xyxy.
        gt_valid: [B, G] bool.
        positive_iou: e.g. 0.7.
        negative_iou: e.g. 0.3.
        low_quality_iou: e.g. 0.3.

    Returns:
        Matches of N anchors.
    """
    if traits(inside.device).reads_wait_for_nothing:
        best, gt, claim = meet_present(anchors, inside, gt_boxes, gt_valid, low_quality_iou)
    else:
        best, gt, claim = meet_all(anchors, inside, gt_boxes, gt_valid, low_quality_iou)
    positive = inside & ((best >= positive_iou) | (claim >= 0))
    negative = inside & (best < negative_iou) & ~positive
    return Matches(torch.where(claim >= 0, claim, gt).long(), best, positive, negative)


def meet_all(
    anchors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_meet` gives [B, N], whatever is valid."""
    found = _unmet(inside)
    capacity = gt_boxes.shape[1]
    blocks = -(-inside.numel() * capacity // LARGEST_BLOCK)
    step = max(1, -(-capacity // max(1, blocks)))
    for first in range(0, capacity, step):
        last = min(first + step, capacity)
        valid = gt_valid[:, first:last, None] & inside[:, None]
        order = torch.arange(first, last, dtype=torch.int32, device=inside.device)
        found = _meet(found, anchors, gt_boxes[:, first:last], valid, order, low_quality_iou)
    return found


@torch.library.custom_op("casc::meet_present", mutates_args=())
def meet_present(
    anchors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `meet_all` gives, with work for the objects that there are, not for the capacity."""
    rows = [
        _meet_present(anchors, *image, low_quality_iou)
        for image in zip(inside, gt_boxes, gt_valid, strict=True)
    ]
    best, gt, claim = (torch.stack(column) for column in zip(*rows, strict=True))
    return best, gt, claim


def _meet_present(
    anchors: Tensor, inside: Tensor, boxes: Tensor, valid: Tensor, low_quality_iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image; the ground truths from top to bottom, each block with the anchors beside it."""
    best, gt, claim = _unmet(inside)
    at, present = inside.nonzero()[:, 0], valid.nonzero()[:, 0].int()
    if not len(present):
        return best, gt, claim
    # Anchors that overlap nothing overlap all by 0, and the first is the best.
    best[at], gt[at] = 0.0, present[0]
    own = anchors[at].mT.contiguous()
    order = present[boxes[present, 1].argsort()]
    for block in order.split(PRESENT_BLOCK):
        numbers = block.sort().values
        some = by_column(boxes[numbers])
        beside = torch.ones_like(at, dtype=torch.bool)
        if low_quality_iou > 0:  # else an object may claim what it doesn't overlap
            beside = (own[3] > some[:, 1].amin()) & (own[1] < some[:, 3].amax())
        beside = beside.nonzero()[:, 0]
        if not len(beside):
            continue
        iou, place = iou_matrix(some, own[:, beside].mT), at[beside]
        block_best, first = iou.max(dim=0)
        old_best, old, block_gt = best[place], gt[place], numbers[first]
        earlier = torch.where(block_best == old_best, torch.minimum(old, block_gt), old)
        gt[place] = torch.where(block_best > old_best, block_gt, earlier)
        best[place] = torch.maximum(block_best, old_best)
        gt_best = iou.amax(dim=1, keepdim=True)
        row, column = (iou == torch.where(gt_best >= low_quality_iou, gt_best, 2.0)).nonzero().T
        claim.scatter_reduce_(0, place[column], numbers[row], "amax")
    return best, gt, claim


@meet_present.register_fake
def _(anchors: Tensor, inside: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality_iou: float):
    return _unmet(inside)


def _unmet(inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = torch.full(inside.shape, -1.0, device=inside.device)
    gt = torch.zeros(inside.shape, dtype=torch.int32, device=inside.device)
    return best, gt, torch.full_like(gt, -1)


def _meet(
    found: tuple[Tensor, Tensor, Tensor],
    anchors: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    order: Tensor,
    low_quality_iou: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let anchors meet the ground truths [..., g] numbered `order` [g].

    Returns:
        Each anchor's best overlap, with which of all so far, and who claims it, -1 for nobody.
    """
    best, gt, claim = found
    iou = iou_matrix(gt_boxes, anchors)
    # Both sides of an equality below must come out of this one tensor: recomputed in
    # another fused kernel, the same overlap may differ in its last bit.
    iou = torch.where(valid, iou, -1.0)
    order = order[:, None]
    # The first of the best: max() says so too, but no compiler makes it fast.
    block_best = iou.amax(dim=-2, keepdim=True)
    block_gt = torch.where(iou == block_best, order, 2**30).amin(dim=-2)
    block_best = block_best.squeeze(-2)
    gt = torch.where(block_best > best, block_gt, gt)
    best = torch.maximum(best, block_best)
    gt_best = iou.amax(dim=-1, keepdim=True)
    claimed = (iou == gt_best) & (gt_best >= low_quality_iou)
    claim = torch.maximum(claim, torch.where(claimed, order, -1).amax(dim=-2))
    return best, gt, claim


def match_rois(
    boxes: Tensor, valid: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *, iou: float
) -> Matches:
    """Match a cascade stage's boxes: positive from `iou`, negative below it.

    Args:
        boxes: [B, N, 4] xyxy.
        valid: [B, N] bool.
        gt_boxes: [B, G, 4] xyxy.
        gt_valid: [B, G] bool.
        iou: the stage's threshold.

    Returns:
        Matches of N boxes; invalid boxes are neither positive nor negative.
    """
    if traits(boxes.device).reads_wait_for_nothing:
        best, gt = best_present(boxes, gt_boxes, gt_valid)
    else:
        best, gt = best_all(boxes, gt_boxes, gt_valid)
    return Matches(gt, best, valid & (best >= iou), valid & (best < iou))


def best_all(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Each box's best overlap [B, N], -1 for none, and the first ground truth that has it."""
    overlap = torch.where(gt_valid[..., None], iou_matrix(gt_boxes, boxes), -1.0)
    best, gt = overlap.max(dim=1)
    return best, gt


@torch.library.custom_op("casc::best_present", mutates_args=())
def best_present(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """What `best_all` gives, with work for the objects that there are, not for the capacity."""
    best = boxes.new_full(boxes.shape[:2], -1.0)
    gt = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=boxes.device)
    for i, own in enumerate(gt_valid):
        present = own.nonzero()[:, 0]
        if len(present):
            overlap = iou_matrix(by_column(gt_boxes[i, present]), by_column(boxes[i]))
            best[i], at = overlap.max(dim=0)
            gt[i] = present[at]
    return best, gt


@best_present.register_fake
def _(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor):
    best = boxes.new_empty(boxes.shape[:2])
    return best, torch.empty(boxes.shape[:2], dtype=torch.int64, device=boxes.device)


def by_column(boxes: Tensor) -> Tensor:
    """The same [N, 4], each coordinate of all in one place: a CPU reads it four times as fast."""
    return boxes.mT.contiguous().mT


def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Which boxes lie in a region to ignore, by more than `IGNORED_SHARE` of their own area.

    The share is pycocotools' overlap with a crowd: intersection over the box's area.

    Args:
        boxes: [N, 4] or [B, N, 4] xyxy; one without area is never covered.
        regions: [B, R, 4] xyxy, of no area where padded.

    Returns:
        [B, N] bool.
    """
    count, boxes = regions.shape[1], boxes.expand(regions.shape[0], *boxes.shape[-2:])
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    found = torch.zeros_like(area, dtype=torch.bool)
    step = max(1, min(count, LARGEST_BLOCK // area.numel()))
    for first in range(0, count, step):
        block = regions[:, first : first + step, None]
        low = torch.maximum(block[..., :2], boxes[:, None, :, :2])
        high = torch.minimum(block[..., 2:], boxes[:, None, :, 2:])
        common = (high - low).clamp(min=0).prod(dim=-1).amax(dim=1)
        found = found | (common > IGNORED_SHARE * area)
    return found


def sample(
    positive: Tensor, negative: Tensor, keys: Tensor, *, count: int, max_positive: int
) -> Sample:
    """Draw at random at most `max_positive` positives and fill up with negatives.

    The randomness is `keys`: the boxes with the largest keys are drawn, in the order of
    their keys. Keys that fall with the index give the reference's "first k".

    Args:
        positive: [B, N] bool.
        negative: [B, N] bool.
        keys: [B, N] float32 in [0, 1).
        count: S, samples per image.
        max_positive: the most positives among them.

    Returns:
        S samples per image; all positives lie within the first `max_positive`.
    """
    # Both kinds at once: an accelerator sorts them side by side.
    kinds = torch.where(torch.stack([positive, negative]), keys, -1.0)
    top, (pos, neg) = kinds.topk(min(count, keys.shape[1]), dim=2)
    n_pos, n_neg = (top >= 0).sum(dim=2, keepdim=True)
    n_pos = n_pos.clamp(max=max_positive)
    slot = torch.arange(count, device=keys.device).expand(keys.shape[0], count)
    is_positive = slot < n_pos
    index = torch.where(
        is_positive,
        F.pad(pos, (0, count - pos.shape[1])),
        neg.gather(1, (slot - n_pos).clamp(0, neg.shape[1] - 1)),
    )
    return Sample(index, slot < n_pos + n_neg, is_positive)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each image's values.

    Args:
        values: [B, N] or [B, N, ...].
        index: [B, K] int64.

    Returns:
        [B, K] or [B, K, ...].
    """
    rows = index.reshape(*index.shape, *[1] * (values.dim() - 2))
    return values.gather(1, rows.expand(*index.shape, *values.shape[2:]))
