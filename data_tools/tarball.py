"""Tar files whose bytes depend on nothing but what is in them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from casc.data.files import sync_folder

TEMPORARY = ".tmp"
"""Suffix of files that aren't finished."""


class Written(NamedTuple):
    """A file that was written."""

    bytes: int
    sha256: str


def write_tar(path: Path, members: Iterable[tuple[str, str, bytes]]) -> Written:
    """Write an archive under a temporary name, and rename it once it is on the disk.

    Args:
        path: of the archive.
        members: key, extension and content of each; names are ASCII, below 100 characters.
    """
    # Imported late: it brings torch, which most of data_tools does without.
    from webdataset.writer import TarWriter

    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w+b") as stream:
        with TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as archive:
            for key, extension, data in members:
                # One by one: TarWriter would sort a sample's members by extension.
                archive.write({"__key__": key, extension: data})
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return Written(size, digest)


def file_written(path: Path) -> Written | None:
    """Give the size and digest of a file, None if there is none."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Written(stream.tell(), digest)
    except FileNotFoundError:
        return None
