"""Ranks that can be killed at any moment: how they are started, struck, watched and compared.

Ranks are forked from a server that has imported everything, so a start costs little and
many of the kills hit the training itself. `strike.c` stands before the server's C library.
"""

import ctypes
import faulthandler
import json
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

from casc.train.recipe import Recipe
from data_tools.plan import Settings

WORLD = 2
LIBRARY = Path(__file__).resolve().parents[2] / ".cache" / "strike.so"
SERVERS: set[int] = set()
"""Fork servers that `server` started in this process."""


@dataclass(frozen=True)
class Aim:
    """What happens to a rank at one of its file operations below a folder, counted from 1."""

    folder: Path
    first: int = 0
    """0: nothing, but operations are counted."""
    last: int = 0
    signal: int = 0
    rank: int | None = None
    """Who gets the signal; None for all ranks."""
    torn: bool = False
    """A write that is struck is done by half before."""
    error: int = 0
    """Which operations that need room fail with, from the first to the last."""
    jump: int = 0
    """Seconds by which the clock is set on."""


def aim(at: Aim, pids: object, count: int) -> None:
    """Make this process strike; `pids` is a C array of those who may get the signal."""
    number = ctypes.c_long
    ctypes.CDLL(None).strike(
        os.fsencode(at.folder), number(at.first), number(at.last), at.signal, pids, count,
        int(at.torn), at.error, number(at.jump),
    )  # fmt: skip


def operations() -> int:
    """File operations of this process since `aim`."""
    return ctypes.CDLL(None).operations()


def entry(
    rank: int, port: int, world: int, recipe: Recipe, output: Path, at: Aim | None = None
) -> None:
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
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, chain=False)  # for a look at one that hangs
    if at is not None and rank == 0:
        # Whom to strike is known once all have been started.
        with output.with_suffix(".pids").open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 4 * world)
        pids = (ctypes.c_int * world).from_buffer(shared)
        while not all(pids):
            time.sleep(0.001)
        chosen = range(world) if at.rank is None else [at.rank]
        aim(at, (ctypes.c_int * world)(*(pids[i] for i in chosen)), len(chosen))
    try:
        with errors_in_one_line():
            train(recipe)
    finally:
        if at is not None and rank == 0:
            output.with_suffix(".count").write_text(str(operations()))


def agent(recipe: Recipe, output: Path, at: Aim) -> None:
    """What torchrun is, with ranks that are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setpgid(0, 0)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        1, 1, WORLD, run_id=output.stem, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=3, start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, attempt)(recipe, output, at)


def attempt(recipe: Recipe, output: Path, at: Aim) -> None:
    """One rank of one of torchrun's attempts."""
    import torch

    from casc.train.launch import errors_in_one_line
    from casc.train.loop import train

    # A rank that is forked has its agent's handlers, one that is started hasn't.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    main = os.environ["RANK"] == "0"
    number = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if main:
        output.with_suffix(f".attempt-{number}").touch()
        # Each attempt is struck a little later than the one before, the last isn't.
        first = at.first + 7 * number if at.first and number < 3 else 0
        mine = replace(at, first=first, last=0, error=0)
        aim(mine, (ctypes.c_int * 1)(os.getpid()), 1)
    with errors_in_one_line():
        train(recipe)
    if main:
        output.with_suffix(".count").write_text(str(operations()))


def shard(coco: Path, out: Path, settings: Settings, output: Path, at: Aim) -> None:
    """`data_tools shard`, in this process alone."""
    from casc.train.launch import errors_in_one_line
    from data_tools.shard import Run, shard_dataset

    os.setpgid(0, 0)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    aim(at, (ctypes.c_int * 1)(os.getpid()), 1)
    try:
        with errors_in_one_line():
            shard_dataset(coco, out, None, settings, Run())
    finally:
        output.with_suffix(".count").write_text(str(operations()))


def server():
    """A context whose processes are forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported_once"])
    source = Path(__file__).with_name("strike.c")
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < source.stat().st_mtime:
        LIBRARY.parent.mkdir(exist_ok=True)
        made = LIBRARY.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"]
        with suppress(FileNotFoundError):  # without a compiler nothing can be aimed at
            subprocess.run(command, check=True)
            made.replace(LIBRARY)
    # Another test's server was started without the library and knows none of its functions.
    other = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if other is not None and other not in SERVERS:
        os.kill(other, signal.SIGKILL)
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)  # `ensure_running` reaps it
    mine = {"PYTHONPATH": os.pathsep.join([str(source.parent), *sys.path])}
    mine |= {"LD_PRELOAD": str(LIBRARY)} if LIBRARY.exists() else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mine.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    SERVERS.add(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
    return context


def start(recipe: Recipe, output: Path, world: int = WORLD, at: Aim | None = None) -> list:
    """Start the ranks of a recipe; what rank 0 does may be struck."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    ranks = [
        context.Process(target=entry, args=(rank, port, world, recipe, output, at))
        for rank in range(world)
    ]
    pids = output.with_suffix(".pids")
    pids.write_bytes(bytes(4 * world))
    for rank in ranks:
        rank.start()
    with pids.open("r+b") as file:
        file.write((ctypes.c_int * world)(*(rank.pid for rank in ranks)))
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
