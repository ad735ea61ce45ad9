"""What each worker is doing right now, in memory that the training process can read.

A run that stands still is mostly a worker that waits for a disk or a server. It can't say so
itself; so it leaves a few numbers behind, and whoever misses a batch reads them.
"""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from casc.printing import plain, say

if TYPE_CHECKING:  # sharding's workers start in a moment, without torch
    from torch import Tensor

STATES = (
    "starting",
    "opening",
    "reading",
    "decoding",
    "waiting to retry",
    "waiting for another process to fetch",
    "fetching",
    "waiting to be asked for a batch",
    "at its end",
)
STARTING, OPENING, READING, DECODING, RETRYING, QUEUEING, FETCHING, IDLE, ENDED = range(len(STATES))
_SHARD, _STATE, _BYTE, _SINCE = range(4)


class Status:
    """One worker's row; only that worker writes it."""

    def __init__(self, row: np.ndarray | None = None) -> None:
        self.row = np.zeros(4, np.int64) if row is None else row
        self.notes: list[str] = []
        """What the worker has to say, such as of a broken download; sent with its next batch."""
        self.row[_SHARD] = -1
        self.set(STARTING)

    def set(self, state: int, *, shard: int | None = None, byte: int | None = None) -> None:
        """Say what is being done, with which shard (position in the split), at which byte."""
        row = self.row
        if shard is not None:
            row[_SHARD], row[_BYTE] = shard, 0
        if byte is not None:
            row[_BYTE] = byte
        row[_STATE] = state
        row[_SINCE] = time.monotonic_ns()

    def note(self, text: str) -> None:
        """Leave a line for the log."""
        self.notes.append(text)

    def taken_notes(self) -> tuple[str, ...]:
        """The lines since last time."""
        notes = tuple(self.notes)
        self.notes.clear()
        return notes


def warn_on_stderr(text: str) -> None:
    """What becomes of a worker's lines where nobody asked for them."""
    say(plain(f"warning: {text}"), sys.stderr)


def shared_rows(workers: int) -> "Tensor":
    """Rows for so many workers, `[workers, 4]` int64 in shared memory."""
    import torch

    return torch.zeros(max(workers, 1), 4, dtype=torch.int64).share_memory_()


def describe(row: np.ndarray, places: Sequence[str]) -> str:
    """A row in words: `reading train/000012.tar at byte 4,096, for 42 s`.

    Args:
        row: of `shared_rows`.
        places: of the split's shards.
    """
    shard, state, byte, since = (int(value) for value in row)
    if not since:
        return STATES[STARTING]
    text = STATES[state]
    if shard >= 0 and state != ENDED:
        link = "; last read" if state == IDLE else ""
        text += f"{link} {places[shard]} at byte {byte:,}"
    return f"{text}, for {(time.monotonic_ns() - since) / 1e9:.0f} s"
