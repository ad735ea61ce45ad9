"""Kill training at random moments, start it again, and compare with a run that was left alone.

Ranks are forked from a server that has imported everything, so a start costs little and
many of the kills hit the training itself.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from casc.train.recipe import Recipe

WORLD = 2
STEPS, AHEAD = 6, 3
"""Steps of the run per kill, and what a start may get on before it is killed."""


class Kill(NamedTuple):
    """One SIGKILL to all ranks."""

    after: float
    """Seconds after the start."""
    step: int
    """The last step in the log, over all starts."""
    where: str
    """What the main rank was at."""


def entry(rank: int, port: int, recipe: Recipe, output: Path) -> None:
    """One rank, as torchrun would start it."""
    import torch

    from casc.train.launch import errors_in_one_line
    from casc.train.loop import train

    multiprocessing.set_start_method("fork", force=True)  # of loading workers, as usual here
    os.setpgid(0, 0)  # the rank and its loading workers die together
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with errors_in_one_line():
        train(recipe)


def server():
    """A context whose processes are forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["casc.train.loop", "PIL.PngImagePlugin", "pytest"])
    return context


def start(recipe: Recipe, output: Path) -> list:
    """Start the ranks of a recipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    ranks = [
        context.Process(target=entry, args=(rank, port, recipe, output)) for rank in range(WORLD)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks: list, seconds: float) -> list[int | None]:
    """Wait for the ranks to end by themselves; their exit statuses."""
    until = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(until - time.monotonic(), 0))
    return [rank.exitcode for rank in ranks]


def kill(ranks: list, number: int = signal.SIGKILL) -> None:
    """Send a signal to every rank, and its workers where there are any."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, number)
        except ProcessLookupError:  # not that far yet, or at its end
            with suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def last_step(recipe: Recipe) -> int:
    """The last step in the log; -1 before the first."""
    found = -1
    path = recipe.folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the writer was killed
            continue
        found = record["step"] if record["kind"] == "train" else found
    return found


def being_written(recipe: Recipe) -> list[Path]:
    """Checkpoints that aren't whole yet."""
    return list((recipe.folder / "checkpoints").glob(".step-*"))


def chaos(
    recipe: Recipe, output: Path, *, kills: int, seed: int, first: float, whole: float
) -> list[Kill]:
    """Start a run again and again until it has been killed so often, then let it end.

    Every second kill waits for the random moment and then for a save to begin.

    Args:
        recipe: of the run.
        output: file for what the ranks print.
        kills: how many.
        seed: of the moments.
        first: seconds from the start of a run to the end of its first step.
        whole: to its end.
    """
    draw = random.Random(seed)
    done: list[Kill] = []
    while len(done) < kills:
        ranks = start(recipe, output)
        began = time.monotonic()
        moment = draw.uniform(0, first + AHEAD * (whole - first) / kills)
        before = last_step(recipe)
        aimed = len(done) % 2 == 1
        old = set(being_written(recipe))
        while all(rank.is_alive() for rank in ranks):
            late = time.monotonic() - began >= moment or last_step(recipe) >= before + AHEAD
            if late and (not aimed or set(being_written(recipe)) - old):
                break
            time.sleep(0.003)
        if all(rank.exitcode == 0 for rank in ranks):
            break
        kill(ranks)
        after = time.monotonic() - began
        for rank in ranks:
            rank.join()
        step = last_step(recipe)
        new = set(being_written(recipe)) - old
        where = "inside a save" if new else "in the steps" if step >= 0 else "before the first"
        done.append(Kill(after, step, where))
    ranks = start(recipe, output)
    statuses = finish(ranks, 20 * whole)
    if statuses != [0] * WORLD:
        kill(ranks)
        raise AssertionError(f"the last start ended with {statuses}: {output.read_text()[-3000:]}")
    return done


def compare(recipe: Recipe, other: Recipe) -> list[str]:
    """Names of tensors of the last checkpoints that differ in any bit."""
    from safetensors.torch import load_file

    from casc.checkpoints.format import list_checkpoints

    different = []
    a, b = (list_checkpoints(r.folder / "checkpoints")[0] for r in (recipe, other))
    if a.name != b.name:
        return [f"{a.name} and {b.name}"]
    for file in ("weights.safetensors", "state.safetensors"):
        left, right = load_file(a / file), load_file(b / file)
        if left.keys() != right.keys():
            return [f"names in {file}"]
        different += [
            name
            for name, value in left.items()
            if value.numpy().tobytes() != right[name].numpy().tobytes()
        ]
    return different


def trial(recipe: Recipe, folder: Path, *, kills: int, seed: int) -> tuple[list[Kill], float]:
    """A run that is left alone and one that is killed; they must end in the same bits."""
    straight = replace(recipe, out=folder / "straight")
    began = time.monotonic()
    ranks = start(straight, folder / "straight.txt")
    while last_step(straight) < 0 and ranks[0].is_alive():
        time.sleep(0.01)
    first = time.monotonic() - began
    assert finish(ranks, 300) == [0] * WORLD, (folder / "straight.txt").read_text()[-3000:]
    whole = time.monotonic() - began
    broken = replace(recipe, out=folder / "broken")
    done = chaos(broken, folder / "broken.txt", kills=kills, seed=seed, first=first, whole=whole)
    different = compare(straight, broken)
    assert not different, different[:5]
    assert not being_written(broken), "what was half written has been swept away"
    return done, whole


def hurried(recipe: Recipe, *, steps: int) -> Recipe:
    """The recipe on two ranks, saving so often that a kill inside a save is likely."""
    return replace(
        recipe,
        batch=1,
        epochs=-(-steps // 5),
        max_steps=steps,
        save_steps=1,
        loading=replace(recipe.loading, workers=1),
    )
