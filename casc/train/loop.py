"""A training run from recipe to results, top to bottom."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple, NoReturn

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.device.devices import peak_memory
from casc.errors import UserError
from casc.evaluate.metrics import Evaluation
from casc.train.evaluation import Evaluator
from casc.train.meter import Meter, watch_positives
from casc.train.opening import open_batches, open_run
from casc.train.picture import draw_batch
from casc.train.profile import profiling
from casc.train.recipe import Recipe
from casc.train.results import conclude, concluded
from casc.train.run import Run, announce
from casc.train.saving import Saver
from casc.train.sinks import Sink
from casc.train.step import TrainStep
from casc.train.stopping import StoppedError, Stopping
from casc.train.warmup import compiled_ahead
from casc.train.watching import Activity, watching

PICTURE = "first_batch.png"


class Summary(NamedTuple):
    """How a run ended."""

    recipe: Recipe
    state: State
    images_per_second: float
    """Median over the log's intervals in which no canvas was new."""
    evaluation: Evaluation | None
    """The last one; None on other ranks than the main one, or if there was none."""


def train(recipe: Recipe, *, sinks: Sequence[Sink] = ()) -> Summary:
    """Run a recipe to its end, or go on with it from where its output folder says.

    Start it with torchrun, once per device, or by itself for one device.

    Args:
        recipe: the run.
        sinks: functions that get each record of the log as well, on the main rank.

    Raises:
        UserError: the recipe, the data, the output folder or a loss is not as it has to be.
        StoppedError: a signal asked for the end; what was learnt is saved.
    """
    with open_run(recipe, sinks) as (run, state, notes):
        if concluded(run, state.step):
            return Summary(run.recipe, state, 0.0, None)
        announce(run, state, notes)
        with (
            watching(run, state.step) as activity,
            Stopping(run.ranks) as stopping,
            Saver(run, state) as saver,
        ):
            return _loop(run, state, activity, stopping, saver)


def _loop(run: Run, state: State, activity: Activity, stopping: Stopping, saver: Saver) -> Summary:
    recipe, log = run.recipe, run.log
    meter = Meter(run.device, run.ranks, max_skips=recipe.optim.max_skips, warn=log.warn)
    train_step = TrainStep(run, state, meter)
    watch = watch_positives(log.warn)
    evaluator = Evaluator(run, state, activity, stopping, saver, meter)
    batches = open_batches(run, state.step)
    activity.detail = batches.stuck_report
    stream = compiled_ahead(run, state, train_step, batches, activity, stopping)
    meter.restart()
    try:
        if evaluator.missed(state.step):
            evaluator.evaluate(state)
        with (
            closing(batches),
            batches.explained(),
            _scheduled_collection() as collect,
            profiling(recipe.profile if run.ranks.main else None, log.say) as traced,
        ):
            while state.step < run.facts.steps and not evaluator.ending:
                activity.set("waiting for data", state.step)
                bucket, batch, on_device = meter.waiting(stream)
                activity.batch(bucket, batch.image_id)
                _check_labels(batch, recipe.model.classes)
                stopping.start_poll()
                _announce_new(run, state.step, train_step, meter, bucket, batch)

                train_step(state.step, bucket, on_device)
                meter.add_images(state.step, batch.image_id)
                state = state._replace(step=state.step + 1)
                log.advance(state.step)
                traced()
                saver.poll()
                ending = stopping.poll_result()

                if state.step % recipe.log_every == 0 or state.step == run.facts.steps:
                    watch(_log(run, state.step, meter))
                    collect()
                if ending or run.due(state.step, recipe.save_every, recipe.save_steps):
                    meter.check()
                    activity.set("saving", state.step)
                    with meter.paused():
                        saver.save_async(state)
                if ending:
                    raise StoppedError(ending)
                if run.due(state.step, recipe.evaluate_every):
                    meter.check()
                    evaluator.evaluate(state)
        if recipe.evaluate_every and not evaluator.done:  # stopped between the last save and it
            evaluator.evaluate(state)
    except StoppedError as stopped:
        _leave(run, saver, state, stopped)
    activity.set("waiting for the last checkpoint to be written")
    saver.wait()
    speed = meter.typical_speed()
    if run.ranks.main:
        conclude(run, state.step, speed, evaluator.latest)
    return Summary(recipe, state, speed, evaluator.latest)


def _check_labels(batch: Batch, classes: int) -> None:
    """Refuse labels that no class has: on a device they would be read out of bounds.

    Raises:
        UserError: naming the image.
    """
    wrong = (batch.labels < 0) | (batch.labels >= classes)
    if bool(wrong.any()):
        i, k = wrong.nonzero()[0].tolist()
        raise UserError(
            f"image {int(batch.image_id[i])}: label: {int(batch.labels[i, k])}, there are"
            f" {classes} classes, from 0 on; run `data_tools check`"
        )


def _announce_new(
    run: Run, step: int, train_step: TrainStep, meter: Meter, bucket: int, batch: Batch
) -> None:
    """Draw a run's first batch; say of a canvas that comes up for the first time."""
    recipe = run.recipe
    canvas = run.facts.canvases[recipe.train_split][bucket]
    if step == 0 and run.ranks.main:
        draw_batch(recipe.folder / PICTURE, batch, recipe.image, canvas, run.index.categories)
    if train_step.is_new(bucket):
        meter.warming_up()
        if recipe.compile:
            run.log.say(f"compiling for canvas {canvas[0]} x {canvas[1]}")


def _log(run: Run, step: int, meter: Meter) -> dict[str, float]:
    """Record the figures of the steps since the last record."""
    progress = {"epoch": step / run.facts.steps_per_epoch, "lr": run.rate(step - 1)}
    values = {**progress, **meter.read()}
    run.log.train(step, {**values, "memory": peak_memory(run.device)})
    return values


def _leave(run: Run, saver: Saver, state: State, stopped: StoppedError) -> NoReturn:
    """Save, if that isn't done or under way, and end the program."""
    saver.save_async(state)
    saver.wait(raise_on_error=True)
    what = "saved" if run.recipe.saves else "nothing is saved (--save-every 0)"
    run.log.say(
        f"{stopped.signal}: {what} at step {state.step:,}; the same command goes on from the newest"
        f" checkpoint (exit status {stopped.code})",
        "stopped",
        step=state.step,
    )
    raise stopped


@contextmanager
def _scheduled_collection() -> Iterator[Callable[[], object]]:
    """Keep the garbage collector out of the steps; gives the function that runs it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
