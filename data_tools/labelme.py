"""LabelMe's JSON files, one of each image, as COCO has them."""

import base64
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.decode import decode_image
from casc.data.record import MOST_PIXELS
from casc.errors import UserError
from data_tools.converted import SPLITS, Converted, Foreign, annotation, coco, exists
from data_tools.texts import BrokenFileError, is_cut, searchable
from data_tools.voc import image_size
from data_tools.voc_files import IMAGES, images_of, in_no_split, is_split, visible

_CIRCLE_POINTS = 64


def find_labelme(root: Path) -> list[Foreign]:
    """LabelMe's files by the folders that are called by a split, wherever these are."""
    found: dict[Path | None, list[Path]] = {}
    for file in _labelme_files(root):
        above = [folder for folder in file.parents if root in folder.parents][::-1]
        part = next((folder for folder in above if folder.name.lower() in SPLITS), None)
        found.setdefault(part, []).append(file)
    others = found.pop(None, [])
    folders: dict[str, Path] = {}
    for folder in filter(None, found):
        split = "val" if folder.name.lower().startswith("val") else folder.name.lower()
        first = folders.setdefault(split, folder)
        if first != folder:
            raise UserError(f"{first} and {folder}: are one split; put their files into one folder")
    if not is_split(folders, not others):
        return [Foreign("train", root, root)] if folders or others else []
    parts = [
        # The images of a folder further down may be in another: they are looked for in all.
        Foreign(split, folder, folder if folder.parent == root else root)
        for split, folder in folders.items()
    ]
    if others:
        parts.append(Foreign(others[0].stem, root, root, fault=in_no_split(others)))
    return parts


