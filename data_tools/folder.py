"""The folder that shards are written to: its lock, its index, and leftovers of earlier runs."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from casc.data.index import INDEX_NAME, Index, Split, read_index, write_index
from casc.errors import UserError

_SHARD_NAME = re.compile(r"[\w.-]+-\d{6}\.tar")


def old_index(out: Path, say: Callable[[str], None]) -> Index | None:
    """Read the index of an earlier run; one that can't be read is set aside."""
    file = out / INDEX_NAME
    if not file.exists():
        return None
    try:
        return read_index(file)
    except UserError as error:
        aside = file.with_name(f"{INDEX_NAME}.old")
        file.replace(aside)
        say(f"{error}\nit was moved to {aside}")
        return None


def enter_index(out: Path, index: Index) -> None:
    """Write the index, or remove it where there is nothing to write."""
    if index.splits:
        write_index(out, index)
    else:
        (out / INDEX_NAME).unlink(missing_ok=True)


def remove_stale(out: Path, split: str, made: Split, say: Callable[[str], None]) -> None:
    """Remove shards of an earlier run that a split doesn't have any more."""
    names = {shard.name for shard in made.shards}
    stale = [
        path
        for path in sorted((out / split).glob("*.tar"))
        if f"{split}/{path.name}" not in names and _SHARD_NAME.fullmatch(path.name)
    ]
    for path in stale:
        path.unlink()
    if stale:
        say(f"{split}: {len(stale)} shards of an earlier run removed")


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder, where the system can."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another data_tools shard is writing there") from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(descriptor)
