"""Saving behind the steps: the state is copied at once, and written by a thread.

The writing releases Python's lock nearly always, so a thread takes less from the steps than
another process would, which needs the state in shared memory and torch a second time.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from casc.checkpoints import format as checkpoint
from casc.checkpoints.state import State
from casc.device.devices import traits
from casc.errors import UserError
from casc.train.derived import trained_split
from casc.train.run import Run
from casc.train.start import data_position, fingerprint, weights_metadata


class _Write(NamedTuple):
    step: int
    stall: float
    """Seconds for which the steps had to wait."""
    done: Future[float]
    """Seconds that the writing took."""


class Saver:
    """Writes checkpoints while training goes on; on other ranks than the main one, none.

    One at a time: a save waits for the one before it. A copy of the state stays in the
    host's memory, since memory used for the first time is far slower than the copy.
    """

    def __init__(self, run: Run, state: State):
        self.run = run
        self.active = run.ranks.main and run.recipe.saves
        self.saved = state.step if state.step else -1
        """The last step whose checkpoint is there or being written."""
        self.write: _Write | None = None
        if self.active:
            self.data = fingerprint(trained_split(run.recipe, run.index), run.index.categories)
            pinned = traits(run.device).pin_memory
            self.host = State(*(_like(value, pinned) for value in state))
            self.pool = ThreadPoolExecutor(1, "saving")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self.active:
            return
        self.pool.shutdown()
        if kind and self.write:  # the error that ends the run shall be seen, not this one
            self._collect(raise_on_error=False)

    def save_async(self, state: State) -> None:
        """Take a copy of the state and have it written.

        Raises:
            UserError: the save before this one was needed and failed, or another run has taken
                the folder over.
        """
        if not self.active or self.saved == state.step:
            return
        if self.run.lock is not None:
            self.run.lock.check()
        began = time.perf_counter()
        if self.write:
            before = self.write.step
            self.wait()
            waited = time.perf_counter() - began
            if waited > 0.1:
                self.run.log.warn(
                    f"step {state.step:,} waited {waited:.1f} s for the"
                    f" checkpoint of step {before:,} to be written: save less often"
                    " (--save-steps), or to a faster disk"
                )
        host, copied = _copy(state, self.host, self.run.device)
        done = self.pool.submit(self._save, host, copied)
        self.saved = state.step
        self.write = _Write(state.step, time.perf_counter() - began, done)

    def poll(self) -> None:
        """Say how the save that was under way has ended, if it has.

        Raises:
            UserError: it failed, and it was the run's last.
        """
        if self.write and self.write.done.done():
            self._collect(raise_on_error=False)

    def wait(self, *, raise_on_error: bool = False) -> None:
        """Wait for the save that is under way.

        Args:
            raise_on_error: raise if it failed, even if it wasn't the run's last.

        Raises:
            UserError: as `poll`.
        """
        if self.write:
            self._collect(raise_on_error=raise_on_error)

    def _collect(self, *, raise_on_error: bool) -> None:
        assert self.write is not None
        (step, stall, done), self.write = self.write, None
        try:
            seconds = done.result()
        except UserError as error:
            self.saved = -1
            if raise_on_error or step == self.run.facts.steps:
                raise
            self.run.log.warn(f"{error}; training goes on")
            return
        except OSError as error:
            self.run.log.warn(f"an older checkpoint couldn't be deleted ({error})")
            return
        self.run.log.record(
            "save", step=step, seconds=round(seconds, 3), stall_seconds=round(stall, 4)
        )

    def _save(self, host: State, copied: torch.Event | None) -> float:
        began = time.perf_counter()
        if copied is not None:
            copied.synchronize()
        run = self.run
        position = data_position(run.recipe, run.facts, run.past, self.data, host.step)
        path = checkpoint.save(
            run.checkpoints,
            host,
            metadata=weights_metadata(run.recipe, run.index, host.step),
            position=position,
            averaged=run.recipe.ema.evaluate,
        )
        run.prune(path)
        return time.perf_counter() - began


def _like(value: Any, pinned: bool) -> Any:
    """Memory on the host for a copy of a field of the state, laid out as its tensors are."""
    if isinstance(value, dict):
        return {key: _like(entry, pinned) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(
        value.size(), value.stride(), dtype=value.dtype, device="cpu", pin_memory=pinned
    )
    return made.zero_()  # so that the system gives the pages now


def _copy(state: State, host: State, device: torch.device) -> tuple[State, torch.Event | None]:
    """Copy the tensors; gives what to wait for where that goes on behind the host."""
    made = State(*map(_filled, host, state))
    if device.type == "cpu":
        return made, None
    copied = torch.Event(device)
    copied.record(torch.accelerator.current_stream(device))
    return made, copied


def _filled(target: Any, source: Any) -> Any:
    if isinstance(source, dict):
        return {key: _filled(target[key], value) for key, value in source.items()}
    if not isinstance(source, Tensor):
        return source
    return target.copy_(source.detach(), non_blocking=True)
