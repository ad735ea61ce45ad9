"""RoIAlign by Triton kernels: the fixed grid, forward and backward, taps made inside.

A program takes some cells of one RoI and all channels that fit: each tap is a row of the
flattened pyramid, read with the widest loads and summed in float32. The backward pass adds to one
float32 gradient of the pyramid by atomics, whose order is free; or, deterministic, a program
gathers for a tile of pixels from the RoIs that reach it, in their order. Neither allocates
anything else. Rows are counted in 64 bits: any number of images.

Legend: P pixels of all levels and images, C channels, R RoIs, N = O * O cells of a RoI.
"""

# Inside a kernel the words are Triton's, which pyright takes for Python's.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportFunctionMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import GRID, sample_grid

# Cells of a RoI that a program takes, and the most channels: 16 numbers a thread.
CELLS, CHANNELS = 8, 256
# The deterministic backward: pixels of a tile per side, RoIs looked at and cells read at once.
TILE, ROIS, CELLS_AT_ONCE, TILE_CHANNELS = 8, 32, 32, 64


def align(pyramid: Pyramid, boxes: Tensor, image: Tensor, cells: int) -> Tensor:
    """[R, N, C]: what each cell of `sample_grid` reads; see `roi_align`."""
    grid = sample_grid(pyramid, boxes.detach(), image, cells)
    return _align(pyramid.pixels, *grid, cells, _sides(pyramid))


def chained_align(
    pyramid: Pyramid, boxes: Tensor, image: Tensor, cells: int
) -> tuple[Tensor, Pyramid]:
    """`align`, and the pyramid for the next reader, as `chained_bags` does it."""
    grid = sample_grid(pyramid, boxes.detach(), image, cells)
    made, pixels = _Chained.apply(pyramid.pixels, *grid, cells, _sides(pyramid))
    return made, pyramid.with_pixels(pixels)


def _sides(pyramid: Pyramid) -> list[int]:
    """H_0, W_0, H_1, W_1, ..."""
    return [side for level in pyramid.levels for side in level.shape[2:]]


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, start, size, first, step, cells, sides):
        ctx.save_for_backward(start, size, first, step)
        ctx.cells, ctx.sides = cells, sides
        return _align(pixels, start, size, first, step, cells, sides), pixels.view_as(pixels)

    @staticmethod
    def backward(ctx, *grads):
        grad, later = grads
        total = _gradient(grad, later, ctx.saved_tensors, ctx.cells, ctx.sides)
        return total.to(later.dtype), None, None, None, None, None, None


def _gradient(grad: Tensor, later: Tensor, grid: tuple[Tensor, ...], cells: int, sides: list[int]):
    by = _backward_in_order if torch.are_deterministic_algorithms_enabled() else _backward
    start, size, first, step = grid
    return by(grad.contiguous(), later, start, size, first, step, cells, sides)


@triton_op("casc::roi_align_triton", mutates_args=())
def _align(
    pixels: Tensor,
    start: Tensor,
    size: Tensor,
    first: Tensor,
    step: Tensor,
    cells: int,
    sides: list[int],
) -> Tensor:
    """[R, N, C] of the pixels' dtype from pixels [P, C] and a `SampleGrid` of R RoIs."""
    rois, channels = start.shape[0], pixels.shape[1]
    made = pixels.new_empty((rois, cells * cells, channels))
    if rois == 0:
        return made
    block = min(CHANNELS, triton.next_power_of_2(channels))
    launch = (rois, triton.cdiv(cells * cells, CELLS), triton.cdiv(channels, block))
    wrap_triton(_read)[launch](
        pixels.contiguous(),
        start,
        size,
        first,
        step,
        made,
        SIDE=cells,
        GRID=GRID,
        C=channels,
        CELLS=CELLS,
        CHANNELS=block,
    )
    return made


def _setup(ctx, inputs, output) -> None:
    pixels, *grid, ctx.cells, ctx.sides = inputs
    ctx.save_for_backward(*grid)
    ctx.shape, ctx.dtype = pixels.shape, pixels.dtype


def _align_grad(ctx, grad: Tensor):
    none = grad.new_zeros(ctx.shape, dtype=torch.float32)
    total = _gradient(grad, none, ctx.saved_tensors, ctx.cells, ctx.sides)
    return total.to(ctx.dtype), None, None, None, None, None, None


_align.register_autograd(_align_grad, setup_context=_setup)


