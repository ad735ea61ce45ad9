"""Writing one shard: the work of a worker process."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from casc.data.record import SampleRecord
from casc.data.sample import annotations_edges, edge_room
from data_tools.images import store_image
from data_tools.instances import Frame, make_records
from data_tools.plan import Item, PlannedShard, Settings
from data_tools.report import Finding
from data_tools.store import load
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


class SampleMembers(NamedTuple):
    """A sample, ready to be put into a tar."""

    key: str
    extension: str
    """Of the image."""
    image: bytes
    record: SampleRecord
    findings: list[Finding]


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
        for item in task.shard.items:
            sample = make_sample(item, task)
            findings.extend(sample.findings)
            listed += len(sample.record["annotations"])
            needs.append(sample_needs(sample.record))
            yield sample.key, sample.extension, sample.image
            # Compact, and the same on every run; keys stay in the order of the code.
            text = json.dumps(sample.record, separators=(",", ":"), allow_nan=False)
            yield sample.key, "json", text.encode("ascii")

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


def sample_needs(record: SampleRecord) -> list[int]:
    """What a sample needs room for in a batch: see `ShardResult.needs`."""
    every = record["annotations"]
    objects = [entry for entry in every if entry["train"]]
    boxes = len(objects) + sum(entry.get("box_only", False) for entry in every)
    regions = sum(entry.get("region", False) for entry in every)
    return [len(objects), edge_room(annotations_edges(objects)), boxes, regions]


def make_sample(item: Item, task: ShardTask) -> SampleMembers:
    """Make an image's two members of the shard."""
    image, settings = item.image, task.settings
    stored = store_image(
        task.images / image.file_name,
        item.probe,
        item.orientation,
        settings.max_size,
        settings.stretch,
        settings.channels,
    )
    frame = Frame(image.width, image.height, stored.width, stored.height)
    entries = list(load(item.annotations))
    records = make_records(entries, frame, task.labels, settings.trace_tolerance)
    return SampleMembers(
        key=f"{image.id:012d}",
        extension=item.probe.extension,
        image=stored.data,
        record={
            "image_id": image.id,
            "file_name": image.file_name,
            "width": stored.width,
            "height": stored.height,
            "orientation": stored.orientation,
            "train": item.train,
            "annotations": [record.entry for record in records],
        },
        findings=[finding for record in records for finding in record.findings],
    )
