"""Annotations of LabelMe, YOLO and Pascal VOC as COCO has them, for the same checks."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from casc.errors import UserError
from data_tools.voc import IMAGES, VocSplit, find_voc, image_size, read_voc

_SPLITS = ("train", "val", "valid", "validation", "test")
_CIRCLE_POINTS = 64


class Foreign(NamedTuple):
    """A split that isn't in COCO's format."""

    split: str
    source: Path
    """LabelMe and VOC: the folder of JSON or XML files. YOLO: data.yaml."""
    images: Path
    voc: VocSplit | None = None


class Converted(NamedTuple):
    """What a split is in COCO's format."""

    data: dict[str, Any]
    digest: str
    """SHA-256 of all that was read."""
    other_shapes: list[tuple[int, str]]
    """Ids and kinds of what is no area: points and lines. These aren't in `data`."""


def find_foreign(root: Path) -> list[Foreign]:
    """Find the splits of a data set of LabelMe's, YOLO's or VOC's; none if it is none of them."""
    for file in (root / "data.yaml", root / "dataset.yaml"):
        if file.is_file():
            about = _yaml(file)
            return [
                Foreign("val" if key == "valid" else key, file, _yolo_folder(file, about, key))
                for key in ("train", "val", "valid", "test")
                if about.get(key)
            ]
    voc = find_voc(root)
    if voc:
        return [Foreign(part.split, part.annotations, part.images, part) for part in voc]
    if not _labelme_files(root):
        return []
    parts = [root / name for name in _SPLITS if _labelme_files(root / name)]
    inside = sum(len(_labelme_files(part)) for part in parts)
    if not parts or inside < len(_labelme_files(root)):
        return [Foreign("train", root, root)]
    return [Foreign(part.name, part, part) for part in parts]


def convert(part: Foreign, every: Sequence[Foreign]) -> Converted:
    """Read a split.

    Args:
        part: which.
        every: all of the data set's, whose classes count.

    Raises:
        UserError: naming the file that can't be understood.
    """
    if part.voc is not None:
        *lists, digest = read_voc(part.voc, [other.voc for other in every if other.voc])
        return Converted(_coco(*lists), digest, [])
    if part.source.is_dir():
        names = sorted({
            str(shape.get("label"))
            for other in every
            for file in _labelme_files(other.source)
            for shape in _labelme(file)[0]["shapes"]
        })  # fmt: skip
        return _convert_labelme(part, names)
    return _convert_yolo(part)


def _labelme_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*.json")) if _is_labelme(file)]


def _is_labelme(file: Path) -> bool:
    try:
        text = file.read_bytes()
    except OSError:
        return False
    return b'"shapes"' in text and b'"imagePath"' in text


