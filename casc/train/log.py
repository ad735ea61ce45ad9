"""What a run tells: lines for people, `log.jsonl` for programs, TensorBoard on request."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from casc.errors import UserError

LOG = "log.jsonl"


class RunLog:
    """Writes a run's records; on ranks other than the main one it keeps silent.

    On a terminal a progress bar shows the latest record, elsewhere each record is a line.
    """

    def __init__(
        self, folder: Path, *, start: int, total: int, main: bool = True, tensorboard: bool = False
    ):
        self.main, self.start, self.total = main, start, total
        self.began = time.monotonic()
        self.file = self.board = self.bar = None
        if not main:
            return
        self.file = (folder / LOG).open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            self.board = _summary_writer(folder)
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def record(self, kind: str, **values: Any) -> None:
        """Append a record to `log.jsonl`; what isn't finite becomes a string."""
        if self.file:
            line = {"kind": kind, "time": round(time.time(), 3), **values}
            self.file.write(json.dumps(_plain(line), allow_nan=False) + "\n")

    def say(self, text: str, kind: str = "message", **values: Any) -> None:
        """Tell people, and record it."""
        if self.main:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)
            self.record(kind, text=text, **values)

    def warn(self, text: str) -> None:
        """Tell people of something that they may want to change."""
        self.say(f"warning: {text}", "warning")

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
            print(f"step {step}/{self.total}  {short}  eta {self._eta(step)}", flush=True)
        self.scalars(step, values, "train")

    @contextmanager
    def progress(self, total: int, title: str) -> Iterator[Callable[[int], object]]:
        """A bar beneath for something else than steps, on a terminal; gives its `update`."""
        if self.bar is None:
            yield lambda count: None
            return
        with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def scalars(self, step: int, values: Mapping[str, float | None], group: str) -> None:
        """Send figures to TensorBoard, if it was asked for."""
        if self.board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flush and close everything."""
        for output in (self.bar, self.board, self.file):
            if output is not None:
                output.close()

    def _eta(self, step: int) -> str:
        done = step - self.start
        left = (time.monotonic() - self.began) * (self.total - step) / max(done, 1)
        hours, minutes = divmod(int(left) // 60, 60)
        return f"{hours}:{minutes:02d}:{int(left) % 60:02d}"


@contextmanager
def run_log(folder: Path, **options: Any) -> Iterator[RunLog]:
    """A log that is closed whatever happens."""
    log = RunLog(folder, **options)
    try:
        yield log
    finally:
        log.close()


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: not installed; pip install 'casc[tensorboard]'") from None
    return SummaryWriter(folder / "tensorboard")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
