"""Instance masks at the image's size, from the 28 x 28 probabilities that the mask heads give.

Legend: N instances, M x M a mask inside its box (28 x 28), h x w the image, C columns of
pixels that masks may touch, of all instances one after the other.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

Rle = dict[str, Any]
"""COCO's compressed run lengths: `size` [h, w] and `counts`, ASCII text that JSON can hold."""

_DOUBT = 1e-5
"""Probabilities so near the threshold are interpolated again, in the reference's own way. Two
single-precision interpolations differ by less: positions are rounded to 2e-6 of a cell per axis,
over which a probability changes by as much at most, sums to 1e-6."""
_NARROW = 1e-2
"""Pixels. Boxes with a shorter side aren't worth a bound on rounding."""


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> Tensor:
    """Paste masks into whole images, as the reference does.

    Bilinear interpolation of the probabilities at the image's pixel centres, zero outside
    the box, `>= threshold` (MMDetection 2.13 `_do_paste_mask`).

    Args:
        masks: `[N, M, M]` float, probabilities inside the box.
        boxes: `[N, 4]` float xyxy in pixels of the image; they may leave the image.
        height: the image's, in pixels.
        width: the image's, in pixels.
        threshold: in (0, 1].

    Returns:
        `[N, height, width]` bool on the masks' device.

    Raises:
        ValueError: when the threshold is out of range, shapes disagree or a box isn't finite.
    """
    _check(masks, boxes, height, width, threshold)
    out = masks.new_zeros((len(masks), height, width), dtype=torch.bool)
    masks, boxes = masks.float(), boxes.float()
    corners = boxes.tolist()
    for i in range(len(masks)):
        top, bottom = _reach(corners[i][1], corners[i][3], masks.shape[-1], height, threshold)
        left, right = _reach(corners[i][0], corners[i][2], masks.shape[-1], width, threshold)
        if left < right and top < bottom:
            x = torch.arange(left, right, device=masks.device)
            y = torch.arange(top, bottom, device=masks.device)
            values = _sample(masks[i][None], boxes[i][None], x[None], y[None])
            out[i, top:bottom, left:right] = values[0] >= threshold
    return out


def encode_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[Rle]:
    """Give COCO's run lengths of `paste_masks` without making a mask of pixels.

    Along a column of pixels the interpolated probability is a chain of M + 1 straight
    lines, so a run can begin or end only where one of them crosses the threshold: the work
    grows with a box's width and not with its area. Arguments and errors are those of
    `paste_masks`; tensors on the CPU.
    """
    counts = encode_counts(masks, boxes, height, width, threshold)
    return [{"size": [height, width], "counts": text.decode("ascii")} for text in counts]


