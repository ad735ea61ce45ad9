"""Decoding, in one place, so that sharding, training, evaluation and drawing see one image.

It is Pillow's. OpenCV, torchvision, torchcodec and simplejpeg give the same pixels of a JPEG,
all being libjpeg-turbo underneath, and make a worker at most a fifth faster, which didn't
outweigh another dependency (docs/performance.md).
"""

import io
import os
import warnings
from typing import Any

import numpy as np
from PIL import Image

from casc.errors import UserError

MEGAPIXELS = "CASC_MAX_MEGAPIXELS"
"""The environment variable with the largest image, in 2**20 pixels, in place of 64; at most 170,
which is what Pillow opens."""


def max_pixels() -> int:
    """The most pixels of an image: a small file may claim a size that fills the memory.

    Raises:
        UserError: the environment variable isn't a number that can be honoured.
    """
    said = os.environ.get(MEGAPIXELS, "64")
    if not said.isascii() or not said.isdecimal() or not 1 <= int(said[:9]) <= 170:
        raise UserError(f"{MEGAPIXELS}={said}: expected a whole number from 1 to 170")
    return int(said) * 2**20


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may try. Shards hold the first three; the others are converted when sharding."""


_EXIF_ORIENTATION = 0x0112


class ImageError(UserError):
    """An image can't be decoded. The message gives the reason, the caller adds the file."""


def decode_image(data: bytes, orientation: int = 1) -> np.ndarray:
    """Decode an image to RGB.

    Grayscale, palette and CMYK images are converted; alpha is dropped; 16-bit grayscale
    keeps its upper 8 bits (as OpenCV's colour reading does, which the reference uses); of
    an animation the first frame counts. An EXIF orientation in the file is not looked at.

    Args:
        data: the file's bytes.
        orientation: EXIF orientation 1 to 8 to undo, as the shard's sample says.

    Returns:
        `[h, w, 3]` uint8, C-contiguous.

    Raises:
        ImageError: when the data isn't an image that can be decoded completely.
    """
    with open_image(data) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                array = rgb(image)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they stumble upon
            raise ImageError(f"can't be decoded: {_reason(error)}") from None
    return np.ascontiguousarray(orient(array, orientation))


def try_decoding(image: Image.Image) -> None:
    """Decode an opened JPEG at an eighth of its size, in half the time: all of its data is read.

    The image can't be used for its pixels afterwards.

    Raises:
        ImageError: as `decode_image` does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # Pillow's decoders raise whatever they stumble upon
        raise ImageError(f"can't be decoded: {_reason(error)}") from None


def open_image(data: bytes) -> Image.Image:
    """Open an image without decoding it: format, size and mode are known, pixels aren't.

    Raises:
        ImageError: when the data isn't an image, or is one that is too large.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata and of sizes that are checked here anyway.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large("more than Pillow opens")) from None
    except Exception as error:
        raise ImageError(f"can't be opened: {_reason(error)}") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels ({width} x {height})")
    if width * height > max_pixels():
        raise ImageError(_too_large(f"{width} x {height}, more than {max_pixels()} pixels"))
    return image


def _too_large(why: str) -> str:
    return f"is too large ({why}; {MEGAPIXELS} in the environment sets the limit)"


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror stored pixels `[h, w, ...]` upright, as EXIF's orientation 1 to 8 says.

    Raises:
        ValueError: on any other orientation.
    """
    if orientation == 1:
        return array
    if orientation == 2:
        return array[:, ::-1]
    if orientation == 3:
        return array[::-1, ::-1]
    if orientation == 4:
        return array[::-1]
    if orientation == 5:
        return array.swapaxes(0, 1)
    if orientation == 6:
        return array.swapaxes(0, 1)[:, ::-1]
    if orientation == 7:
        return array.swapaxes(0, 1)[::-1, ::-1]
    if orientation == 8:
        return array.swapaxes(0, 1)[::-1]
    raise ValueError(f"orientation: expected 1 to 8, got {orientation}")


def exif_orientation(image: Image.Image) -> int:
    """Give the orientation 1 to 8 that the metadata of an image, opened but not decoded, asks for.

    1 where there is none, and where it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF: viewers and OpenCV go by the pixels then, and so do we
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def rgb(image: Image.Image) -> np.ndarray:
    """Give Pillow's image as `[h, w, 3]` uint8, converted as `decode_image` says, not turned.

    Raises:
        ImageError: its values have no 8-bit meaning.
    """
    turned = _turned(image)
    if image.mode.startswith("I;16"):
        sixteen = np.asarray(image)
        image = Image.fromarray((sixteen >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageError(f"holds 32-bit values (mode {image.mode}) that have no 8-bit meaning")
    return orient(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), turned)


def values(image: Image.Image) -> np.ndarray:
    """Give the image's own values, `[h, w]` or `[h, w, c]`, not turned."""
    turned = _turned(image)
    return orient(np.asarray(image), turned)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Give the width and height of an image that is opened but not decoded, not turned."""
    width, height = image.size
    return (height, width) if _turned(image) >= 5 else (width, height)


def _turned(image: Image.Image) -> int:
    """The orientation that undoes what Pillow does to a TIFF as it decodes it."""
    orientation = exif_orientation(image) if image.format == "TIFF" else 1
    return {6: 8, 8: 6}.get(orientation, orientation)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
