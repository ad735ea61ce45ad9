"""`data_tools show`: samples of shards on a contact sheet."""

import bisect
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casc.data.index import Index, read_index
from casc.data.loading import DEFAULT_LOADING, Fetching
from casc.data.reader import read_shard
from casc.data.remote import location
from casc.draw import contact_sheet, draw_sample
from casc.errors import UserError


def show_shards(
    folder: str | os.PathLike[str],
    out: Path,
    *,
    split: str | None = None,
    count: int = 16,
    seed: int = 0,
    cell: int = 480,
    loading: Fetching = DEFAULT_LOADING,
) -> list[str]:
    """Draw samples chosen at random on a contact sheet, and write it as PNG.

    Args:
        folder: of the shards, or their URL.
        out: the PNG to write.
        split: of which split; the index's first by default.
        count: how many samples.
        seed: chooses them.
        cell: the longest side of a picture on the sheet, in pixels.
        loading: how shards are fetched that lie elsewhere.

    Returns:
        A caption for each picture.

    Raises:
        UserError: when there is no such split, or a shard can't be read.
    """
    index, folder = read_index(folder, loading), location(folder)
    if count < 1:
        raise UserError(f"--n: expected 1 or more, got {count}")
    if split is None:
        split = next(iter(index.splits), "")
    if split not in index.splits:
        raise UserError(f"{folder}: has no split {split!r}, only {', '.join(index.splits)}")
    samples = _choose(folder, index, split, count, seed, loading)
    captions = [_caption(record) for _, record in samples]
    pictures = [draw_sample(image, record, index.categories, cell) for image, record in samples]
    sheet = contact_sheet(pictures, cell=cell, captions=captions)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(out, "PNG")
    return captions


def _choose(
    folder: str, index: Index, split: str, count: int, seed: int, loading: Fetching
) -> list[tuple[bytes, dict[str, Any]]]:
    shards = index.splits[split].shards
    ends = list(itertools.accumulate(shard.samples for shard in shards))
    total = ends[-1] if ends else 0
    if not total:
        raise UserError(f"{folder}: split {split!r} has no samples")
    chosen = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    wanted: dict[int, set[int]] = {}
    for number in chosen.tolist():
        shard = bisect.bisect_right(ends, number)
        wanted.setdefault(shard, set()).add(number - (ends[shard] - shards[shard].samples))
    samples: list[tuple[bytes, dict[str, Any]]] = []
    for shard in sorted(wanted):
        for i, (_, image, record) in enumerate(read_shard(folder, shards[shard], loading)):
            if i in wanted[shard]:
                samples.append((image, json.loads(record)))
    return samples


def _caption(record: dict[str, Any]) -> str:
    entries = record["annotations"]
    trained = sum(entry["train"] for entry in entries)
    use = f"{trained} of {len(entries)} to train on" if record["train"] else "evaluation only"
    return f"{record['image_id']}: {record['width']} x {record['height']}, {use}"
