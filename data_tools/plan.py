"""The plan: which image goes into which shard. A pure function of what is known of the images."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from casc.data.index import ASPECTS, MOST_CHANNELS, Category
from casc.data.segmentation import usable_segmentation
from casc.errors import UserError
from data_tools.coco import Annotations, ImageEntry
from data_tools.images import MISSING, Probe, reduced_size
from data_tools.report import Finding
from data_tools.store import Kept, load_each

SHORTEST_SIDE = 32
"""Pixels. The reference doesn't train on images with a shorter side."""


class Settings(NamedTuple):
    """What shapes the shards' contents."""

    aspects: tuple[float, ...] = ASPECTS
    """Edges between buckets, width over height, ascending."""
    max_size: int | None = None
    """Reduce images whose longer side exceeds this many pixels."""
    samples_per_shard: int = 64
    shard_mib: float = 256.0
    trace_tolerance: float | None = None
    """Pixels by which polygons traced from RLE masks may deviate from them; None is exact except
    for ragged outlines, see `data_tools.instances`."""
    negatives: bool = False
    """Train on images without any annotation, as background."""
    skip_invalid: bool = False
    """Leave out annotations that can't be understood."""
    channels: int = 3
    """Of the images: 3 is RGB, 1 grey, others are planes, which they have to have."""
    stretch: bool = False
    """Spread the range of 16-bit greyscale images over 8 bits."""
    val_share: float = 0.0
    """Of the images of a data set in one part, held out as the split `val`."""
    val_seed: int = 0
    """Chooses them."""
    crowds: bool = True
    """Crowds are for evaluation only, as COCO means them; False: they are objects."""


class Item(NamedTuple):
    """An image and all that is needed to write its sample."""

    image: ImageEntry
    probe: Probe
    orientation: int
    """EXIF orientation that decoding undoes."""
    width: int
    """As stored, upright."""
    height: int
    train: bool
    maskless: bool
    """Whether it is trained on where no masks are, and there only."""
    annotations: Kept


class PlannedShard(NamedTuple):
    """A shard to be written."""

    name: str
    bucket: int
    train: bool
    maskless: bool
    items: list[Item]


class PlannedBucket(NamedTuple):
    """A bucket's name and range of aspects: more than the first, at most the second."""

    name: str
    min_aspect: float
    max_aspect: float | None


def plan_items(
    annotations: Annotations,
    probes: Sequence[Probe],
    max_size: int | None,
    negatives: bool = False,
    *,
    stretch: bool = False,
    channels: int = 3,
) -> tuple[list[Item], list[Finding]]:
    """Decide for every image whether it is stored, how it is turned and whether it is trained on.

    Args:
        annotations: the split's.
        probes: of `annotations.images`, in their order.
        max_size: see `Settings`.
        negatives: see `Settings`.
        stretch: see `Settings`.
        channels: see `Settings`.
    """
    known = {category.id for category in annotations.categories}
    items: list[Item] = []
    findings: list[Finding] = []
    every = [annotations.by_image.kept(image.id) for image in annotations.images]
    for image, probe, kept, entries in zip(
        annotations.images, probes, every, load_each(every), strict=True
    ):
        numbers = annotations.by_image.ids(image.id)
        if probe.fault:
            kind = "missing_file" if probe.sha256 == MISSING else "unreadable"
            findings.append(Finding(kind, image.id, f"{image.file_name}: {probe.fault}"))
            findings += [Finding("image_left_out", number) for number in numbers]
            continue
        left = f"{probe.levels} levels are left"
        if "grayscale" in probe.traits or (channels == 1 and "colour" not in probe.traits):
            hint = f"{left}; --stretch spreads an image's own range"
            left = "its own range is spread over 8 bits" if stretch else hint
        findings += [
            Finding(trait, image.id, left if trait == "sixteen_bit" else "")
            for trait in probe.traits
        ]
        orientation, kind = _turn(image, probe)
        turned = (probe.height, probe.width) if orientation >= 5 else (probe.width, probe.height)
        if kind:
            detail = f"{turned[0]} x {turned[1]}, annotated {image.width} x {image.height}"
            if kind == "size_mismatch" and turned == (image.height, image.width):
                detail += ": width and height are exchanged"
            sized = kind in ("size_mismatch", "rescaled")
            findings.append(Finding(kind, image.id, detail if sized else ""))
        if kind == "size_mismatch":
            findings += [Finding("image_left_out", number) for number in numbers]
            continue
        width, height = reduced_size(*turned, max_size)
        named = not known.isdisjoint(annotations.by_image.categories(image.id))
        negative = negatives and not numbers
        reasons = {
            "too_small": min(width, height) < SHORTEST_SIDE,
            "no_annotations": not named and not negative,
            "only_maskless": named and _only_maskless(entries, image, known),
        }
        if negative:
            findings.append(Finding("negative", image.id))
        findings += [Finding(reason, image.id) for reason, holds in reasons.items() if holds]
        if (width, height) != turned:
            findings.append(Finding("reduced", image.id))
        maskless = [reason for reason, holds in reasons.items() if holds] == ["only_maskless"]
        train = not any(reasons.values())
        items.append(Item(image, probe, orientation, width, height, train, maskless, kept))
    return items, findings


