"""Names on a picture: set in type, put where they hide least, written legibly."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

from casc.draw.letters import set_in_type
from casc.draw.style import BLACK, WHITE, Colour, Pen, Rect


class Tag(NamedTuple):
    """A name as it is written, and where."""

    text: str
    font: ImageFont.FreeTypeFont
    pad: int
    place: Rect


def tag_of(name: str, tail: str, frame: Rect, pen: Pen, page: tuple[int, int]) -> Tag:
    """The name set in type, its size measured; its place is yet to be found."""
    size = (pen.font if frame.area > (8 * pen.font.size) ** 2 else pen.small_font).size
    name, font = set_in_type(name, round(size))
    pad = max(2, round(font.size / 6))
    text = shorten(name, tail, font, page[0] - 2 * pad)
    ascent, descent = font.getmetrics()
    width = math.ceil(font.getlength(text)) + 2 * pad
    return Tag(text, font, pad, Rect(0, 0, width, ascent + descent + pad // 2))


def place_tag(
    tag: Rect,
    frame: Rect,
    page: tuple[int, int],
    taken: Sequence[Rect],
    frames: Sequence[Rect],
) -> Rect:
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

    def hidden(place: Rect) -> float:
        names = sum(place.overlap(other) for other in taken)
        return 3 * names + sum(place.overlap(other) for other in small)

    # min keeps the first of equals: above the box, then just inside it.
    return min((_clamp(x, y, width, height, page) for x, y in spots), key=hidden)


def write_tag(brush: ImageDraw.ImageDraw, tag: Tag, colour: Colour) -> None:
    """Write a name in black or white on its class's colour."""
    left, top, right, bottom = tag.place
    brush.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    # Where black and white are equally far, by WCAG's measure of contrast: 4.5 to 1 at least.
    ink = BLACK if _luminance(colour) > 0.179 else WHITE
    middle = (left + tag.pad, (top + bottom) // 2)
    brush.text(middle, tag.text, font=tag.font, fill=ink, anchor="lm")


def shorten(text: str, tail: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text and its tail, on one line; where they don't fit, the text loses its end."""
    if font.getlength(text + tail) <= width:
        return text + tail
    while text and font.getlength(text + "..." + tail) > width:
        text = text[:-1]
    return text + "..." + tail


def _clamp(x: int, y: int, width: int, height: int, page: tuple[int, int]) -> Rect:
    x, y = max(0, min(x, page[0] - width)), max(0, min(y, page[1] - height))
    return Rect(x, y, min(x + width, page[0]), min(y + height, page[1]))


def _luminance(colour: Colour) -> float:
    """WCAG's relative luminance, 0 black to 1 white."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
