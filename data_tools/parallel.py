"""Work spread over processes, with results in order and a progress bar."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from casc.device.signals import end_with_parent
from casc.errors import UserError
from casc.printing import plain

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Processes to use by default: one a core this process may run on, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 16)


def map_tasks(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int,
    title: str,
    unit: str = "image",
    weights: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[R]:
    """Yield `function(task)` for every task, in order.

    Args:
        function: importable by name; it runs in processes of its own, unless `workers` is 1.
        tasks: what to call it with.
        workers: number of processes.
        title: shown beside the progress bar.
        unit: what the bar counts.
        weights: how many units each task is worth, 1 by default.
        progress: false shows no bar; it's not shown either where stderr isn't a terminal.

    Raises:
        UserError: when a process dies.
    """
    weights = [1] * len(tasks) if weights is None else weights
    disable = None if progress else True  # None: tqdm looks whether it is a terminal
    bar = tqdm(total=sum(weights), desc=plain(title), unit=unit, disable=disable, leave=False)
    workers = min(workers, len(tasks))
    with bar:
        if workers <= 1:
            for task, weight in zip(tasks, weights, strict=True):
                yield function(task)
                bar.update(weight)
            return
        # Spawned, because a fork of a process with threads may lock up, and because the
        # parent's annotation lists needn't be in the workers.
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=end_with_parent
        )
        with _one_interrupt():
            try:
                with _no_interrupts():
                    results = pool.map(function, tasks)
                for result, weight in zip(results, weights, strict=True):
                    yield result
                    bar.update(weight)
            except BrokenProcessPool:
                raise UserError(
                    "a worker process died, perhaps for lack of memory; try fewer --workers"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def interrupt_once(*_: object) -> None:
    """Take Control-C as usual, and ignore further ones.

    A signal handler. A second one would catch the pool while it shuts down, and leave it
    waiting for ever, or the program while it says goodbye.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _one_interrupt() -> contextlib.AbstractContextManager[None]:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return contextlib.nullcontext()  # whoever set another handler takes care
    return _handling_interrupts(interrupt_once)


def _no_interrupts() -> contextlib.AbstractContextManager[None]:
    """Let workers be born deaf to Control-C, which goes to the whole process group.

    The parent ends them in order. Otherwise each would print a traceback.
    """
    return _handling_interrupts(signal.SIG_IGN)


@contextlib.contextmanager
def _handling_interrupts(handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
