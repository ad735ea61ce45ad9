"""Tar files whose bytes depend on nothing but what is in them."""

import hashlib
import io
import os
import tarfile
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


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Written:
    """Write a ustar archive under a temporary name, and rename it once it is on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w+b") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)  # owner, group and time are all 0
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        size = stream.tell()
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
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
