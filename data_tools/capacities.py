"""What a bucket's batches have to hold, and which images ask for far more than the others."""

from collections.abc import Sequence

from casc.data.index import Bucket
from data_tools.plan import PlannedBucket, PlannedShard
from data_tools.report import Finding
from data_tools.write import ShardResult

_FAR = 4
"""An image stands out if it needs so many times what 99 % of the images do, of its bucket or of all
(it may be alone in its bucket) ..."""
_LEAST = {"many_objects": 200, "many_edges": 10_000, "large_image": 2_000_000}
"""... and more than so many objects, edges or pixels, which cost nothing worth a word."""
_NAMES = {"many_objects": "objects", "many_edges": "edges", "large_image": "pixels"}


def make_bucket(
    number: int,
    bucket: PlannedBucket,
    shards: Sequence[PlannedShard],
    results: Sequence[ShardResult],
    channels: int = 3,
) -> tuple[Bucket, list[Finding]]:
    """Give a bucket's capacities, and name the images that set one far above the 99th percentile.

    Args:
        number: the bucket's.
        bucket: its name and aspects.
        shards: of the whole split.
        results: what became of them.
        channels: of the images.
    """
    own = [(s, r) for s, r in zip(shards, results, strict=True) if s.bucket == number]
    items = [item for shard, _ in own for item in shard.items]
    ids = [item.image.id for item in items]
    needs = [need for _, result in own for need in result.needs]
    columns = _needs(own)
    every = _needs(list(zip(shards, results, strict=True)))
    made = Bucket(
        name=bucket.name,
        min_aspect=bucket.min_aspect,
        max_aspect=bucket.max_aspect,
        height=max(item.height for item in items),
        width=max(item.width for item in items),
        instances=max(1, *(need[0] for need in needs)),
        edges=max(1, *(need[1] for need in needs)),
        samples=len(items),
        boxes=max(1, *(need[2] for need in needs)),
        regions=max(1, *(need[3] for need in needs)),
        channels=channels,
    )
    found: list[Finding] = []
    for kind, values in columns.items():
        usual = min(_usual(values), _usual(every[kind]))
        limit = max(_FAR * usual, _LEAST[kind])
        side = max((max(item.width, item.height) for shard in shards for item in shard.items
                    if item.width * item.height <= limit), default=0)  # fmt: skip
        remedy = f"; --max-size {side} makes it like them" if kind == "large_image" and side else ""
        found += [
            Finding(kind, i, f"{n:,} {_NAMES[kind]}; 99 % of images: up to {usual:,}{remedy}")
            for i, n in zip(ids, values, strict=True)
            if n > limit
        ]
    return made, found


def _needs(own: Sequence[tuple[PlannedShard, ShardResult]]) -> dict[str, list[int]]:
    needs = [need for _, result in own for need in result.needs]
    items = [item for shard, _ in own for item in shard.items]
    return {
        "many_objects": [need[2] for need in needs],
        "many_edges": [need[1] for need in needs],
        "large_image": [item.width * item.height for item in items],
    }


def _usual(values: Sequence[int]) -> int:
    # Of a few images the largest is left out: it would be its own 99th percentile.
    return sorted(values)[int(0.99 * (len(values) - 1))]
