"""RoIAlign over a feature pyramid (He et al., Mask R-CNN, 2017; aligned, average).

Every RoI reads the level that suits its size (FPN, eq. 1). Two ways to sample:

- "fixed": a 2x2 grid of bilinear samples per cell, as one weighted embedding bag over
  the flattened pyramid. Index and weight tables are plain functions of the boxes, and
  every shape is static.
  Where there is Triton, `roi_align_triton` makes the taps inside its kernels instead.
- "adaptive": the reference's grid of ceil(side / cells) samples per cell, by the device's
  native operator (torchvision's, torch_npu's), hidden in one of ours.

Legend: B images, R RoIs, C channels, L levels, P all pixels of all levels, O output cells
per side, T taps per output cell.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from casc.device.devices import roi_kernels, traits
from casc.ops.pyramid import Level, Pyramid, by_level
from casc.ops.row_sums import weighted_row_sums

Sampling = Literal["fixed", "adaptive"]
RoiKernel = Literal["auto", "aten", "native", "triton"]

# A RoI of sqrt(area) below 2 * 56 pixels reads the finest level; each doubling goes one up.
FINEST_SIDE = 56.0
# The reference adds it to that quotient.
EPSILON = 1e-6
GRID = 2
# What the device's own operator takes for a grid that depends on the RoI.
ADAPTIVE = 0


def roi_levels(boxes: Tensor, count: int) -> Tensor:
    """The pyramid level of each RoI: floor(log2(sqrt(area) / 56 + 1e-6)), clamped.

    Args:
        boxes: [R, 4] xyxy in pixels.
        count: L.

    Returns:
        [R] int64 in [0, L).
    """
    return sum(_beyond(boxes, count), torch.zeros_like(boxes[:, 0], dtype=torch.long))


def _beyond(boxes: Tensor, count: int) -> list[Tensor]:
    """Whether each RoI's level is above the first, the second, ...: count - 1 of [R] bool.

    As areas are compared, there is no root or logarithm, whose last digit is the device's.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides[:, 0] * sides[:, 1]
    return [area >= (FINEST_SIDE * (2**i - EPSILON)) ** 2 for i in range(1, count)]


def roi_align(
    pyramid: Pyramid,
    boxes: Tensor,
    image: Tensor,
    cells: int,
    sampling: Sampling,
    kernel: RoiKernel = "auto",
) -> Tensor:
    """Features of each RoI on a `cells` x `cells` grid.

    Args:
        pyramid: from `flatten_pyramid`.
        boxes: [R, 4] float32 xyxy in pixels of the canvas; no gradient flows to them.
        image: [R] int64, each RoI's image in the batch.
        cells: O.
        sampling: "fixed" or "adaptive", which is native whatever `kernel` says.
        kernel: native computes the fixed grid by the device's own operator as well, triton by
            casc's kernels. Which of them auto becomes is decided before, by
            `casc.model.choose_compute`; here it is aten.

    Returns:
        [R, C, O, O] of the features' dtype; channels_last in memory for the bag's.
    """
    if is_native(sampling, kernel):
        made = _natively(pyramid, boxes.detach(), image, cells, sampling)
        return made.to(pyramid.pixels.dtype)
    if kernel == "triton":
        from casc.ops.roi_align_triton import align  # there isn't Triton for every device

        return _as_maps(align(pyramid, boxes, image, cells), boxes, cells)
    index, weight = fixed_taps(pyramid, boxes.detach(), image, cells)
    return _as_maps(weighted_row_sums(pyramid.pixels, index, weight), boxes, cells)


def is_native(sampling: Sampling, kernel: RoiKernel) -> bool:
    """Whether the device's own operator reads the levels; if not, bags read the pixels."""
    return sampling == "adaptive" or kernel == "native"


def detach_unread(pyramid: Pyramid, sampling: Sampling, kernel: RoiKernel) -> Pyramid:
    """The pyramid with a gradient where `roi_align` reads it, and nowhere else.

    What leaves a compiled graph and isn't read gets a gradient of zeros, as large as itself.
    """
    if is_native(sampling, kernel):
        return pyramid.with_pixels(pyramid.pixels.detach())
    detached = [level.detach() for level in pyramid.levels]
    return Pyramid(detached, pyramid.pixels, pyramid.strides)