def plan_buckets(aspects: Sequence[float]) -> list[PlannedBucket]:
    """Name the buckets between the edges, from the tallest images to the widest."""
    edges = [0.0, *aspects, math.inf]
    buckets = [
        PlannedBucket(_bucket_name(low, high), low, None if high == math.inf else high)
        for low, high in itertools.pairwise(edges)
    ]
    if len({bucket.name for bucket in buckets}) < len(buckets):
        buckets = [bucket._replace(name=f"b{i}") for i, bucket in enumerate(buckets)]
    return buckets


def find_bucket(buckets: Sequence[PlannedBucket], width: int, height: int) -> int:
    """Give the position of the bucket that an image belongs to."""
    aspect = width / height
    return next(i for i, b in enumerate(buckets) if b.max_aspect is None or aspect <= b.max_aspect)


def plan_shards(
    split: str, items: Sequence[Item], settings: Settings
) -> tuple[list[PlannedBucket], list[PlannedShard]]:
    """Distribute images over shards: one bucket, and one use in training, in each.

    Within its bucket the order is mixed, by a hash of the image id, so that a shard is a fair
    sample even where a data set is sorted by scene or by class. Buckets without images are
    left out.
    """
    every = plan_buckets(settings.aspects)
    groups: dict[tuple[int, int], list[Item]] = {}
    for item in sorted(items, key=lambda item: order_key(item.image.id)):
        use = 0 if item.train else 1 if item.maskless else 2
        group = find_bucket(every, item.width, item.height), use
        groups.setdefault(group, []).append(item)
    used = sorted({bucket for bucket, _ in groups})
    shards = [
        PlannedShard(
            name=f"{split}/{every[bucket].name}{('', '-boxes', '-eval')[use]}-{i:06d}.tar",
            bucket=used.index(bucket),
            train=use == 0,
            maskless=use == 1,
            items=chunk,
        )
        for bucket, use in sorted(groups)
        for i, chunk in enumerate(_chunks(groups[bucket, use], settings))
    ]
    return [every[bucket] for bucket in used], shards


def order_key(image_id: int) -> tuple[bytes, int]:
    """What the samples of a shard are sorted by."""
    return hashlib.sha256(str(image_id).encode()).digest(), image_id


