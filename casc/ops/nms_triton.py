"""Non-maximum suppression by two Triton kernels, without a read.

The same rule as `fixed_nms`, the same order, the same bits: within a set, best box first, a box
survives if it is valid and no survivor before it overlaps it too much. The first kernel
compares all pairs, a program per tile of 64 x 64, and packs what it finds into words of 64 bits.
The second one walks over each set, a program per set, 64 boxes at a time.

Legend: B images, S separate sets (an image's groups), M boxes of a set, W words of a row.
"""

# Inside a kernel the words are Triton's, which pyright takes for Python's.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from casc.ops.fixed_nms import just_below, suppress_in_slots

# Boxes that are walked over at once: the bits of a word.
BLOCK = 64
# Words that the walk reads at once, in registers.
MOST_WORDS = 8192


def triton_nms(
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
    """`fixed_nms` by Triton kernels; takes and returns the same."""
    return suppress_in_slots(
        lambda table, alive: greedy(table, alive, iou, count),
        boxes,
        scores,
        group,
        valid,
        count,
        groups,
        largest,
        lengths,
    )


@triton_op("casc::nms_triton", mutates_args=())
def greedy(boxes: Tensor, valid: Tensor, iou: float, count: int) -> Tensor:
    """Which boxes survive: the first `count` survivors of each set, or all if they are fewer.

    Args:
        boxes: [S, M, 4] float32 xyxy, best box first.
        valid: [S, M] float32, 1 or 0.
        iou: suppress above this overlap.
        count: how many survivors of a set are enough.

    Returns:
        [S, M] float32, 1 or 0.
    """
    sets, size = valid.shape
    words = triton.cdiv(size, BLOCK)
    boxes, valid = boxes.contiguous(), valid.contiguous()
    # Stored, so that no compiler fuses a product of it into the sum of two areas: the rounding
    # of an overlap decides between boxes that are tied.
    sides = boxes[..., 2:] - boxes[..., :2]
    area = sides[..., 0] * sides[..., 1]
    overlaps = boxes.new_empty((sets, size, words), dtype=torch.long)
    keep = torch.zeros_like(valid)
    wrap_triton(_overlaps)[(sets, words, words)](
        boxes, area, valid, overlaps, size, words, just_below(iou), BLOCK=BLOCK
    )
    padded = triton.next_power_of_2(words)
    wrap_triton(_sweep)[(sets,)](
        overlaps,
        valid,
        keep,
        size,
        words,
        count,
        BLOCK=BLOCK,
        WORDS=padded,
        ROWS=max(1, min(BLOCK, MOST_WORDS // padded)),
    )
    return keep


@triton.jit
def _overlaps(boxes, area, valid, overlaps, size, words, iou, BLOCK: tl.constexpr):
    """Bit j of word w of row i: box i comes before box 64 * w + j and overlaps it."""
    first = tl.program_id(0).to(tl.int64) * size
    word = tl.program_id(2)
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(1) * BLOCK + lane
    j = word * BLOCK + lane
    # Words that no valid box reads, or for which no box can be suppressed, stay unwritten.
    some_i = tl.sum(tl.load(valid + first + i, mask=i < size, other=0.0)) > 0
    some_j = tl.sum(tl.load(valid + first + j, mask=j < size, other=0.0)) > 0
    if (word >= tl.program_id(1)) & some_i & some_j:
        a, b = boxes + (first + i) * 4, boxes + (first + j) * 4
        is_a, is_b = i < size, j < size
        left = tl.maximum(
            tl.load(a, mask=is_a, other=0.0)[:, None], tl.load(b, mask=is_b, other=0.0)[None, :]
        )
        top = tl.maximum(
            tl.load(a + 1, mask=is_a, other=0.0)[:, None],
            tl.load(b + 1, mask=is_b, other=0.0)[None, :],
        )
        right = tl.minimum(
            tl.load(a + 2, mask=is_a, other=0.0)[:, None],
            tl.load(b + 2, mask=is_b, other=0.0)[None, :],
        )
        bottom = tl.minimum(
            tl.load(a + 3, mask=is_a, other=0.0)[:, None],
            tl.load(b + 3, mask=is_b, other=0.0)[None, :],
        )
        inter = tl.maximum(right - left, 0.0) * tl.maximum(bottom - top, 0.0)
        # Keeps the product from being fused into the difference below; NaN overlaps nothing.
        inter = tl.where(inter > 0, inter, 0.0)
        areas = (
            tl.load(area + first + i, mask=is_a, other=0.0)[:, None]
            + tl.load(area + first + j, mask=is_b, other=0.0)[None, :]
        )
        over = tl.div_rn(inter, areas - inter) > iou
        bits = tl.where(over & (i[:, None] < j[None, :]), tl.full([1, 1], 1, tl.int64) << lane, 0)
        tl.store(overlaps + (first + i) * words + word, tl.sum(bits, axis=1), mask=is_a)


@triton.jit
def _sweep(
    overlaps,
    valid,
    keep,
    size,
    words,
    count,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One set, until its boxes end or `count` have survived."""
    first = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    bit = lane.to(tl.int64)
    word = tl.arange(0, WORDS)
    suppressed = tl.zeros([WORDS], tl.int64)
    block = tl.program_id(0) * 0
    found = tl.program_id(0) * 0
    while (block < words) & (found < count):
        row = block * BLOCK + lane
        is_box = row < size
        gone = tl.sum(tl.where(word == block, suppressed, 0))
        alive = tl.load(valid + first + row, mask=is_box, other=0.0) > 0
        alive = alive & (((gone >> bit) & 1) == 0)
        own = tl.load(overlaps + (first + row) * words + block, mask=alive, other=0)
        # Within the block: each pass settles at least one box more of every chain.
        kept = alive
        changed = tl.sum(alive.to(tl.int32)) > 0
        while changed:
            hit = tl.reduce_or(tl.where(kept, own, 0), axis=0)
            left = alive & (((hit >> bit) & 1) == 0)
            changed = tl.sum((left != kept).to(tl.int32)) > 0
            kept = left
        # The best `count` of the set only, should the last block have more.
        rank = tl.cumsum(kept.to(tl.int32), axis=0)
        kept = kept & (found + rank <= count)
        tl.store(keep + first + row, kept.to(tl.float32), mask=is_box)
        found += tl.sum(kept.to(tl.int32))
        # What the survivors suppress in the blocks to come.
        packed = tl.sum(tl.where(kept, tl.full([1], 1, tl.int64) << bit, 0))
        for start in tl.static_range(0, BLOCK, ROWS):
            part = start + tl.arange(0, ROWS)
            is_kept = ((packed >> part.to(tl.int64)) & 1) != 0
            at = overlaps + (first + block * BLOCK + part)[:, None] * words + word[None, :]
            later = (word[None, :] > block) & (word[None, :] < words)
            suppressed |= tl.reduce_or(tl.load(at, mask=is_kept[:, None] & later, other=0), axis=0)
        block += 1
