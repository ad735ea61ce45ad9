"""`data_tools check`: whether shards are what their index says."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

from casc.data.decode import decode_image
from casc.data.index import Bucket, Index, Shard, read_index
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.reader import remote_shard
from casc.data.record import SampleRecord, parse_record
from casc.data.remote import FetchError, is_local, join, location
from casc.data.sample import annotations_edges, iter_tar
from casc.data.status import Status
from casc.errors import UserError
from casc.json_files import open_plain
from casc.printing import plain
from data_tools.parallel import map_tasks
from data_tools.plan import order_key
from data_tools.write import sample_needs

_ANNOTATION_FIELDS = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")


class Checked(NamedTuple):
    """What a shard turned out to hold."""

    faults: list[str]
    image_ids: list[int]
    annotations: int
    trained: int
    """Annotations that can be trained on, on images that are."""
    boxes: int = 0
    """The same where no masks are trained."""
    notes: tuple[str, ...] = ()
    """What is no fault: downloads that had to be taken up again."""


class SplitCheck(NamedTuple):
    """What a split turned out to hold."""

    samples: int
    shards: int
    annotations: int
    faults: list[str]


def check_shards(
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    progress: bool = False,
    loading: RemoteConfig = DEFAULT_LOADING,
    warn: Callable[[str], object] = lambda text: None,
) -> dict[str, SplitCheck]:
    """Check all shards of a folder or URL against its index.

    Args:
        folder: where they lie.
        workers: processes.
        progress: show progress bars.
        loading: how files are fetched that lie elsewhere.
        warn: is told of downloads that had to be taken up again.

    Raises:
        UserError: when the index itself can't be read.
    """
    index = read_index(folder, loading)
    return {
        name: _check_split(
            location(folder), index, name, loading, workers=workers, progress=progress, warn=warn
        )
        for name in index.splits
    }


def _check_split(
    root: str, index: Index, name: str, loading: RemoteConfig, *,
    workers: int, progress: bool, warn: Callable[[str], object],
) -> SplitCheck:  # fmt: skip
    split = index.splits[name]
    labels = {category.id: i for i, category in enumerate(index.categories)}
    tasks = [
        _Task(root, shard, split.buckets[shard.bucket], labels, loading) for shard in split.shards
    ]
    results = list(
        map_tasks(
            _check_shard,
            tasks,
            workers=workers,
            title=f"{name}: checking",
            weights=[shard.samples for shard in split.shards],
            progress=progress,
        )
    )
    faults = [fault for result in results for fault in result.faults]
    for note in (note for result in results for note in result.notes):
        warn(note)
    for i, bucket in enumerate(split.buckets):
        listed = sum(shard.samples for shard in split.shards if shard.bucket == i)
        if listed != bucket.samples:
            faults.append(
                f"index.json: splits.{name}.buckets[{i}].samples: {bucket.samples}, "
                f"its shards list {listed}"
            )
    seen: set[int] = set()
    for shard, result in zip(split.shards, results, strict=True):
        twice = sorted(seen.intersection(result.image_ids))
        if twice:
            faults.append(f"{shard.name}: image {twice[0]} is in an earlier shard too")
        seen.update(result.image_ids)
    if not faults:
        found = {
            "images": {"stored": len(seen)},
            "annotations": {
                "stored": sum(result.annotations for result in results),
                "trained": sum(result.trained for result in results),
                "trained_without_masks": sum(result.boxes for result in results),
            },
        }
        faults += _compare_report(name, split.report, found)
    return SplitCheck(len(seen), len(tasks), sum(r.annotations for r in results), faults)


def _compare_report(name: str, report: dict[str, Any], found: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    for subject, counts in found.items():
        for key, count in counts.items():
            stated = report.get(subject, {}).get(key, count)
            if stated != count:
                faults.append(
                    f"index.json: splits.{name}.report.{subject}.{key}: {stated}, "
                    f"the shards hold {count}"
                )
    return faults


class _Task(NamedTuple):
    root: str
    shard: Shard
    bucket: Bucket
    labels: dict[int, int]
    loading: RemoteConfig


class _Counted:
    """What tarfile reads from: counts and hashes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.bytes, self.digest = stream, 0, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.bytes += len(data)
        self.digest.update(data)
        return data


def _check_shard(task: _Task) -> Checked:
    shard, status = task.shard, Status()
    place = join(task.root, shard.name)
    try:
        if is_local(place):
            stream = open_plain(place)
        else:
            stream, place, _ = remote_shard(place, shard, task.loading, status)
        with stream:
            checked = _check_content(task, _Counted(stream), place)
    except FileNotFoundError:
        checked = Checked([f"{shard.name}: missing"], [], 0, 0)
    except OSError as error:
        checked = Checked([f"{shard.name}: can't be read ({error.strerror})"], [], 0, 0)
    except UserError as error:
        checked = Checked([f"{shard.name}: {_without(place, error)}"], [], 0, 0)
    return checked._replace(notes=status.taken_notes())