def _labelme(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    shapes = found.get("shapes") if isinstance(found, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(f"{file}: shapes: expected a list of objects; is it a file of LabelMe's?")
    return found, data


def _convert_labelme(part: Foreign, names: Sequence[str]) -> Converted:
    images, annotations, others = [], [], []
    digest, numbers = hashlib.sha256(json.dumps(names).encode()), itertools.count(1)
    for image_id, file in enumerate(_labelme_files(part.source), 1):
        about, data = _labelme(file)
        digest.update(f"{file.relative_to(part.source)}\0".encode() + data)
        listed = str(about.get("imagePath", "")).replace("\\", "/")
        path = os.path.relpath(os.path.normpath(file.parent / listed), part.images)
        if path.startswith(".."):
            path = os.path.relpath(file.parent / Path(listed).name, part.images)
        size = {key: about.get(f"image{key.title()}") for key in ("width", "height")}
        images.append({"id": image_id, "file_name": path.replace(os.sep, "/"), **size})
        groups: dict[object, list[list[float]]] = {}
        for i, shape in enumerate(about["shapes"]):
            ring = _ring(shape, f"{file}: shapes[{i}]")
            if ring is None:
                others.append((next(numbers), str(shape.get("shape_type"))))
                continue
            group = shape.get("group_id")
            key = (shape.get("label"), i if group is None else -1, group)
            groups.setdefault(key, []).append(ring)
        for (label, _, _), rings in cast("dict[tuple[Any, Any, Any], Any]", groups).items():
            annotations.append(
                _annotation(next(numbers), image_id, names.index(str(label)) + 1, rings)
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    return Converted(_coco(images, annotations, categories), digest.hexdigest(), others)


def _ring(shape: dict[str, Any], place: str) -> list[float] | None:
    """The outline of a shape; None for points and lines."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind not in ("polygon", "rectangle", "circle"):
        return None
    try:
        corners = [(float(x), float(y)) for x, y in cast("list[Any]", points)]
        if kind != "polygon":
            (x0, y0), (x1, y1) = corners
    except (TypeError, ValueError):
        raise UserError(f"{place}.points: not the points of a {kind}; mend it") from None
    if kind == "rectangle":
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]  # type: ignore[possibly-unbound]
    elif kind == "circle":
        radius = math.hypot(x1 - x0, y1 - y0)  # type: ignore[possibly-unbound]
        turns = [2 * math.pi * k / _CIRCLE_POINTS for k in range(_CIRCLE_POINTS)]
        corners = [(x0 + radius * math.cos(t), y0 + radius * math.sin(t)) for t in turns]  # type: ignore[possibly-unbound]
    return [value for corner in corners for value in corner]


def _yaml(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise UserError(f"{file}: reading YOLO's needs PyYAML: pip install pyyaml") from None
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not isinstance(found.get("names"), (list, dict)):
        raise UserError(f"{file}: names: expected the classes; is it a data.yaml of YOLO's?")
    return found


def _yolo_folder(file: Path, about: dict[str, Any], key: str) -> Path:
    listed = about[key]
    if not isinstance(listed, str):
        raise UserError(f"{file}: {key}: expected one folder of images, got {listed!a}")
    base = Path(str(about.get("path", "")))
    # Roboflow writes ../train/images for a folder beside data.yaml.
    tries = [file.parent / base / listed, file.parent / listed, file.parent / listed.lstrip("./")]
    folder = next((folder for folder in tries if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"{file}: {key}: {listed!a}: no such folder")
    return folder.resolve()


def _convert_yolo(part: Foreign) -> Converted:
    names = _yaml(part.source)["names"]
    by_number = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    digest = hashlib.sha256(json.dumps(sorted(by_number.items())).encode())
    parts = list(part.images.parts)
    where = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else None
    labels = (
        Path(*parts[:where], "labels", *parts[where + 1 :]) if where is not None else part.images
    )
    images, annotations, numbers = [], [], itertools.count(1)
    files = [f for f in sorted(part.images.rglob("*")) if f.suffix.lower() in IMAGES]
    for image_id, file in enumerate(files, 1):
        below = file.relative_to(part.images)
        width, height = image_size(file)
        images.append(
            {"id": image_id, "file_name": below.as_posix(), "width": width, "height": height}
        )
        text = labels / below.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
        digest.update(f"{below}\0{lines}\0{width} {height}".encode())
        for number, line in enumerate(lines, 1):
            if line.split():
                place = f"{text}: line {number}"
                category, ring, box = _yolo_line(line, place, by_number, width, height)
                made = _annotation(next(numbers), image_id, category, [ring] if ring else [], box)
                annotations.append(made)
    categories = [{"id": i, "name": str(name)} for i, name in by_number.items()]
    return Converted(_coco(images, annotations, categories), digest.hexdigest(), [])


def _yolo_line(
    line: str, place: str, names: dict[int, Any], width: int, height: int
) -> tuple[int, list[float], list[float] | None]:
    try:
        first, *rest = line.split()
        number, values = int(first), [float(value) for value in rest]
    except ValueError:
        raise UserError(f"{place}: expected a class and numbers, got {line[:40]!a}") from None
    if number not in names:
        raise UserError(f"{place}: class {number} isn't in data.yaml's names")
    if len(values) == 4:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return number, [], [x - w / 2, y - h / 2, w, h]
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{place}: expected x y of 3 points or more, got {len(values)} numbers")
    return number, [v * (height if i % 2 else width) for i, v in enumerate(values)], None


def _annotation(
    number: int,
    image_id: int,
    category: int,
    rings: list[list[float]],
    box: list[float] | None = None,
) -> dict[str, Any]:
    if box is None:
        xs = [x for ring in rings for x in ring[0::2]]
        ys = [y for ring in rings for y in ring[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)] if xs else [0, 0, 0, 0]
    return {
        "id": number, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0,
        "segmentation": rings,
    }  # fmt: skip


def _coco(images: list[Any], annotations: list[Any], categories: list[Any]) -> dict[str, Any]:
    return {"images": images, "annotations": annotations, "categories": categories}
