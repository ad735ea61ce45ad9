"""What everything is drawn with: colours, widths, letters, and the picture's own size."""

import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

from casc.draw.letters import font_of

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
WHITE, BLACK, PAPER = (255, 255, 255), (0, 0, 0), (40, 40, 40)
_SMALL = 400  # an image whose long side is less is enlarged
_COMFORTABLE = 640  # to about this


class Pen(NamedTuple):
    """Widths of lines in pixels, and letters, for a picture of some size."""

    line: int
    outline: int
    rim: int
    font: ImageFont.FreeTypeFont
    small_font: ImageFont.FreeTypeFont


class Rect(NamedTuple):
    """Whole pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: "Rect") -> int:
        """Pixels that are in both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)

    @property
    def area(self) -> int:
        """In pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


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


def pen_for(canvas: np.ndarray, seen_at: int | None = None) -> Pen:
    """The pen that suits a picture `[H, W, 3]` whose long side is shown `seen_at` pixels long."""
    shrunk = 1.0 if seen_at is None else max(1.0, max(canvas.shape[:2]) / seen_at)
    size = math.sqrt(canvas.shape[0] * canvas.shape[1])
    line = max(round(2 * shrunk), round(size / 280))
    font = font_of(max(round(12 * shrunk), round(size / 42)))
    return Pen(
        line=line,
        outline=max(1, line // 2),
        rim=max(1, line // 3),
        font=font,
        small_font=font_of(max(round(11 * shrunk), round(size / 52))),
    )


def resize(image: np.ndarray, long_side: int | None) -> np.ndarray:
    """The image `[h, w, 3]` at the size that it is drawn on: see `draw_instances`."""
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
