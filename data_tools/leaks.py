"""Images that lie in two splits: what is measured on them was trained on."""

import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from casc.data.index import Split
from data_tools.images import MISSING, UNREADABLE
from data_tools.report import Finding, summarise
from data_tools.source import Source

_KIND = "in_other_split"


class Images(NamedTuple):
    """A split's source and the digests of its image files."""

    source: Source
    digests: Sequence[str]


def report_leaks(
    out: Path, made: Mapping[str, Split], current: Mapping[str, Images]
) -> dict[str, Split]:
    """Report the images that are in another split byte for byte, whatever they are called.

    A pair is reported once, by the split that isn't for training.

    Args:
        out: the folder of shards.
        made: all splits of the index.
        current: of those of this run, what they were made of.

    Returns:
        `made` with findings.
    """
    held = {split: set(images.digests) for split, images in current.items()}
    earlier = made.keys() - current.keys()
    if earlier:
        sizes = {size for images in current.values() for size in _sizes(images)}
        held |= {split: _in_shards(out, made[split], sizes) for split in earlier}
    reported = dict(made)
    done: set[str] = set()
    for split in sorted(current, key=lambda name: (name.startswith("train"), name)):
        done.add(split)
        others = [other for other in made if other not in done]
        images, digests = current[split]
        findings = [
            Finding(_KIND, image.id, f"{image.file_name} is in {other}")
            for image, digest in zip(images.annotations.images, digests, strict=True)
            for other in others
            if digest in held[other] and digest not in (MISSING, UNREADABLE)
        ]
        report = dict(made[split].report)
        known = {kind: about for kind, about in report["findings"].items() if kind != _KIND}
        report["findings"] = {**known, **summarise(findings)}
        reported[split] = replace(made[split], report=report)
    return reported


def _sizes(images: Images) -> list[int]:
    paths = (images.source.images / image.file_name for image in images.source.annotations.images)
    return [os.stat(path).st_size for path in paths if path.is_file()]  # noqa: PTH116


def _in_shards(out: Path, split: Split, sizes: Set[int]) -> set[str]:
    """Digests of the images in a split's shards that have one of these sizes: few are read."""
    found: set[str] = set()
    for shard in split.shards:
        try:
            with tarfile.open(out / shard.name) as archive:
                for member in archive:
                    stream = archive.extractfile(member) if member.size in sizes else None
                    if stream is not None:
                        found.add(hashlib.file_digest(stream, "sha256").hexdigest())  # type: ignore[arg-type]
        except (OSError, tarfile.TarError):
            continue  # shards of another run that aren't here, or are damaged: `check` tells
    return found
