"""What every reader owes to hostile input: a result or one line, in little time and memory.

And nothing else: nothing is written but below the folder that is meant for it, nothing is started,
nobody but this machine is spoken to.
"""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from casc.errors import UserError
from casc.printing import _UNSAFE

SECONDS, MEGABYTES = 2.0, 500


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Memory that is asked for beyond the limit isn't given; what waits for ever is ended."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20, before[1]))
    handler = signal.signal(signal.SIGALRM, _hung)
    signal.alarm(60)  # of a busy machine; processor time is what counts
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Watch:
    """What was done meanwhile that shouldn't be."""

    below: str | None = None
    on = False
    seen: list[str] = []  # noqa: RUF012


_WRITES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1,
           "os.rename": 2, "os.link": 2, "os.symlink": 2}  # fmt: skip
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _Watch.on:
        return
    paths: tuple[Any, ...] = args[: _WRITES.get(event, 0)]
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        paths = args[:1]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.path.realpath(os.fsdecode(path))
            inside = _Watch.below is not None and Path(name).is_relative_to(_Watch.below)
            if not inside and "__pycache__" not in name and name != os.devnull:
                _Watch.seen.append(f"{event} {name}")
    elsewhere = event == "socket.connect" and args[1][0] != "127.0.0.1"
    if event in _STARTS or elsewhere:
        _Watch.seen.append(f"{event} {args}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def _watched(below: Path | None) -> Iterator[None]:
    _Watch.on, _Watch.below = True, None if below is None else os.path.realpath(below)
    _Watch.seen = []
    try:
        yield
    finally:
        _Watch.on = False


def judged(call: Callable[[], Any], below: Path | None = None) -> str | None:
    """The line by which a call refuses its input; None where it gave a result.

    Args:
        call: what reads.
        below: where it may write, if anywhere.

    Raises:
        AssertionError: it does anything else, or takes more than it may.
    """
    began = time.process_time()
    line = None
    with limited(), _watched(below):
        try:
            call()
        except UserError as error:
            line = str(error)
    spent = time.process_time() - began
    assert spent < SECONDS, f"{spent:.1f} s of processor time: {line}"
    assert not _Watch.seen, _Watch.seen
    if line is not None:
        assert line.strip()
        # Refused for want of memory only: on a larger machine it would be had.
        assert "MemoryError" not in line, line
        assert "allocate" not in line, line
        assert not _UNSAFE.search(line), line
        assert len(line) < 3000, line
    return line


def _hung(*_: object) -> None:
    raise AssertionError("it waits for ever")
