"""Pictures in rows and columns."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from casc.draw.letters import font_of, set_in_type
from casc.draw.style import PAPER, WHITE, resize
from casc.draw.tags import shorten


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
    pictures = [resize(p, cell) if max(p.shape[:2]) > cell else p for p in images]

    font = font_of(max(12, round(cell / 32)))
    line = 0 if captions is None else math.ceil(1.6 * font.size)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(p.shape[1] for p in pictures)
    heights = [max(p.shape[0] for p in row) for row in rows]
    page = Image.new(
        "RGB",
        (columns * (width + gap) + gap, sum(h + line + gap for h in heights) + gap),
        PAPER,
    )
    brush = ImageDraw.Draw(page)
    top = gap
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            left = gap + c * (width + gap)
            page.paste(Image.fromarray(picture), (left, top))
            if captions is not None:
                text, letters = set_in_type(captions[r * columns + c], round(font.size))
                text = shorten(text, "", letters, width)
                place = (left, top + picture.shape[0] + line // 2)
                brush.text(place, text, font=letters, fill=WHITE, anchor="lm")
        top += heights[r] + line + gap
    return np.asarray(page)
