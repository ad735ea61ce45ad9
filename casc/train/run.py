"""A run: what stays the same from its first step to its last, and where its output goes."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch

import casc
from casc.checkpoints import format as checkpoint
from casc.checkpoints.state import State
from casc.config import to_json
from casc.data.index import Index
from casc.data.plan import NO_HISTORY, EpochHistory
from casc.device.compute import Compute
from casc.distributed import Ranks
from casc.errors import UserError
from casc.json_files import write_json
from casc.train.derived import Facts, rate_lines, shortened
from casc.train.environment import environment
from casc.train.log import LOGS, RunLog, run_log
from casc.train.recipe import Recipe
from casc.train.recipe_checks import advice
from casc.train.run_lock import RunLock
from casc.train.schedule import learning_rate
from casc.train.sinks import Sink
from casc.train.start import CHECKPOINTS, RECIPE

EVALUATIONS = "evaluations"
FOLDERS = (CHECKPOINTS, EVALUATIONS, LOGS)
"""What a run makes in its output folder."""


@dataclass(frozen=True)
class Run:
    """A recipe with everything that it was resolved to."""

    recipe: Recipe
    index: Index
    facts: Facts
    compute: Compute
    device: torch.device
    ranks: Ranks
    log: RunLog
    past: EpochHistory = NO_HISTORY
    """How the epoch in which the run goes on began, where that was planned differently."""
    replay: bool = False
    """Whether steps are recorded and replayed."""
    lock: RunLock | None = None
    """On the folder; the main rank's."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.recipe.folder / CHECKPOINTS

    def rate(self, step: int) -> float:
        """The learning rate of the update after so many."""
        return learning_rate(
            self.recipe.schedule,
            self.facts.rate,
            step,
            steps_per_epoch=self.facts.steps_per_epoch,
            epochs=self.recipe.epochs,
        )

    def due(self, step: int, epochs: int, steps: int | None = None) -> bool:
        """Whether something is due after so many updates.

        Args:
            step: updates made.
            epochs: how many lie between one time and the next; 0 for none.
            steps: how many updates lie between further times; None for none. With either of
                them, the run's end is one too.
        """
        if steps and step % steps == 0:
            return True
        if step == self.facts.steps:
            return bool(epochs or steps)
        if not epochs:
            return False
        epoch, rest = divmod(step, self.facts.steps_per_epoch)
        return rest == 0 and epoch % epochs == 0

    def prune(self, newest: Path) -> None:
        """Delete the checkpoints up to this one that the recipe doesn't keep."""
        best = None if self.recipe.keep_best == "none" else self.recipe.keep_best
        checkpoint.prune(
            self.checkpoints, keep_last=self.recipe.keep_last, keep_best=best, newest=newest
        )


@contextmanager
def open_log(
    recipe: Recipe, derived: Facts, state: State, ranks: Ranks, sinks: Sequence[Sink] = ()
) -> Iterator[RunLog]:
    """Make the output folder with the resolved recipe in it, and open its log.

    Raises:
        UserError: the folder can't be written.
    """
    if ranks.main:
        try:
            for folder in (recipe.folder, *(recipe.folder / name for name in FOLDERS)):
                folder.mkdir(parents=True, exist_ok=True)
                # Told now, not when hours of training are to be saved.
                with TemporaryFile(dir=folder):
                    pass
            write_json(to_json(recipe), recipe.folder / RECIPE)
        except OSError as error:
            raise UserError(f"--out {recipe.folder}: can't be written ({error})") from None
        checkpoint.remove_partial(recipe.folder / CHECKPOINTS)
    with run_log(
        recipe.folder,
        start=state.step,
        total=derived.steps,
        rank=ranks.rank,
        board=recipe.tensorboard,
        sinks=sinks,
    ) as log:
        yield log


def announce(run: Run, state: State, notes: list[str]) -> None:
    """Say and record what is about to happen."""
    recipe, log = run.recipe, run.log
    log.note(
        "start",
        step=state.step,
        rank=run.ranks.rank,
        world=run.ranks.world,
        host=platform.node(),
        pid=os.getpid(),
        device=str(run.device),
    )
    log.record(
        "run",
        step=state.step,
        steps=run.facts.steps,
        steps_per_epoch=run.facts.steps_per_epoch,
        device=str(run.device),
        world=run.ranks.world,
        casc=casc.__version__,
        torch=torch.__version__,
        environment=environment(run.device),
        recipe=to_json(recipe),
    )
    for note in [*notes, *(f"warning: {text}" for text in advice(recipe))]:
        log.say(note)
    log.say(
        f"{recipe.name}: {run.facts.steps:,} steps of {run.facts.images_per_step} images on"
        f" {run.ranks.world} x {run.device.type}, {run.compute.dtype}; output in {recipe.folder}"
    )
    log.say("learning rate: " + "; ".join(rate_lines(recipe, run.facts)))
    for line in shortened(recipe, run.facts):
        log.say(line)
    for bucket, count in run.facts.wrapped.items():
        log.say(f"bucket {bucket}: {count} images an epoch are seen twice, to fill its last step")
