"""How many images per second the loader delivers, end to end, by the number of workers."""

import contextlib
import io
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from casc.data.index import read_index
from casc.data.stream import TrainLoaderConfig, training_batches
from casc.errors import UserError


def bench_loader(
    shards: Path | None,
    split: str | None,
    *,
    batch: int,
    workers: tuple[int, ...],
    seconds: float,
    generated: int,
) -> dict[str, Any]:
    """Take training batches for a while with each number of workers.

    Args:
        shards: folder made by `data_tools shard`; None for images generated for the occasion.
        split: which split; None for the first with images to train on.
        batch: images per batch.
        workers: numbers of worker processes; 0 loads in this process.
        seconds: how long each number is tried.
        generated: images to generate without shards.

    Raises:
        UserError: numbers that make no sense, or a split that isn't there.
    """
    if min(batch, generated) < 1 or not 0 < seconds < math.inf or not workers or min(workers) < 0:
        raise UserError(
            "--batch, --samples and --seconds must be positive, --workers at least one number"
            " that isn't negative"
        )
    with tempfile.TemporaryDirectory(prefix="casc-bench-") as temporary:
        root = shards or _generate(Path(temporary), generated)
        splits = read_index(root).splits
        names = [name for name, found in splits.items() if found.train_samples]
        name = split or (names[0] if names else "")
        if name not in names:
            raise UserError(f"--split {name}: {root} has images to train on in {names}")
        rates = {}
        for number in workers:
            loading = TrainLoaderConfig(workers=number)
            stream = training_batches(
                root, splits[name], seed=0, steps=range(2**40), batch=batch, loading=loading
            )
            # What is ready when the clock starts must have been made at the same speed.
            for _ in range(2 * max(number, 1) * loading.prefetch):
                next(stream)
            rates[str(number)] = batch * _batches_per_second(stream, seconds)
            stream.close()
    return {
        "what": "loader",
        "split": name,
        "images": splits[name].train_samples,
        "batch": batch,
        "img_per_s": rates,
    }


def _batches_per_second(stream: Any, seconds: float) -> float:
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(stream)
        batches += 1
    return batches / (time.perf_counter() - start)


def _generate(folder: Path, images: int) -> Path:
    from data_tools.cli import ShardCommand
    from data_tools.synth import SynthSettings, synthesise

    synthesise(folder / "coco", {"train2017": images}, SynthSettings(size=640))
    # What it says of them names a folder that is gone afterwards, and isn't part of the report.
    with contextlib.redirect_stdout(io.StringIO()):
        ShardCommand(folder / "coco", folder / "shards", progress=False).run()
    return folder / "shards"
