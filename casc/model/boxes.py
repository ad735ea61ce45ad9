"""Box geometry: areas, overlaps, and the delta coding that regression learns.

Boxes are [..., 4] float32 in pixels, (x1, y1, x2, y2), x to the right and y down,
with continuous corners: width is x2 - x1, without the old "+ 1".
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from casc.device.devices import is_accelerator, traits

# Widths and heights may change by at most this factor's logarithm either way in one
# decoding, so that an untrained head can't overflow exp(); mmdet's wh_ratio_clip = 16/1000.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def area(boxes: Tensor) -> Tensor:
    """Areas in square pixels.

    Args:
        boxes: [..., 4] xyxy.

    Returns:
        [...], of the boxes' dtype.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` with every box of `b`.

    The union is clamped at 1e-6, so two empty boxes overlap by 0 and nothing is NaN.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy.

    Returns:
        [..., N, M] float32 in [0, 1].
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    intersection = _both_axes(a, b) if _launches_each(a) else _by_axes(a, b)
    union = area(a) + area(b) - intersection
    return intersection / union.clamp(min=1e-6)


def _launches_each(x: Tensor) -> bool:
    """Whether each operator is likely a launch: on accelerators that want contiguous memory."""
    own = traits(x.device)
    return is_accelerator(x.device) and own.memory_format == torch.contiguous_format


def _by_axes(a: Tensor, b: Tensor) -> Tensor:
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def _both_axes(a: Tensor, b: Tensor) -> Tensor:
    """The same with both axes in one tensor, the axis first: half the operators."""
    dims = max(a.dim(), b.dim())
    (low, high), (other_low, other_high) = (
        x[(None,) * (dims - x.dim())].movedim(-1, 0).unflatten(0, (2, 2)) for x in (a, b)
    )
    sides = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    sides = sides.clamp(min=0)
    return sides[0] * sides[1]


def encode(
    boxes: Tensor, targets: Tensor, stds: tuple[float, float, float, float] | Tensor
) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `boxes` onto `targets`, divided by `stds`.

    Appendix C of "Rich feature hierarchies" (Girshick et al., 2014). Sides are clamped
    at 1e-6 pixels so that padded rows give finite numbers, which the losses then mask.

    Args:
        boxes: [..., 4] xyxy.
        targets: [..., 4] xyxy.
        stds: standard deviations of the four deltas; of each box if [..., 4].

    Returns:
        [..., 4].
    """
    centre, side = _centre_form(boxes)
    goal_centre, goal_side = _centre_form(targets)
    side, goal_side = side.clamp(min=1e-6), goal_side.clamp(min=1e-6)
    shift, growth = (goal_centre - centre) / side, (goal_side / side).log()
    if isinstance(stds, Tensor):
        return torch.cat([shift, growth], dim=-1) / stds
    pairs = ((shift, stds[:2]), (growth, stds[2:]))
    return torch.cat([_by_axis(torch.div, *pair) for pair in pairs], dim=-1)


def decode(
    boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float], size: Tensor | None
) -> Tensor:
    """Move `boxes` by `deltas`; the inverse of `encode`.

    Args:
        boxes: [B, N, 4] xyxy (or [N, 4] to share them over the batch).
        deltas: [B, N, 4], in units of `stds`.
        stds: standard deviations of the four deltas.
        size: [B, 2] image height and width in pixels to clip to, or None not to clip.

    Returns:
        [B, N, 4] xyxy.
    """
    centre, side = _centre_form(boxes)
    shift = _by_axis(torch.mul, deltas[..., :2], stds[:2])
    growth = _by_axis(torch.mul, deltas[..., 2:], stds[2:])
    half = side * growth.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * 0.5
    centre = centre + side * shift
    moved = torch.cat([centre - half, centre + half], dim=-1)
    return moved if size is None else clip(moved, size)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Clip boxes to their images.

    NaN becomes 0: boxes turn into indices later on, and a run that diverges must reach
    its finite check rather than read outside of memory.

    Args:
        boxes: [B, N, 4] xyxy.
        size: [B, 2] height and width in pixels.

    Returns:
        [B, N, 4] with 0 <= x <= width and 0 <= y <= height.
    """
    corners = boxes.nan_to_num().clamp(min=0).unflatten(-1, (2, 2))
    return torch.minimum(corners, size.flip(-1)[:, None, None]).flatten(-2)


def _by_axis(
    function: Callable[[Tensor, float], Tensor], values: Tensor, stds: Sequence[float]
) -> Tensor:
    """A function of [..., 2] and each axis's deviation; both are the same, as a rule."""
    if stds[0] != stds[1]:
        columns = zip(values.unbind(-1), stds, strict=True)
        return torch.stack([function(*column) for column in columns], dim=-1)
    return values if stds[0] == 1 else function(values, stds[0])


def _centre_form(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (x, y), and widths and heights, each [..., 2]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low
