"""JPEG decoders side by side: whichever of them can be imported.

casc decodes with Pillow (`casc.data.decode`); the others are here to be compared with it.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from casc.data.decode import decode_image

Decoder = Callable[[bytes], np.ndarray]
"""A file's bytes to [h, w, 3] uint8 RGB."""


class Agreement(NamedTuple):
    """How a decoder's pixels compare with Pillow's."""

    equal: int
    """Images whose pixels are all the same."""
    images: int
    largest: int
    """Largest difference of a channel in grey levels."""


def decoders() -> dict[str, Decoder]:
    """Every decoder that can be imported, Pillow first."""
    found: dict[str, Decoder] = {"pillow": decode_image}
    makers = {
        "opencv": _opencv,
        "torchvision": _torchvision,
        "torchcodec": _torchcodec,
        "simplejpeg": _simplejpeg,
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, OSError, RuntimeError):  # not installed, or it lacks a library
            continue
    return found


def agreement(decoder: Decoder, images: Sequence[bytes]) -> Agreement:
    """Compare a decoder's pixels with Pillow's."""
    largest = [
        int(np.abs(decoder(data).astype(np.int16) - decode_image(data)).max()) for data in images
    ]
    return Agreement(largest.count(0), len(images), max(largest, default=0))


def _opencv() -> Decoder:
    cv2: Any = import_module("cv2")
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def _torchvision() -> Decoder:
    return _of_tensors(import_module("torchvision.io"))


def _torchcodec() -> Decoder:
    return _of_tensors(import_module("torchcodec.decoders"))


def _of_tensors(library: Any) -> Decoder:
    import torch

    def decode(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            # Torchvision's is deprecated in favour of torchcodec's, which not all have.
            warnings.simplefilter("ignore", DeprecationWarning)
            planes = library.decode_jpeg(encoded, mode=library.ImageReadMode.RGB)
        return planes.permute(1, 2, 0).numpy()

    return decode


def _simplejpeg() -> Decoder:
    library: Any = import_module("simplejpeg")
    return lambda data: library.decode_jpeg(data, "RGB")
