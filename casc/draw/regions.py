"""Masks and boxes on a canvas, in place.

Legend: h x w the image given, H x W the picture drawn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from casc.draw.style import BLACK, Colour, Pen, Rect

_RIM_OPACITY = 0.55


def region_of(
    masks: Sequence[np.ndarray | Mapping[str, Any] | None] | np.ndarray | None,
    polygons: Sequence[Sequence[Sequence[float]]] | None,
    i: int,
    size: tuple[int, int],
    picture: tuple[int, int],
    scale: np.ndarray,
) -> tuple[np.ndarray, tuple[int, int]]:
    """The instance's mask in the picture's pixels: its smallest window, and the window's y, x."""
    given = None if masks is None else masks[i]
    if given is not None:
        array: Any = coco_mask.decode(given) if isinstance(given, Mapping) else given  # type: ignore[arg-type]
        mask: np.ndarray = np.asarray(array).astype(bool)
        if mask.shape != size:
            raise ValueError(f"draw_instances: mask {i} is {mask.shape}, the image {size}")
        y = ((np.arange(picture[0]) + 0.5) / scale[1]).astype(int)
        x = ((np.arange(picture[1]) + 0.5) / scale[0]).astype(int)
        rows, columns = _span(mask.max(axis=1)[y]), _span(mask.max(axis=0)[x])
        return mask[y[rows]][:, x[columns]], (rows.start, columns.start)
    parts = [] if polygons is None else [p for p in polygons[i] if len(p) >= 6]
    if not parts:
        return np.zeros((0, 0), bool), (0, 0)
    # COCO counts from a pixel's corner, Pillow from its centre.
    points = [np.asarray(p, float).reshape(-1, 2) * scale - 0.5 for p in parts]
    every = np.concatenate(points)
    low = np.floor(every.min(axis=0)).clip(0).astype(int)
    high = np.ceil(every.max(axis=0) + 1).clip(0, picture[::-1]).astype(int)
    if (high <= low).any():
        return np.zeros((0, 0), bool), (0, 0)
    sheet = Image.new("1", (int(high[0] - low[0]), int(high[1] - low[1])))
    for part in points:
        ImageDraw.Draw(sheet).polygon([(x, y) for x, y in (part - low).tolist()], fill=1)
    return np.asarray(sheet), (int(low[1]), int(low[0]))


def fill_region(
    canvas: np.ndarray,
    mask: np.ndarray,
    corner: tuple[int, int],
    colour: Colour,
    pen: Pen,
    *,
    striped: bool,
) -> None:
    """Dye a mask that lies at `corner` (y, x) of the canvas, and draw its outline."""
    if not mask.size:
        return
    y, x = corner
    window = canvas[y : y + mask.shape[0], x : x + mask.shape[1]]
    fill = mask
    if striped:
        period = 8 * pen.line
        diagonal = np.add.outer(np.arange(mask.shape[0]) + y, np.arange(mask.shape[1]) + x)
        fill = mask & (diagonal % period < period // 2)
    # A mask that fills the picture would dye all that is on it.
    share = mask.sum() / (canvas.shape[0] * canvas.shape[1])
    opacity = 0.45 - 0.2 * math.sqrt(share)
    window[fill] = (window[fill] * (1 - opacity) + np.array(colour) * opacity + 0.5).astype(
        np.uint8
    )
    edge = mask & ~_erode(mask, pen.outline)
    window[edge] = colour


def frame_of(box: Sequence[float]) -> Rect:
    """Whole pixels of a box; one that is thinner than a pixel still has to be seen."""
    left, top, right, bottom = (round(v) for v in box)
    return Rect(left, top, max(right, left + 1), max(bottom, top + 1))


def draw_frame(canvas: np.ndarray, frame: Rect, colour: Colour, pen: Pen, *, dashed: bool) -> None:
    """Draw a box, with a dark rim on its inside."""
    # The dark rim keeps a box visible on a background of its own colour.
    for strip in _strips(canvas, frame, -pen.rim, pen.rim):
        strip[:] = (strip * (1 - _RIM_OPACITY)).astype(np.uint8)
    for strip in _strips(canvas, frame, 0, pen.line):
        strip[:] = colour
        if dashed:
            dash = 4 * pen.line
            run = np.arange(max(strip.shape[:2])) % (2 * dash) >= dash
            (strip if strip.shape[0] >= strip.shape[1] else strip.swapaxes(0, 1))[run] = BLACK


def _span(flags: np.ndarray) -> slice:
    found = np.flatnonzero(flags)
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Where the square of `2 * radius + 1` pixels around a pixel is all mask."""
    out, span = np.pad(mask, radius), 2 * radius + 1
    for _ in range(2):
        width = 1
        while width < span:  # the span doubles, so that wide pens stay cheap
            step = min(width, span - width)
            out = out[:-step] & out[step:]
            width += step
        out = out.T
    return out


def _strips(canvas: np.ndarray, frame: Rect, inset: int, width: int) -> list[np.ndarray]:
    """Views of a frame's four sides, `width` pixels wide, `inset` pixels inside the frame."""
    left, top = frame.left + inset, frame.top + inset
    right, bottom = frame.right - inset, frame.bottom - inset
    # Opposite sides must not overlap, or a rim would be darkened twice.
    across = min(width, max(1, (right - left) // 2))
    down = min(width, max(1, (bottom - top) // 2))
    spans = [
        (top, top + down, left, right),
        (bottom - down, bottom, left, right),
        (top + down, bottom - down, left, left + across),
        (top + down, bottom - down, right - across, right),
    ]
    return [
        canvas[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        for y0, y1, x0, x1 in spans
        if min(y1, x1) > 0
    ]
