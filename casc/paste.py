"""Instance masks at the image's size, from the 28 x 28 probabilities that the mask heads give.

Legend: N instances, M x M a mask inside its box (28 x 28), h x w the image.
"""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

Rle = dict[str, Any]
"""COCO's compressed run lengths: `size` [h, w] and `counts`, ASCII text that JSON can hold."""


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
        ValueError: when the threshold is out of range or shapes disagree.
    """
    _check(masks, boxes, height, width, threshold)
    out = masks.new_zeros((len(masks), height, width), dtype=torch.bool)
    for i in range(len(masks)):
        top, left, window = _window(masks[i], boxes[i], height, width, threshold)
        out[i, top : top + window.shape[0], left : left + window.shape[1]] = window
    return out


def encode_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> list[Rle]:
    """Give COCO's run lengths of `paste_masks` without ever making a whole image.

    Only the pixels around each box are computed, and their runs are written straight at
    the image's offsets. Arguments and errors are those of `paste_masks`; tensors on the CPU.
    """
    _check(masks, boxes, height, width, threshold)
    encoded = []
    for i in range(len(masks)):
        top, left, window = _window(masks[i], boxes[i], height, width, threshold)
        runs = _runs(window.numpy(), top, left, height, width)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)  # type: ignore[arg-type]
        encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return encoded


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


def _window(
    mask: Tensor, box: Tensor, height: int, width: int, threshold: float
) -> tuple[int, int, Tensor]:
    """Top, left and the pasted pixels of the part of the image that the mask can reach."""
    x0, y0, x1, y1 = box.tolist()
    # Interpolation reaches half a cell beyond the box, where at most half of a probability
    # is left: at a threshold of 0.5 and above, a pixel of margin is enough.
    cells = 0.0 if threshold >= 0.5 else 0.5 / mask.shape[-1]
    left, right = _reach(x0, x1, cells * (x1 - x0) + 1, width)
    top, bottom = _reach(y0, y1, cells * (y1 - y0) + 1, height)
    if left >= right or top >= bottom:
        return 0, 0, torch.zeros((0, 0), dtype=torch.bool, device=mask.device)
    # In the tensors' own precision and the reference's order of operations, to the last bit.
    left_edge, top_edge, right_edge, bottom_edge = box
    x = torch.arange(left, right, device=mask.device, dtype=torch.float32) + 0.5
    y = torch.arange(top, bottom, device=mask.device, dtype=torch.float32) + 0.5
    x = (x - left_edge) / (right_edge - left_edge) * 2 - 1
    y = (y - top_edge) / (bottom_edge - top_edge) * 2 - 1
    # An empty box divides by zero; the reference takes the middle of the mask there.
    x = x.where(~x.isinf(), 0)
    y = y.where(~y.isinf(), 0)
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)
    values = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)
    return top, left, values[0, 0] >= threshold


def _reach(low: float, high: float, margin: float, limit: int) -> tuple[int, int]:
    first = max(int(np.floor(low - margin)), 0)
    last = min(int(np.ceil(high + margin)), limit)
    return first, last


def _runs(window: np.ndarray, top: int, left: int, height: int, width: int) -> list[int]:
    """Lengths of the alternating runs, zeros first, of the image read column by column."""
    total = height * width
    if not window.any():
        return [total]
    columns = np.zeros((window.shape[1], window.shape[0] + 1), np.int8)
    columns[:, :-1] = window.T
    # The spare row ends a run at a column's last pixel.
    steps = np.diff(columns.ravel(), prepend=0)
    places = np.flatnonzero(steps)
    column, row = np.divmod(places, columns.shape[1])
    edges = (column + left) * height + row + top
    if window.shape[0] == height:
        # Only here can a run go on from the foot of one column to the head of the next.
        begins, ends = edges[0::2], edges[1::2]
        joined = ends[:-1] == begins[1:]
        edges = np.sort(
            np.concatenate([begins[np.append(True, ~joined)], ends[np.append(~joined, True)]])
        )
    counts = np.diff(edges, prepend=0, append=total)
    # A run that reaches the last pixel leaves no zeros behind it.
    return counts[: len(counts) - (counts[-1] == 0)].tolist()
