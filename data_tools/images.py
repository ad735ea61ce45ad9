"""Image files: what each is, whether it decodes, and the bytes that go into a shard."""

import base64
import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from casc.data.decode import (
    NPY,
    ImageError,
    array_size,
    decode_image,
    exif_orientation,
    open_image,
    orient,
    resized_planes,
    stored_size,
    try_decoding,
    values,
)
from casc.errors import UserError

LARGEST_FILE = 2**30
"""Bytes. A larger image file is taken for damage."""

MISSING, UNREADABLE = "missing", "unreadable"

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ALIASES = {"jpg": {"jpg", "jpeg", "jpe", "jfif"}, "tif": {"tif", "tiff"}}


class Probe(NamedTuple):
    """What is known of an image file once it was read and decoded."""

    fault: str = ""
    """Why it can't be used; size and digest are all that is known then."""
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    """Digest of the file, `MISSING` or `UNREADABLE`."""
    extension: str = ""
    """By content: jpg, png or webp, of planes tif or npy; png for formats that are converted."""
    width: int = 0
    """As stored, before any turning."""
    height: int = 0
    orientation: int = 1
    """What EXIF says."""
    levels: int = 0
    """Of a 16-bit image: different values that are left in 8 bits."""
    traits: tuple[str, ...] = ()
    """Kinds of findings that follow from the file alone, such as `cmyk`."""


