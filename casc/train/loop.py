"""A training run from recipe to results, top to bottom."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import NamedTuple, NoReturn

from casc.checkpoints import format as checkpoint
from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.data.index import read_index
from casc.data.stream import ahead, training_batches
from casc.data.workers import BatchStream
from casc.device.compile_cache import use_cache
from casc.device.devices import choose_device, make_deterministic, peak_memory, traits
from casc.distributed import (
    Exchange,
    from_main,
    process_group,
    ranks_from_environment,
)
from casc.evaluate.metrics import Evaluation, format_table, write_evaluation
from casc.evaluate.run import evaluate_split
from casc.inference.detector import Detector, new_detector
from casc.model.choose_compute import choose_compute
from casc.model.steps import LossStep, make_loss_step
from casc.train.accumulate import backward
from casc.train.derived import facts
from casc.train.ema import average, decay_at
from casc.train.guard import IN_A_ROW, scale_of
from casc.train.meter import Meter, watch_positives
from casc.train.optim import make_optimizer, update
from casc.train.picture import draw_batch
from casc.train.profile import check_profile, profiling
from casc.train.recipe import Recipe, resolved
from casc.train.recipe_checks import check
from casc.train.results import conclude, concluded, figures_of
from casc.train.run import EVALUATIONS, Run, announce, open_log
from casc.train.saving import Saver
from casc.train.schedule import learning_rate
from casc.train.sinks import Sink
from casc.train.start import fresh_state, resumed_state
from casc.train.stopping import StoppedError, Stopping
from casc.train.warmup import buckets_ahead, warm_up
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
    recipe = resolved(recipe)
    index = read_index(recipe.data, recipe.loading)
    ranks = ranks_from_environment()
    check(recipe, index, ranks.world)
    device = choose_device(recipe.device)
    if recipe.deterministic:
        make_deterministic(device)
    derived = facts(recipe, index, ranks.world)
    with process_group(ranks, device) as device:
        compute, compute_notes = choose_compute(
            recipe.model,
            device,
            dtype=recipe.dtype,
            compile=recipe.compile,
            backend=recipe.compile_backend,
            programs=use_cache(recipe.compile_cache) if recipe.compile else None,
        )
        state, past, notes = resumed_state(
            recipe, index, derived, ranks, device, compute.memory_format
        )
        if state is None:
            state, more = fresh_state(recipe, index, device, compute.memory_format)
            notes += more
        check_profile(recipe.profile, derived.steps - state.step)
        with open_log(recipe, derived, state, ranks, sinks) as log:
            run = Run(recipe, index, derived, compute, device, ranks, log, past)
            if from_main(concluded(run, state.step) if ranks.main else None, ranks):
                return Summary(recipe, state, 0.0, None)
            announce(run, state, [*notes, *compute_notes])
            with (
                watching(run, state.step) as activity,
                Stopping(ranks) as stopping,
                Saver(run, state) as saver,
            ):
                return _loop(run, state, activity, stopping, saver)


def _loop(run: Run, state: State, activity: Activity, stopping: Stopping, saver: Saver) -> Summary:
    recipe, derived, ranks, log = run.recipe, run.facts, run.ranks, run.log
    split = run.index.splits[recipe.train_split]
    canvases = derived.canvases[recipe.train_split]
    optimizer = make_optimizer(recipe.optim, state)
    exchange = Exchange(
        [state.params[name] for name in state.momentum], ranks, recipe.ddp_bucket_mb
    )
    together = ranks if recipe.normalise != "rank" else None
    shown = {**state.params, **state.ema} if recipe.ema.evaluate else state.params
    detector = new_detector(
        shown, state.buffers, recipe.model, recipe.image, run.compute, run.device
    )
    watch = watch_positives(log.warn)
    # `evaluation` is the main rank's alone, so it can't tell the others whether there was one.
    evaluation, evaluated = None, False

    def evaluate() -> Evaluation | None:
        try:
            with stopping.between_steps(), meter.paused():
                return _evaluate(run, detector, state, activity, saver)
        except StoppedError as stopped:
            _leave(run, saver, state, stopped)

    @cache
    def loss_step(bucket: int) -> LossStep:
        return make_loss_step(recipe.model, recipe.image, canvases[bucket], run.compute, together)

    steps = range(state.step, derived.steps)
    cold = buckets_ahead(recipe, split, ranks.world, steps)
    batches = training_batches(
        recipe.data,
        split,
        seed=recipe.seed,
        steps=steps,
        batch=recipe.images_per_rank,
        world=ranks.world,
        rank=ranks.rank,
        loading=recipe.loading,
        past=run.past,
        pin_memory=traits(run.device).pin_memory,
        bitmaps=recipe.model.mask_head.target == "bitmap",
        warn=log.warn,
    )
    activity.detail = batches.stuck_report
    stream: Iterator[tuple[int, Batch]] = batches
    if recipe.compile and recipe.warm_up and steps:
        # Workers read ahead meanwhile, and data that can't be read says so before.
        activity.set("waiting for data")
        stream = chain([next(batches)], batches)

        def compiling(bucket: int) -> LossStep:
            activity.set(f"compiling bucket {split.buckets[bucket].name}")
            return loss_step(bucket)

        with stopping.between_steps():
            warm_up(run, state, compiling, cold)
        cold.clear()
    copied = ahead(stream, run.device, copy_stream=traits(run.device).copy_stream)
    meter = Meter(run.device, ranks, max_skips=recipe.optim.max_skips, warn=log.warn)
    if _missed_evaluation(run, state.step):
        evaluation, evaluated = evaluate(), True
    trace = recipe.profile if ranks.main else None
    with (
        batches.explained(),
        _scheduled_collection() as collect,
        profiling(trace, log.say) as traced,
    ):
        while state.step < derived.steps:
            activity.set("waiting for data", state.step)
            bucket, batch, on_device = meter.waiting(copied)
            activity.batch(bucket, batch.image_id)
            stopping.start_poll()
            if state.step == 0 and ranks.main:
                picture = recipe.folder / PICTURE
                draw_batch(picture, batch, recipe.image, canvases[bucket], run.index.categories)
            if bucket in cold:
                cold.remove(bucket)
                meter.warming_up()
                if recipe.compile:
                    log.say(f"compiling for canvas {canvases[bucket][0]} x {canvases[bucket][1]}")
            loss, measures = backward(
                loss_step(bucket), state, on_device, exchange, ranks, recipe.accumulate,
                together=recipe.normalise == "step",
            )  # fmt: skip
            rate = _rate(run, state.step)
            norm = update(optimizer, rate, recipe.optim.clip_norm, state.guard, loss)
            if recipe.ema.decay is not None:
                average(state.ema, state.params, decay_at(recipe.ema.decay, state.step))
            measures = {"loss": loss, "grad_norm": norm, **scale_of(state.guard), **measures}
            meter.add(state.step, batch.image_id, measures, state.guard[IN_A_ROW])
            state = state._replace(step=state.step + 1)
            log.advance(state.step)
            traced()
            saver.poll()
            ending = stopping.poll_result()

            if state.step % recipe.log_every == 0 or state.step == derived.steps:
                values = {"epoch": state.step / derived.steps_per_epoch, "lr": rate, **meter.read()}
                log.train(state.step, {**values, "memory": peak_memory(run.device)})
                watch(values)
                collect()
            if ending or _due(run, state.step, recipe.save_every, recipe.save_steps):
                meter.check()
                activity.set("saving", state.step)
                with meter.paused():
                    saver.save_async(state)
            if ending:
                _leave(run, saver, state, StoppedError(ending))
            if _due(run, state.step, recipe.evaluate_every):
                meter.check()
                evaluation, evaluated = evaluate(), True
    if not evaluated and recipe.evaluate_every:  # stopped between the last save and it
        evaluation = evaluate()
    activity.set("waiting for the last checkpoint to be written")
    saver.wait()
    speed = meter.typical_speed()
    if ranks.main:
        conclude(run, state.step, speed, evaluation)
    return Summary(recipe, state, speed, evaluation)


def _rate(run: Run, step: int) -> float:
    return learning_rate(
        run.recipe.schedule,
        run.facts.rate,
        step,
        steps_per_epoch=run.facts.steps_per_epoch,
        epochs=run.recipe.epochs,
    )


def _due(run: Run, step: int, epochs: int, steps: int | None = None) -> bool:
    """Whether something that is done every so many epochs, and at the end, is due."""
    if steps and step % steps == 0:
        return True
    if step == run.facts.steps:
        return bool(epochs or steps)
    if not epochs:
        return False
    epoch, rest = divmod(step, run.facts.steps_per_epoch)
    return rest == 0 and epoch % epochs == 0


def _missed_evaluation(run: Run, step: int) -> bool:
    """Whether a run that goes on ended between a checkpoint and its evaluation."""
    saved = checkpoint.path_of(run.checkpoints, step) / checkpoint.METRICS
    missed = step > 0 and _due(run, step, run.recipe.evaluate_every) and not saved.exists()
    return from_main(missed if run.ranks.main else None, run.ranks)


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


def _evaluate(
    run: Run, detector: Detector, state: State, activity: Activity, saver: Saver
) -> Evaluation | None:
    recipe, log = run.recipe, run.log
    images = run.index.splits[recipe.val_split].samples
    began = time.perf_counter()
    log.say(f"evaluating on {recipe.val_split}, {images:,} images")
    with log.progress(images, "evaluating") as shown:

        def watch(count: int) -> None:
            activity.set("evaluating", state.step)
            shown(count)

        def opened(stream: BatchStream) -> None:
            activity.detail = stream.stuck_report

        training = activity.detail
        evaluation = evaluate_split(
            detector,
            recipe.data,
            run.index,
            recipe.val_split,
            batch=recipe.batch,
            ranks=run.ranks,
            loading=recipe.loading,
            watch=watch,
            opened=opened,
            warn=log.warn,
        )
        activity.detail = training
    if evaluation is None:
        return None
    figures = figures_of(evaluation)
    log.say(
        format_table(evaluation),
        "evaluation",
        step=state.step,
        seconds=round(time.perf_counter() - began, 1),
        figures=figures,
    )
    folder = recipe.folder / EVALUATIONS
    write_evaluation(evaluation, folder / f"step-{state.step:08d}.json")
    saver.wait()
    saved = checkpoint.path_of(run.checkpoints, state.step)
    if saved.is_dir():
        checkpoint.add_metrics(saved, figures)
        run.prune(saved)
    return evaluation


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
