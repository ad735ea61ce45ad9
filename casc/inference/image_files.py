"""Images given as files: which they are, and what their results are called."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from casc.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""What a folder is searched for; a file named outright may be called anything."""


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