@triton_op("casc::roi_align_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    later: Tensor,
    start: Tensor,
    size: Tensor,
    first: Tensor,
    step: Tensor,
    cells: int,
    sides: list[int],
) -> Tensor:
    """`later` [P, C] plus the gradient of the pixels, float32, from that of [R, N, C]."""
    total = later.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rois, channels = start.shape[0], later.shape[1]
    if rois == 0:
        return total
    block = min(CHANNELS, triton.next_power_of_2(channels))
    launch = (rois, triton.cdiv(cells * cells, CELLS), triton.cdiv(channels, block))
    wrap_triton(_add)[launch](
        grad,
        start,
        size,
        first,
        step,
        total,
        SIDE=cells,
        GRID=GRID,
        C=channels,
        CELLS=CELLS,
        CHANNELS=block,
    )
    return total


@triton_op("casc::roi_align_triton_backward_in_order", mutates_args=())
def _backward_in_order(
    grad: Tensor,
    later: Tensor,
    start: Tensor,
    size: Tensor,
    first: Tensor,
    step: Tensor,
    cells: int,
    sides: list[int],
) -> Tensor:
    """`_backward` with every sum in the RoIs' order: the same bits every time."""
    later = later.contiguous()
    total = torch.empty_like(later, dtype=torch.float32)
    levels = list(zip(sides[::2], sides[1::2], strict=True))
    per_image = sum(height * width for height, width in levels)
    images = later.shape[0] // per_image
    block = max(16, min(TILE_CHANNELS, triton.next_power_of_2(later.shape[1])))
    skip = 0
    for height, width in levels:
        tiles = triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
        wrap_triton(_gather)[(tiles, images, triton.cdiv(later.shape[1], block))](
            grad,
            later,
            start,
            first,
            step,
            total,
            start.shape[0],
            height,
            width,
            skip,
            per_image,
            SIDE=cells,
            GRID=GRID,
            C=later.shape[1],
            TILE=TILE,
            ROIS=ROIS,
            CELLS=CELLS_AT_ONCE,
            CHANNELS=block,
        )
        skip += height * width
    return total


@triton.jit
def _axis(first, step, size, sample, GRID: tl.constexpr):
    """Both neighbours of samples along an axis and their weights, as `_axis_taps` has them."""
    at = first + (sample.to(tl.float32) + 0.5) / GRID * step
    last = size - 1.0
    counts = (at >= -1) & (at <= last + 1)
    at = tl.where(counts, tl.minimum(tl.maximum(at, 0.0), last), 0.0)
    low = tl.floor(at)
    high = tl.minimum(low + 1, last)
    weight = tl.where(counts, 1.0 / GRID, 0.0)
    fraction = at - low
    return low.to(tl.int64), high.to(tl.int64), (1 - fraction) * weight, fraction * weight