def check_settings(settings: Settings) -> None:
    """Refuse settings that make no sense.

    Raises:
        UserError: naming the flag.
    """
    edges = settings.aspects
    if any(not 0 < edge < math.inf for edge in edges) or any(
        low >= high for low, high in itertools.pairwise(edges)
    ):
        raise UserError(f"--aspects: expected ascending positive numbers, got {list(edges)}")
    if settings.max_size is not None and settings.max_size < SHORTEST_SIDE:
        raise UserError(f"--max-size: expected at least {SHORTEST_SIDE}, got {settings.max_size}")
    if not 0 <= settings.val_share < 1:
        raise UserError(f"--val-share: expected 0 to less than 1, got {settings.val_share}")
    if not 1 <= settings.channels <= MOST_CHANNELS:
        raise UserError(f"--channels: expected 1 to {MOST_CHANNELS}, got {settings.channels}")
    if settings.stretch and settings.channels not in (1, 3):
        raise UserError(f"--stretch: is for grey images, not for --channels {settings.channels}")
    if settings.samples_per_shard < 1:
        raise UserError(
            f"--samples-per-shard: expected 1 or more, got {settings.samples_per_shard}"
        )
    if not settings.shard_mib > 0:
        raise UserError(f"--shard-mib: expected more than 0, got {settings.shard_mib}")
    if not 0 <= (settings.trace_tolerance or 0) <= 16:
        raise UserError(f"--trace-tolerance: expected 0 to 16, got {settings.trace_tolerance}")


def check_categories(found: Mapping[str, Sequence[Category]]) -> None:
    """Refuse splits that don't share their classes: a label would mean different things.

    Args:
        found: categories by the name of what lists them.

    Raises:
        UserError: naming two of them and the first difference.
    """
    names = list(found)
    for name in names[1:]:
        first = {category.id: category.name for category in found[names[0]]}
        second = {category.id: category.name for category in found[name]}
        for i in sorted({*first, *second}):
            if first.get(i) != second.get(i):
                here, there = (repr(c[i]) if i in c else "missing" for c in (first, second))
                raise UserError(
                    f"{name}: categories: id {i} is {there}, in {names[0]} it is {here}; "
                    "all splits of a folder of shards share one list: write the same one into both,"
                    " or give another --out"
                )


def _only_maskless(
    entries: Iterable[Mapping[str, Any]], image: ImageEntry, known: Set[int]
) -> bool:
    """Whether an image has objects, but masks of none: it would be trained on as background."""
    found = False
    for entry in entries:  # seldom more than the first
        if entry["category_id"] not in known or entry["iscrowd"] or entry.get("ignore"):
            continue
        if usable_segmentation(entry["segmentation"], image.width, image.height) is not None:
            return False
        found = True
    return found


def _turn(image: ImageEntry, probe: Probe) -> tuple[int, str]:
    """EXIF orientation to apply, and what to report of it and of the size."""
    annotated, stored = (image.width, image.height), (probe.width, probe.height)
    turned = stored[::-1] if probe.orientation >= 5 else stored
    if probe.orientation != 1 and turned == stored and annotated == stored:
        # Half turns, mirrors and squares keep the size. Tools that annotate, and the
        # reference, show images upright.
        return probe.orientation, "exif_assumed"
    if annotated == turned:
        return probe.orientation, "exif_applied" if probe.orientation != 1 else ""
    if annotated == stored:
        return 1, "exif_ignored"
    # A copy that was made smaller or larger has its sides rounded to whole pixels.
    width, height = turned
    scale = max(width / image.width, height / image.height)
    same = abs(width - image.width * scale) <= 1 and abs(height - image.height * scale) <= 1
    return probe.orientation, "rescaled" if same else "size_mismatch"


def _bucket_name(low: float, high: float) -> str:
    if low >= 1:
        return "wide" if high == math.inf else f"w{high:.2f}"
    if high <= 1:
        return "tall" if low == 0 else f"h{1 / low:.2f}"
    if low == 0 and high == math.inf:
        return "all"
    above = "" if low == 0 else f"h{1 / low:.2f}"
    below = "" if high == math.inf else f"w{high:.2f}"
    return f"{above or 'tall'}-{below or 'wide'}"


def _chunks(items: Sequence[Item], settings: Settings) -> list[list[Item]]:
    """Cut into equal parts, so that no shard is a small remainder."""
    heaviest = settings.shard_mib * 2**20
    size = sum(item.probe.size for item in items)
    count = max(math.ceil(len(items) / settings.samples_per_shard), math.ceil(size / heaviest))
    count = min(count, len(items))
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(cuts)]
