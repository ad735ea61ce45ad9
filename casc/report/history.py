"""What a run's folder tells: its log, evaluations and recipe.

A run that was stopped and continued wrote all its parts into one log. Steps that a later part
took again, because the newest checkpoint was older than the stop, count as they were taken last.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from casc.checkpoints.format import upgrade_recipe
from casc.errors import UserError
from casc.evaluate.metrics import Evaluation, read_evaluation
from casc.json_files import parse_json, read_json
from casc.train.log import LOG
from casc.train.run import EVALUATIONS
from casc.train.start import RECIPE

Record = dict[str, Any]
_TOLD = ("warning", "error", "crash", "stuck", "stopped")


class Part(NamedTuple):
    """A run between its start, or where it was taken up again, and its next stop."""

    step: int
    """Updates made before."""
    began: float
    """Seconds since 1970."""
    facts: Record
    """The log's record of kind `run`."""


class History(NamedTuple):
    """All that is known of a run."""

    folder: Path
    recipe: Record
    parts: list[Part]
    train: list[Record]
    """Means over intervals of steps, ascending by step, each step counted once."""
    evaluations: list[Record]
    """Figures in [0, 1] with their step, ascending."""
    messages: list[Record]
    """Warnings, errors and stops, in the order of the log."""
    ended: str
    """How the last part ended: a kind of record, or nothing if the log just ends."""
    last: float
    """When the last record was written, in seconds since 1970; 0 if there is none."""
    damaged: int
    """Lines of the log that can't be read."""

    @property
    def step(self) -> int:
        """Updates that the log knows of."""
        steps = [r["step"] for r in self.train[-1:]] + [p.step for p in self.parts[-1:]]
        if self.ended == "stopped":
            steps += [r["step"] for r in self.messages if r["kind"] == "stopped"][-1:]
        return max(steps, default=0)

    @property
    def steps(self) -> int | None:
        """Updates that the run is to make."""
        return self.parts[-1].facts.get("steps") if self.parts else None

    @property
    def steps_per_epoch(self) -> int | None:
        """As the run was last started."""
        return self.parts[-1].facts.get("steps_per_epoch") if self.parts else None

    @property
    def skipped(self) -> int:
        """Updates that were skipped because the loss or its gradient wasn't finite."""
        return sum(int(r.get("skipped") or 0) for r in self.train)

    def epoch_of(self, step: int) -> float:
        """A step as epochs, or as it is where the run's epochs aren't known."""
        return step / (self.steps_per_epoch or 1)


def read_history(folder: Path) -> History:
    """Read a run's folder.

    Raises:
        UserError: there is no run in it.
    """
    if not (folder / LOG).is_file():
        hint = "is it the output folder (--out) of a run?" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder / LOG}: not found; {hint}")
    parts: list[Part] = []
    train: list[Record] = []
    evaluations: dict[int, Record] = {}
    messages: list[Record] = []
    ended, last, damaged = "", 0.0, 0
    for record in _records(folder / LOG):
        if record is None:
            damaged += 1
            continue
        kind, step = record["kind"], record.get("step")
        last = max(last, record["time"])
        if kind == "run" and isinstance(step, int):
            parts.append(Part(step, record["time"], record))
            train = [r for r in train if r["step"] <= step]
            evaluations = {k: v for k, v in evaluations.items() if k <= step}
            ended = ""
        elif kind == "train" and isinstance(step, int):
            train.append(record)
        elif kind == "evaluation" and isinstance(step, int):
            evaluations[step] = record
        if kind in _TOLD:
            messages.append(record)
        if kind in ("results", "stopped", "error", "crash"):
            ended = kind
        elif kind == "train":
            ended = ""
    recipe = read_json(folder / RECIPE) if (folder / RECIPE).exists() else {}
    if not recipe and parts:
        recipe = parts[-1].facts.get("recipe") or {}
    recipe = upgrade_recipe(recipe)
    if not isinstance(recipe.get("model", {}), dict):
        recipe = {**recipe, "model": {}}
    found = [evaluations[key] for key in sorted(evaluations)]
    return History(folder, recipe, parts, train, found, messages, ended, last, damaged)


def newest_evaluation(history: History) -> tuple[int, Evaluation] | None:
    """The newest evaluation that was saved in full, and its step.

    Raises:
        UserError: the file holds something else.
    """
    steps = {record["step"] for record in history.evaluations}
    files = {
        int(path.stem.removeprefix("step-")): path
        for path in (history.folder / EVALUATIONS).glob("step-*.json")
        if path.stem.removeprefix("step-").isdecimal()
    }
    # A file whose record was superseded is of weights that the run left behind.
    known = [step for step in files if step in steps] or list(files)
    return (max(known), read_evaluation(files[max(known)])) if known else None


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A figure of a record; None if it isn't there or isn't finite."""
    value = record.get(name)
    # The log writes what isn't finite as text.
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str),
    "time": lambda value: _is_number(value) and 0 <= value < _LAST,
    "text": lambda value: isinstance(value, str),
    **dict.fromkeys(("step", "skipped"), lambda value: _is_number(value) and 0 <= value < 2**53),
    **dict.fromkeys(("steps", "steps_per_epoch"), _is_count),
    **dict.fromkeys(("figures", "recipe", "environment"), lambda value: isinstance(value, dict)),
}
"""What is relied on where a record has it."""
_LAST = 2.5e11
"""Seconds since 1970; the calendar of Python ends then."""


def _records(path: Path) -> Iterator[Record | None]:
    """The log's records; None for a line that isn't one, as a crash may leave behind."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = parse_json(line, LOG)
            except UserError:
                yield None
                continue
            whole = "kind" in record and "time" in record
            whole &= all(fits(record[key]) for key, fits in _FIELDS.items() if key in record)
            yield record if whole else None
