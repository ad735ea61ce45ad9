"""A training run from recipe to results, top to bottom."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

import casc
from casc.config import to_json
from casc.data.index import Index, read_index
from casc.data.stream import to_device, training_batches
from casc.detect import Detector, evaluate_split, new_detector
from casc.devices import choose_device, choose_dtype, peak_memory, traits
from casc.errors import UserError
from casc.evaluate import Evaluation, format_table, write_evaluation
from casc.ground_truth import read_json, write_json
from casc.recipe import Facts, Recipe, advice, check, facts, rate_lines
from casc.train import checkpoint
from casc.train.distributed import Ranks, average_gradients, process_group, ranks_from_environment
from casc.train.log import RunLog, results_table, run_log
from casc.train.meter import Meter, watch_positives
from casc.train.optim import make_optimizer, update
from casc.train.picture import draw_batch
from casc.train.schedule import learning_rate
from casc.train.start import (
    CHECKPOINTS,
    RECIPE,
    data_position,
    fresh_state,
    resumed_state,
    weights_metadata,
)
from casc.train.state import State
from casc.train.step import Compute, LossStep, make_loss_step

RESULTS, PICTURE, EVALUATIONS = "results.json", "first_batch.png", "evaluations"


class Summary(NamedTuple):
    """How a run ended."""

    recipe: Recipe
    state: State
    images_per_second: float
    """Median over the log's intervals in which no canvas was new."""
    evaluation: Evaluation | None
    """The last one; None on other ranks than the main one, or if there was none."""


@dataclass(frozen=True)
class Run:
    """What stays the same all through a run."""

    recipe: Recipe
    index: Index
    facts: Facts
    compute: Compute
    device: torch.device
    ranks: Ranks
    log: RunLog


def train(recipe: Recipe) -> Summary:
    """Run a recipe to its end, or go on with it from where its output folder says.

    Start it with torchrun, once per device, or by itself for one device.

    Raises:
        UserError: the recipe, the data, the output folder or a loss is not as it has to be.
    """
    index = read_index(recipe.data)
    ranks = ranks_from_environment()
    check(recipe, index, ranks.world)
    device = choose_device(recipe.device)
    compute = Compute(
        choose_dtype(recipe.dtype, device), traits(device).memory_format, recipe.compile
    )
    derived = facts(recipe, index, ranks.world)
    with process_group(ranks, device) as device:
        state, notes = resumed_state(recipe, index, derived, ranks, device, compute.memory_format)
        if state is None:
            state, more = fresh_state(recipe, index, device, compute.memory_format)
            notes += more
        with _open_log(recipe, derived, state, ranks) as log:
            run = Run(recipe, index, derived, compute, device, ranks, log)
            _announce(run, state, notes)
            return _loop(run, state)


def _loop(run: Run, state: State) -> Summary:
    recipe, derived, ranks, log = run.recipe, run.facts, run.ranks, run.log
    split = run.index.splits[recipe.train_split]
    canvases = derived.canvases[recipe.train_split]
    optimizer = make_optimizer(recipe.optim, state)
    trained = [state.params[name] for name in state.momentum]
    detector = new_detector(
        state.params, state.buffers, recipe.model, recipe.image, run.compute, run.device
    )
    meter = Meter(run.device, ranks)
    watch = watch_positives(log.warn)
    evaluation = None

    @cache
    def loss_step(bucket: int) -> LossStep:
        meter.warming_up()
        if recipe.compile:
            height, width = canvases[bucket]
            log.say(f"compiling for {split.buckets[bucket].name}, canvas {height} x {width}")
        return make_loss_step(recipe.model, recipe.image, canvases[bucket], run.compute)

    batches = training_batches(
        recipe.data,
        split,
        seed=recipe.seed,
        steps=range(state.step, derived.steps),
        batch=recipe.batch,
        world=ranks.world,
        rank=ranks.rank,
        loading=recipe.loading,
        pin_memory=traits(run.device).pin_memory,
        bitmaps=recipe.model.mask_head.target == "bitmap",
    )
    with _scheduled_collection() as collect:
        while state.step < derived.steps:
            bucket, batch = meter.waiting(batches)
            if state.step == 0 and ranks.main:
                picture = recipe.folder / PICTURE
                draw_batch(picture, batch, recipe.image, canvases[bucket], run.index.categories)
            total, measures = loss_step(bucket)(
                state.params, state.buffers, to_device(batch, run.device)
            )
            total.backward()
            average_gradients(trained, ranks)
            rate = _rate(run, state.step)
            norm = update(optimizer, rate, recipe.optim.clip_norm)
            meter.add(state.step, batch.image_id, {"loss": total, "grad_norm": norm, **measures})
            state = state._replace(step=state.step + 1)
            log.advance(state.step)

            if state.step % recipe.log_every == 0 or state.step == derived.steps:
                values = {"epoch": state.step / derived.steps_per_epoch, "lr": rate, **meter.read()}
                log.train(state.step, {**values, "memory": peak_memory(run.device)})
                watch(values)
                collect()
            if _due(run, state.step, recipe.save_every, recipe.save_steps):
                meter.check()
                with meter.paused():
                    _save(run, state)
            if _due(run, state.step, recipe.evaluate_every):
                meter.check()
                with meter.paused():
                    evaluation = _evaluate(run, detector, state)
    return _conclude(run, state, meter.typical_speed(), evaluation)


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
    if not epochs:
        return False
    if step == run.facts.steps or (steps and step % steps == 0):
        return True
    epoch, rest = divmod(step, run.facts.steps_per_epoch)
    return rest == 0 and epoch % epochs == 0


