"""The ground truth that evaluation measures against: COCO data sets, from files or shards."""

import os
import sys
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any

from casc.data.index import Category, Index
from casc.data.loader_config import DEFAULT_LOADING, RemoteConfig
from casc.data.reader import read_shard
from casc.data.record import SampleRecord, parse_record
from casc.data.segmentation import mask_area, usable_segmentation
from casc.errors import UserError
from casc.json_files import MOST_COCO_BYTES, read_json

_LARGEST = sys.float_info.max
CocoDict = dict[str, Any]
"""`images`, `annotations` and `categories` as in a COCO annotation file."""


def ground_truth_from_shards(
    folder: str | os.PathLike[str],
    index: Index,
    split: str,
    loading: RemoteConfig = DEFAULT_LOADING,
) -> CocoDict:
    """Collect the annotations of a split's shards, those that aren't trained on included.

    Raises:
        UserError: when the index has no such split or a shard can't be read.
    """
    if split not in index.splits:
        raise UserError(f"{folder}: no split {split!r}; there is {', '.join(index.splits)}")
    records = (
        parse_record(record, f"{shard.name}: {key}")
        for shard in index.splits[split].shards
        for key, _, record in read_shard(folder, shard, loading)
    )
    return ground_truth_from_samples(records, index.categories)


def ground_truth_from_samples(
    samples: Iterable[SampleRecord], categories: Sequence[Category]
) -> CocoDict:
    """Collect the JSON records of shards into a COCO data set, annotations as COCO gave them.

    Args:
        samples: parsed sample JSONs, in any order.
        categories: `Index.categories`.
    """
    images, annotations = [], []
    kept = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    for sample in samples:
        image_id = sample["image_id"]
        images.append(
            {
                "id": image_id,
                "file_name": sample["file_name"],
                "width": sample["width"],
                "height": sample["height"],
            }
        )
        annotations += [
            {"image_id": image_id, **{key: a[key] for key in kept if key in a}}
            for a in sample["annotations"]
        ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [asdict(category) for category in categories],
    }


def read_coco(path: str | os.PathLike[str]) -> CocoDict:
    """Read a COCO annotation file.

    Raises:
        UserError: naming the file and the field, when it can't be read or isn't of that format.
    """
    data = read_json(path, most_bytes=MOST_COCO_BYTES)
    needed = {"images": ("id", "width", "height"), "annotations": (), "categories": ("id", "name")}
    for key, fields in needed.items():
        entries = data.get(key)
        if not isinstance(entries, list):
            raise UserError(f"{path}: {key}: expected a list; is this a COCO annotation file?")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: {key}[{i}]: expected an object, got {entry!r:.60}")
            for field in fields:
                kind = str if field == "name" else int
                if not isinstance(entry.get(field), kind):
                    raise UserError(
                        f"{path}: {key}[{i}].{field}: expected {kind.__name__}, "
                        f"got {entry.get(field)!r:.60}"
                    )
    return data


def usable_objects(
    ground_truth: CocoDict, images: Mapping[int, Any], categories: Mapping[int, str]
) -> tuple[list[dict[str, Any]], int]:
    """Copy the annotations of these images that can be measured against.

    They are numbered anew from 1: pycocotools takes the id 0 for "no match" and mixes up
    ids that occur twice. A missing `iscrowd` becomes 0, a missing `area` the mask's as
    pycocotools has it, without a usable mask the box's.

    Returns:
        The annotations, and how many were left out for want of a box or a known category.
    """
    objects: list[dict[str, Any]] = []
    skipped = 0
    for annotation in ground_truth["annotations"]:
        if not is_key(annotation.get("image_id"), images):
            continue
        box = annotation.get("bbox")
        if not is_key(annotation.get("category_id"), categories) or not are_numbers(box, 4):
            skipped += 1
            continue
        area = annotation.get("area")
        if not are_numbers([area], 1):
            size = (images[annotation["image_id"]][side] for side in ("width", "height"))
            area = _area(annotation, *size)
        crowd = int(bool(annotation.get("iscrowd")))
        objects.append({**annotation, "id": len(objects) + 1, "area": area, "iscrowd": crowd})
    return objects, skipped


def _area(annotation: Mapping[str, Any], width: int, height: int) -> float:
    mask = usable_segmentation(annotation.get("segmentation"), width, height)
    box = annotation["bbox"]
    return box[2] * box[3] if mask is None else mask_area(mask, width, height)


def with_masks(
    objects: Sequence[dict[str, Any]], images: Mapping[int, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Give the same objects, each with a mask that pycocotools can read.

    An object without a usable one becomes a region to ignore, as a crowd is: its box.

    Returns:
        The objects, and how many of them (crowds not counted) had no usable mask.
    """
    masked, without = [], 0
    for entry in objects:
        size = (images[entry["image_id"]][side] for side in ("width", "height"))
        mask = usable_segmentation(entry.get("segmentation"), *size)
        if mask is not None:
            masked.append({**entry, "segmentation": mask})
            continue
        without += not entry["iscrowd"]
        x, y, width, height = entry["bbox"]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        masked.append({**entry, "segmentation": [corners], "iscrowd": 1})
    return masked, without


def is_key(value: object, known: Collection[Any]) -> bool:
    """Whether an id, which may be anything that JSON knows, is one of those that are there."""
    return isinstance(value, Hashable) and value in known


def are_numbers(values: object, count: int) -> bool:
    """Whether this is a sequence of `count` finite numbers."""
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
        and all(-_LARGEST <= v <= _LARGEST for v in values)  # integers may be of any length
    )


def is_rle(mask: object) -> bool:
    """Whether this looks like COCO's compressed run lengths."""
    if not isinstance(mask, Mapping) or not are_numbers(mask.get("size"), 2):
        return False
    counts = mask.get("counts")
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    # pycocotools reads on past the end of what ends within a number.
    return isinstance(counts, bytes) and (not counts or not (counts[-1] - 48) & 0x20)
