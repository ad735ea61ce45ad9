"""Ending a run on a signal: after the step, with a checkpoint, on all ranks alike.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for it. One that comes again, later than launchers
repeat what the scheduler has sent to everyone, ends the process at once.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from casc.device.signals import ENDS
from casc.distributed import Ranks, meeting_point

LOOK = 0.5
"""Seconds between looks at whether another rank was asked to end."""
REPEAT = 2.0
"""Seconds within which another signal is taken for the same request."""
BEAT = 2.0
"""Seconds between two signs of life in the store."""
MISSED = 60.0
"""Seconds of waiting without a rank's sign of life after which it is taken for lost."""


class StoppedError(SystemExit):
    """The run was asked to end and has saved; the exit status is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Stopping:
    """Listens to signals while its context is open.

    A signal is noted, and the ranks tell each other of it, by one number per step sent from
    host to host: it is under way while the step is computed, and needs no look at the device.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.number = 0
        self.asked_at = 0.0
        self.at_once = False
        self.parts = 0
        self.before: dict[signal.Signals, Any] = {}
        # Between the hosts: devices have no say in it.
        self.group: Any = None
        if ranks.world > 1:
            alike = dist.get_backend() == "gloo"
            self.group = dist.group.WORLD if alike else dist.new_group(backend="gloo")
        self.flag = torch.zeros((), dtype=torch.int32)
        self.work: Any = None
        self.over = threading.Event()

    def __enter__(self) -> Self:
        # Python allows it nowhere else; a run in another thread is its program's to end.
        if threading.current_thread() is threading.main_thread():
            for each in ENDS:
                self.before[each] = signal.signal(each, self._note)
        if self.group is not None:
            work = (self.over, _beats(self.ranks.rank))
            threading.Thread(target=_beat, args=work, name="signs of life", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def start_poll(self) -> None:
        """Begin a step: send whether this rank was asked to end."""
        if self.group is not None:
            self.flag.fill_(self.number)
            self.work = dist.all_reduce(
                self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True
            )

    def poll_result(self) -> int:
        """End a step: the signal that some rank had been sent when the step began, or 0."""
        if self.group is None:
            return self.number
        self.work.wait()
        return int(self.flag)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What runs for minutes without a safe point and leaves nothing: a signal ends it there.

        Raises:
            StoppedError: on a signal.
        """
        if self.number:
            raise StoppedError(self.number)
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def between_steps(self) -> "SafePoints":
        """For what takes minutes and can be done again; all ranks call this alike."""
        self.parts += 1
        return SafePoints(self, self.parts)

    def _note(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.number:
            if now - self.asked_at > REPEAT:
                os._exit(128 + number)
            return
        self.number, self.asked_at = number, now
        if self.ranks.main:
            # print could have been interrupted in the middle of a line of its own.
            os.write(2, f"{name}: leaving after the step; again to leave at once\n".encode())
        if self.at_once:
            raise StoppedError(number)


class SafePoints:
    """Points at which work between steps may be left; a signal to one rank ends it on all.

    Ranks are at different points at one time, so they leave word for each other in the store
    that they met at, and meet once more before they exchange anything.
    """

    def __init__(self, stopping: Stopping, part: int):
        self.stopping, self.key, self.looked = stopping, f"casc stop {part}", -math.inf

    def pass_by(self) -> None:
        """A point where the work may be left: call it every second or so.

        Raises:
            StoppedError: some rank was asked to end.
        """
        number = self.stopping.number
        if self.stopping.group is None:
            if number:
                raise StoppedError(number)
            return
        if not number and time.monotonic() - self.looked < LOOK:
            return
        self.looked, store = time.monotonic(), meeting_point()
        if number:
            store.set(self.key, str(number))
        if store.check([self.key]):
            self._leave()

    def meet(self) -> None:
        """Wait for all ranks to have come this far: from here on nobody leaves.

        Raises:
            StoppedError: some rank was asked to end before it was here.
            RuntimeError: a rank has ended without a word, as `casc.distributed.is_lost` knows it.
        """
        self.looked = -math.inf
        self.pass_by()
        if self.stopping.group is None:
            return
        store, ranks = meeting_point(), self.stopping.ranks
        store.set(self._mark("is done", ranks.rank), "")
        for rank in range(ranks.world):
            for _ in self._pauses_until("is done", rank):
                if store.check([self.key]):
                    self._leave()

    def _leave(self) -> NoReturn:
        """The first rank may keep the store, so it leaves when the others have read the word."""
        store, ranks = meeting_point(), self.stopping.ranks
        number = int(store.get(self.key))
        store.set(self._mark("leaves", ranks.rank), "")
        if ranks.main:
            patience = MISSED
            for rank in range(ranks.world):
                with suppress(RuntimeError):  # one that is gone needs no word
                    for pause in self._pauses_until("leaves", rank):
                        patience -= pause
                        if patience < 0:
                            raise StoppedError(number)
        raise StoppedError(number)

    def _mark(self, what: str, rank: int) -> str:
        return f"{self.key}: rank {rank} {what}"

    def _pauses_until(self, what: str, rank: int) -> Iterator[float]:
        """Short sleeps, in seconds, until a rank has left its mark.

        Raises:
            RuntimeError: it gives no sign of life.
        """
        store, pause = meeting_point(), LOOK / 5
        # Pauses are counted, not the time: a job that was suspended whole has missed nothing.
        beats, silent = -1, 0.0
        while not store.check([self._mark(what, rank)]):
            before, beats = beats, store.add(_beats(rank), 0)
            silent = silent + pause if beats == before else 0.0
            if silent > MISSED:
                raise RuntimeError(
                    f"timed out waiting for rank {rank}, of which there has been no sign of life"
                    f" for {MISSED:g} s"
                )
            yield pause
            time.sleep(pause)


def _beats(rank: int) -> str:
    return f"casc signs of life of rank {rank}"


def _beat(over: threading.Event, key: str) -> None:
    # Without the rank that keeps the store there is nobody to tell; the run finds that out itself.
    with suppress(RuntimeError):
        while not over.wait(BEAT):
            meeting_point().add(key, 1)
