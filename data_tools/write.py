"""Writing one shard: the work of a worker process."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from casc.data.record import AnnotationRecord, SampleRecord
from casc.data.sample import annotations_edges, edge_room
from data_tools.images import store_image
from data_tools.instances import Frame, Made, make_records
from data_tools.plan import Item, PlannedShard, Settings
from data_tools.report import Finding
from data_tools.store import load_many
from data_tools.tarball import TEMPORARY, write_tar


class ShardTask(NamedTuple):
    """What a worker needs to write a shard."""

    path: Path
    images: Path
    """The split's folder."""
    shard: PlannedShard
    labels: Mapping[int, int]
    """Label by category id."""
    settings: Settings


class ShardResult(NamedTuple):
    """What is to be known of a shard that was written."""

    bytes: int
    sha256: str
    annotations: int
    trained_annotations: int
    """Those that can be trained on and are on images that are."""
    trained_without_masks: int
    """The same where no masks are trained."""
    needs: list[list[int]]
    """Of each image, in the shard's order: trainable annotations, the room for their edges,
    trainable annotations where no masks are, and regions to ignore."""
    findings: list[Finding]


_AT_ONCE = 64
"""Images whose annotations are worked on together."""


def write_shard(task: ShardTask) -> ShardResult:
    """Write a shard.

    Raises:
        UserError: when an image changed since it was looked at.
        OSError: when the shard can't be written.
    """
    findings: list[Finding] = []
    listed = 0
    needs: list[list[int]] = []

    def members() -> Iterator[tuple[str, str, bytes]]:
        nonlocal listed
        for first in range(0, len(task.shard.items), _AT_ONCE):
            items = task.shard.items[first : first + _AT_ONCE]
            made = _annotations(items, task)
            entries = [[each.entry for each in of_image] for of_image in made]
            needs.extend(sample_needs(entries))
            listed += sum(map(len, entries))
            findings.extend(f for of_image in made for each in of_image for f in each.findings)
            for item, annotations in zip(items, entries, strict=True):
                image, record = _sample(item, annotations, task)
                key = f"{item.image.id:012d}"
                yield key, item.probe.extension, image
                # Compact, and the same on every run; keys stay in the order of the code.
                text = json.dumps(record, separators=(",", ":"), allow_nan=False)
                yield key, "json", text.encode("ascii")

    task.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = write_tar(task.path, members())
    except BaseException:
        task.path.with_name(task.path.name + TEMPORARY).unlink(missing_ok=True)
        raise
    return ShardResult(
        bytes=written.bytes,
        sha256=written.sha256,
        annotations=listed,
        trained_annotations=sum(need[0] for need in needs) if task.shard.train else 0,
        trained_without_masks=sum(need[2] for need in needs)
        if task.shard.train or task.shard.maskless
        else 0,
        needs=needs,
        findings=findings,
    )


def sample_needs(samples: Sequence[Sequence[AnnotationRecord]]) -> list[list[int]]:
    """What samples need room for in a batch, by their annotations: see `ShardResult.needs`."""
    objects = [[entry for entry in entries if entry["train"]] for entries in samples]
    edges = iter(annotations_edges([entry for entries in objects for entry in entries]))
    return [
        [
            len(own),
            edge_room([next(edges) for _ in own]),
            len(own) + sum(entry.get("box_only", False) for entry in entries),
            sum(entry.get("region", False) for entry in entries),
        ]
        for own, entries in zip(objects, samples, strict=True)
    ]


def _annotations(items: Sequence[Item], task: ShardTask) -> list[list[Made]]:
    frames = [Frame(i.image.width, i.image.height, i.width, i.height) for i in items]
    entries = load_many([item.annotations for item in items])
    images = list(zip(entries, frames, strict=True))
    return make_records(images, task.labels, task.settings.trace_tolerance)


def _sample(
    item: Item, annotations: list[AnnotationRecord], task: ShardTask
) -> tuple[bytes, SampleRecord]:
    """An image's two members of the shard."""
    settings = task.settings
    stored = store_image(
        task.images / item.image.file_name,
        item.probe,
        item.orientation,
        settings.max_size,
        settings.stretch,
        settings.channels,
    )
    return stored.data, {
        "image_id": item.image.id,
        "file_name": item.image.file_name,
        "width": stored.width,
        "height": stored.height,
        "orientation": stored.orientation,
        "train": item.train,
        "annotations": annotations,
    }
