"""Reading shards, and comparing each with its hash on the way.

The hash is computed of the bytes that are read anyway, so comparing costs no second read. A
shard is compared when its end has been read; a reader that leaves it before reads on to there
first, unless the shard has been compared already in this run.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Self

import numpy as np

from casc.data.cache import cached_shard
from casc.data.index import Shard, Split
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.plan import Segment
from casc.data.remote import REPAIR, FetchError, is_local, join, location, open_remote
from casc.data.sample import iter_tar
from casc.data.status import OPENING, READING, Status, warn_on_stderr
from casc.errors import UserError
from casc.json_files import open_plain
from casc.printing import plain

Pair = tuple[str, bytes, bytes]
"""Key, image bytes, JSON bytes."""


class _Source:
    """What tarfile reads from: counts, hashes, and closes with whoever used it last."""

    def __init__(self, stream: BinaryIO, status: Status, hashed: bool) -> None:
        self.stream, self.status, self.hashed = stream, status, hashed
        self.at, self.digest = 0, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        if self.hashed:
            self.digest.update(data)
        self.at += len(data)
        self.status.set(READING, byte=self.at)
        return data

    def __del__(self) -> None:
        self.stream.close()


class OpenShard:
    """A shard that is read front to back, once, and compared with its hash.

    Raises:
        UserError: here and in all that reads: it isn't there, damaged, or not what the
            index says.
    """

    def __init__(
        self,
        root: str,
        shard: Shard,
        loading: RemoteConfig = DEFAULT_LOADING,
        status: Status | None = None,
        *,
        compared: bool = False,
    ) -> None:
        self.shard, self.status = shard, status or Status()
        self.place = join(root, shard.name)
        self.compared = compared or not shard.sha256
        stream = self._open(loading)
        self._source = _Source(stream, self.status, hashed=not self.compared)
        self._pairs = iter_tar(self._source, name=self.place)

    def pairs(self) -> Iterator[Pair]:
        """The samples from where the last one was taken; compared before the last is given."""
        for i in range(self.shard.samples):
            try:
                pair = next(self._pairs, None)
            except FetchError:
                raise
            except UserError as error:
                self.compare(str(error))
                raise
            if pair is None:
                text = f"ends after {i} samples, the index says {self.shard.samples}"
                self.compare(text)
                raise UserError(f"{self.place}: {text}; run `data_tools check`")
            if i == self.shard.samples - 1:
                self.compare()
            yield pair

    def compare(self, because: str = "") -> None:
        """Read on to the end and compare, if that hasn't been done.

        Raises:
            UserError: when the content isn't what the index says; `because` is what made
                the caller ask.
        """
        if self.compared:
            return
        while self._source.read(2**20):
            pass
        found = self._source.digest.hexdigest()
        if found != self.shard.sha256:
            seen = because.removeprefix(plain(f"{self.place}: "))
            raise UserError(
                f"{self.place}: its SHA-256 is {found}, the index says {self.shard.sha256}"
                + (f" ({seen})" if seen else "")
                + f"; {REPAIR}"
            )
        self.compared = True

    def close(self) -> None:
        """Close the file."""
        self._source.stream.close()

    def _open(self, loading: RemoteConfig) -> BinaryIO:
        self.status.set(OPENING)
        shard, place = self.shard, self.place
        if not is_local(place):
            stream, self.place, compared = remote_shard(place, shard, loading, self.status)
            self.compared |= compared
            return stream
        try:
            stream = open_plain(place)
        except FileNotFoundError:
            raise UserError(
                f"{place}: the shard is missing; copy it again from where it was made, or make"
                " the shards again with `data_tools shard`"
            ) from None
        except OSError as error:
            raise UserError(f"{place}: can't be opened ({error.strerror})") from None
        size = os.fstat(stream.fileno()).st_size
        if size != shard.bytes:
            stream.close()
            raise UserError(f"{place}: is {size} bytes, the index says {shard.bytes}; {REPAIR}")
        return stream


def remote_shard(
    place: str, shard: Shard, loading: RemoteConfig, status: Status
) -> tuple[BinaryIO, str, bool]:
    """Open a shard that lies elsewhere, or its copy in the cache.

    Returns:
        What to read from; what errors call it; whether it has been compared just now.

    Raises:
        UserError: it can't be had; reading may raise so too.
    """
    if loading.cache is not None:
        if not shard.sha256:
            raise UserError(f"{place}: the index has no SHA-256, which a cache needs")
        cached = cached_shard(place, shard, loading, status)
        if cached is not None:
            return cached.stream, f"{place} (in the cache: {cached.path})", cached.compared
        status.note(f"{place}: no room in the cache, streamed instead")
    return open_remote(place, shard.bytes, loading, status), place, False


class ShardReader:
    """Reads segments, and goes on in the open shard where one segment follows the other.

    As a context it finishes in the end, or only closes after an error.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split,
        loading: RemoteConfig = DEFAULT_LOADING,
        status: Status | None = None,
        compared: np.ndarray | None = None,
    ) -> None:
        """Read a split.

        Args:
            root: folder or URL of the shards.
            split: of its index.
            loading: how to read.
            status: is told what is being done.
            compared: `[shards]` uint8, 1 where a shard's content has been found right;
                readers that share it compare a shard once.
        """
        self.root, self.split, self.loading = location(root), split, loading
        self.status = status or Status()
        self.compared = np.zeros(len(split.shards), np.uint8) if compared is None else compared
        self.at = (-1, 0)
        self.open: OpenShard | None = None
        self.pairs: Iterator[Pair] = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if self.open is not None:
                self.open.close()

    def read(self, segment: Segment) -> list[Pair]:
        """(name for errors, image bytes, JSON bytes) of each sample of the segment."""
        if self.at != (segment.shard, segment.start):
            self.finish()
            self.status.set(OPENING, shard=segment.shard)
            self.open = OpenShard(
                self.root,
                self.split.shards[segment.shard],
                self.loading,
                self.status,
                compared=bool(self.compared[segment.shard]),
            )
            self.pairs, self.at = self.open.pairs(), (segment.shard, 0)
        assert self.open is not None
        self.status.set(READING, shard=segment.shard)
        found = []
        for i in range(self.at[1], segment.stop):
            pair = next(self.pairs)
            if i >= segment.start:
                found.append((f"{self.open.place}: {pair[0]}", *pair[1:]))
        self.at = (segment.shard, segment.stop)
        if self.open.compared:
            self.compared[segment.shard] = 1
        return found

    def finish(self) -> None:
        """Leave the open shard, once it has been compared."""
        if self.open is not None:
            if not self.compared[self.at[0]]:
                self.open.compare()
                self.compared[self.at[0]] = 1
            self.open.close()
            self.open = None
        self.at = (-1, 0)


def read_shard(
    root: str | os.PathLike[str],
    shard: Shard,
    loading: RemoteConfig = DEFAULT_LOADING,
    warn: Callable[[str], object] = warn_on_stderr,
) -> Iterator[Pair]:
    """Yield (key, image bytes, JSON bytes) of all samples of a shard, wherever it lies.

    Args:
        root: folder or URL.
        shard: of its index.
        loading: how it is fetched.
        warn: is told of downloads that had to be taken up again.

    Raises:
        UserError: it isn't there, damaged, or not what the index says.
    """
    status = Status()
    opened = OpenShard(location(root), shard, loading, status)
    try:
        for pair in opened.pairs():
            for note in status.taken_notes():
                warn(note)
            yield pair
    finally:
        opened.close()
