"""Non-maximum suppression by a fixed number of launches, without a read: for accelerators.

Within a group, best box first, a box survives if it is valid and no surviving box before it
overlaps it too much:

    keep[j] = valid[j] and not any(keep[i] and overlaps[i, j] for i < j)

This determines `keep` one box after the other, so there is one answer and no other set of
boxes satisfies all the equations. A block of m boxes has only 2**m possible outcomes. How
many equations each of them violates is an affine function of the block's boxes that are
still alive: the coefficients are made for all blocks at once, before anything is decided.
So a block costs a handful of launches, whatever the boxes: what the blocks before it leave
alive, the violations of every outcome, and the outcome that has none.

All images and groups go through their blocks side by side. No number of rounds is guessed:
chains of any length come out right.

Legend: B images, N boxes, G groups, M boxes of the largest group, m boxes of a block, K kept.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Entries of the coefficients, all blocks together: they decide how large blocks are.
MOST_COEFFICIENTS = 2**25
LARGEST_BLOCK = 12
# Pairs of boxes whose overlaps are computed at once.
MOST_PAIRS = 2**25


@torch.library.custom_op("casc::fixed_nms", mutates_args=())
def fixed_nms(
    boxes: Tensor,
    scores: Tensor,
    group: Tensor,
    valid: Tensor,
    iou: float,
    count: int,
    groups: int,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Greedy suppression within groups, in plain ATen of fixed shapes.

    Args:
        boxes: [B, N, 4] float32 xyxy.
        scores: [B, N] float32.
        group: [B, N] int64 in [0, G).
        valid: [B, N] bool.
        iou: suppress above this overlap.
        count: K.
        groups: G.
        largest: M; no group has more boxes, valid or not.

    Returns:
        index [B, K] int64 by falling score, equal scores in the boxes' order, 0 where padded;
        and the number of survivors [B] int64, at most K.
    """
    return suppress_in_slots(
        lambda table, alive: greedy(table, alive, iou),
        boxes,
        scores,
        group,
        valid,
        count,
        groups,
        largest,
    )


@fixed_nms.register_fake
def _(boxes, scores, group, valid, iou, count, groups, largest):
    shape = (boxes.shape[0], count)
    return boxes.new_empty(shape, dtype=torch.long), boxes.new_empty(shape[:1], dtype=torch.long)