@triton.jit
def _read(
    pixels,
    start,
    size,
    first,
    step,
    made,
    SIDE: tl.constexpr,
    GRID: tl.constexpr,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    roi = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (cell < SIDE * SIDE)[:, None] & (channel < C)[None, :]
    row, height, width = tl.load(start + roi), tl.load(size + roi * 2), tl.load(size + roi * 2 + 1)
    y, y_step = tl.load(first + roi * 2), tl.load(step + roi * 2)
    x, x_step = tl.load(first + roi * 2 + 1), tl.load(step + roi * 2 + 1)
    total = tl.zeros([CELLS, CHANNELS], tl.float32)
    for i in tl.static_range(GRID):
        top, bottom, top_weight, bottom_weight = _axis(
            y, y_step, height, cell // SIDE * GRID + i, GRID
        )
        for j in tl.static_range(GRID):
            left, right, left_weight, right_weight = _axis(
                x, x_step, width, cell % SIDE * GRID + j, GRID
            )
            for tap in tl.static_range(4):
                at_y = top if tap < 2 else bottom
                at_x = left if tap % 2 == 0 else right
                weight = (top_weight if tap < 2 else bottom_weight) * (
                    left_weight if tap % 2 == 0 else right_weight
                )
                at = (row + at_y * width + at_x) * C
                here = inside & (weight != 0)[:, None]
                value = tl.load(pixels + at[:, None] + channel[None, :], mask=here, other=0.0)
                total += value.to(tl.float32) * weight[:, None]
    at = (roi * (SIDE * SIDE) + cell) * C
    tl.store(made + at[:, None] + channel[None, :], total.to(made.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    grad,
    start,
    size,
    first,
    step,
    total,
    SIDE: tl.constexpr,
    GRID: tl.constexpr,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`_read` backwards: each tap's share is added to its row."""
    roi = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (cell < SIDE * SIDE)[:, None] & (channel < C)[None, :]
    row, height, width = tl.load(start + roi), tl.load(size + roi * 2), tl.load(size + roi * 2 + 1)
    y, y_step = tl.load(first + roi * 2), tl.load(step + roi * 2)
    x, x_step = tl.load(first + roi * 2 + 1), tl.load(step + roi * 2 + 1)
    at = (roi * (SIDE * SIDE) + cell) * C
    value = tl.load(grad + at[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(GRID):
        top, bottom, top_weight, bottom_weight = _axis(
            y, y_step, height, cell // SIDE * GRID + i, GRID
        )
        for j in tl.static_range(GRID):
            left, right, left_weight, right_weight = _axis(
                x, x_step, width, cell % SIDE * GRID + j, GRID
            )
            for tap in tl.static_range(4):
                at_y = top if tap < 2 else bottom
                at_x = left if tap % 2 == 0 else right
                weight = (top_weight if tap < 2 else bottom_weight) * (
                    left_weight if tap % 2 == 0 else right_weight
                )
                to = (row + at_y * width + at_x) * C
                here = inside & (weight != 0)[:, None]
                tl.atomic_add(
                    total + to[:, None] + channel[None, :],
                    value * weight[:, None],
                    mask=here,
                    sem="relaxed",
                )


@triton.jit
def _hat(pixel, first, step, size, cell, GRID: tl.constexpr):
    """What a cell takes from a pixel along an axis: [pixels, cells]."""
    weight = tl.zeros([pixel.shape[0], cell.shape[0]], tl.float32)
    for i in tl.static_range(GRID):
        low, high, low_weight, high_weight = _axis(first, step, size, cell * GRID + i, GRID)
        weight += tl.where(pixel[:, None] == low[None, :], low_weight[None, :], 0.0)
        weight += tl.where(pixel[:, None] == high[None, :], high_weight[None, :], 0.0)
    return weight


@triton.jit
def _reaches(first, step, size, pixel, SAMPLES: tl.constexpr, GRID: tl.constexpr, TILE):
    """Whether any sample may read one of TILE pixels along an axis."""
    last = size - 1.0
    a = first + 0.5 / GRID * step
    b = first + (SAMPLES - 0.5) / GRID * step
    low = tl.minimum(tl.maximum(tl.minimum(a, b), 0.0), last)
    high = tl.minimum(tl.maximum(tl.maximum(a, b), 0.0), last)
    # One pixel more on either side: the neighbour of a sample, and its rounding.
    return (high + 2 >= pixel) & (low - 1 <= pixel + TILE)


@triton.jit
def _gather(
    grad,
    later,
    start,
    first,
    step,
    total,
    rois,
    height,
    width,
    skip,
    per_image,
    SIDE: tl.constexpr,
    GRID: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ROIS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of a tile of one image's level, one RoI after the other."""
    across = tl.cdiv(width, TILE)
    y0 = tl.program_id(0) // across * TILE
    x0 = tl.program_id(0) % across * TILE
    base = tl.program_id(1).to(tl.int64) * per_image + skip
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, TILE * TILE)
    y, x = y0 + pixel // TILE, x0 + pixel % TILE
    row = base + y.to(tl.int64) * width + x
    inside = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    value = tl.load(later + at, mask=inside, other=0.0).to(tl.float32)
    lane = tl.arange(0, ROIS)
    for begin in range(0, rois, ROIS):
        roi = begin + lane.to(tl.int64)
        is_roi = roi < rois
        touch = is_roi & (tl.load(start + roi, mask=is_roi, other=-1) == base)
        touch = touch & _reaches(
            tl.load(first + roi * 2, mask=is_roi, other=0.0),
            tl.load(step + roi * 2, mask=is_roi, other=0.0),
            height,
            y0,
            SIDE * GRID,
            GRID,
            TILE,
        )
        touch = touch & _reaches(
            tl.load(first + roi * 2 + 1, mask=is_roi, other=0.0),
            tl.load(step + roi * 2 + 1, mask=is_roi, other=0.0),
            width,
            x0,
            SIDE * GRID,
            GRID,
            TILE,
        )
        bits = tl.sum(tl.where(touch, tl.full([1], 1, tl.int64) << lane.to(tl.int64), 0))
        number = tl.sum(tl.where(lane == 0, roi, 0))
        while bits != 0:
            if (bits & 1) != 0:
                top, y_step = tl.load(first + number * 2), tl.load(step + number * 2)
                left, x_step = tl.load(first + number * 2 + 1), tl.load(step + number * 2 + 1)
                for cells in range(0, SIDE * SIDE, CELLS):
                    cell = cells + tl.arange(0, CELLS)
                    is_cell = cell < SIDE * SIDE
                    weight = _hat(y, top, y_step, height, cell // SIDE, GRID)
                    weight *= _hat(x, left, x_step, width, cell % SIDE, GRID)
                    of_cell = (number * (SIDE * SIDE) + cell) * C
                    part = tl.load(
                        grad + of_cell[:, None] + channel[None, :],
                        mask=is_cell[:, None] & (channel < C)[None, :],
                        other=0.0,
                    )
                    value = tl.dot(weight, part.to(tl.float32), value, input_precision="ieee")
            bits = bits >> 1
            number += 1
    tl.store(total + at, value, mask=inside)