def encode_counts(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[bytes]:
    """Give the `counts` of `encode_masks` alone, as pycocotools has them."""
    _check(masks, boxes, height, width, threshold)
    masks, boxes = masks.float(), boxes.float()
    columns = _columns(masks, boxes, width, threshold)
    column, row = _edges(columns, masks, boxes, height, threshold)
    places = columns.x[column] * height + row
    runs = _runs(columns.instance[column], places, len(masks), height * width)
    plain: Any = [{"size": (height, width), "counts": lengths} for lengths in runs]
    return [rle["counts"] for rle in coco_mask.frPyObjects(plain, height, width)] if plain else []


def _check(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> None:
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(
            f"masks must be [N, M, M] and boxes [N, 4], not {list(masks.shape)} and "
            f"{list(boxes.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the image's size must be positive, not {height} x {width}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], not {threshold}")
    if not boxes.isfinite().all():
        raise ValueError("boxes must be finite")


def _reach(low: Any, high: Any, cells: int, limit: int, threshold: float) -> tuple[Any, Any]:
    """First pixel that a mask can reach, and the one after the last; of scalars or arrays."""
    # Interpolation reaches half a cell beyond the box, where at most half of a probability
    # is left: at a threshold of 0.5 and above, a pixel of margin is enough.
    margin = 1 if threshold >= 0.5 else 0.5 / cells * (high - low) + 1
    first = np.clip(np.floor(low - margin), 0, limit).astype(np.int64)
    last = np.clip(np.ceil(high + margin), 0, limit).astype(np.int64)
    return first, last


def _sample(masks: Tensor, boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate as the reference does, to the last bit.

    Args:
        masks: `[N, M, M]`.
        boxes: `[N, 4]`.
        x: `[N, X]` columns of the image.
        y: `[N, Y]` rows of the image.

    Returns:
        `[N, Y, X]` float32.
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    # The order of operations is the reference's.
    x = (x.float() + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (y.float() + 0.5 - y0) / (y1 - y0) * 2 - 1
    # An empty box divides by zero; the reference takes the middle of the mask there.
    x = x.where(~x.isinf(), 0)
    y = y.where(~y.isinf(), 0)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


class _Columns(NamedTuple):
    """Columns of pixels, interpolated across; instance by instance, from left to right."""

    instance: np.ndarray
    """`[C]` int64."""
    x: np.ndarray
    """`[C]` int64, place in the image."""
    values: np.ndarray
    """`[C, M + 2]` float32: the probability at the rows of the mask, with zeros around."""


def _columns(masks: Tensor, boxes: Tensor, width: int, threshold: float) -> _Columns:
    count, size = masks.shape[:2]
    x0, _, x1, _ = boxes.numpy().T
    first, last = _reach(x0, x1, size, width, threshold)
    lengths = np.maximum(last - first, 0)
    instance = np.repeat(np.arange(count), lengths)
    x = np.arange(len(instance)) + np.repeat(first - np.cumsum(lengths) + lengths, lengths)
    place = _cells(x, x0[instance], x1[instance], size)
    left = np.minimum(np.floor(place), size - 1)
    across = F.pad(masks.transpose(1, 2), (1, 1, 1, 1)).view(-1, size + 2).numpy()
    at = instance * (size + 2) + left.astype(np.int64) + 1
    values = across.take(at, axis=0)
    slopes = across.take(at + 1, axis=0)
    slopes -= values
    slopes *= (place - left)[:, None]
    values += slopes
    return _Columns(instance, x, values)


def _cells(pixel: np.ndarray, low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
    """Place of pixels' centres in a mask: 0 is its first cell's centre, -1 and M are outside."""
    with np.errstate(all="ignore"):  # boxes without a width, which are done again
        place = (pixel.astype(np.float32) + np.float32(0.5) - low) / (high - low)
        place = (place * 2 - 1 + 1) * np.float32(size / 2) - np.float32(0.5)
        return np.nan_to_num(place).clip(-1, size)


def _edges(
    columns: _Columns, masks: Tensor, boxes: Tensor, height: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where masks begin or end along their columns: `[E]` columns, and rows just after.

    In order. What the image cuts off begins at row 0 or ends at row `height`.
    """
    level = np.float32(threshold)
    column, row, certain = _crossings(columns, masks.shape[-1], boxes, height, level)
    doubtful = _doubtful(columns, masks, boxes, level)
    doubtful[column[~certain]] = True
    if not doubtful.any():
        return column, row
    kept = ~doubtful[column]
    again, row_again = _edges_again(columns, doubtful.nonzero()[0], masks, boxes, height, threshold)
    column, row = np.append(column[kept], again), np.append(row[kept], row_again)
    order = np.argsort(column * (height + 1) + row, kind="stable")
    return column[order], row[order]


def _crossings(
    columns: _Columns, size: int, boxes: Tensor, height: int, level: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines between the mask's rows cross the threshold.

    Returns:
        `[E]` columns, rows just after the crossing, and whether rounding can't have moved it
        to another row.
    """
    inside = columns.values >= level
    column, segment = np.divmod(np.flatnonzero(inside[:, 1:] != inside[:, :-1]), size + 1)
    # A segment is the line between two cells' centres; the first begins outside, at -1.
    nodes = columns.values.reshape(-1)
    node = column * (size + 2) + segment
    start = nodes[node]
    slope = nodes[node + 1] - start
    instance = columns.instance[column]
    _, y0, _, y1 = (edge[instance] for edge in boxes.numpy().T)
    crossing = segment - 0.5 + (level - start) / slope.astype(np.float64)
    row = np.ceil(y0 + crossing / size * (y1 - y0) - 0.5).clip(-1, height + 1).astype(np.int64)

    def over(row: np.ndarray) -> np.ndarray:
        """How far the line is past the threshold at a row."""
        value = start + slope * (_cells(row, y0, y1, size) - (segment - 1))
        return (value - level) * np.sign(slope)

    certain = (over(row) >= _DOUBT) & (over(row - 1) <= -_DOUBT)
    return column, row.clip(0, height), certain


def _doubtful(columns: _Columns, masks: Tensor, boxes: Tensor, level: np.float32) -> np.ndarray:
    """`[C]` bool, columns in which rounding may decide on which side of the threshold a pixel is.

    Crossings are looked at elsewhere; here it is lines that run along the threshold, and
    masks and boxes for which the bound on rounding doesn't hold.
    """
    near = np.flatnonzero(np.abs(columns.values - level) < _DOUBT)
    flat = masks.flatten(1).numpy()
    sound = (flat.min(axis=1, initial=0) >= 0) & (flat.max(axis=1, initial=1) <= 1)
    sound &= (boxes[:, 2:] - boxes[:, :2] >= _NARROW).all(dim=1).numpy()
    doubtful = ~sound[columns.instance]
    doubtful[near // columns.values.shape[1]] = True
    return doubtful


def _edges_again(
    columns: _Columns,
    which: np.ndarray,
    masks: Tensor,
    boxes: Tensor,
    height: int,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The edges of some columns, pixel by pixel as `paste_masks` has them."""
    instance = torch.from_numpy(columns.instance[which])
    x = torch.from_numpy(columns.x[which])
    rows = torch.arange(height)
    values = _sample(masks[instance], boxes[instance], x[:, None], rows.expand(len(x), -1))
    _, y0, _, y1 = boxes[instance].numpy().T
    top, bottom = _reach(y0[:, None], y1[:, None], masks.shape[-1], height, threshold)
    inside = (values[:, :, 0] >= threshold).numpy()
    inside &= (rows.numpy() >= top) & (rows.numpy() < bottom)
    column, row = np.diff(inside.view(np.int8), prepend=0, append=0).nonzero()
    return which[column], row


def _runs(instance: np.ndarray, place: np.ndarray, count: int, total: int) -> list[list[int]]:
    """Lengths of each instance's alternating runs, zeros first.

    Args:
        instance: `[E]` which an edge belongs to, ascending.
        place: `[E]` pixels before the edge in the image read column by column, ascending
            within an instance.
        count: N.
        total: pixels of the image.
    """
    # Two edges at one place are a run of no pixels, or one that goes on from the foot of a
    # column to the head of the next: of equal edges only an odd one counts.
    first = np.flatnonzero(np.diff(instance * (total + 1) + place, prepend=-1))
    odd = first[np.diff(first, append=len(place)) % 2 == 1]
    instance, place = instance[odd], place[odd]
    bounds = np.searchsorted(instance, np.arange(count + 1))
    lengths = np.insert(place, bounds[1:], total) - np.insert(place, bounds[:-1], 0)
    cuts = (bounds + np.arange(count + 1)).tolist()
    flat = lengths.tolist()
    runs = [flat[begin:end] for begin, end in pairwise(cuts)]
    # A run that reaches the last pixel leaves no zeros behind it.
    return [each[:-1] if each[-1] == 0 else each for each in runs]