def suppress_in_slots(
    survive: Callable[[Tensor, Tensor], Tensor],
    boxes: Tensor,
    scores: Tensor,
    group: Tensor,
    valid: Tensor,
    count: int,
    groups: int,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """What `fixed_nms` does, by any function that suppresses within sets as `greedy` does.

    Args:
        survive: ([B * G, M, 4] boxes, [B * G, M] valid) -> [B * G, M], 1 or 0; of each set its
            best `count` survivors are enough.
        boxes: this and the others as of `fixed_nms`.
        scores: likewise.
        group: likewise.
        valid: likewise.
        count: likewise.
        groups: likewise.
        largest: likewise.
    """
    batch, boxes_per_image = scores.shape
    slot = _slots(scores, group, groups, largest)
    size = groups * largest
    table = boxes.new_zeros((batch, size, 4)).scatter(1, slot[..., None].expand(-1, -1, 4), boxes)
    alive = boxes.new_zeros((batch, size)).scatter(1, slot, valid.to(boxes.dtype))
    sets = batch * groups
    keep = survive(table.reshape(sets, largest, 4), alive.reshape(sets, largest))
    kept = keep.reshape(batch, size).gather(1, slot) > 0
    most = min(count, boxes_per_image)
    order = torch.where(kept, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order[:, :most]
    survivors = kept.sum(dim=1)
    order = torch.where(torch.arange(most, device=order.device) < survivors[:, None], order, 0)
    return torch.nn.functional.pad(order, (0, count - most)), survivors.clamp(max=count)


def _slots(scores: Tensor, group: Tensor, groups: int, largest: int) -> Tensor:
    """Each box's place, [B, N] in [0, G * M): its group's first, by falling score from there."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    by_group = group.gather(1, order)
    every = torch.arange(groups, device=group.device)
    sizes = (group[..., None] == every).sum(dim=1)
    first = (sizes.cumsum(dim=1) - sizes).gather(1, by_group)
    rank = torch.arange(group.shape[1], device=group.device) - first
    return torch.empty_like(order).scatter(1, order, by_group * largest + rank)


def greedy(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """Which boxes survive.

    Args:
        boxes: [S, M, 4] float32 xyxy, S separate sets, best box first.
        valid: [S, M] float32, 1 or 0.
        iou: suppress above this overlap.

    Returns:
        [S, M] float32, 1 or 0.
    """
    sets, size = valid.shape
    width = block_size(sets, size)
    padding = -size % width
    boxes = torch.nn.functional.pad(boxes, (0, 0, 0, padding))
    valid = torch.nn.functional.pad(valid, (0, padding))[..., None]
    overlaps = _overlaps(boxes, iou)
    outcomes = _outcomes(width, boxes)
    constant, slope = _violations(overlaps, outcomes)
    keep = torch.zeros_like(valid)
    for number, first in enumerate(range(0, size, width)):
        block = slice(first, first + width)
        alive = _not_suppressed(valid, keep, overlaps, block)
        violations = torch.baddbmm(constant, slope[:, number], alive)
        right = violations[..., 0].argmin(dim=1)
        keep[:, block] = outcomes[right][..., None]
    return keep[:, :size, 0]


def block_size(sets: int, size: int) -> int:
    """Boxes of a block: as many as the memory for their 2**m outcomes allows."""
    width = min(LARGEST_BLOCK, size)
    while width > 1 and sets * -(-size // width) * width * 2**width > MOST_COEFFICIENTS:
        width -= 1
    return width


def _not_suppressed(valid: Tensor, keep: Tensor, overlaps: Tensor, block: slice) -> Tensor:
    """[S, m, 1], 1 or 0: a block's valid boxes that no survivor of the blocks before overlaps."""
    alive = valid[:, block]
    if block.start == 0:
        return alive
    before = slice(0, block.start)
    suppressed_by = overlaps[:, before, block].transpose(1, 2)
    return torch.baddbmm(alive, suppressed_by, keep[:, before], alpha=-1).clamp_(min=0)


def _overlaps(boxes: Tensor, iou: float) -> Tensor:
    """[S, M, M] float32: 1 where box i comes before j and overlaps it by more than `iou`."""
    size = boxes.shape[1]
    earlier = torch.ones((size, size), dtype=torch.bool, device=boxes.device).triu(1)
    at_once = max(1, MOST_PAIRS // (size * size))
    parts = [
        ((_iou(part) > just_below(iou)) & earlier).to(boxes.dtype) for part in boxes.split(at_once)
    ]
    return torch.cat(parts)


def _iou(boxes: Tensor) -> Tensor:
    """[S, M, M], in torchvision's order of operations; NaN between empty boxes."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    area = (x2 - x1) * (y2 - y1)
    width = torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])
    height = torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])
    inter = width.clamp(min=0) * height.clamp(min=0)
    return inter / (area[:, :, None] + area[:, None] - inter)


def just_below(iou: float) -> float:
    """The largest float32 that isn't above `iou`: exceeding either is the same to a float32."""
    nearest = np.float32(iou)
    return float(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > iou else nearest)


def _outcomes(width: int, like: Tensor) -> Tensor:
    """[2**m, m]: every set of survivors that a block may have, as 1 and 0."""
    number = torch.arange(2**width, device=like.device)
    bit = torch.arange(width, device=like.device)
    return (torch.bitwise_right_shift(number[:, None], bit) & 1).to(like.dtype)


def _violations(overlaps: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """How many equations each outcome c of each block violates: constant + slope @ alive.

    Box j's equation is c[j] = alive[j] * free[j], where free[j] says that no box of c before
    it overlaps it: of c, alive and free known to be 1 or 0, the violation is
    c[j] + alive[j] * free[j] * (1 - 2 * c[j]).

    Returns:
        [S, 2**m, 1], the same for all blocks, and [S, blocks, 2**m, m].
    """
    sets, size, _ = overlaps.shape
    width = outcomes.shape[1]
    blocks = size // width
    within = overlaps.unflatten(2, (blocks, width)).unflatten(1, (blocks, width))
    within = within.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    free = (torch.matmul(outcomes, within) < 0.5).to(overlaps.dtype)
    constant = outcomes.sum(dim=1)[:, None].expand(sets, -1, 1)
    return constant, free * (1 - 2 * outcomes)
