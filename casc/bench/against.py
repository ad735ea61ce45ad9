"""Timing several programs in turns, and what one is to the other."""

import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from casc.bench.worker import Worker
from casc.errors import UserError

Say = Callable[[str], None]


class Spread(NamedTuple):
    """A figure of several rounds."""

    median: float
    low: float
    high: float


class Timed(NamedTuple):
    """What the rounds gave for one program."""

    first: dict[str, float]
    """The first step, compilation included."""
    rounds: list[dict[str, float]]
    """Every timed step; `step_s` and the seconds of its parts."""

    def median(self, part: str) -> float:
        """The median over the rounds of one part."""
        return statistics.median(r[part] for r in self.rounds)


def take_turns(workers: Sequence[Worker], rounds: int, say: Say) -> list[Timed]:
    """Let each do a step, again and again.

    The first step of each compiles, the second fills caches; neither counts.
    """
    first = []
    for worker in workers:
        first.append(worker.step())
        say(f"{_name(worker)}: first step {first[-1]['step_s']:.1f} s")
        worker.step()
    timed = [Timed(f, []) for f in first]
    for number in range(rounds):
        for worker, result in zip(workers, timed, strict=True):
            result.rounds.append(worker.step())
        shown = ", ".join(
            f"{_name(w)} {t.rounds[-1]['step_s']:.2f} s"
            for w, t in zip(workers, timed, strict=True)
        )
        say(f"round {number + 1} of {rounds}: {shown}")
    return timed


def spread(values: Sequence[float]) -> Spread:
    """Median and extremes."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(ours: Timed, theirs: Timed) -> Spread:
    """How many times faster we are, round by round."""
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    return spread([b["step_s"] / a["step_s"] for a, b in pairs])


def run_command(command: str) -> dict[str, Any]:
    """Run a peer that prints one JSON object with at least `img_per_s` as its last line.

    Raises:
        UserError: it can't be run, fails, or prints something else.
    """
    try:
        done = subprocess.run(
            shlex.split(command), stdout=subprocess.PIPE, text=True, check=False, timeout=None
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--against {command!r}: can't be run ({error})") from None
    if done.returncode:
        raise UserError(f"--against {command!r}: ended with code {done.returncode}")
    try:
        report = json.loads(done.stdout.strip().splitlines()[-1])
        float(report["img_per_s"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--against {command!r}: its last line must be a JSON object with img_per_s,"
            f" it was {done.stdout.strip()[-200:]!r}"
        ) from None
    return report


def _name(worker: Worker) -> str:
    return f"{worker.job.who} {worker.job.dtype}"
