"""`data_tools synth`: a data set in COCO's layout, of overlapping textured shapes.

The shape makes the class; colour and texture only hint at it. What hides an object is cut
out of its mask, so masks have concave outlines and sometimes several parts, as COCO's do.
Everything follows from (seed, split, image number).
"""

import functools
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

CLASSES = ("disc", "triangle", "square", "star", "cross", "crescent", "arrow", "ring")

_ASPECTS = (4 / 3, 3 / 4, 1.0, 3 / 2, 2 / 3)
_SHARES = (0.35, 0.25, 0.15, 0.15, 0.1)
_VISIBLE = 0.6
"""Least share of an object that others may leave visible."""
_TOLERANCE = 0.5
"""Pixels that polygons may deviate from the drawn outline."""
_SLIVER = 12
"""Pixels squared. Parts and holes of less are passed over, as a person would."""
_TEXTURES = 5
_UNFINISHED = ".unfinished"


class SynthSettings(NamedTuple):
    """What is generated."""

    size: int = 256
    """Longer side of the images in pixels."""
    classes: int = 6
    seed: int = 0


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
                for i, name in enumerate(CLASSES[: settings.classes])
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
    """Draw one image: a textured ground with up to eight shapes, from back to front.

    Args:
        rng: all that is random.
        settings: of what kind.
        empty: draw no shapes.
        crowded: draw a crowd behind the shapes.
    """
    long = settings.size
    aspect = float(rng.choice(_ASPECTS, p=_SHARES))
    width = long if aspect >= 1 else round(long * aspect)
    height = long if aspect <= 1 else round(long / aspect)
    canvas = _ground(rng, height, width)
    objects: list[tuple[int, np.ndarray]] = []
    sizes: list[int] = []
    crowd: np.ndarray | None = None
    crowd_class = int(rng.integers(settings.classes))
    if crowded:
        crowd = np.zeros((height, width), bool)
        _draw_crowd(rng, canvas, crowd, crowd_class)
    wanted = 0 if empty else int(rng.choice(8, p=[0.1, 0.16, 0.2, 0.18, 0.14, 0.1, 0.07, 0.05])) + 1
    for _ in range(6 * wanted):
        if len(objects) == wanted:
            break
        kind = int(rng.integers(settings.classes))
        # Areas, not radii, are what detectors find small or large.
        radius = long * math.sqrt(rng.uniform(0.065**2, 0.22**2))
        x, y = rng.uniform(0.6 * radius, [width - 0.6 * radius, height - 0.6 * radius])
        shape = _Shape(kind, x, y, radius, rng.uniform(-math.pi, math.pi), rng.uniform(0.75, 1.3))
        cover = _coverage(shape, height, width)
        mask = cover >= 0.5
        left = [seen & ~mask for _, seen in objects]
        if (
            not mask.any()
            or mask.sum() < 0.7 * _unit_area(kind) * radius**2  # cut by the image's border
            or any(seen.sum() < _VISIBLE * size for seen, size in zip(left, sizes, strict=True))
            or (crowd is not None and (crowd & mask).sum() > 0.3 * crowd.sum())
        ):
            continue
        _paint(rng, canvas, cover, shape)
        objects = [(k, seen) for (k, _), seen in zip(objects, left, strict=True)]
        objects.append((kind, mask))
        sizes.append(int(mask.sum()))
        crowd = crowd & ~mask if crowd is not None else None
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


class _Shape(NamedTuple):
    kind: int
    x: float
    y: float
    radius: float
    angle: float
    stretch: float


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
    if not 5 <= settings.classes <= len(CLASSES):
        raise UserError(f"--classes: expected 5 to {len(CLASSES)}, got {settings.classes}")
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


def _coverage(shape: _Shape, height: int, width: int) -> np.ndarray:
    """How much of each pixel `[h, w]` a shape covers, from its distance to the outline."""
    cover = np.zeros((height, width))
    reach = 1.5 * shape.radius + 2
    x0, x1 = max(0, int(shape.x - reach)), min(width, int(shape.x + reach) + 1)
    y0, y1 = max(0, int(shape.y - reach)), min(height, int(shape.y + reach) + 1)
    if x1 > x0 and y1 > y0:
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        cover[y0:y1, x0:x1] = np.clip(0.5 - _distance(shape, x, y) * shape.radius, 0, 1)
    return cover


@functools.cache
def _unit_area(kind: int) -> float:
    """Area of a shape in units of its radius squared; stretching doesn't change it."""
    return float(_coverage(_Shape(kind, 100, 100, 64, 0, 1), 200, 200).sum()) / 64**2


def _distance(shape: _Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in units of the radius, negative inside (about)."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = (x - shape.x) / shape.radius, (y - shape.y) / shape.radius
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # Stretching keeps the area; a ring or a star that is stretched is one still.
    u, v = u / shape.stretch, v * shape.stretch
    r = np.hypot(u, v)
    name = CLASSES[shape.kind]
    if name == "disc":
        return r - 0.9
    if name == "triangle":
        return np.maximum.reduce([-v - 0.5, *(_half_plane(u, v, a, 0.5) for a in (30, 150))])
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.75
    if name == "star":
        turn = 2 * math.pi / 5
        sector = np.abs((np.arctan2(v, u) + math.pi / 5) % turn - math.pi / 5)
        # A line from an outer corner (1.1, 0) to the next inner corner.
        inner = 0.48
        ex, ey = inner * math.cos(turn / 2) - 1.1, inner * math.sin(turn / 2)
        px, py = r * np.cos(sector) - 1.1, r * np.sin(sector)
        return (px * ey - py * ex) / math.hypot(ex, ey)
    if name == "cross":
        bar, arm = 0.3, 1.0
        first = np.maximum(np.abs(u) - arm, np.abs(v) - bar)
        return np.minimum(first, np.maximum(np.abs(u) - bar, np.abs(v) - arm))
    if name == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.55, v))
    if name == "ring":
        return np.abs(r - 0.72) - 0.24
    shaft = np.maximum(np.abs(v) - 0.24, np.abs(u + 0.35) - 0.75)
    head = np.maximum(-u, (u + np.abs(v) - 1.1) / math.sqrt(2))
    return np.minimum(shaft, head)


