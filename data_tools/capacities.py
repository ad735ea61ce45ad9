"""What a bucket's batches have to hold, and which images ask for far more than the others."""

from collections.abc import Sequence

import numpy as np

from casc.data.index import Bucket
from data_tools.plan import PlannedBucket, PlannedShard
from data_tools.report import Finding
from data_tools.write import ShardResult

_FAR = 4
"""An image stands out if it needs so many times what 99 % of its bucket's images do ..."""
_LEAST = {"many_objects": 200, "many_edges": 10_000, "large_image": 2_000_000}
"""... and more than so many objects, edges or pixels, which cost nothing worth a word."""
_NAMES = {"many_objects": "objects", "many_edges": "edges", "large_image": "pixels"}


def make_bucket(
    number: int,
    bucket: PlannedBucket,
    shards: Sequence[PlannedShard],
    results: Sequence[ShardResult],
) -> tuple[Bucket, list[Finding]]:
    """Give a bucket's capacities, and name the images that set one far above the 99th percentile.

    Args:
        number: the bucket's.
        bucket: its name and aspects.
        shards: of the whole split.
        results: what became of them.
    """
    own = [(s, r) for s, r in zip(shards, results, strict=True) if s.bucket == number]
    items = [item for shard, _ in own for item in shard.items]
    needs = [need for _, result in own for need in result.needs]
    ids = [item.image.id for item in items]
    columns = {
        "many_objects": [need[0] for need in needs],
        "many_edges": [need[1] for need in needs],
        "large_image": [item.width * item.height for item in items],
    }
    made = Bucket(
        name=bucket.name,
        min_aspect=bucket.min_aspect,
        max_aspect=bucket.max_aspect,
        height=max(item.height for item in items),
        width=max(item.width for item in items),
        instances=max(1, *columns["many_objects"]),
        edges=max(1, *columns["many_edges"]),
        samples=len(items),
        boxes=max(1, *(need[2] for need in needs)),
        regions=max(1, *(need[3] for need in needs)),
    )
    found = [finding for kind, values in columns.items() for finding in _far(kind, ids, values)]
    return made, found


def _far(kind: str, ids: Sequence[int], values: Sequence[int]) -> list[Finding]:
    # Of a few images the largest is left out: it would be its own 99th percentile.
    usual = sorted(values)[int(0.99 * (len(values) - 1))] if len(values) > 1 else values[0]
    limit = max(_FAR * usual, _LEAST[kind])
    return [
        Finding(kind, ids[i], f"{values[i]:,} {_NAMES[kind]}; 99 % of its bucket: up to {usual:,}")
        for i in np.flatnonzero(np.array(values) > limit).tolist()
    ]
