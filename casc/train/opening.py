"""What is done before the first step: from a recipe to a run and the state that it begins with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from casc.checkpoints.state import State
from casc.data.index import read_index
from casc.data.stream import training_batches
from casc.data.workers import BatchStream
from casc.device.compile_cache import use_cache
from casc.device.devices import choose_device, is_accelerator, make_deterministic, traits
from casc.device.replay import choose_replay
from casc.distributed import process_group, ranks_from_environment
from casc.model.choose_compute import choose_compute
from casc.model.steps import reads_back
from casc.train.derived import facts, trained_split
from casc.train.profile import check_profile
from casc.train.recipe import Recipe, reads_bitmaps, resolved
from casc.train.recipe_checks import check
from casc.train.run import Run, open_log
from casc.train.run_lock import run_lock
from casc.train.sinks import Sink
from casc.train.start import fresh_state, resumed_state


@contextmanager
def open_run(recipe: Recipe, sinks: Sequence[Sink]) -> Iterator[tuple[Run, State, list[str]]]:
    """Check a recipe, join the other ranks, and take the state from where it is to begin.

    Yields:
        The run, its log open; the state; and what there is to say of how they came about.

    Raises:
        UserError: the recipe, the data, or the output folder is not as it has to be.
    """
    recipe = resolved(recipe)
    index = read_index(recipe.data, recipe.loading)
    ranks = ranks_from_environment()
    check(recipe, index, ranks.world)
    device = choose_device(recipe.device)
    if recipe.deterministic:
        make_deterministic(device)
    derived = facts(recipe, index, ranks.world)
    with (
        process_group(ranks, device) as device,
        run_lock(recipe.folder) if ranks.main else nullcontext() as lock,
    ):
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
        replay = choose_replay(recipe.replay, device, reads_back(recipe.model, compute, device))
        check_profile(recipe.profile, derived.steps - state.step)
        with open_log(recipe, derived, state, ranks, sinks) as log:
            run = Run(
                recipe, index, derived, compute, device, ranks, log, past, replay.replay, lock
            )
            # On a CPU nobody expects a replay.
            replay_notes = [replay.note] if is_accelerator(device) else []
            yield run, state, [*notes, *compute_notes, *replay_notes]


def open_batches(run: Run, step: int) -> BatchStream:
    """The batches of this rank, from a step of the run to its end."""
    recipe = run.recipe
    return training_batches(
        recipe.data,
        trained_split(recipe, run.index),
        seed=recipe.seed,
        steps=range(step, run.facts.steps),
        batch=recipe.images_per_rank,
        world=run.ranks.world,
        rank=run.ranks.rank,
        loading=recipe.loading,
        past=run.past,
        pin_memory=traits(run.device).pin_memory,
        bitmaps=reads_bitmaps(recipe),
        masks=recipe.model.masks != "none",
        regions=recipe.model.ignore == "crowds",
        warn=run.log.warn,
    )
