"""`data_tools synth`: a data set in COCO's layout, of overlapping textured shapes.

The shape makes the class; colour and texture only hint at it. What hides an object is cut
out of its mask, so masks have concave outlines and sometimes several parts, as COCO's do.
Everything follows from (seed, split, image number).
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from casc.data.sample import signed_area
from casc.errors import UserError
from data_tools.rings import trace_mask
from data_tools.shapes import (
    CLASSES,
    SHAPES,
    SIMILAR_CLASSES,
    Shape,
    coverage,
    draw_ground,
    paint,
    unit_area,
)

_ASPECTS = (4 / 3, 3 / 4, 1.0, 3 / 2, 2 / 3)
_SHARES = (0.35, 0.25, 0.15, 0.15, 0.1)
_TOLERANCE = 0.5
"""Pixels that polygons may deviate from the drawn outline."""
_SLIVER = 12
"""Pixels squared. Parts and holes of less are passed over, as a person would."""
_UNFINISHED = ".unfinished"


class Difficulty(NamedTuple):
    """What makes a scene easy or hard to read."""

    radius: tuple[float, float] = (0.065, 0.22)
    """Least and most, in units of the image's longer side."""
    by_area: bool = True
    """Areas are uniform; else the logarithms of radii, so that there are as many of each size."""
    visible: float = 0.6
    """Least share of an object that others may leave visible."""
    whole: float = 0.7
    """Least share of it that lies within the image."""
    counts: tuple[float, ...] = (0.1, 0.16, 0.2, 0.18, 0.14, 0.1, 0.07, 0.05)
    """Probabilities of one object, two, ..."""
    together: int | None = None
    """The most classes in one image; None: any."""
    hinted: float = 0.65
    """How often colour, and texture, are the class's own."""
    clutter: int = 0
    """The most things of no class, behind the objects and, a third as many, in front."""


EASY = Difficulty()
HARD = Difficulty(
    # From the smallest to the largest it is 1 to 20.
    radius=(0.02, 0.4), by_area=False, visible=0.3, whole=0.5, counts=(0.0, 0.0, *[0.1] * 10),
    together=3, hinted=0.0, clutter=12,
)  # fmt: skip
_LEAST = 2 * _SLIVER
"""Pixels squared that are left visible of any object of a hard scene: less has no outline."""


class SynthSettings(NamedTuple):
    """What is generated."""

    size: int = 256
    """Longer side of the images in pixels."""
    classes: int = 6
    seed: int = 0
    names: tuple[str, ...] = ()
    """The shapes, in the order of classes; without any the first `classes` of `among`."""
    hard: bool = False
    """Hard scenes of similar shapes."""

    @property
    def among(self) -> tuple[str, ...]:
        """The shapes that there are."""
        return SIMILAR_CLASSES if self.hard else CLASSES

    @property
    def kinds(self) -> list[int]:
        """Of each class its position in `SHAPES`."""
        return [SHAPES.index(name) for name in self.names or self.among[: self.classes]]


class Scene(NamedTuple):
    """A generated image."""

    image: np.ndarray
    """[h, w, 3] uint8."""
    objects: list[tuple[int, np.ndarray]]
    """Class and visible mask [h, w] bool."""
    crowds: list[tuple[int, np.ndarray]]
    """Class and mask of groups that aren't told apart."""


def synthesise(
    out: Path, counts: Mapping[str, int], settings: SynthSettings, *, progress: bool = False
) -> list[str]:
    """Generate a data set, and give a line on each split.

    Args:
        out: a folder that doesn't exist yet or is empty.
        counts: images by split.
        settings: of what kind.
        progress: show a progress bar.

    Raises:
        UserError: on settings that make no sense, or when `out` holds something.
    """
    _check(out, counts, settings)
    # Made aside, so that an interrupted run leaves nothing that looks like a data set.
    making = out / _UNFINISHED
    shutil.rmtree(making, ignore_errors=True)
    (making / "annotations").mkdir(parents=True)
    lines: list[str] = []
    for number, (split, count) in enumerate(counts.items()):
        (making / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        disable = None if progress else True
        for i in tqdm(range(count), desc=split, unit="image", leave=False, disable=disable):
            # Ids of the splits don't overlap, so that they can be mixed up without harm.
            image_id = 1_000_000 * number + i + 1
            name = f"{image_id:012d}.jpg"
            rng = np.random.default_rng([settings.seed, number, i])
            # A few images are as odd as some of COCO's: empty, crowded or grayscale.
            scene = draw_scene(rng, settings, empty=i % 40 == 17, crowded=i % 20 == 8)
            picture = Image.fromarray(scene.image)
            picture = picture.convert("L") if i % 50 == 23 else picture
            picture.save(making / split / name, "JPEG", quality=92)
            height, width = scene.image.shape[:2]
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for entry in _entries(scene):
                entry["id"] = 10_000_000 * number + len(annotations) + 1
                annotations.append({**entry, "image_id": image_id})
        data = {
            "info": {"description": "generated shapes", "version": "1"},
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": i + 1, "name": name, "supercategory": "shape"}
                for i, name in enumerate(SHAPES[kind] for kind in settings.kinds)
            ],
        }
        file = making / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(data) + "\n", encoding="utf-8")
        crowds = sum(entry["iscrowd"] for entry in annotations)
        objects = len(annotations) - crowds
        lines.append(f"{split}: {count} images, {objects} objects, {crowds} crowds")
    for name in [*counts, "annotations"]:
        (making / name).rename(out / name)
    making.rmdir()
    return lines