def _natively(
    pyramid: Pyramid, boxes: Tensor, image: Tensor, cells: int, sampling: Sampling
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    scales = [1 / stride for stride in pyramid.strides]
    here = _on_levels(boxes, len(scales))
    if not traits(rois.device).select_rois:
        # Each level reads as many: those of other levels become points of the first image, which
        # cost little and whose results aren't used.
        rois = rois * here[..., None]
    if sampling == "adaptive":
        return _native(pyramid.levels, rois, here, scales, cells, ADAPTIVE)
    return _native(pyramid.levels, rois, here, scales, cells, GRID)


def _on_levels(boxes: Tensor, count: int) -> Tensor:
    """Which RoIs are of each level: [L, R] bool."""
    beyond = _beyond(boxes, count)
    if not beyond:
        return torch.ones_like(boxes[None, :, 0], dtype=torch.bool)
    between = [low ^ high for low, high in pairwise(beyond)]
    return torch.stack([~beyond[0], *between, beyond[-1]])


def fixed_taps(pyramid: Pyramid, boxes: Tensor, image: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """What each cell of the fixed grid is a weighted sum of.

    Returns:
        Rows of `Pyramid.pixels` and their weights, [R * O * O, T] int64 and of the features'
        dtype.
    """
    index, weight = _taps(sample_grid(pyramid, boxes, image, cells), cells)
    return index, weight.to(pyramid.pixels.dtype)


class SampleGrid(NamedTuple):
    """Where the samples of the fixed grid lie, in cells of each RoI's level, axes (y, x).

    Sample s along an axis is at first + (s + 0.5) / GRID * step.
    """

    start: Tensor
    """[R] int64: the first row of the RoI's level and image in `Pyramid.pixels`."""
    size: Tensor
    """[R, 2] int64: the level's height and width."""
    first: Tensor
    """[R, 2] float32: the RoI's first edges."""
    step: Tensor
    """[R, 2] float32: the sides of its output cells."""


def sample_grid(pyramid: Pyramid, boxes: Tensor, image: Tensor, cells: int) -> SampleGrid:
    """Each RoI's level, and its edges on it, shifted by half a cell (aligned).

    Args:
        pyramid: from `flatten_pyramid`.
        boxes: [R, 4] float32 xyxy in pixels of the canvas.
        image: [R] int64.
        cells: O.
    """
    level = Level(image, _beyond(boxes, len(pyramid.levels)))
    sizes = [(f.shape[2], f.shape[3]) for f in pyramid.levels]
    per_image = sum(h * w for h, w in sizes)
    offsets = [sum(h * w for h, w in sizes[:i]) for i in range(len(sizes))]
    size = [by_level(level, [side[axis] for side in sizes]) for axis in (0, 1)]
    scaled = boxes / by_level(level, list(pyramid.strides)).to(boxes.dtype)[:, None] - 0.5
    first, last = scaled[:, :2].flip(1), scaled[:, 2:].flip(1)
    return SampleGrid(
        by_level(level, offsets) + image * per_image,
        torch.stack(size, dim=1),
        first,
        (last - first) / cells,
    )


def _as_maps(rows: Tensor, boxes: Tensor, cells: int) -> Tensor:
    return rows.reshape(boxes.shape[0], cells, cells, rows.shape[-1]).permute(0, 3, 1, 2)


def _taps(grid: SampleGrid, cells: int) -> tuple[Tensor, Tensor]:
    """Rows of `Pyramid.pixels` and their weights: [R * O * O, T] int64 and float32."""
    (y, x), (y_weight, x_weight) = zip(
        *(
            _axis_taps(grid.first[:, axis], grid.step[:, axis], grid.size[:, axis], cells)
            for axis in (0, 1)
        ),
        strict=True,
    )
    width = grid.size[:, 1]
    # [R, O, 1, t, 1] against [R, 1, O, 1, t], t taps per axis.
    index = y[:, :, None, :, None] * width[:, None, None, None, None] + x[:, None, :, None, :]
    index = index + grid.start[:, None, None, None, None]
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    taps = (2 * GRID) ** 2
    return index.reshape(-1, taps), weight.reshape(-1, taps)


def _axis_taps(first: Tensor, step: Tensor, size: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Positions and weights along one axis, two neighbours for each sample.

    A sample more than a cell outside the map counts as 0; within that margin it reads
    the border.

    Args:
        first: [R] of a `SampleGrid`.
        step: [R] likewise.
        size: [R] cells of the level along this axis.
        cells: O.

    Returns:
        [R, O, 2 * GRID] int64 and float32.
    """
    samples = cells * GRID
    number = (torch.arange(samples, device=first.device, dtype=first.dtype) + 0.5) / GRID
    at = first[:, None] + number * step[:, None]
    last = (size - 1)[:, None].to(at.dtype)
    counts = (at >= -1) & (at <= last + 1)
    at = torch.minimum(at.clamp(min=0), last)
    floor = at.floor()
    fraction = at - floor
    position = torch.stack([floor, torch.minimum(floor + 1, last)], dim=-1).long()
    weight = torch.stack([1 - fraction, fraction], dim=-1) * counts[..., None] / GRID
    shape = (first.shape[0], cells, 2 * GRID)
    return position.reshape(shape), weight.reshape(shape)


# The RoIs of one level are as many as the data has it: that stays inside the operator.
# It reads how many there are, so no graph of a device's may hold it.
@torch.library.custom_op(
    "casc::roi_align_adaptive", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _native(
    levels: list[Tensor],
    rois: Tensor,
    here: Tensor,
    scales: list[float],
    cells: int,
    grid: int,
) -> Tensor:
    """RoIs [R, 5], or each level's [L, R, 5] where they aren't selected; `here` [L, R] bool."""
    kernels = roi_kernels(rois.device)
    result = levels[0].new_empty((here.shape[1], levels[0].shape[1], cells, cells))
    for i, (features, scale) in enumerate(zip(levels, scales, strict=True)):
        rows, own = _of_level(rois, here, i)
        aligned = kernels.forward(features.float().contiguous(), own, scale, cells, grid)
        aligned = aligned.to(result.dtype)
        if rows is None:
            # Each RoI is of one level, so whatever the first gives to others is replaced.
            result = torch.where(here[i, :, None, None, None], aligned, result) if i else aligned
        else:
            result[rows] = aligned
    return result


def _of_level(rois: Tensor, here: Tensor, level: int) -> tuple[Tensor | None, Tensor]:
    """The RoIs of a level and which they are; None for all, where no number may be read."""
    if rois.dim() == 3:
        return None, rois[level]
    rows = here[level].nonzero()[:, 0]
    return rows, rois[rows]


@_native.register_fake
def _(levels, rois, here, scales, cells, grid):
    return levels[0].new_empty((here.shape[1], levels[0].shape[1], cells, cells))


# It reads how many there are, so no graph of a device's may hold it.
@torch.library.custom_op(
    "casc::roi_align_adaptive_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _native_backward(
    grad: Tensor,
    rois: Tensor,
    here: Tensor,
    scales: list[float],
    shape: list[int],
    cells: int,
    grid: int,
) -> list[Tensor]:
    kernels = roi_kernels(rois.device)
    grads = []
    for i, scale in enumerate(scales):
        rows, own = _of_level(rois, here, i)
        part = grad * here[i, :, None, None, None] if rows is None else grad[rows]
        features = [*shape[:2], *shape[2 + 2 * i : 4 + 2 * i]]
        made = kernels.backward(part.float().contiguous(), own, features, scale, cells, grid)
        grads.append(made.to(grad.dtype))
    return grads


@_native_backward.register_fake
def _(grad, rois, here, scales, shape, cells, grid):
    batch, channels, *sides = shape
    return [
        grad.new_empty((batch, channels, sides[2 * i], sides[2 * i + 1]))
        for i in range(len(scales))
    ]


def _native_setup(ctx, inputs, output) -> None:
    levels, rois, here, scales, cells, grid = inputs
    ctx.save_for_backward(rois, here)
    sides = [int(side) for features in levels for side in features.shape[2:]]
    ctx.shape = [*levels[0].shape[:2], *sides]
    ctx.scales, ctx.cells, ctx.grid = scales, cells, grid


def _native_grad(ctx, grad: Tensor):
    rois, here = ctx.saved_tensors
    grads = _native_backward(grad, rois, here, ctx.scales, ctx.shape, ctx.cells, ctx.grid)
    return grads, None, None, None, None, None


_native.register_autograd(_native_grad, setup_context=_native_setup)
