"""Images from wherever they are to batches that the detector takes.

Legend: h x w an image as it is upright, Hi x Wi input canvas, H x W canvas that the network sees.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casc.data.batch import Batch
from casc.data.collate import collate
from casc.data.decode import NPY, decode_image, exif_orientation, open_image, orient, pixels
from casc.data.index import ASPECTS, Bucket, canvas
from casc.data.loader_config import RemoteConfig
from casc.data.remote import is_local, read_remote
from casc.data.sample import Sample
from casc.errors import UserError
from casc.model.preprocess import ImageConfig

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""An image: a path or URL, a file's bytes, Pillow's, `[h, w, 3]` uint8 RGB, or `[3, h, w]`; where
the model has other channels, of these."""
KINDS = (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor)
"""What a `Picture` is an instance of."""


def read_image(picture: Picture, channels: int = 3) -> np.ndarray:
    """Give an image as `[h, w, c]` uint8, upright: RGB, grey or planes, see `decode_image`.

    Raises:
        OSError, UserError: when it can't be read, or has another shape or type.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture, channels)
    if isinstance(picture, Tensor):
        return _from_tensor(picture, channels)
    if isinstance(picture, Image.Image):
        orientation = exif_orientation(picture)
        return np.ascontiguousarray(orient(pixels(picture, channels), orientation))
    data = picture if isinstance(picture, bytes) else read_file(picture)
    if data.startswith(NPY):
        return decode_image(data, channels=channels)
    with open_image(data) as image:
        orientation = exif_orientation(image)
    return decode_image(data, orientation, channels)


def read_file(place: str | os.PathLike[str]) -> bytes:
    """Give the bytes at a path or URL.

    Raises:
        OSError, UserError: when they can't be read.
    """
    if isinstance(place, str) and not is_local(place):
        return read_remote(place, RemoteConfig())
    return Path(place).read_bytes()


def canvas_of(image: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """Give the canvas (H, W) on which the network sees an image of `height` x `width` pixels.

    It is the one of the bucket that sharding puts the image in by default, so prediction and
    evaluation compute the same, and there are as many shapes to compile as buckets.
    """
    return _canvases(image.short, image.long)[sum(width / height > edge for edge in ASPECTS)]


def holding_canvas(height: int, width: int) -> tuple[int, int]:
    """Give an input canvas (Hi, Wi) for a whole image: each side has four lengths an octave."""

    def length(side: int) -> int:
        step = max(64, (1 << (side - 1).bit_length()) // 8)
        return -(-side // step) * step

    return length(height), length(width)


def batch_of(images: Mapping[int, np.ndarray], size: tuple[int, int], rows: int) -> Batch:
    """Put images on an input canvas, as a batch on the CPU without ground truth.

    Args:
        images: `[h, w, c]` uint8 by id, which is at least 0; none larger than the canvas.
        size: the canvas (Hi, Wi).
        rows: of the batch; those beyond the images have the id -1.
    """
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    samples = [Sample(image, *nothing, [], [], number) for number, image in images.items()]
    channels = next(iter(images.values())).shape[2]
    bucket = Bucket("", 0, None, *size, 1, 1, len(samples), channels=channels)
    return collate(samples, bucket, batch=rows)


@cache
def _canvases(short: int, long: int) -> list[tuple[int, int]]:
    """The buckets' canvases (H, W), tallest first."""
    lows, highs = (0.0, *ASPECTS), (*ASPECTS, None)
    buckets = (
        Bucket("", low, high, height=1, width=1, instances=1, edges=1, samples=0)
        for low, high in zip(lows, highs, strict=True)
    )
    return [canvas(bucket, short, long) for bucket in buckets]


def _checked(image: np.ndarray, channels: int) -> np.ndarray:
    if channels == 1 and image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] != channels or image.dtype != np.uint8 or not image.size:
        what = " RGB (of OpenCV's BGR give image[..., ::-1])" if channels == 3 else ""
        raise UserError(
            f"an array must be [h, w, {channels}] uint8{what}, not"
            f" {list(image.shape)} {image.dtype}"
        )
    return np.ascontiguousarray(image)


def _from_tensor(image: Tensor, channels: int) -> np.ndarray:
    if image.dim() != 3 or image.shape[0] != channels or not image.numel():
        raise UserError(f"a tensor must be [{channels}, h, w], not {list(image.shape)}")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise UserError(f"a tensor must be uint8, or float in [0, 1], not {image.dtype}")
        if not (bool((image >= 0).all()) and bool((image <= 1).all())):
            raise UserError("a tensor of floats must be in [0, 1]: before any normalisation")
        image = (image.detach().float() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())