class Stored(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    width: int
    """As decoded, upright."""
    height: int
    orientation: int
    """EXIF orientation that decoding has to undo."""


def probe_image(path: str | Path, channels: int = 3) -> Probe:
    """Read and decode an image file to see whether and how it can be used.

    Args:
        path: the file.
        channels: that it is to have, or to be converted to: see `decode_image`.
    """
    try:
        data = read_file(path)
    except FileNotFoundError:
        return Probe(fault="no such file", sha256=MISSING)
    except (OSError, ImageError) as error:
        return Probe(fault=_one_line(error), sha256=UNREADABLE)
    digest = hashlib.sha256(data).hexdigest()
    try:
        probe = _probe(data, str(path), channels)
        return probe._replace(size=len(data), sha256=digest)
    except ImageError as error:
        return Probe(fault=_one_line(error), size=len(data), sha256=digest)


def read_file(path: str | Path) -> bytes:
    """Read a file's bytes; of a JSON file of LabelMe's those of the image in it.

    Raises:
        ImageError: when it isn't a plain file of sensible size.
        OSError: when it can't be read.
    """
    about = os.stat(path)  # noqa: PTH116 - of each image
    if not stat.S_ISREG(about.st_mode):
        raise ImageError("not a plain file")
    if about.st_size > LARGEST_FILE:
        raise ImageError(f"too large ({about.st_size} bytes)")
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123
        data = stream.readall()
    return _embedded(data) if str(path).lower().endswith(".json") else data


def _embedded(data: bytes) -> bytes:
    try:
        return base64.b64decode(json.loads(data)["imageData"], validate=True)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ImageError(f"imageData: no image in base64 ({_one_line(error)})") from None


def file_digest(path: Path) -> str:
    """Give the SHA-256 of an image file's bytes, `MISSING` or `UNREADABLE`."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except FileNotFoundError:
        return MISSING
    except (OSError, ImageError):
        return UNREADABLE


def store_image(
    path: Path,
    probe: Probe,
    orientation: int,
    max_size: int | None,
    stretch: bool = False,
    channels: int = 3,
) -> Stored:
    """Give the bytes to store: the file's own, unless its format or size calls for new ones.

    Args:
        path: the file.
        probe: what `probe_image` found.
        orientation: EXIF orientation to apply.
        max_size: longest side allowed, in pixels. A larger image is turned upright, reduced
            and encoded again: as JPEG of quality 95, or as PNG if it wasn't a JPEG; planes as npy.
        stretch: spread the values of a 16-bit greyscale image over 8 bits, from its darkest to
            its brightest, instead of taking the upper 8.
        channels: of the image.

    Raises:
        UserError: when the file isn't the one that was probed any more.
    """
    try:
        data = read_file(path)
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: changed while shards were made ({_one_line(error)})") from None
    if hashlib.sha256(data).hexdigest() != probe.sha256:
        raise UserError(f"{path}: changed while shards were made; run the command again")
    turned = orientation >= 5
    width, height = (probe.height, probe.width) if turned else (probe.width, probe.height)
    small = reduced_size(width, height, max_size)
    traits = set(probe.traits)
    grey = "grayscale" in traits if channels == 3 else channels == 1 and "colour" not in traits
    wide = stretch and grey and "sixteen_bit" in traits
    if small == (width, height) and "other_format" not in probe.traits and not wide:
        return Stored(data, width, height, orientation)
    out = io.BytesIO()
    if channels not in (1, 3):
        planes = resized_planes(
            decode_image(data, orientation, channels), small, Image.Resampling.LANCZOS
        )
        np.save(out, planes)
        return Stored(out.getvalue(), *small, 1)
    if wide:
        image = Image.fromarray(_stretched(data, orientation))
    else:
        decoded = decode_image(data, orientation, channels)
        image = Image.fromarray(decoded[..., 0] if channels == 1 else decoded)
    if small != image.size:
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=None)
    if probe.extension == "jpg":
        image.save(out, "JPEG", quality=95)
    else:
        image.save(out, "WEBP" if probe.extension == "webp" else "PNG", lossless=True)
    return Stored(out.getvalue(), *small, 1)


def _stretched(data: bytes, orientation: int) -> np.ndarray:
    """A 16-bit greyscale image `[h, w]` with its range of values spread over 0 to 255."""
    if data.startswith(NPY):
        whole = _array(data).astype(np.float64)
        whole = whole.reshape(whole.shape[:2])
    else:
        with open_image(data) as image:
            whole = values(image).astype(np.float64)
    low, high = whole.min(), whole.max()
    spread = (whole - low) * (255 / max(high - low, 1))
    return np.ascontiguousarray(orient(np.rint(spread).astype(np.uint8), orientation))


def reduced_size(width: int, height: int, max_size: int | None) -> tuple[int, int]:
    """Give the size (width, height) after reducing the longest side to `max_size`."""
    longest = max(width, height)
    if max_size is None or longest <= max_size:
        return width, height
    scale = max_size / longest
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def _probe_array(data: bytes, channels: int) -> Probe:
    height, width, _ = array_size(data)
    decoded = decode_image(data, channels=channels)
    # An array isn't a picture that other programs would show: grey and RGB go in as PNG.
    traits = ("other_format",) if channels in (1, 3) else ()
    extension = "png" if traits else "npy"
    levels = 0
    if _array(data).dtype == np.uint16:
        traits, levels = (*traits, "sixteen_bit"), len(np.unique(decoded))
    return Probe(extension=extension, width=width, height=height, levels=levels, traits=traits)


def _array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _probe(data: bytes, name: str, channels: int) -> Probe:
    if data.startswith(NPY):
        return _probe_array(data, channels)
    traits: list[str] = []
    with open_image(data) as image:
        kind, mode, size = image.format or "", image.mode, stored_size(image)
        if kind != "MPO" and _frames(image) > 1:
            traits.append("animated")
        orientation = exif_orientation(image)
        transparent = "A" in mode or "transparency" in image.info
        sixteen = mode.startswith("I;16") or (kind == "PNG" and _png_depth(data) == 16)
        # JPEGs of other channels aren't wanted, and are told by decoding.
        quick = kind == "JPEG" and channels in (1, 3)
        if quick:
            try_decoding(image)
    levels = 0
    if not quick:
        decoded = decode_image(data, channels=channels)
        if decoded.shape[:2] != size[::-1]:
            raise ImageError(
                f"decodes to {decoded.shape[1]} x {decoded.shape[0]} pixels, "
                f"its header says {size[0]} x {size[1]}"
            )
        levels = len(np.unique(decoded)) if sixteen else 0
    known = _EXTENSIONS if channels in (1, 3) else {**_EXTENSIONS, "TIFF": "tif"}
    if kind not in known:
        traits.append("other_format")
    grey = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    if channels in (1, 3):
        traits += _conversions(mode, channels, grey=grey, transparent=transparent)
    if channels not in (1, 3) and "animated" in traits:
        traits.remove("animated")  # pages are planes
    if sixteen:
        traits.append("sixteen_bit")
    extension = known.get(kind, "png" if channels in (1, 3) else "npy")
    given = os.path.splitext(name)[1].lower().lstrip(".")  # noqa: PTH122 - of each image
    if given != "json" and kind in known and given not in _ALIASES.get(extension, {extension}):
        traits.append("wrong_extension")
    return Probe(
        extension=extension,
        width=size[0],
        height=size[1],
        orientation=orientation,
        levels=levels,
        traits=tuple(traits),
    )


def _conversions(mode: str, channels: int, *, grey: bool, transparent: bool) -> list[str]:
    """What is done to the pixels of a Pillow mode to make RGB or grey of them."""
    found = []
    if mode == "CMYK":
        found.append("cmyk")
    if grey and channels == 3:
        found.append("grayscale")
    if not grey and channels == 1:
        found.append("colour")
    if mode.startswith("P"):
        found.append("palette")
    if transparent:
        found.append("alpha")
    return found


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # Pillow reads on to count them; the first may be fine all the same
        return 1


def _png_depth(data: bytes) -> int:
    """Bits a channel, from the header chunk: Pillow shows 16-bit colour as 8-bit."""
    return data[24] if len(data) > 24 else 8


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    lines = str(text).splitlines()
    return lines[0] if lines else type(error).__name__
