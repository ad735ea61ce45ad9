"""A split of a COCO data set: where its files lie, and digests of what they hold."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from casc.errors import UserError
from data_tools.coco import Annotations, read_annotations
from data_tools.plan import PlannedShard, Settings

_CONTENT_VERSION = 2
"""Raised when the same input gives other shards than before, so that old ones aren't reused."""


class Source(NamedTuple):
    """A split to make shards of."""

    split: str
    file: Path
    images: Path
    annotations: Annotations
    digest: str
    """Of the annotation file and the settings."""


def find_splits(coco: Path) -> list[str]:
    """Give the splits of a data set: annotation files that have a folder of images.

    Raises:
        UserError: when there is none.
    """
    folder = coco / "annotations"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; is {coco} the root of a COCO data set?")
    found = sorted(path.name[10:-5] for path in folder.glob("instances_*.json"))
    splits = [split for split in found if split and (coco / split).is_dir()]
    if not splits:
        lacking = ", ".join(f"{coco / split}/" for split in found)
        raise UserError(
            f"{folder}: no instances_<split>.json with its folder <split>/ beside annotations/"
            + (f"; there is no {lacking}" if lacking else "")
        )
    return splits


def read_source(coco: Path, out: Path, split: str, settings: Settings) -> Source:
    """Read a split's annotation file.

    Raises:
        UserError: when a file or folder isn't there, or can't be understood.
    """
    if not re.fullmatch(r"\w[\w.-]*", split, re.ASCII):
        raise UserError(f"--splits: {split!a} can't be a split's name (letters, digits, . _ -)")
    file, images = coco / "annotations" / f"instances_{split}.json", coco / split
    if not file.is_file():
        raise UserError(f"{file}: not found; check --splits and the folder {coco}")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; the images of {file.name} belong there")
    if (out / split).resolve() == images.resolve():
        raise UserError(f"{out}: shards would lie among the images; give another --out")
    annotations = read_annotations(file)
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256(json.dumps([_CONTENT_VERSION, *settings, content]).encode())
    return Source(split, file, images, annotations, digest.hexdigest())


def count_unlisted(source: Source) -> int:
    """Count the files in the split's folder that its annotation file doesn't list."""
    listed = {os.path.normpath(image.file_name) for image in source.annotations.images}
    files = (
        os.path.relpath(os.path.join(folder, name), source.images)  # noqa: PTH118
        for folder, _, names in os.walk(source.images)
        for name in names
    )
    return sum(name not in listed for name in files)


def source_digest(source: Source, images: Sequence[str]) -> str:
    """Give the digest of all that a split's shards come from.

    Its first half is of the annotations and the settings, its second of the images.
    """
    return source.digest[:32] + hashlib.sha256("\n".join(images).encode()).hexdigest()[:32]


def plan_digest(source: Source, shard: PlannedShard) -> str:
    """Give the digest of all that a shard comes from."""
    images = [
        [item.image.id, item.probe.sha256, item.orientation, item.train] for item in shard.items
    ]
    return hashlib.sha256(json.dumps([source.digest, shard.name, images]).encode()).hexdigest()
