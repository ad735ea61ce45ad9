"""What a rank is doing, and who tells when it stops doing anything: watchdog, crash report."""

import faulthandler
import json
import platform
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import casc
from casc.config import to_json
from casc.distributed import is_lost
from casc.errors import UserError
from casc.printing import plain
from casc.train.log import LOGS, RunLog
from casc.train.run import Run


class Activity:
    """What this rank is at. Each change is a sign of life."""

    def __init__(self, step: int):
        self.what, self.step, self.since = "starting", step, time.monotonic()
        self.bucket: int | None = None
        self.image_ids: Tensor | None = None
        self.detail: Callable[[], str] = lambda: ""
        """More to say when asked, such as which shards the workers read."""

    def set(self, what: str, step: int | None = None) -> None:
        """Say what begins, or that it goes on."""
        self.what, self.since = what, time.monotonic()
        self.step = self.step if step is None else step

    def batch(self, bucket: int, image_ids: Tensor) -> None:
        """Say that a batch has arrived and its step begins."""
        self.bucket, self.image_ids = bucket, image_ids
        self.set("computing")

    def __str__(self) -> str:
        detail = self.detail()
        return f"{self.what}, step {self.step:,}" + (f" ({detail})" if detail else "")


@contextmanager
def watching(run: Run, step: int) -> Iterator[Activity]:
    """Watch over what is done inside, with a watchdog and a report if it crashes.

    Raises:
        UserError: another rank is no longer there.
    """
    activity = Activity(step)
    try:
        with watchdog(activity, run.log, run.recipe.watchdog_minutes * 60, run.recipe.folder):
            yield activity
    except Exception as error:
        lost = run.ranks.world > 1 and is_lost(error)
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        report = _write_report(run, activity, error)
        where = f"; see {report}" if report else ""
        if lost:
            text = (
                f"lost touch with another rank ({activity.what}, step {activity.step:,}; {text})."
                f" Its own file in {run.recipe.folder / LOGS} says more, if it could write it;"
                " the same command goes on from the newest checkpoint"
            )
        text += where
        shown = not lost and not isinstance(error, UserError)  # those are shown when they arrive
        run.log.error(text, "crash", shown=shown, step=activity.step, activity=activity.what)
        if lost:
            raise UserError(f"rank {run.ranks.rank}: {text}") from error
        raise


@contextmanager
def watchdog(activity: Activity, log: RunLog, seconds: float, folder: Path) -> Iterator[None]:
    """Report when nothing has changed for so long, again and again; 0 never does.

    It ends nothing: a rank that waits for another one may well be the healthy one, and what
    can be given up has time-outs of its own (reading data, the process group).
    """
    if not seconds:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        reported = 0.0
        while not over.wait(min(seconds / 4, 10)):
            since = activity.since
            still = time.monotonic() - max(since, reported)
            if still >= seconds:
                reported = time.monotonic()
                _report_stall(activity, log, folder, reported - since)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report_stall(activity: Activity, log: RunLog, folder: Path, seconds: float) -> None:
    stacks = folder / LOGS / f"stacks-rank-{log.rank}.txt"
    text = f"no progress for {seconds / 60:.3g} minutes: {activity}; stacks in {stacks}"
    try:
        with stacks.open("a", encoding="utf-8") as file:
            file.write(f"\n{time.strftime('%F %T')} {text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        text += f" (not written: {error})"
    log.error(text, "stuck", step=activity.step, activity=activity.what, seconds=round(seconds))


def _write_report(run: Run, activity: Activity, error: Exception) -> Path | None:
    """Write down all that helps to find out; None where not even that can be written."""
    ids = "none yet" if activity.image_ids is None else str(activity.image_ids.tolist())
    buckets = run.index.splits[run.recipe.train_split].buckets
    bucket = "none yet" if activity.bucket is None else buckets[activity.bucket].name
    path = run.recipe.folder / LOGS / f"crash-rank-{run.ranks.rank}.txt"
    text = f"""{type(error).__name__}: {error}

time      {time.strftime("%F %T %z")}
rank      {run.ranks.rank} of {run.ranks.world}, on {platform.node()}, {run.device}
activity  {activity}
bucket    {bucket}
images    {ids}
versions  casc {casc.__version__}, torch {torch.__version__}, Python {platform.python_version()}

{"".join(traceback.format_exception(error))}
recipe    {json.dumps(to_json(run.recipe), indent=1)}
"""
    try:
        path.write_text(plain(text, lines=True), encoding="utf-8")
    except OSError:
        return None
    return path
