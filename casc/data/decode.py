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


NPY = b"\x93NUMPY"
"""What a file of one numpy array begins with."""


def decode_image(data: bytes, orientation: int = 1, channels: int = 3) -> np.ndarray:
    """Decode an image: to RGB, to grey, or to planes.

    With three channels grayscale, palette and CMYK images are converted; alpha is dropped; 16-bit
    grayscale keeps its upper 8 bits (as OpenCV's colour reading does, which the reference uses); of
    an animation the first frame counts. An EXIF orientation in the file is not looked at.

    With one channel colours become grey, as Pillow weighs them. Any other number of channels the
    file has to have: as bands of its pixels (RGBA, CMYK), or a TIFF as pages of one band each.
    Whatever the number, it may be an npy file of `[h, w, c]` (or `[h, w]`), uint8, or uint16 of
    which the upper 8 bits are kept.

    Args:
        data: the file's bytes.
        orientation: EXIF orientation 1 to 8 to undo, as the shard's sample says.
        channels: c.

    Returns:
        `[h, w, c]` uint8, C-contiguous.

    Raises:
        ImageError: when the data isn't an image that can be decoded completely.
    """
    if data.startswith(NPY):
        return np.ascontiguousarray(orient(_planes_of_array(data, channels), orientation))
    with open_image(data) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                array = pixels(image, channels)
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


def array_size(data: bytes) -> tuple[int, int, int]:
    """Give height, width and channels of an npy file from its header.

    Raises:
        ImageError: it isn't of an image's shape and type, or not whole.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # a header is a Python literal: anything may be wrong with it
        raise ImageError(f"not a whole npy file: {_reason(error)}") from None
    if dtype not in (np.uint8, np.uint16):
        raise ImageError(f"holds {dtype}, where 8 or 16 bits without sign are an image's")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ImageError(f"is an array {list(shape)}, expected [height, width, channels]")
    height, width, channels = (*shape, 1)[:3]
    if height * width > max_pixels():
        raise ImageError(_too_large(f"{width} x {height}, more than {max_pixels()} pixels"))
    if len(data) - stream.tell() != height * width * channels * dtype.itemsize:
        raise ImageError("not a whole npy file: its length isn't what its header says")
    return height, width, channels


def _planes_of_array(data: bytes, channels: int) -> np.ndarray:
    height, width, found = array_size(data)
    _check_channels(found, channels)
    array = np.load(io.BytesIO(data), allow_pickle=False).reshape(height, width, found)
    return _eight_bits(array)


def _check_channels(found: int, channels: int) -> None:
    if found != channels:
        raise ImageError(f"has {found} channel{'' if found == 1 else 's'}, expected {channels}")


def _eight_bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)


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
        if data.startswith(b"version https://git-lfs"):
            raise ImageError("a pointer of Git LFS, not the file; git lfs pull brings it") from None
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


def pixels(image: Image.Image, channels: int = 3) -> np.ndarray:
    """Give Pillow's image as `[h, w, c]` uint8, as `decode_image` says, not turned.

    Raises:
        ImageError: it hasn't so many channels, or its values have no 8-bit meaning.
    """
    if channels == 3:
        return rgb(image)
    turned = _turned(image)
    if channels == 1:
        if image.mode in ("I", "F"):
            raise ImageError(f"holds 32-bit values (mode {image.mode}) that have no 8-bit meaning")
        whole = image if image.mode.startswith("I;16") else image.convert("L")
        return orient(_eight_bits(np.asarray(whole))[..., None], turned)
    bands = len(image.getbands())
    if image.mode.startswith("P") or bands > 1 or getattr(image, "n_frames", 1) == 1:
        _check_channels(bands, channels)
        return orient(_eight_bits(np.asarray(image)), turned)
    pages = getattr(image, "n_frames", 1)
    _check_channels(pages, channels)
    planes = []
    for page in range(pages):
        image.seek(page)
        plane = np.asarray(image)
        if plane.ndim != 2 or plane.dtype not in (np.uint8, np.uint16):
            raise ImageError(f"page {page + 1} isn't one plane of 8 or 16 bits ({image.mode})")
        if planes and plane.shape != planes[0].shape:
            raise ImageError(f"page {page + 1} is of another size than the first")
        planes.append(_eight_bits(plane))
    return orient(np.stack(planes, axis=-1), turned)


def resized_planes(image: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    """Resize `[h, w, c]` uint8 to (width, height); each plane by itself where Pillow can't at once.

    For three channels, what Pillow makes of RGB.
    """
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size, how, reducing_gap=None))
    planes = [
        np.asarray(Image.fromarray(plane).resize(size, how, reducing_gap=None))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, axis=-1)


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