def _half_plane(u: np.ndarray, v: np.ndarray, degrees: float, offset: float) -> np.ndarray:
    angle = math.radians(degrees)
    return u * math.cos(angle) + v * math.sin(angle) - offset


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, crowd: np.ndarray, kind: int) -> None:
    height, width = crowd.shape
    long = max(height, width)
    radius = 0.035 * long
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    for _ in range(int(rng.integers(8, 14))):
        x, y = middle + rng.normal(0, 0.1 * long, 2)
        x, y = np.clip((x, y), radius, (width - radius, height - radius))
        shape = _Shape(kind, float(x), float(y), radius, rng.uniform(-math.pi, math.pi), 1.0)
        cover = _coverage(shape, height, width)
        _paint(rng, canvas, cover, shape)
        crowd |= cover >= 0.5


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A ground `[h, w, 3]` of dull colours: clouds, a gradient, stripes or patches."""
    base, other = _colour(rng.random(), 0.25, rng.uniform(60, 190)), None
    other = _colour(rng.random(), 0.3, float(base.mean()) + rng.uniform(-45, 45))
    style = int(rng.integers(4))
    if style == 0:
        blend = _clouds(rng, height, width, int(rng.integers(3, 9)))
    elif style == 1:
        y, x = np.mgrid[:height, :width]
        a = rng.uniform(-math.pi, math.pi)
        blend = 0.5 + (math.cos(a) * (x / width - 0.5) + math.sin(a) * (y / height - 0.5)) / 1.5
    elif style == 2:
        blend = 0.5 + 0.35 * _stripes(rng, height, width, rng.uniform(8, 30))
    else:
        blend = (_clouds(rng, height, width, int(rng.integers(6, 14))) > 0.5) * 0.8 + 0.1
    blend = 0.8 * blend + 0.2 * _clouds(rng, height, width, 24)
    return base + (other - base) * blend[..., None]


def _paint(rng: np.random.Generator, canvas: np.ndarray, cover: np.ndarray, shape: _Shape) -> None:
    """Paint a shape in place, in a colour that stands out from what it is painted on."""
    ys, xs = np.nonzero(cover)
    if not len(ys):
        return
    window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    alpha, below = cover[window][..., None], canvas[window]
    ground = (below * alpha).sum(axis=(0, 1)) / alpha.sum()
    # Colour and texture are the class's own in two cases out of three.
    typical = rng.random() < 0.65
    hue = shape.kind / len(CLASSES) + rng.normal(0, 0.03) if typical else rng.random()
    texture = shape.kind % _TEXTURES if rng.random() < 0.65 else int(rng.integers(_TEXTURES))
    colours = [_colour(hue, rng.uniform(0.5, 0.9), rng.uniform(50, 210)) for _ in range(4)]
    colour = max(colours, key=lambda c: float(np.abs(c - ground).sum()))
    pattern = _pattern(rng, texture, len(alpha), alpha.shape[1], max(3.0, shape.radius / 4))
    shade = 1 + 0.28 * (pattern - 0.5)
    canvas[window] = below + alpha * (np.clip(colour * shade[..., None], 0, 255) - below)


def _pattern(
    rng: np.random.Generator, texture: int, height: int, width: int, period: float
) -> np.ndarray:
    if texture == 0:
        return np.full((height, width), 0.5)
    if texture == 1:
        return 0.5 + 0.8 * _stripes(rng, height, width, period)
    y, x = np.mgrid[:height, :width] / period * math.pi
    if texture == 2:
        return (np.sin(x) * np.sin(y) > 0) * 1.2 - 0.1
    if texture == 3:
        return (np.sin(x) * np.sin(y)) ** 2 * 1.6 - 0.2
    return 1.8 * _clouds(rng, height, width, 6) - 0.4


def _stripes(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    a, phase = rng.uniform(-math.pi, math.pi), rng.uniform(0, 2 * math.pi)
    return np.sin((math.cos(a) * x + math.sin(a) * y) * (2 * math.pi / period) + phase)


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise `[h, w]` in [0, 1], of about so many blobs a side."""
    grid = rng.random((cells + 1, cells + 1))
    y, x = np.linspace(0, cells, height), np.linspace(0, cells, width)
    j, i = np.minimum(y.astype(int), cells - 1), np.minimum(x.astype(int), cells - 1)
    fy, fx = y - j, x - i
    fy, fx = (fy * fy * (3 - 2 * fy))[:, None], fx * fx * (3 - 2 * fx)
    j = j[:, None]
    top = grid[j, i] * (1 - fx) + grid[j, i + 1] * fx
    bottom = grid[j + 1, i] * (1 - fx) + grid[j + 1, i + 1] * fx
    return top * (1 - fy) + bottom * fy


def _colour(hue: float, saturation: float, brightness: float) -> np.ndarray:
    """An RGB colour `[3]` of about that mean; hue and saturation in [0, 1]."""
    wave = np.cos(2 * math.pi * (hue - np.array([0, 1, 2]) / 3))
    return np.clip(brightness * (1 + saturation * wave), 5, 250)
