"""Image files: what each is, whether it decodes, and the bytes that go into a shard."""

import hashlib
import io
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from casc.data.decode import (
    ImageError,
    decode_image,
    exif_orientation,
    open_image,
    orient,
    stored_size,
    try_decoding,
    values,
)
from casc.errors import UserError

LARGEST_FILE = 2**30
"""Bytes. A larger image file is taken for damage."""

MISSING, UNREADABLE = "missing", "unreadable"

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ALIASES = {"jpg": {"jpg", "jpeg", "jpe", "jfif"}}


class Probe(NamedTuple):
    """What is known of an image file once it was read and decoded."""

    fault: str = ""
    """Why it can't be used; size and digest are all that is known then."""
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    """Digest of the file, `MISSING` or `UNREADABLE`."""
    extension: str = ""
    """By content: jpg, png or webp; png for formats that are converted."""
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


def probe_image(path: Path) -> Probe:
    """Read and decode an image file to see whether and how it can be used."""
    try:
        data = read_file(path)
    except FileNotFoundError:
        return Probe(fault="no such file", sha256=MISSING)
    except (OSError, ImageError) as error:
        return Probe(fault=_one_line(error), sha256=UNREADABLE)
    digest = hashlib.sha256(data).hexdigest()
    try:
        return _probe(data, path.name)._replace(size=len(data), sha256=digest)
    except ImageError as error:
        return Probe(fault=_one_line(error), size=len(data), sha256=digest)


def read_file(path: Path) -> bytes:
    """Read a file's bytes.

    Raises:
        ImageError: when it isn't a plain file of sensible size.
        OSError: when it can't be read.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ImageError("not a plain file")
    if about.st_size > LARGEST_FILE:
        raise ImageError(f"too large ({about.st_size} bytes)")
    return path.read_bytes()


def file_digest(path: Path) -> str:
    """Give the SHA-256 of an image file's bytes, `MISSING` or `UNREADABLE`."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except FileNotFoundError:
        return MISSING
    except (OSError, ImageError):
        return UNREADABLE


def store_image(
    path: Path, probe: Probe, orientation: int, max_size: int | None, stretch: bool = False
) -> Stored:
    """Give the bytes to store: the file's own, unless its format or size calls for new ones.

    Args:
        path: the file.
        probe: what `probe_image` found.
        orientation: EXIF orientation to apply.
        max_size: longest side allowed, in pixels. A larger image is turned upright, reduced
            and encoded again: as JPEG of quality 95, or as PNG if it wasn't a JPEG.
        stretch: spread the values of a 16-bit greyscale image over 8 bits, from its darkest to
            its brightest, instead of taking the upper 8.

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
    wide = stretch and {"sixteen_bit", "grayscale"} <= set(probe.traits)
    if small == (width, height) and "other_format" not in probe.traits and not wide:
        return Stored(data, width, height, orientation)
    image = Image.fromarray(
        _stretched(data, orientation) if wide else decode_image(data, orientation)
    )
    if small != image.size:
        image = image.resize(small, Image.Resampling.LANCZOS, reducing_gap=None)
    out = io.BytesIO()
    if probe.extension == "jpg":
        image.save(out, "JPEG", quality=95)
    else:
        image.save(out, "WEBP" if probe.extension == "webp" else "PNG", lossless=True)
    return Stored(out.getvalue(), *small, 1)


def _stretched(data: bytes, orientation: int) -> np.ndarray:
    """A 16-bit greyscale image `[h, w]` with its range of values spread over 0 to 255."""
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


def _probe(data: bytes, name: str) -> Probe:
    traits: list[str] = []
    with open_image(data) as image:
        kind, mode, size = image.format or "", image.mode, stored_size(image)
        if kind != "MPO" and _frames(image) > 1:
            traits.append("animated")
        orientation = exif_orientation(image)
        transparent = "A" in mode or "transparency" in image.info
        sixteen = mode.startswith("I;16") or (kind == "PNG" and _png_depth(data) == 16)
        if kind == "JPEG":
            try_decoding(image)
    levels = 0
    if kind != "JPEG":
        decoded = decode_image(data)
        if decoded.shape[:2] != size[::-1]:
            raise ImageError(
                f"decodes to {decoded.shape[1]} x {decoded.shape[0]} pixels, "
                f"its header says {size[0]} x {size[1]}"
            )
        levels = len(np.unique(decoded)) if sixteen else 0
    if kind not in _EXTENSIONS:
        traits.append("other_format")
    if mode == "CMYK":
        traits.append("cmyk")
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        traits.append("grayscale")
    if mode.startswith("P"):
        traits.append("palette")
    if transparent:
        traits.append("alpha")
    if sixteen:
        traits.append("sixteen_bit")
    extension = _EXTENSIONS.get(kind, "png")
    given = Path(name).suffix.lower().lstrip(".")
    if kind in _EXTENSIONS and given not in _ALIASES.get(extension, {extension}):
        traits.append("wrong_extension")
    return Probe(
        extension=extension,
        width=size[0],
        height=size[1],
        orientation=orientation,
        levels=levels,
        traits=tuple(traits),
    )


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