def _save(run: Run, state: State) -> None:
    if not run.ranks.main:
        return
    recipe, folder = run.recipe, run.recipe.folder / CHECKPOINTS
    try:
        checkpoint.save(
            folder,
            state,
            metadata=weights_metadata(recipe, run.index, state.step),
            position=data_position(
                recipe, run.index.splits[recipe.train_split], run.facts, state.step
            ),
        )
    except UserError as error:
        if state.step == run.facts.steps:
            raise
        run.log.warn(f"{error}; training goes on")
        return
    checkpoint.tidy(folder, keep_last=recipe.keep_last, keep_best=_best_metric(recipe))
    run.log.record("save", step=state.step)


def _evaluate(run: Run, detector: Detector, state: State) -> Evaluation | None:
    recipe, log = run.recipe, run.log
    images = run.index.splits[recipe.val_split].samples
    log.say(f"evaluating on {recipe.val_split}, {images:,} images")
    with log.progress(images, "evaluating") as watch:
        evaluation = evaluate_split(
            detector,
            recipe.data,
            run.index,
            recipe.val_split,
            batch=recipe.batch,
            ranks=run.ranks,
            loading=recipe.loading,
            watch=watch,
        )
    if evaluation is None:
        return None
    figures = flat_figures(evaluation)
    log.say(format_table(evaluation), "evaluation", step=state.step, figures=figures)
    log.scalars(state.step, figures, "val")
    folder = recipe.folder / EVALUATIONS
    folder.mkdir(exist_ok=True)
    write_evaluation(evaluation, folder / f"step-{state.step:08d}.json")
    checkpoints = recipe.folder / CHECKPOINTS
    saved = checkpoint.path_of(checkpoints, state.step)
    if saved.is_dir():
        checkpoint.add_metrics(saved, figures)
        checkpoint.tidy(checkpoints, keep_last=recipe.keep_last, keep_best=_best_metric(recipe))
    return evaluation


def _conclude(run: Run, state: State, speed: float, evaluation: Evaluation | None) -> Summary:
    """Print the results in the columns of the project's table, and save them."""
    recipe = run.recipe
    summary = Summary(recipe, state, speed, evaluation)
    if not run.ranks.main:
        return summary
    path = recipe.folder / RESULTS
    if not speed and path.exists():
        run.log.say(f"{recipe.folder}: the run is already at its end, step {state.step:,}")
        print(results_table(read_json(path)["row"]))
        return summary
    figures = flat_figures(evaluation) if evaluation else {}
    row = {
        "NAME": recipe.name,
        "Batch_Size": f"{run.facts.images_per_step} ({run.ranks.world} x {recipe.batch})",
        "Epochs": f"{state.step / run.facts.steps_per_epoch:.4g}",
        "Throughput": f"{speed:.2f} img/s",
        "Box AP": _percent(figures.get("box_ap")),
        "Mask AP": _percent(figures.get("mask_ap")),
        "AMP_Type": str(run.compute.dtype).removeprefix("torch."),
        "Torch_Version": torch.__version__,
    }
    write_json({"row": row, "step": state.step, "figures": figures}, path)
    run.log.say(results_table(row), "results", row=row)
    run.log.say(f"output in {recipe.folder.absolute()}")
    return summary


def flat_figures(evaluation: Evaluation) -> dict[str, float | None]:
    """All figures under names such as box_ap and mask_ap50, in [0, 1]."""
    titles = {"bbox": "box", "segm": "mask"}
    return {
        f"{titles[kind]}_{name.lower()}": value
        for kind, figures in evaluation.figures.items()
        for name, value in figures.items()
    }


def _best_metric(recipe: Recipe) -> str | None:
    return None if recipe.keep_best == "none" else recipe.keep_best


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


@contextmanager
def _open_log(recipe: Recipe, derived: Facts, state: State, ranks: Ranks) -> Iterator[RunLog]:
    """Make the output folder with the resolved recipe in it, and open its log."""
    if ranks.main:
        try:
            (recipe.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            write_json(to_json(recipe), recipe.folder / RECIPE)
        except OSError as error:
            raise UserError(f"--out {recipe.folder}: can't be written ({error})") from None
        checkpoint.sweep(recipe.folder / CHECKPOINTS)
    with run_log(
        recipe.folder,
        start=state.step,
        total=derived.steps,
        main=ranks.main,
        tensorboard=recipe.tensorboard,
    ) as log:
        yield log


def _announce(run: Run, state: State, notes: list[str]) -> None:
    recipe, log = run.recipe, run.log
    log.record(
        "run",
        step=state.step,
        steps=run.facts.steps,
        steps_per_epoch=run.facts.steps_per_epoch,
        device=str(run.device),
        world=run.ranks.world,
        casc=casc.__version__,
        torch=torch.__version__,
        recipe=to_json(recipe),
    )
    for note in [*notes, *(f"warning: {text}" for text in advice(recipe))]:
        log.say(note)
    log.say(
        f"{recipe.name}: {run.facts.steps:,} steps of {run.facts.images_per_step} images on"
        f" {run.ranks.world} x {run.device.type}, {run.compute.dtype}; output in {recipe.folder}"
    )
    log.say("learning rate: " + "; ".join(rate_lines(recipe, run.facts)))
    for bucket, count in run.facts.wrapped.items():
        log.say(f"bucket {bucket}: {count} images an epoch are seen twice, to fill its last step")


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
