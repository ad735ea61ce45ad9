"""How batches are read: settings that change speed and robustness, never what is learnt."""

import math
from dataclasses import dataclass
from pathlib import Path

from casc.errors import UserError


@dataclass(frozen=True)
class RemoteConfig:
    """How files come that lie elsewhere; files of this machine are just opened."""

    retries: int = 8
    """How often a broken or stalled download is taken up again where it stopped, without a
    byte more in between, before the run ends."""
    timeout: float = 30.0
    """Seconds that a server may take to accept a connection, and to send the next bytes."""
    deadline: float = 300.0
    """Seconds that the index may take in all, retries and a server that trickles included."""
    backoff: float = 0.5
    """Seconds before the first retry; each further one waits twice as long, up to 60."""
    cache: Path | None = None
    """Folder on a local disk for shards that come over the network, shared by all processes;
    without one they are streamed anew each time."""
    cache_gb: float = 100.0
    """Size that the cache is held to, in 10^9 bytes; what wasn't read for longest goes first."""
    allow_commands: bool = False
    """Let the shards' place be pipe:COMMAND, which runs COMMAND in a shell to read each file."""


@dataclass(frozen=True)
class EvalLoaderConfig(RemoteConfig):
    """How a split is read front to back."""

    workers: int = 2
    """Reading processes per rank; 0 reads in the process that computes."""
    prefetch: int = 4
    """Batches that each worker keeps ready."""


@dataclass(frozen=True)
class TrainLoaderConfig(EvalLoaderConfig):
    """How a split is read to train on; none of it changes what an image sees."""

    window: int = 128
    """Encoded images per bucket that a worker holds in memory to draw from in random order."""


DEFAULT_LOADING = TrainLoaderConfig()


MOST_WORKERS = 1024
"""Processes that read, or make shards: more than machines have processors."""


def check_loading(loading: RemoteConfig) -> None:
    """Refuse settings that can't be honoured.

    Raises:
        UserError: naming the flag to change.
    """
    for name, least in (("workers", 0), ("prefetch", 1), ("window", 1), ("retries", 0)):
        value = getattr(loading, name, least)
        if value < least:
            raise UserError(f"--loading.{name} {value}: must be at least {least}")
    if getattr(loading, "workers", 0) > MOST_WORKERS:
        workers = getattr(loading, "workers", 0)
        raise UserError(f"--loading.workers {workers}: must be at most {MOST_WORKERS}")
    for name, zero in (
        ("timeout", False),
        ("deadline", False),
        ("backoff", True),
        ("cache_gb", False),
    ):
        value = getattr(loading, name)
        if not (0 <= value < math.inf) or (value == 0 and not zero):
            flag = name.replace("_", "-")
            least = "at least" if zero else "more than"
            raise UserError(f"--loading.{flag} {value:g}: must be {least} 0, and finite")
