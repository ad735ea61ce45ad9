"""Pictures of instances: boxes, masks, names and scores on photographs.

Legend: n instances, h x w the image given, H x W the picture drawn.
Sizes of lines and letters follow the picture's size, so that a picture fitted to a
screen or a page looks alike whatever its resolution.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

Colour = tuple[int, int, int]

# Okabe and Ito's colours, told apart by most colour-blind people; black is left out because
# it is no help on photographs.
_HUES: tuple[Colour, ...] = (
    (230, 80, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 190),
    (230, 159, 0),
)
_WHITE, _BLACK, _PAPER = (255, 255, 255), (0, 0, 0), (40, 40, 40)
_RIM_OPACITY = 0.55
_SMALL = 400  # an image whose long side is less is enlarged
_COMFORTABLE = 640  # to about this
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
) -> np.ndarray:
    """Draw instances on an image, legible whatever the image's size.

    Small images are enlarged, and images too thin for a name are extended to the right or
    below by a dark margin; the image stays in the top left corner.

    Args:
        image: `[h, w, 3]` uint8 RGB.
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

    Returns:
        `[H, W, 3]` uint8 RGB.

    Raises:
        ValueError: when shapes or lengths disagree or a box isn't finite.
    """
    image, boxes = np.asarray(image), np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    _check(image, boxes, names, labels, masks, polygons, scores, crowds)

    picture = _resize(image, long_side)
    scale = np.array([picture.shape[1] / image.shape[1], picture.shape[0] / image.shape[0]])
    canvas = _extend(picture)
    pen = _pen(canvas)
    colours = [class_colour(names[i] if labels is None else int(labels[i])) for i in range(count)]
    is_crowd = [crowds is not None and bool(crowds[i]) for i in range(count)]
    limit = np.array([picture.shape[1], picture.shape[0]] * 2)
    drawn = (boxes * np.tile(scale, 2)).clip(0, limit)

    # The largest first, so that nothing is buried.
    area = (drawn[:, 2] - drawn[:, 0]) * (drawn[:, 3] - drawn[:, 1])
    order: list[int] = np.argsort(-area, kind="stable").tolist()
    for i in order:
        mask, corner = _region(masks, polygons, i, image.shape[:2], picture.shape[:2], scale)
        _fill(canvas, mask, corner, colours[i], pen, striped=is_crowd[i])

    frames = [_frame(box) for box in drawn.tolist()]
    for i in order:
        _outline(canvas, frames[i], colours[i], pen, dashed=is_crowd[i])

    page = Image.fromarray(canvas)
    brush = ImageDraw.Draw(page)
    taken: list[_Rect] = []
    doubt = np.zeros(count) if scores is None else -np.asarray(scores)
    ranks: list[int] = np.argsort(doubt, kind="stable").tolist()
    for i in ranks:
        name = names[i] + (" (crowd)" if is_crowd[i] else "")
        tail = "" if scores is None else f" {100 * float(scores[i]):.0f}%"
        tag = _tag(name, tail, frames[i], pen, page.size)
        tag = tag._replace(place=_place(tag.place, frames[i], page.size, taken, frames))
        _write(brush, tag, colours[i])
        taken.append(tag.place)
    return np.asarray(page)


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: int | None = None,
    *,
    cell: int = 480,
    captions: Sequence[str] | None = None,
    gap: int = 12,
) -> np.ndarray:
    """Lay pictures out in rows and columns on a dark page.

    Args:
        images: pictures `[h, w, 3]` uint8 RGB of any size; those larger than a cell are
            reduced to it. Draw with `long_side=cell` to keep the letters readable.
        columns: how many side by side; by default about as many as rows.
        cell: the longest side of a picture on the page, in pixels.
        captions: a line below each picture.
        gap: pixels between pictures.

    Returns:
        `[H, W, 3]` uint8 RGB.

    Raises:
        ValueError: when there is no picture, `columns`, `cell` or `gap` is out of range, or
            the captions' number isn't the pictures'.
    """
    if not images:
        raise ValueError("contact_sheet: images is empty; give at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"contact_sheet: {len(captions)} captions for {len(images)} images")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or cell < 1 or gap < 0:
        raise ValueError("contact_sheet: columns and cell must be at least 1, gap at least 0")
    columns = min(columns, len(images))
    pictures = [_resize(p, cell) if max(p.shape[:2]) > cell else p for p in images]

    font = _font(max(12, round(cell / 32)))
    line = 0 if captions is None else math.ceil(1.6 * font.size)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(p.shape[1] for p in pictures)
    heights = [max(p.shape[0] for p in row) for row in rows]
    page = Image.new(
        "RGB",
        (columns * (width + gap) + gap, sum(h + line + gap for h in heights) + gap),
        _PAPER,
    )
    brush = ImageDraw.Draw(page)
    top = gap
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            left = gap + c * (width + gap)
            page.paste(Image.fromarray(picture), (left, top))
            if captions is not None:
                text = _shorten(captions[r * columns + c], "", font, width)
                place = (left, top + picture.shape[0] + line // 2)
                brush.text(place, text, font=font, fill=_WHITE, anchor="lm")
        top += heights[r] + line + gap
    return np.asarray(page)


def class_colour(label: int | str) -> Colour:
    """Give the RGB colour of a class, the same in every picture.

    Neighbouring class numbers get different hues; 21 colours repeat after that, which is
    about what an eye can tell apart, and the name is always written out beside.
    """
    number = zlib.crc32(label.encode()) if isinstance(label, str) else label
    hue = _HUES[number % len(_HUES)]
    tone = number // len(_HUES) % 3
    if tone == 0:
        return hue
    towards, share = (255, 0.5) if tone == 1 else (0, 0.35)
    red, green, blue = (round(c + (towards - c) * share) for c in hue)
    return red, green, blue


class _Pen(NamedTuple):
    line: int
    outline: int
    rim: int
    font: ImageFont.FreeTypeFont
    small_font: ImageFont.FreeTypeFont


class _Rect(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: "_Rect") -> int:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


class _Tag(NamedTuple):
    text: str
    font: ImageFont.FreeTypeFont
    pad: int
    place: _Rect


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


def _resize(image: np.ndarray, long_side: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    longest = max(height, width)
    if long_side is None:
        if longest >= _SMALL:
            return image
        # A whole factor keeps the pixels' grid, which matters when looking at small things.
        factor = max(1, round(_COMFORTABLE / longest))
        return np.asarray(
            Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BOX)
        )
    if long_side < 1:
        raise ValueError(f"draw_instances: long_side must be at least 1, not {long_side}")
    scale = long_side / longest
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _extend(picture: np.ndarray) -> np.ndarray:
    """A writable copy of at least `_THINNEST` on each side."""
    height, width = picture.shape[:2]
    canvas = np.empty((max(height, _THINNEST), max(width, _THINNEST), 3), np.uint8)
    canvas[:] = _PAPER
    canvas[:height, :width] = picture
    return canvas


def _pen(canvas: np.ndarray) -> _Pen:
    size = math.sqrt(canvas.shape[0] * canvas.shape[1])
    line = max(2, round(size / 280))
    font = _font(max(12, round(size / 42)))
    return _Pen(
        line=line,
        outline=max(1, line // 2),
        rim=max(1, line // 3),
        font=font,
        small_font=_font(max(11, round(size / 52))),
    )


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _region(
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


def _span(flags: np.ndarray) -> slice:
    found = np.flatnonzero(flags)
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def _fill(
    canvas: np.ndarray,
    mask: np.ndarray,
    corner: tuple[int, int],
    colour: Colour,
    pen: _Pen,
    *,
    striped: bool,
) -> None:
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


def _frame(box: Sequence[float]) -> _Rect:
    """Whole pixels of a box; one that is thinner than a pixel still has to be seen."""
    left, top, right, bottom = (round(v) for v in box)
    return _Rect(left, top, max(right, left + 1), max(bottom, top + 1))


def _outline(canvas: np.ndarray, frame: _Rect, colour: Colour, pen: _Pen, *, dashed: bool) -> None:
    # The dark rim keeps a box visible on a background of its own colour.
    for strip in _strips(canvas, frame, -pen.rim, pen.rim):
        strip[:] = (strip * (1 - _RIM_OPACITY)).astype(np.uint8)
    for strip in _strips(canvas, frame, 0, pen.line):
        strip[:] = colour
        if dashed:
            dash = 4 * pen.line
            run = np.arange(max(strip.shape[:2])) % (2 * dash) >= dash
            (strip if strip.shape[0] >= strip.shape[1] else strip.swapaxes(0, 1))[run] = _BLACK


def _strips(canvas: np.ndarray, frame: _Rect, inset: int, width: int) -> list[np.ndarray]:
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


def _tag(name: str, tail: str, frame: _Rect, pen: _Pen, page: tuple[int, int]) -> _Tag:
    """The name set in type, its size measured; its place is yet to be found."""
    font = pen.font if frame.area > (8 * pen.font.size) ** 2 else pen.small_font
    pad = max(2, round(font.size / 6))
    text = _shorten(name, tail, font, page[0] - 2 * pad)
    ascent, descent = font.getmetrics()
    width = math.ceil(font.getlength(text)) + 2 * pad
    return _Tag(text, font, pad, _Rect(0, 0, width, ascent + descent + pad // 2))


def _place(
    tag: _Rect,
    frame: _Rect,
    page: tuple[int, int],
    taken: Sequence[_Rect],
    frames: Sequence[_Rect],
) -> _Rect:
    """Where a name hides the least of other names and of small instances."""
    width, height = tag.right, tag.bottom
    left, top, right, bottom = frame
    spots = [
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        (left, bottom - height),
        (right, top),
        (left - width, top),
    ]
    small = [f for f in frames if f.area < 4 * tag.area]

    def hidden(place: _Rect) -> float:
        names = sum(place.overlap(other) for other in taken)
        return 3 * names + sum(place.overlap(other) for other in small)

    # min keeps the first of equals: above the box, then just inside it.
    return min((_clamp(x, y, width, height, page) for x, y in spots), key=hidden)


def _write(brush: ImageDraw.ImageDraw, tag: _Tag, colour: Colour) -> None:
    left, top, right, bottom = tag.place
    brush.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    # Where black and white are equally far, by WCAG's measure of contrast: 4.5 to 1 at least.
    ink = _BLACK if _luminance(colour) > 0.179 else _WHITE
    middle = (left + tag.pad, (top + bottom) // 2)
    brush.text(middle, tag.text, font=tag.font, fill=ink, anchor="lm")


def _clamp(x: int, y: int, width: int, height: int, page: tuple[int, int]) -> _Rect:
    x, y = max(0, min(x, page[0] - width)), max(0, min(y, page[1] - height))
    return _Rect(x, y, min(x + width, page[0]), min(y + height, page[1]))


def _shorten(text: str, tail: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text and its tail on one line; where they don't fit, the text loses its end."""
    text = " ".join(text.split())
    if font.getlength(text + tail) <= width:
        return text + tail
    while text and font.getlength(text + "..." + tail) > width:
        text = text[:-1]
    return text + "..." + tail


def _luminance(colour: Colour) -> float:
    """WCAG's relative luminance, 0 black to 1 white."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