def convert_labelme(part: Foreign, every: Sequence[Foreign]) -> Converted:
    """Read a split; the classes of all of the data set's count.

    Raises:
        UserError: naming the file that can't be understood.
    """
    names = sorted({
        _label(shape, f"{file}: shapes[{i}]")
        for other in every
        for file in _labelme_files(other.source)
        for i, shape in enumerate(_shapes(file))
    })  # fmt: skip
    images, annotations, others, broken = [], [], [], []
    digest, numbers = hashlib.sha256(json.dumps(names).encode()), itertools.count(1)
    there = {f.name.casefold() for f in part.images.rglob("*.*")}
    pictures = {Path(name).stem for name in there if name.endswith(IMAGES)}
    files = _labelme_files(part.source)
    known = set(files)
    files += _broken_files((f for f in _json_files(part.source) if f not in known), pictures)
    for image_id, file in enumerate(files, 1):
        try:
            about, data = _labelme(file)
        except BrokenFileError as error:
            digest.update(f"{file.relative_to(part.source)}\0broken".encode())
            broken.append((image_id, str(error)))
            continue
        digest.update(f"{file.relative_to(part.source)}\0".encode() + data)
        image = _labelmes_image(file, about)
        if image.name.casefold() not in there and not exists(image) and about.get("imageData"):
            image = file  # which holds it
        path = os.path.relpath(image, part.images).replace(os.sep, "/")
        if path.startswith("..") or not exists(image):
            path = image.name  # looked for in all folders
        size = {key: _pixels(about, f"image{key.title()}", file) for key in ("width", "height")}
        if None in size.values():
            if not exists(image):
                raise UserError(
                    f"{file}: imageWidth and imageHeight: missing, and {image} isn't there to tell"
                    " them; mend it, or put the image there"
                )
            size = dict(zip(size, image_size(image), strict=True))
        images.append({"id": image_id, "file_name": path, **size})
        groups: dict[object, list[list[float]]] = {}
        for i, shape in enumerate(about["shapes"]):
            if shape.get("shape_type") == "mask":
                label = names.index(str(shape.get("label"))) + 1
                rle = _mask(shape, f"{file}: shapes[{i}]", size["width"], size["height"])
                annotations.append(annotation(next(numbers), image_id, label, rle))
                continue
            ring = _ring(shape, f"{file}: shapes[{i}]")
            if ring is None:
                others.append((next(numbers), str(shape.get("shape_type"))))
                continue
            group = shape.get("group_id")
            key = (shape.get("label"), i if group is None else -1, group)
            groups.setdefault(key, []).append(ring)
        for (label, _, _), rings in cast("dict[tuple[Any, Any, Any], Any]", groups).items():
            annotations.append(
                annotation(next(numbers), image_id, names.index(str(label)) + 1, rings)
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    return Converted(coco(images, annotations, categories), digest.hexdigest(), others, broken)


def _json_files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*.[jJ][sS][oO][nN]")) if visible(f, folder)]


def _labelme_files(folder: Path) -> list[Path]:
    return [file for file in _json_files(folder) if _is_labelme(file)]


def _broken_files(files: Iterable[Path], pictures: Collection[str]) -> list[Path]:
    """Those that are called like a picture and hold no JSON: LabelMe's, broken off."""
    found = []
    for file in files:
        if file.stem.casefold() in pictures:
            try:
                json.loads(file.read_bytes())
            except (ValueError, RecursionError):
                found.append(file)
    return found


def _is_labelme(file: Path) -> bool:
    try:
        text = searchable(file.read_bytes())
    except OSError:
        return False
    return '"shapes"' in text and '"imagePath"' in text


def _label(shape: dict[str, Any], place: str) -> str:
    label = shape.get("label")
    if not isinstance(label, (str, int)) or not str(label).strip():
        raise UserError(f"{place}.label: expected a class's name, got {label!a:.40}; mend it")
    return str(label)


def _labelme(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    try:
        found = json.loads(data)
    except UnicodeDecodeError as error:
        if is_cut(error):
            raise BrokenFileError(f"{file}: not valid JSON ({error})") from None
        raise UserError(f"{file}: isn't in UTF-8 ({error}); save it as that") from None
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"{file}: not valid JSON ({error})") from None
    shapes = found.get("shapes") if isinstance(found, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(f"{file}: shapes: expected a list of objects; is it a file of LabelMe's?")
    return found, data


def _shapes(file: Path) -> list[dict[str, Any]]:
    try:
        return _labelme(file)[0]["shapes"]
    except BrokenFileError:  # told with its split
        return []


def _pixels(about: dict[str, Any], key: str, file: Path) -> int | None:
    """A side of the image; None where it isn't given."""
    value = about.get(key)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(
            f"{file}: {key}: expected a whole number of pixels, got {value!a:.40}; remove it: then"
            " the image file tells"
        )
    return value


def _labelmes_image(file: Path, about: dict[str, Any]) -> Path:
    """Where it is, or else what it is called: what is listed may be a path of another machine."""
    listed = str(about.get("imagePath") or file.with_suffix(".jpg").name).replace("\\", "/")
    named = Path(os.path.normpath(file.parent / listed))
    # A JSON file is named after its image, which may have become another kind of file since.
    own = [file.parent / name for name in images_of(file.parent, file.stem)]
    tries = [named, file.parent / named.name, *own]
    return next((path for path in tries if exists(path)), tries[1])


def _mask(shape: dict[str, Any], place: str, width: Any, height: Any) -> dict[str, Any]:
    """The RLE of a mask: a picture in base64, which lies at the first of two points."""
    try:
        (x, y), _ = ((round(a), round(b)) for a, b in shape["points"])
        data = base64.b64decode(shape["mask"], validate=True)
        part = decode_image(data, channels=1)[..., 0] > 0
        rows, columns = min(part.shape[0], height - y), min(part.shape[1], width - x)
        if width * height > MOST_PIXELS:
            raise ValueError(f"of an image of {width} x {height} pixels")
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[y : y + rows, x : x + columns] = part[:rows, :columns]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}.mask: not a picture between two points ({error})") from None
    rle: Any = coco_mask.encode(whole)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _ring(shape: dict[str, Any], place: str) -> list[float] | None:
    """The outline of a shape; None for points and lines."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind not in ("polygon", "rectangle", "circle", "rotation"):
        return None
    if kind == "rotation" or (kind == "rectangle" and _count(points) == 4):
        kind = "polygon"  # of X-AnyLabeling, which gives four corners
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


def _count(values: object) -> int:
    return len(cast("list[Any]", values)) if isinstance(values, list) else 0