def draw_scene(
    rng: np.random.Generator,
    settings: SynthSettings,
    *,
    empty: bool = False,
    crowded: bool = False,
) -> Scene:
    """Draw one image: a textured ground with shapes, from back to front.

    Args:
        rng: all that is random.
        settings: of what kind.
        empty: draw no shapes.
        crowded: draw a crowd behind the shapes.
    """
    hard, long = HARD if settings.hard else EASY, settings.size
    aspect = float(rng.choice(_ASPECTS, p=_SHARES))
    width = long if aspect >= 1 else round(long * aspect)
    height = long if aspect <= 1 else round(long / aspect)
    canvas = draw_ground(rng, height, width)
    objects: list[tuple[int, np.ndarray]] = []
    sizes: list[int] = []
    crowd: np.ndarray | None = None
    kinds = settings.kinds
    labels = None
    if hard.together and hard.together < len(kinds):
        labels = rng.choice(len(kinds), hard.together, replace=False)
    if hard.clutter:
        _draw_clutter(rng, canvas, int(rng.integers(hard.clutter // 2, hard.clutter + 1)))
    crowd_class = int(rng.integers(len(kinds)))
    if crowded:
        crowd = np.zeros((height, width), bool)
        _draw_crowd(rng, canvas, crowd, kinds[crowd_class])
    wanted = 0 if empty else int(rng.choice(len(hard.counts), p=hard.counts)) + 1
    for _ in range(6 * wanted):
        if len(objects) == wanted:
            break
        label = int(rng.integers(len(kinds)) if labels is None else rng.choice(labels))
        kind = kinds[label]
        radius = _radius(rng, hard, long)
        x, y = rng.uniform(0.6 * radius, [width - 0.6 * radius, height - 0.6 * radius])
        shape = Shape(kind, x, y, radius, rng.uniform(-math.pi, math.pi), rng.uniform(0.75, 1.3))
        cover = coverage(shape, height, width)
        mask = cover >= 0.5
        left = [seen & ~mask for _, seen in objects]
        if (
            not mask.any()
            or mask.sum() < hard.whole * unit_area(kind) * radius**2  # cut by the image's border
            or _hides(left, sizes, hard)
            or (crowd is not None and (crowd & mask).sum() > 0.3 * crowd.sum())
        ):
            continue
        paint(rng, canvas, cover, shape, hard.hinted)
        objects = [(k, seen) for (k, _), seen in zip(objects, left, strict=True)]
        objects.append((label, mask))
        sizes.append(int(mask.sum()))
        crowd = crowd & ~mask if crowd is not None else None
    if hard.clutter:
        hidden = [seen for _, seen in objects] + ([] if crowd is None else [crowd])
        _draw_clutter(rng, canvas, int(rng.integers(hard.clutter // 3 + 1)), hidden, sizes, hard)
        # What is left of an object may be too thin for an outline.
        objects = [(k, seen) for k, seen in objects if mask_polygons(seen)]
    canvas += rng.normal(0, 4, canvas.shape[:2])[..., None]
    image = canvas.clip(0, 255).round().astype(np.uint8)
    return Scene(image, objects, [] if crowd is None else [(crowd_class, crowd)])


def mask_polygons(mask: np.ndarray) -> list[list[float]]:
    """Outline a mask by polygons without holes, for COCO's polygons can't have any."""
    rings = [ring for ring in trace_mask(mask, _TOLERANCE) if abs(signed_area(ring)) >= _SLIVER]
    holes = [ring for ring in rings if signed_area(ring) < 0]
    if not holes:
        return [[round(v, 2) for v in ring.reshape(-1).tolist()] for ring in rings]
    # A cut through a hole opens it; both halves are outlined on their own.
    cut = int(holes[0][:, 0].mean())
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return [*mask_polygons(left), *mask_polygons(right)]


def _check(out: Path, counts: Mapping[str, int], settings: SynthSettings) -> None:
    if out.exists() and (
        not out.is_dir() or any(path.name != _UNFINISHED for path in out.iterdir())
    ):
        raise UserError(f"{out}: exists already; give a folder that is new or empty")
    for split, count in counts.items():
        if not 1 <= count < 1_000_000:
            flag = split.removesuffix("2017")
            raise UserError(f"--{flag}: expected 1 to 999999 images, got {count}")
    if not 64 <= settings.size <= 4096:
        raise UserError(f"--size: expected 64 to 4096 pixels, got {settings.size}")
    among = settings.among
    strange = [name for name in settings.names if name not in among]
    if strange or len(set(settings.names)) != len(settings.names):
        raise UserError(
            f"--names {' '.join(settings.names)}: expected different ones of {', '.join(among)}"
        )
    if not 5 <= settings.classes <= len(among):
        raise UserError(f"--classes: expected 5 to {len(among)}, got {settings.classes}")
    if settings.seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {settings.seed}")


def _entries(scene: Scene) -> Iterator[dict[str, Any]]:
    for kind, mask in scene.objects:
        polygons = mask_polygons(mask)
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in polygons])
        low, high = points.min(axis=0), points.max(axis=0)
        area = sum(abs(signed_area(np.reshape(part, (-1, 2)))) for part in polygons)
        yield {
            "category_id": kind + 1,
            "bbox": [round(v, 2) for v in [*low.tolist(), *(high - low).tolist()]],
            "area": round(area, 2),
            "iscrowd": 0,
            "segmentation": polygons,
        }
    for kind, mask in scene.crowds:
        ys, xs = np.nonzero(mask)
        x, y = int(xs.min()), int(ys.min())
        yield {
            "category_id": kind + 1,
            "bbox": [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
            "area": int(mask.sum()),
            "iscrowd": 1,
            "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
        }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs down the columns, off the mask first: COCO's uncompressed RLE."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def _radius(rng: np.random.Generator, hard: Difficulty, long: int) -> float:
    low, high = hard.radius
    if hard.by_area:
        # Areas, not radii, are what detectors find small or large.
        return long * math.sqrt(rng.uniform(low**2, high**2))
    return long * math.exp(rng.uniform(math.log(low), math.log(high)))


def _hides(left: list[np.ndarray], sizes: list[int], hard: Difficulty) -> bool:
    """Whether too little is left of one of the objects that had these sizes."""
    least = _LEAST if hard.clutter else 0
    return any(
        seen.sum() < max(hard.visible * size, min(least, size))
        for seen, size in zip(left, sizes, strict=True)
    )


def _draw_clutter(
    rng: np.random.Generator,
    canvas: np.ndarray,
    count: int,
    behind: list[np.ndarray] | None = None,
    sizes: list[int] | None = None,
    hard: Difficulty = EASY,
) -> None:
    """Draw bars and blobs of no class in place, and take them out of the masks of what is behind.

    Args:
        rng: all that is random.
        canvas: `[h, w, 3]`.
        count: how many at most; those that would hide too much are left out.
        behind: masks `[h, w]` bool, changed in place.
        sizes: of the first of these, when they were drawn.
        hard: how much may be hidden.
    """
    height, width = canvas.shape[:2]
    long, behind, sizes = max(height, width), behind or [], sizes or []
    y, x = np.mgrid[:height, :width] + 0.5
    for _ in range(count):
        cx, cy = rng.uniform(0, [width, height])
        angle, radius = rng.uniform(-math.pi, math.pi), long * rng.uniform(0.02, 0.15)
        u = ((x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)) / radius
        v = ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) / radius
        if rng.random() < 0.5:
            distance = np.maximum(np.abs(u) - 1, np.abs(v) - rng.uniform(0.06, 0.3))
        else:
            # Its outline wobbles without any repetition.
            theta = np.arctan2(v, u)
            waves = [
                rng.uniform(0, 0.12) * np.cos(n * theta + rng.uniform(0, 7)) for n in (1, 2, 3)
            ]
            distance = np.hypot(u, v * rng.uniform(1, 2)) - 0.7 - sum(waves)
        cover = np.clip(0.5 - distance * radius, 0, 1)
        left = [seen & ~(cover >= 0.5) for seen in behind]
        shape = Shape(int(rng.integers(len(CLASSES))), cx, cy, radius, angle, 1.0)
        if _hides(left[: len(sizes)], sizes, hard):
            continue
        paint(rng, canvas, cover, shape, 0.0)
        for seen, rest in zip(behind, left, strict=True):
            seen[...] = rest


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, crowd: np.ndarray, kind: int) -> None:
    height, width = crowd.shape
    long = max(height, width)
    radius = 0.035 * long
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    for _ in range(int(rng.integers(8, 14))):
        x, y = middle + rng.normal(0, 0.1 * long, 2)
        x, y = np.clip((x, y), radius, (width - radius, height - radius))
        shape = Shape(kind, float(x), float(y), radius, rng.uniform(-math.pi, math.pi), 1.0)
        cover = coverage(shape, height, width)
        paint(rng, canvas, cover, shape)
        crowd |= cover >= 0.5
