"""What a loader's worker does, over a chosen set of samples: as a whole and part by part."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from casc.data.collate import block_size, collate
from casc.data.decode import decode_image
from casc.data.index import Bucket, Split
from casc.data.plan import Segment
from casc.data.sample import annotations_edges, read_sample
from casc.data.stream import ShardReader

Work = list[tuple[Bucket, Segment]]
"""Which samples are loaded."""
Pair = tuple[bytes, bytes]
"""A sample's image and JSON."""


def choose(split: Split, samples: int) -> Work:
    """Samples of all buckets, in proportion to what they hold."""
    work, wanted, passed = [], min(samples, split.train_samples), 0
    for number, shard in enumerate(split.shards):
        if shard.train:
            before = passed * wanted // split.train_samples
            passed += shard.samples
            stop = passed * wanted // split.train_samples - before
            if stop:
                work.append((split.buckets[shard.bucket], Segment(number, 0, stop)))
    return work


def read_pairs(root: Path, split: Split, work: Work) -> Iterator[list[Pair]]:
    """Yield each segment's samples, still encoded."""
    reader = ShardReader(root, split)
    for _, segment in work:
        yield [(image, record) for _, image, record in reader.read(segment)]


def load(root: Path, split: Split, work: Work, batch: int) -> None:
    """What a worker does, in memory that is used again as a worker's is."""
    block = _memory(work, batch)
    for (bucket, _), pairs in zip(work, read_pairs(root, split, work), strict=True):
        for at in range(0, len(pairs), batch):
            samples = [read_sample(*pair) for pair in pairs[at : at + batch]]
            collate(samples, bucket, batch=batch, block=block)


def time_parts(root: Path, split: Split, work: Work, batch: int) -> dict[str, float]:
    """Seconds of each part of `_load`; what is done inside of `read_sample` is done again."""
    names = ["read", "JSON", "decode", "edges", "collate", "other"]
    total = dict.fromkeys(names, 0.0)
    block = _memory(work, batch)

    def lap(name: str, before: float) -> float:
        now = time.process_time()
        total[name] += now - before
        return now

    for bucket, segment in work:
        start = time.process_time()
        (pairs,) = read_pairs(root, split, [(bucket, segment)])
        lap("read", start)
        for at in range(0, len(pairs), batch):
            samples = []
            for image, text in pairs[at : at + batch]:
                start = time.process_time()
                record = json.loads(text)
                middle = lap("JSON", start)
                decode_image(image, record["orientation"])
                middle = lap("decode", middle)
                annotations_edges([a for a in record["annotations"] if a["train"]])
                middle = lap("edges", middle)
                samples.append(read_sample(image, text))
                total["other"] += time.process_time() - middle - (middle - start)
            start = time.process_time()
            collate(samples, bucket, batch=batch, block=block)
            lap("collate", start)
    return {name: max(value, 0.0) for name, value in total.items()}


def _memory(work: Work, batch: int) -> Tensor:
    size = max(block_size(bucket, batch) for bucket, _ in work)
    return torch.zeros(size, dtype=torch.uint8)
