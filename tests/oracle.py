"""What every reader owes to hostile input: a result or one line, in little time and memory."""

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
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


def judged(call: Callable[[], Any]) -> str | None:
    """The line by which a call refuses its input; None where it gave a result.

    Raises:
        AssertionError: it does anything else, or takes more than it may.
    """
    began = time.process_time()
    line = None
    with limited():
        try:
            call()
        except UserError as error:
            line = str(error)
    spent = time.process_time() - began
    assert spent < SECONDS, f"{spent:.1f} s of processor time: {line}"
    if line is not None:
        assert line.strip()
        assert not _UNSAFE.search(line), line
        assert len(line) < 3000, line
    return line


def _hung(*_: object) -> None:
    raise AssertionError("it waits for ever")
