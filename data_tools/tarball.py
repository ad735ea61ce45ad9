"""Tar files whose bytes depend on nothing but what is in them."""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
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
    digest, size = hashlib.sha256(), 0
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as stream:
        for block in _blocks(members):
            stream.write(block)
            digest.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return Written(size, digest.hexdigest())


def _blocks(members: Iterable[tuple[str, str, bytes]]) -> Iterator[bytes]:
    size = 0
    for key, extension, data in members:
        # As webdataset's TarWriter has it: owned by nobody, of no time.
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        filling = -len(data) % tarfile.BLOCKSIZE
        yield member.tobuf(tarfile.USTAR_FORMAT)
        yield data
        yield bytes(filling)
        size += tarfile.BLOCKSIZE + len(data) + filling
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(size + end) % tarfile.RECORDSIZE)


def file_written(path: Path) -> Written | None:
    """Give the size and digest of a file, None if there is none."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Written(stream.tell(), digest)
    except FileNotFoundError:
        return None
