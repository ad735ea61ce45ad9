"""A folder of shards that came over the network, held to a size and shared by all processes.

Files are named by their SHA-256, so they are never out of date, and two URLs of one shard
share one. A file appears by a rename once its content has been compared; until then it is a
`.part`, which the next process goes on with. Locks are the system's: they end with whoever
held them, however that ended.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from casc.data.index import Shard
from casc.data.loader_config import RemoteConfig
from casc.data.remote import open_remote
from casc.data.status import FETCHING, QUEUEING, Status
from casc.errors import UserError

PART, LOCK = ".part", ".lock"
_BLOCK = 2**20


class Cached(NamedTuple):
    """A shard's copy in the cache, open."""

    stream: BinaryIO
    path: str
    compared: bool
    """Whether its content was compared with the index just now."""


def cached_shard(place: str, shard: Shard, loading: RemoteConfig, status: Status) -> Cached | None:
    """Open a remote shard's copy in the cache, fetching it where there is none.

    Args:
        place: its URL or command.
        shard: of the index.
        loading: with a cache.
        status: is told what is being done.

    Returns:
        The copy; None where all room is taken by shards that other processes are fetching.

    Raises:
        UserError: it can't be had, isn't what the index says, or is too large for the cache.
    """
    assert loading.cache is not None
    path = loading.cache / f"{shard.sha256}.tar"
    compared = False
    try:
        loading.cache.mkdir(parents=True, exist_ok=True)
        while True:
            # Another process may remove it to make room, but not what is open already.
            with contextlib.suppress(FileNotFoundError):
                stream = path.open("rb")
                if os.fstat(stream.fileno()).st_size == shard.bytes:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # what was read last is removed last
                    return Cached(stream, str(path), compared)
                stream.close()  # the machine went down before all of it was on the disk
                path.unlink(missing_ok=True)
            status.set(QUEUEING)
            with _locked(_lock_of(path)):
                if not path.exists():
                    part = _make_room(path, shard, loading)
                    if part is None:
                        return None
                    _fetch(place, shard, part, path, loading, status)
                    compared = True
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"--loading.cache {loading.cache}: can't keep {place}: {error.strerror or error}; "
            + ("lower --loading.cache-gb or make room" if full else "choose another folder")
        ) from None


def _fetch(
    place: str, shard: Shard, part: Path, path: Path, loading: RemoteConfig, status: Status
) -> None:
    """Complete a part, compare it, and give it its name."""
    # Bytes of an interrupted fetch may be torn: then once more from the start.
    for mode in ("r+b", "w+b"):
        with part.open(mode) as file:
            found = _download(place, shard, file, loading, status)
        if found == shard.sha256:
            part.replace(path)
            return
    part.unlink()
    raise UserError(
        f"{place}: its SHA-256 is {found}, the index says {shard.sha256}; it was fetched"
        " twice: the file on the server is damaged or not of this index; copy it there"
        " again, or make the shards again with `data_tools shard`"
    )


def _download(
    place: str, shard: Shard, file: BinaryIO, loading: RemoteConfig, status: Status
) -> str:
    """Complete a partial file, and give the digest of all of it."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    have = file.tell()
    if have < shard.bytes:
        with open_remote(place, shard.bytes, loading, status, start=have) as stream:
            while block := stream.read(_BLOCK):
                status.set(FETCHING)
                digest.update(block)
                file.write(block)
    return digest.hexdigest()


def _make_room(path: Path, shard: Shard, loading: RemoteConfig) -> Path | None:
    """Remove what wasn't read for longest until the shard fits; gives its part, which exists.

    Parts count as the shards that they will be; those of dead processes are removed too.
    """
    limit = int(loading.cache_gb * 1e9)
    if shard.bytes > limit:
        raise UserError(
            f"--loading.cache-gb {loading.cache_gb:g}: {shard.name} alone has"
            f" {shard.bytes / 1e9:.3g} GB; make the cache larger, or leave out --loading.cache"
        )
    part = path.with_name(f"{shard.sha256}.{shard.bytes}{PART}")
    with _locked(path.with_name(f"room{LOCK}")):
        files = []
        for entry in os.scandir(path.parent):
            if entry.name.endswith((".tar", PART)) and entry.name != part.name:
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    is_part = entry.name.endswith(PART)
                    size = int(entry.name.split(".")[1]) if is_part else about.st_size
                    files.append((about.st_mtime_ns, size, Path(entry.path)))
        room = limit - sum(size for _, size, _ in files) - shard.bytes
        for _, size, name in sorted(files):
            if room >= 0:
                break
            if _remove(name):
                room += size
        if room < 0:
            return None
        part.touch()
    return part


def _remove(path: Path) -> bool:
    """Remove a file of the cache; not a part that somebody is still fetching."""
    if path.suffix != PART:
        path.unlink(missing_ok=True)
        return True
    with _locked(_lock_of(path), wait=False) as mine:
        if mine:
            path.unlink(missing_ok=True)
        return mine


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name.partition(".")[0] + LOCK)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, and remove it in the end; gives whether it could be had."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        # Whoever held it has removed it: then this is a lock on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
