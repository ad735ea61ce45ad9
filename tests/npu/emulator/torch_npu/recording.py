"""What a piece of code asks of the device: operators, launches, host reads, host copies."""

import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch_npu import _C

_NOT_THE_CALLER = (f"{os.sep}torch{os.sep}", f"{os.sep}torch_npu{os.sep}")


class Event(NamedTuple):
    """Something that the host and the device do together."""

    kind: str
    """"read": the host waits for the device; "copy": to the device; "fallback": the CPU computes
    what the device has no kernel for, so operands and results are copied, and the host waits."""
    name: str
    """The operator, or what kind of copy."""
    bytes: int
    where: str
    """File, line and source of the caller outside torch."""


class Recording:
    """What was recorded; the counts are there once the recording has ended."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.operators: dict[str, int] = {}
        """Calls that reached the device, views included, by full name."""
        self.launches: dict[str, int] = {}
        """Calls that compute."""
        self.signatures: set[str] = set()
        """Different launches: name, dtypes and shapes of the operands."""
        self.bytes = 0
        """Operands and results of all launches together."""
        self.doubles = 0
        """Launches with a float64 operand."""

    @property
    def reads(self) -> list[Event]:
        """When the host waited for the device."""
        return [event for event in self.events if event.kind == "read"]

    @property
    def fallbacks(self) -> list[Event]:
        """Operators without a kernel."""
        return [event for event in self.events if event.kind == "fallback"]

    @property
    def copies(self) -> list[Event]:
        """From the host to the device."""
        return [event for event in self.events if event.kind == "copy"]


@contextmanager
def recording() -> Iterator[Recording]:
    """Record all that is done inside, by whichever thread."""
    made = Recording()

    def hear(kind: str, name: str, size: int) -> None:
        made.events.append(Event(kind, name, size, _caller()))

    _C.start(hear)
    try:
        yield made
    finally:
        for name, value in _C.stop().items():
            setattr(made, name, value)


@contextmanager
def without_fallbacks(exempt: Iterable[str] = ()) -> Iterator[None]:
    """Raise where an operator has no kernel, unless it is exempt (`aten::add`, no overload)."""
    _C.deny_fallbacks(True, list(exempt))
    try:
        yield
    finally:
        _C.deny_fallbacks(False, [])


def places(events: Iterable[Event]) -> list[tuple[str, int]]:
    """Where events come from, most frequent first."""
    return Counter(f"{event.name} at {event.where}" for event in events).most_common()


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()[:-2]):
        if not any(part in frame.filename for part in _NOT_THE_CALLER):
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "a thread of torch's"
