"""A split of a COCO data set: where its files lie, and digests of what they hold."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from casc.errors import UserError
from data_tools.boxes import mend_corners
from data_tools.coco import Annotations, check_annotations, encoding_fault, read_annotations
from data_tools.foreign import convert
from data_tools.layouts import Part, find_files
from data_tools.plan import PlannedShard, Settings
from data_tools.report import Finding
from data_tools.voc_files import visible
from data_tools.yolo import has_objects, is_yolo, yolo_labels

_BESIDE_IMAGES = (".txt", ".cache", ".npy", ".yaml", ".yml", ".json", ".xml", ".labels")
"""What Ultralytics and labelling tools put among images."""
_CONTENT_VERSION = 8
"""Raised when the same input gives other shards than before, so that old ones aren't reused."""


class Source(NamedTuple):
    """A split to make shards of."""

    split: str
    file: Path
    images: Path
    annotations: Annotations
    digest: str
    """Of the annotation file and the settings."""
    hints: dict[str, str]
    """What a file that isn't there may be called, by the name that is listed."""


def read_source(part: Part, out: Path, settings: Settings) -> Source:
    """Read a split's annotation file, and find the files that it names.

    Raises:
        UserError: when a file or folder isn't there, or can't be understood.
    """
    split, file, images, foreign = part
    if not re.fullmatch(r"\w[\w.-]*", split, re.ASCII):
        raise UserError(f"--splits: {split!a} can't be a split's name (letters, digits, . _ -)")
    if not foreign and file.is_dir():
        raise UserError(
            f"{file}: is a folder; give an annotation file in it, or the data set's folder"
        )
    if not foreign and not file.is_file():
        raise UserError(
            f"{file}: not found; check --splits and the folder, or give --annotations FILE"
            " --images FOLDER"
        )
    if not images.is_dir():
        # Of a file that can't be read no folder could be found, either.
        raise UserError(
            (not foreign and encoding_fault(file))
            or f"{images}: no such folder; the images of {file.name} belong there, or give --images"
        )
    if os.path.realpath(out / split) == os.path.realpath(images):  # out may be a loop of links
        raise UserError(f"{out}: shards would lie among the images; give another --out")
    if foreign:
        if settings.skip_invalid:
            raise UserError(
                f"--skip-invalid: leaves out annotations of COCO's files only, {file} is none; drop"
                " it, and mend what is named then"
            )
        made = convert(next(other for other in foreign if other.split == split), foreign)
        if made.broken and not made.data["images"]:
            raise UserError(
                f"{made.broken[0][1]}; restore it: no image of {split} has one that is whole"
            )
        annotations, content = check_annotations(made.data, str(file)), made.digest
        others = [Finding("other_shape", number, kind) for number, kind in made.other_shapes]
        embedded = [
            Finding("embedded", image.id, image.file_name)
            for image in annotations.images
            if image.file_name.lower().endswith(".json")
        ]
        broken = [
            Finding("broken_file", number, told.removeprefix(f"{file}{os.sep}"))
            for number, told in made.broken
        ]
        annotations = annotations._replace(
            listed_images=annotations.listed_images + len(broken),
            listed_annotations=annotations.listed_annotations + len(others),
            # None of these formats has areas.
            findings=[f for f in annotations.findings if f.kind != "missing_area"]
            + others
            + broken
            + embedded,
        )
    else:
        annotations = read_annotations(file, skip_invalid=settings.skip_invalid)
        if not settings.crowds:
            annotations = annotations._replace(by_image=annotations.by_image.without_crowds())
        annotations = mend_corners(annotations)
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256(json.dumps([_CONTENT_VERSION, *settings, content]).encode())
    found, hints = find_files(images, [image.file_name for image in annotations.images])
    renamed = [
        Finding("other_spelling", image.id, f"{image.file_name!a} is {found[image.file_name]!a}")
        for image in annotations.images
        if found.get(image.file_name, image.file_name) != image.file_name
    ]
    entries = [
        image._replace(file_name=found.get(image.file_name, image.file_name))
        for image in annotations.images
    ]
    annotations = annotations._replace(images=entries, findings=[*annotations.findings, *renamed])
    return Source(split, file, images, annotations, digest.hexdigest(), hints)