def _check_content(task: _Task, source: _Counted, place: str) -> Checked:
    shard = task.shard
    checked = Checked([], [], 0, 0)
    keys: list[str] = []
    try:
        for key, image, record in iter_tar(source, name=place):
            keys.append(key)
            checked = _check_sample(task, key, image, record, checked)
    except FetchError:
        raise
    except UserError as error:
        checked.faults.append(f"{shard.name}: {_without(place, error)}")
    while source.read(2**20):  # what follows the archive's end, or what is wrong with it
        pass
    if source.bytes != shard.bytes:
        checked.faults.insert(0, f"{shard.name}: {source.bytes} bytes, index says {shard.bytes}")
    elif source.digest.hexdigest() != shard.sha256:
        checked.faults.insert(0, f"{shard.name}: its content has changed (SHA-256 differs)")
    if len(keys) != shard.samples:
        checked.faults.append(f"{shard.name}: {len(keys)} samples, index says {shard.samples}")
    if keys != [f"{i:012d}" for i in sorted(checked.image_ids, key=order_key)]:
        checked.faults.append(f"{shard.name}: keys are not the image ids in the order of shards")
    return checked


def _without(place: str, error: UserError) -> str:
    return str(error).removeprefix(plain(f"{place}: "))


def _check_sample(task: _Task, key: str, image: bytes, text: bytes, before: Checked) -> Checked:
    place = f"{task.shard.name}: {key}"
    try:
        record = parse_record(text)
    except UserError as error:
        before.faults.append(f"{place}: {error}")
        return before
    for i, entry in enumerate(record["annotations"]):
        # Training and evaluation do without some of them.
        lacks = [name for name in _ANNOTATION_FIELDS if name not in entry]
        if lacks:
            before.faults.append(f"{place}: annotations[{i}].{lacks[0]} is missing")
            return before
    before.image_ids.append(record["image_id"])
    before.faults.extend(f"{place}: {fault}" for fault in _sample_faults(task, record, image))
    objects = sum(entry["train"] for entry in record["annotations"])
    more = sum(entry.get("box_only", False) for entry in record["annotations"])
    shard = task.shard
    return before._replace(
        annotations=before.annotations + len(record["annotations"]),
        trained=before.trained + (objects if shard.train else 0),
        boxes=before.boxes + (objects + more if shard.train or shard.maskless else 0),
    )


def _sample_faults(task: _Task, record: SampleRecord, image: bytes) -> list[str]:
    bucket, faults = task.bucket, []
    width, height = record["width"], record["height"]
    try:
        decoded = decode_image(image, record["orientation"], bucket.channels)
        if decoded.shape[:2] != (height, width):
            found = f"{decoded.shape[1]} x {decoded.shape[0]}"
            faults.append(f"decodes to {found}, its JSON says {width} x {height}")
    except ValueError as error:
        faults.append(f"image: {error}")
    if width > bucket.width or height > bucket.height:
        canvas = f"{bucket.width} x {bucket.height}"
        faults.append(f"{width} x {height} is larger than its bucket's canvas {canvas}")
    aspect = width / height if height > 0 else 0
    if not bucket.min_aspect < aspect <= (bucket.max_aspect or aspect):
        faults.append(f"its aspect {aspect:.4f} isn't its bucket's ({bucket.name})")
    if record["train"] != task.shard.train:
        faults.append("its `train` isn't its shard's")
    objects = [entry for entry in record["annotations"] if entry["train"]]
    count, room, boxes, regions = sample_needs([record["annotations"]])[0]
    for needed, held, what in (
        (count, bucket.instances, "objects"),
        (boxes, bucket.boxes, "objects without masks"),
        (regions, bucket.regions, "regions to ignore"),
    ):
        if held is not None and needed > held:
            faults.append(f"{needed} {what}, its bucket has room for {held}")
    for entry in record["annotations"]:
        if entry["label"] != task.labels.get(entry["category_id"], -1):
            faults.append(f"annotation {entry['id']}: its label isn't its category's")
    outlines = annotations_edges(objects)
    faults += [
        f"annotation {entry['id']}: it has no edges"
        for entry, edges in zip(objects, outlines, strict=True)
        if not len(edges)
    ]
    if room > bucket.edges:
        faults.append(f"edges need a room of {room}, its bucket has {bucket.edges}")
    return faults


def fault_lines(checks: dict[str, SplitCheck]) -> Sequence[str]:
    """All faults, a line each."""
    return [fault for check in checks.values() for fault in check.faults]
