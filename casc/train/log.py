"""What a run tells: lines for people, `log.jsonl` for programs, and what else is asked for.

Each rank also has a file of its own, `logs/rank-N.jsonl`, for what happens to it alone:
where it runs, warnings, errors.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from casc.errors import UserError
from casc.printing import plain, redacted, say
from casc.train.sinks import Sink, tensorboard

LOG, LOGS = "log.jsonl", "logs"


class RunLog:
    """Writes a run's records; ranks other than the main one write into their own file only.

    On a terminal a progress bar shows the latest record, elsewhere each record is a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        rank: int = 0,
        sinks: Sequence[Sink] = (),
    ):
        self.rank, self.main, self.start, self.total = rank, rank == 0, start, total
        self.began = time.monotonic()
        self.file = self.bar = None
        self.sinks: list[Sink] = []
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        self.own = _Lines(folder / LOGS / f"rank-{rank}.jsonl")
        if not self.main:
            return
        self.file = _Lines(folder / LOG)
        self.sinks += sinks
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def record(self, kind: str, **values: Any) -> None:
        """Append a record to `log.jsonl`, where what isn't finite is a string, and hand it on."""
        if self.file:
            record = self.file.add(kind, values)
            for sink in [*self.sinks]:
                self._hand(record, sink)

    def note(self, kind: str, **values: Any) -> None:
        """Append a record to this rank's own file."""
        self.own.add(kind, values)

    def say(self, text: str, kind: str = "message", **values: Any) -> None:
        """Tell people, and record it."""
        if self.main:
            tqdm.write(plain(text, lines=True)) if self.bar is not None else say(text)
            self.record(kind, text=text, **values)

    def warn(self, text: str) -> None:
        """Tell people of something that they may want to change."""
        self.say(f"warning: {text}", "warning")
        self.note("warning", text=text)

    def error(self, text: str, kind: str = "error", *, shown: bool = True, **values: Any) -> None:
        """Tell people of what has gone wrong on this rank, whichever it is."""
        if shown:
            say(f"rank {self.rank}: {text}", sys.stderr)
        self.record(kind, text=text, **values)
        self.note(kind, text=text, **values)

    def advance(self, step: int) -> None:
        """Move the bar to a number of steps."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Show and record the figures of the steps since the last record."""
        if not self.main:
            return
        self.record("train", step=step, **values)
        short = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.3g}"
            f"  {values['images_per_second']:.2f} img/s  wait {values['data_wait']:.0%}"
            f"  mem {values['memory'] / 2**30:.1f} GiB"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(short)
        else:
            say(f"step {step}/{self.total}  {short}  eta {self._eta(step)}")

    @contextmanager
    def progress(self, total: int, title: str) -> Iterator[Callable[[int], object]]:
        """A bar beneath for something else than steps, on a terminal; gives its `update`."""
        if self.bar is None:
            yield lambda count: None
            return
        with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def close(self) -> None:
        """Flush and close everything."""
        for output in (self.bar, self.file, self.own):
            if output is not None:
                output.close()

    def _hand(self, record: Mapping[str, Any], sink: Sink) -> None:
        try:
            sink(record)
        except Exception as error:  # a sink may be anybody's, and training is worth more
            self.sinks.remove(sink)
            name = getattr(sink, "__qualname__", type(sink).__name__)
            reason = f"{type(error).__name__}: {error}"
            self.warn(f"{name}: {reason}; it gets no more records, training goes on")

    def _eta(self, step: int) -> str:
        done = step - self.start
        left = (time.monotonic() - self.began) * (self.total - step) / max(done, 1)
        hours, minutes = divmod(int(left) // 60, 60)
        return f"{hours}:{minutes:02d}:{int(left) % 60:02d}"


@contextmanager
def run_log(
    folder: Path,
    *,
    start: int,
    total: int,
    rank: int = 0,
    board: bool = False,
    sinks: Sequence[Sink] = (),
) -> Iterator[RunLog]:
    """A log that is closed whatever happens.

    Args:
        folder: the run's.
        start: steps made before.
        total: steps of the whole run.
        rank: this process's; only the main rank's records reach `log.jsonl` and sinks.
        board: whether to write TensorBoard's format too.
        sinks: functions of a record.

    Raises:
        UserError: the folder can't be written, or TensorBoard isn't installed.
    """
    with ExitStack() as stack:
        if board and rank == 0:
            sinks = [*sinks, stack.enter_context(tensorboard(folder / "tensorboard"))]
        try:
            log = RunLog(folder, start=start, total=total, rank=rank, sinks=sinks)
        except OSError as error:
            raise UserError(f"--out {folder}: can't be written ({error})") from None
        stack.callback(log.close)
        yield log


def logged_figures(folder: Path, step: int) -> list[dict[str, float | None]]:
    """Figures of a run's evaluations up to a step, in order, from its log; none without a log.

    What came of steps that the run left behind, when it went on from an earlier one, doesn't count.
    """
    found: dict[int, dict[str, float | None]] = {}
    with contextlib.suppress(FileNotFoundError), (folder / LOG).open("rb") as lines:
        for line in lines:
            # A line may have been cut short by a crash.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["kind"] == "run":
                    found = {at: found[at] for at in found if at <= record["step"]}
                elif record["kind"] == "evaluation":
                    found[record["step"]] = dict(record["figures"])
    return [found[at] for at in sorted(found) if at <= step]


class _Lines:
    """A file of JSON lines. Not being able to write it is said once, and ends nothing."""

    def __init__(self, path: Path):
        self.path, self.failed = path, False
        self.file = path.open("ab+", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self._write(b"\n")  # the last writer was killed within a line

    def add(self, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append a record, and give it back."""
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        self._write((json.dumps(_plain(record), allow_nan=False) + "\n").encode())
        return record

    def _write(self, line: bytes) -> None:
        try:
            self.file.write(line)
        except OSError as error:
            if not self.failed:
                say(f"warning: {self.path}: {error}; training goes on", sys.stderr)
            self.failed = True

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redacted(str(value)) if isinstance(value, (Path, str)) else value