def hold_out(source: Source, share: float, seed: int) -> list[Source]:
    """Split a source in two by image: what is to be trained on, and `val`.

    Images are grouped by the rarest class on them, and of each group the share is taken in an
    order that is mixed by the seed, so that rare classes are in both parts. Which part an image
    belongs to doesn't depend on the order of the file. Images of one file go into one part.

    Args:
        source: the only part of a data set.
        share: of the images that go to `val`, more than 0 and less than 1.
        seed: chooses which.

    Raises:
        UserError: when it is called `val` itself, or one part would have no image.
    """
    if source.split == "val":
        raise UserError("--val-share: the only part is called val; give --split train")
    found = source.annotations
    # A file that is listed under several ids is one image.
    firsts: dict[str, int] = {}
    for image in found.images:
        firsts[image.file_name] = min(image.id, firsts.get(image.file_name, image.id))
    same = {image.id: firsts[image.file_name] for image in found.images}
    classes: dict[int, set[int]] = {}
    for number, first in same.items():
        classes.setdefault(first, set()).update(found.by_image.categories(number))
    frequency = Counter(number for numbers in classes.values() for number in numbers)
    rarest = {
        i: min(numbers, key=lambda n: (frequency[n], n), default=-1)
        for i, numbers in classes.items()
    }

    def order(number: int) -> bytes:
        return hashlib.sha256(f"{seed} {number}".encode()).digest()

    held: set[int] = set()
    groups = sorted(set(rarest.values()), key=lambda n: (frequency[n], n))
    passed = 0
    for group in groups:
        members = sorted((i for i, least in rarest.items() if least == group), key=order)
        passed += len(members)
        # The share of all groups so far, so that small groups don't round to nothing.
        held.update(members[: max(0, round(share * passed) - len(held))])
    held = {number for number, first in same.items() if first in held}
    if not 0 < len(held) < len(found.images):
        raise UserError(
            f"--val-share: {share} of {len(found.images)} images leaves a part without any"
        )
    listed = {i: len(found.by_image.ids(i)) for i in held}
    parts = []
    for name, wanted in ((source.split, False), ("val", True)):
        images = [image for image in found.images if (image.id in held) == wanted]
        own = found._replace(
            images=images,
            by_image=found.by_image.only([image.id for image in images]),
            listed_images=len(held) if wanted else found.listed_images - len(held),
            listed_annotations=sum(listed.values())
            if wanted
            else found.listed_annotations - sum(listed.values()),
            # What was found in the file as a whole is told once.
            findings=[] if wanted else found.findings,
        )
        digest = hashlib.sha256(f"{source.digest} {name}".encode()).hexdigest()
        parts.append(source._replace(split=name, annotations=own, digest=digest))
    return parts


def count_unlisted(source: Source, every: Sequence[Source]) -> int:
    """Count the files in the split's folder that no annotation file of it lists.

    Of a data.yaml, which may list images of many folders, what counts is in these folders, and
    labels without an image.
    """
    listed = {
        # Links stay as they are.
        os.path.abspath(os.path.join(other.images, image.file_name))  # noqa: PTH100, PTH118
        for other in every
        for image in other.annotations.images
    }
    # An export may keep its annotation file among the images.
    listed |= {os.path.abspath(other.file) for other in every}  # noqa: PTH100
    if is_yolo(source.file):
        images = [source.images / image.file_name for image in source.annotations.images]
        found = _files_in({image.parent for image in images})
        pictures = [f for f in found if f.suffix.lower() not in _BESIDE_IMAGES]
        # Objects of an image that isn't there, or not as a kind of file that is looked for.
        wanted = {yolo_labels(image) for image in [*images, *pictures]}
        texts = _files_in({text.parent for text in wanted})
        lost = [
            f for f in texts if f.suffix.lower() == ".txt" and f not in wanted and has_objects(f)
        ]
        paths = {os.path.abspath(f) for f in pictures}  # noqa: PTH100
        return len(paths - listed) + len(lost)
    labels = (".json", ".xml") if source.file.is_dir() else ()
    walked = (
        os.path.abspath(os.path.join(folder, name))  # noqa: PTH100, PTH118
        for folder, _, names in os.walk(source.images)
        if visible(Path(folder), source.images)
        for name in names
        if not name.startswith(".")
    )
    return sum(path not in listed and Path(path).suffix.lower() not in labels for path in walked)


def _files_in(folders: Iterable[Path]) -> list[Path]:
    files = [f for above in folders if above.is_dir() for f in above.iterdir() if f.is_file()]
    return [f for f in files if not f.name.startswith(".")]


def source_digest(source: Source, images: Sequence[str]) -> str:
    """Give the digest of all that a split's shards come from.

    Its first half is of the annotations and the settings, its second of the images.
    """
    return source.digest[:32] + hashlib.sha256("\n".join(images).encode()).hexdigest()[:32]


def plan_digest(source: Source, shard: PlannedShard) -> str:
    """Give the digest of all that a shard comes from."""
    images = [
        [item.image.id, item.probe.sha256, item.orientation, item.train, item.maskless]
        for item in shard.items
    ]
    return hashlib.sha256(json.dumps([source.digest, shard.name, images]).encode()).hexdigest()
