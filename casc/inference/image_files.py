"""Photographs given as files: which they are, their pixels, and what their results are called."""

import glob
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from casc.data.decode import decode_image, open_image
from casc.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""What a folder is searched for; a file named outright may be called anything."""
_EXIF_ORIENTATION = 0x0112


def find_images(
    paths: Iterable[str | os.PathLike[str]],
) -> tuple[list[Path], list[tuple[str, str]]]:
    """List the images that paths, folders and patterns mean, each once.

    A folder means the images in it, not those in folders below it.

    Returns:
        The files, and the paths that led to none with the reason.
    """
    files: dict[Path, None] = {}
    failed: list[tuple[str, str]] = []
    for given in paths:
        text, path = os.fspath(given), Path(given)
        if path.is_dir():
            matches = sorted(
                p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()
            )
            reason = "the folder has no images"
        elif path.exists() or not glob.has_magic(text):
            # A path that leads nowhere fails when it is read, like any other bad image.
            matches, reason = [path], ""
        else:
            found = glob.glob(text, recursive=True)  # noqa: PTH207 - a pattern may be absolute
            matches = sorted(p for p in map(Path, found) if p.is_file())
            reason = "no file matches"
        files.update(dict.fromkeys(matches))
        if not matches:
            failed.append((text, reason))
    return list(files), failed


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as RGB `[h, w, 3]` uint8, turned upright.

    Raises:
        OSError, UserError: when it can't be read.
    """
    data = Path(path).read_bytes()
    with open_image(data) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # damaged metadata doesn't make a photograph unreadable
            orientation = 1
    return decode_image(data, orientation if orientation in range(1, 9) else 1)


def names_of(files: Sequence[Path]) -> list[str]:
    """What `file_name` says: the name, or the path where names aren't enough."""
    distinct = len({file.name for file in files}) == len(files)
    return [file.name if distinct else file.as_posix() for file in files]


def image_ids(files: Sequence[Path]) -> list[int]:
    """The numbers that files are named by, or 1, 2, ... where not all are numbers of their own."""
    if all(file.stem.isdecimal() and file.stem.isascii() for file in files):
        numbers = [int(file.stem) for file in files]
        if len(set(numbers)) == len(numbers) and max(numbers, default=0) < 2**63:
            return numbers
    return list(range(1, len(files) + 1))


def targets_of(files: Sequence[Path], folder: Path) -> list[Path]:
    """Where the pictures go; names that several images share are numbered."""
    inputs = {file.resolve() for file in files}
    targets: dict[Path, None] = {}
    for file in files:
        target, number = folder / f"{file.stem}.jpg", 1
        while target in targets:
            number += 1
            target = folder / f"{file.stem}-{number}.jpg"
        if target.resolve() in inputs:
            raise UserError(
                f"{target}: would overwrite an input image; choose another output folder"
            )
        targets[target] = None
    return list(targets)


def reason_of(error: Exception) -> str:
    """What to say of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
