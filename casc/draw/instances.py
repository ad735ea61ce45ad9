"""Instances on an image: masks, then boxes, then names.

Legend: n instances, h x w the image given, H x W the picture drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from casc.draw.regions import draw_frame, fill_region, frame_of, region_of
from casc.draw.style import PAPER, Rect, class_colour, pen_for, resize
from casc.draw.tags import place_tag, tag_of, write_tag

_THINNEST = 96  # pixels that a picture has at least on either side, so that a name fits


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    masks: np.ndarray | Sequence[np.ndarray | Mapping[str, Any] | None] | None = None,
    polygons: Sequence[Sequence[Sequence[float]]] | None = None,
    scores: Sequence[float] | np.ndarray | None = None,
    crowds: Sequence[bool] | np.ndarray | None = None,
    long_side: int | None = None,
    seen_at: int | None = None,
) -> np.ndarray:
    """Draw instances on an image, legible whatever the image's size.

    Small images are enlarged, and images too thin for a name are extended to the right or
    below by a dark margin; the image stays in the top left corner.

    Args:
        image: `[h, w, c]` uint8: RGB, grey, or planes, of which the first three are shown.
        boxes: `[n, 4]` xyxy in pixels of the image; what lies outside is clipped.
        names: n names, one an instance, often of its class.
        labels: n class numbers, which choose the colours; by default the names do.
        masks: `[n, h, w]` bool, or n of them as arrays or COCO RLE dicts (decoded one at a
            time) or None.
        polygons: n lists of parts `[x0, y0, x1, y1, ...]`, drawn where there is no mask.
        scores: n scores in [0, 1], shown as percentages.
        crowds: n flags; a crowd gets a striped mask, a dashed box and the word "crowd".
        long_side: the picture's longest side in pixels; the image is resized to it before
            anything is drawn. By default only small images are resized.
        seen_at: how long that side will be on the screen, if it is going to be reduced: lines
            and letters are drawn so that they can still be read there.

    Returns:
        `[H, W, 3]` uint8 RGB.

    Raises:
        ValueError: when shapes or lengths disagree or a box isn't finite.
    """
    image, boxes = visible(np.asarray(image)), np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    _check(image, boxes, names, labels, masks, polygons, scores, crowds)

    picture = resize(image, long_side)
    scale = np.array([picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]])
    canvas = _extend(picture)
    pen = pen_for(canvas, seen_at)
    colours = [class_colour(names[i] if labels is None else int(labels[i])) for i in range(count)]
    is_crowd = [crowds is not None and bool(crowds[i]) for i in range(count)]
    limit = np.array([picture.shape[1], picture.shape[0]] * 2)
    drawn = (boxes * np.tile(scale, 2)).clip(0, limit)

    # The largest first, so that nothing is buried.
    area = (drawn[:, 2] - drawn[:, 0]) * (drawn[:, 3] - drawn[:, 1])
    order: list[int] = np.argsort(-area, kind="stable").tolist()
    for i in order:
        mask, corner = region_of(masks, polygons, i, image.shape[:2], picture.shape[:2], scale)
        fill_region(canvas, mask, corner, colours[i], pen, striped=is_crowd[i])

    frames = [frame_of(box) for box in drawn.tolist()]
    for i in order:
        draw_frame(canvas, frames[i], colours[i], pen, dashed=is_crowd[i])

    page = Image.fromarray(canvas)
    brush = ImageDraw.Draw(page)
    taken: list[Rect] = []
    doubt = np.zeros(count) if scores is None else -np.asarray(scores)
    ranks: list[int] = np.argsort(doubt, kind="stable").tolist()
    for i in ranks:
        name = names[i] + (" (crowd)" if is_crowd[i] else "")
        tail = "" if scores is None else f" {100 * float(scores[i]):.0f}%"
        tag = tag_of(name, tail, frames[i], pen, page.size)
        tag = tag._replace(place=place_tag(tag.place, frames[i], page.size, taken, frames))
        write_tag(brush, tag, colours[i])
        taken.append(tag.place)
    return np.asarray(page)


def visible(image: np.ndarray) -> np.ndarray:
    """An image `[h, w, c]` as RGB: one channel or two as grey, of more the first three."""
    if image.ndim != 3 or image.shape[2] == 3:
        return image
    return image[..., [0, 0, 0]] if image.shape[2] < 3 else image[..., :3]


def _check(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    labels: Sequence[int] | np.ndarray | None,
    masks: Sequence[Any] | np.ndarray | None,
    polygons: Sequence[Any] | None,
    scores: Sequence[float] | np.ndarray | None,
    crowds: Sequence[bool] | np.ndarray | None,
) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"draw_instances: image must be [h, w, 3] uint8, not {image.shape} {image.dtype}"
        )
    per_instance = {
        "names": names,
        "labels": labels,
        "masks": masks,
        "polygons": polygons,
        "scores": scores,
        "crowds": crowds,
    }
    for field, values in per_instance.items():
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"draw_instances: {len(values)} {field} for {len(boxes)} boxes")
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(bad):
        raise ValueError(f"draw_instances: box {bad[0]} is not finite: {boxes[bad[0]].tolist()}")


def _extend(picture: np.ndarray) -> np.ndarray:
    """A writable copy of at least `_THINNEST` on each side."""
    height, width = picture.shape[:2]
    canvas = np.empty((max(height, _THINNEST), max(width, _THINNEST), 3), np.uint8)
    canvas[:] = PAPER
    canvas[:height, :width] = picture
    return canvas
