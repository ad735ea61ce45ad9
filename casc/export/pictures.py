"""The images that a program is checked on: the user's, or generated ones.

Legend: B images, Hi x Wi input canvas.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casc.data.decode import resized_planes
from casc.errors import UserError
from casc.inference.image_files import find_images, suffixes_of
from casc.inference.images import read_image

GENERATED = 10

Picture = tuple[Tensor, tuple[int, int]]
"""[Hi, Wi, C] uint8 with the image in its top left corner, and the image's height and width."""


def read_pictures(
    paths: Sequence[str], canvas: tuple[int, int], channels: int = 3
) -> list[Picture]:
    """Images from files, folders and patterns; larger ones are reduced to fit the canvas.

    Raises:
        UserError: one can't be read.
    """
    files, failed = find_images(paths, suffixes_of(channels))
    for name, reason in failed:
        raise UserError(f"--images {name}: {reason}")
    pictures = []
    for file in files:
        try:
            image = read_image(file, channels)
        except OSError as error:
            raise UserError(f"--images {file}: {error.strerror or error}") from None
        height, width = image.shape[:2]
        ratio = min(canvas[0] / height, canvas[1] / width, 1.0)
        if ratio < 1:
            height, width = (max(1, round(side * ratio)) for side in (height, width))
            image = resized_planes(image, (width, height), Image.Resampling.BILINEAR)
        whole = np.zeros((*canvas, channels), np.uint8)
        whole[:height, :width] = image
        pictures.append((torch.from_numpy(whole), (height, width)))
    return pictures


def generated_pictures(
    canvas: tuple[int, int], count: int = GENERATED, channels: int = 3
) -> list[Picture]:
    """Coloured rectangles and ellipses on noise, of many sizes; the first picture is empty."""
    generator = torch.Generator().manual_seed(0)

    def draw(least: float, most: float) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator))

    pictures = []
    for number in range(count):
        height, width = (max(1, int(side * draw(0.5, 1))) for side in canvas)
        shape = height, width, channels
        image = torch.randint(0, 64, shape, generator=generator, dtype=torch.uint8)
        y = torch.arange(height)[:, None].expand(height, width)
        x = torch.arange(width).expand(height, width)
        for shape in range(0 if number == 0 else 8):
            half_height, half_width = (side * draw(0.03, 0.3) for side in (height, width))
            down = (y - draw(0, height)).abs() / half_height
            across = (x - draw(0, width)).abs() / half_width
            inside = (down**2 + across**2 < 1) if shape % 2 else (down < 1) & (across < 1)
            colour = torch.randint(0, 256, (channels,), generator=generator, dtype=torch.uint8)
            image[inside] = colour
        whole = torch.zeros((*canvas, channels), dtype=torch.uint8)
        whole[:height, :width] = image
        pictures.append((whole, (height, width)))
    return pictures


def batches(pictures: Sequence[Picture], batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Pixels [B, Hi, Wi, C], sizes [B, 2] int64, and how many of them count.

    The last batch is filled up with its last picture.
    """
    for start in range(0, len(pictures), batch):
        part = list(pictures[start : start + batch])
        count = len(part)
        part += [part[-1]] * (batch - count)
        yield torch.stack([p for p, _ in part]), torch.tensor([s for _, s in part]), count
