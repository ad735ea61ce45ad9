"""Non-maximum suppression by a fixed number of launches, without a read: for accelerators.

Within a group, best box first, a box survives if it is valid and no surviving box before it
overlaps it too much:

    keep[j] = valid[j] and not any(keep[i] and overlaps[i, j] for i < j)

This determines `keep` one box after the other, so there is one answer: of all sets of boxes that
break no rule, in which none overlaps another or was ruled out before, the first in a dictionary's
order, best boxes first. A block of m boxes has only 2**m possible outcomes. Read as a binary
number, the best box its first digit, the largest that breaks no rule is right; each broken rule
costs more than any number. What an outcome breaks within its block is known for all blocks before
anything is decided. So a block costs four launches, whatever the boxes: every outcome's number less
its cost, the largest, its boxes, and what these rule out in the blocks to come.

All images and groups go through their blocks side by side. No number of rounds is guessed:
chains of any length come out right.

Legend: B images, N boxes, G groups, M boxes of the largest group, m boxes of a block, K kept.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# Numbers of outcomes, all blocks together: they decide how large blocks are.
MOST_OUTCOMES = 2**27
LARGEST_BLOCK = 16
# Pairs of boxes whose overlaps are computed at once.
MOST_PAIRS = 2**26


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
    lengths: list[int] | None = None,
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
        lengths: boxes of each group where they come group by group, each by falling score: they
            needn't be sorted then.

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
        lengths,
    )


@fixed_nms.register_fake
def _(boxes, scores, group, valid, iou, count, groups, largest, lengths=None):
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
    lengths: Sequence[int] | None,
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
        lengths: likewise.
    """
    batch, boxes_per_image = scores.shape
    sets = batch * groups
    if lengths is None:
        slot = _slots(scores, group, groups, largest)
        size = groups * largest
        table = boxes.new_zeros((batch, size, 4))
        table = table.scatter(1, slot[..., None].expand(-1, -1, 4), boxes)
        alive = boxes.new_zeros((batch, size)).scatter(1, slot, valid.to(boxes.dtype))
        keep = survive(table.reshape(sets, largest, 4), alive.reshape(sets, largest))
        kept = keep.reshape(batch, size).gather(1, slot) > 0
    else:
        table = _padded(boxes, lengths, largest)
        alive = _padded(valid.to(boxes.dtype)[..., None], lengths, largest)
        keep = survive(table.flatten(0, 1), alive.reshape(sets, largest)).unflatten(0, (batch, -1))
        kept = torch.cat([keep[:, i, :length] for i, length in enumerate(lengths)], dim=1) > 0
    most = min(count, boxes_per_image)
    order = torch.where(kept, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order[:, :most]
    survivors = kept.sum(dim=1)
    order = order * (torch.arange(most, device=order.device) < survivors[:, None])
    if most < count:
        order = torch.nn.functional.pad(order, (0, count - most))
    return order, survivors.clamp(max=count)


def _padded(values: Tensor, lengths: Sequence[int], largest: int) -> Tensor:
    """[B, G, M, C] of [B, N, C], which come group by group; 0 beyond a group's own."""
    parts = [
        torch.nn.functional.pad(part, (0, 0, 0, largest - length)) if length < largest else part
        for part, length in zip(values.split(list(lengths), dim=1), lengths, strict=True)
    ]
    return torch.stack(parts, dim=1)


def _slots(scores: Tensor, group: Tensor, groups: int, largest: int) -> Tensor:
    """Each box's place, [B, N] in [0, G * M): its group's first, by falling score from there."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    by_group = group.gather(1, order)
    every = torch.arange(groups, device=group.device)
    sizes = (group[..., None] == every).sum(dim=1)
    first = (sizes.cumsum(dim=1) - sizes).gather(1, by_group)
    slot = by_group * largest + torch.arange(group.shape[1], device=group.device) - first
    return torch.empty_like(order).scatter(1, order, slot)


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
    # How often each box is ruled out already; those of the padding are.
    out = 1 - valid
    if padding:
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, padding))
        out = torch.nn.functional.pad(out, (0, padding), value=1.0)
    overlaps = _overlaps(boxes, iou)
    outcomes = _outcomes(width, boxes)
    worth = _worth(overlaps, outcomes)
    cost = outcomes.t() * -(2.0**width)
    kept = []
    for number, first in enumerate(range(0, size, width)):
        block, later = slice(first, first + width), slice(first + width, None)
        best = torch.addmm(worth[number], out[:, block], cost).argmax(dim=1)
        kept.append(outcomes.index_select(0, best))
        if first + width < size:
            out[:, None, later].baddbmm_(kept[-1][:, None], overlaps[:, block, later])
    return torch.cat(kept, dim=1)[:, :size]


def block_size(sets: int, size: int) -> int:
    """Boxes of a block: as many as the memory for their 2**m outcomes allows."""
    width = min(LARGEST_BLOCK, size)
    while width > 1 and sets * -(-size // width) * 2**width > MOST_OUTCOMES:
        width -= 1
    return width


def _overlaps(boxes: Tensor, iou: float) -> Tensor:
    """[S, M, M] float32: 1 where boxes i and j overlap by more than `iou`, also where i = j."""
    size = boxes.shape[1]
    at_once = max(1, MOST_PAIRS // (size * size))
    parts = [(_iou(part) > just_below(iou)).to(boxes.dtype) for part in boxes.split(at_once)]
    return torch.cat(parts) if parts[1:] else parts[0]


def _iou(boxes: Tensor) -> Tensor:
    """[S, M, M], in torchvision's order of operations; NaN between empty boxes."""
    low, high = boxes.permute(2, 0, 1).contiguous().split(2)
    sides = high - low
    area = sides[0] * sides[1]
    # Both axes in one tensor, the axis first.
    common = torch.minimum(high[..., None], high[:, :, None])
    common -= torch.maximum(low[..., None], low[:, :, None])
    common.clamp_(min=0)
    inter = common[0] * common[1]
    return inter / (area[:, :, None] + area[:, None] - inter)


def just_below(iou: float) -> float:
    """The largest float32 that isn't above `iou`: exceeding either is the same to a float32."""
    nearest = np.float32(iou)
    return float(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > iou else nearest)


def _outcomes(width: int, like: Tensor) -> Tensor:
    """[2**m, m]: every set of survivors that a block may have, as 1 and 0, best box first."""
    number = torch.arange(2**width, device=like.device)[:, None]
    bit = torch.arange(width - 1, -1, -1, device=like.device)
    return (torch.bitwise_right_shift(number, bit) & 1).to(like.dtype)


def _worth(overlaps: Tensor, outcomes: Tensor) -> Tensor:
    """Each outcome's number, less 2**m for every two of its boxes that overlap.

    All are whole: those that break no rule are exact, and no others come near them. An outcome is
    one of the block's better half and one of its other half, so that tables stay small.

    Returns:
        [blocks, S, 2**m].
    """
    sets, size, _ = overlaps.shape
    width = outcomes.shape[1]
    half, blocks, rest = -(-width // 2), size // width, width // 2
    within = overlaps.unflatten(2, (blocks, width)).unflatten(1, (blocks, width))
    within = within.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2).reshape(-1, width, width)
    step, penalty = 2**rest, -(2.0**width)
    better, other = outcomes[::step, :half], outcomes[:step, half:]
    first = _half_worth(within[:, :half, :half], better, float(step), penalty)
    second = _half_worth(within[:, half:, half:], other, 1.0, penalty)
    # What the better half's survivors rule out in the other half.
    between = torch.matmul(better, within[:, :half, half:])
    worth = torch.baddbmm(
        second[:, None], between, other.t().expand(len(within), -1, -1), alpha=penalty
    )
    return worth.add_(first[..., None]).reshape(blocks, sets, -1)


def _half_worth(within: Tensor, outcomes: Tensor, scale: float, penalty: float) -> Tensor:
    """`scale` times each outcome's number, and `penalty` for every two that overlap: [N, 2**w]."""
    number = torch.arange(len(outcomes), device=outcomes.device).to(outcomes.dtype)
    # Each two once, the better one first.
    both = (outcomes[:, :, None] * outcomes[:, None]).triu(1).flatten(1)
    return torch.addmm(number * scale, within.flatten(1), both.t(), alpha=penalty)
