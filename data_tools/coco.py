"""COCO annotation files: read, checked field by field, and put in order.

What can't be understood is refused, with the file and the field; what can be repaired
without guessing is repaired and reported.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from casc.data.index import Category
from casc.errors import UserError
from data_tools.report import Finding

LARGEST_ID = 10**12 - 1
"""Largest image id: a sample's key is the id in 12 digits."""

FARTHEST = 1_000_000
"""Largest coordinate of a box in pixels; the largest photographs have a tenth of that."""


class ImageEntry(NamedTuple):
    """An entry of `images`."""

    id: int
    file_name: str
    width: int
    height: int


class Annotations(NamedTuple):
    """An annotation file."""

    images: list[ImageEntry]
    """In the file's order, without copies."""
    by_image: dict[int, list[dict[str, Any]]]
    """Annotations by image id, in the file's order: id, image_id, category_id, bbox, area
    (None where not given), iscrowd, ignore where set, segmentation (None where not given)."""
    categories: tuple[Category, ...]
    """By ascending id, as the reference orders labels."""
    listed_images: int
    listed_annotations: int
    findings: list[Finding]


def read_annotations(path: Path) -> Annotations:
    """Read and check a COCO annotation file.

    Raises:
        UserError: naming the file, the field and what was expected there.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: not a COCO file (nested too deeply)") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory") from None
    except ValueError as error:  # bad JSON, bad UTF-8, numbers of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return check_annotations(data, str(path))


def check_annotations(data: object, file: str) -> Annotations:
    """Check an annotation file that is parsed already; `file` is what errors call it.

    Raises:
        UserError: see `read_annotations`.
    """
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected an object with images, annotations and categories")
    data = cast("dict[str, Any]", data)
    lists: dict[str, list[dict[str, Any]]] = {}
    for key in ("images", "annotations", "categories"):
        if key not in data:
            raise UserError(f"{file}: {key}: missing; is this a COCO instances file?")
        if not isinstance(data[key], list):
            raise _error(file, key, "a list", data[key])
        for i, entry in enumerate(data[key]):
            if not isinstance(entry, dict):
                raise _error(file, f"{key}[{i}]", "an object", entry)
        lists[key] = data[key]
    for key in ("images", "categories"):
        if not lists[key]:
            raise UserError(f"{file}: {key}: empty; there is nothing to make shards of")

    findings: list[Finding] = []
    categories = _categories(lists["categories"], file, findings)
    images = _images(lists["images"], file, findings)
    by_image = _annotations(lists["annotations"], images, file, findings)
    return Annotations(
        images=images,
        by_image=by_image,
        categories=categories,
        listed_images=len(lists["images"]),
        listed_annotations=len(lists["annotations"]),
        findings=findings,
    )


def _categories(
    entries: list[dict[str, Any]], file: str, findings: list[Finding]
) -> tuple[Category, ...]:
    by_id: dict[int, Category] = {}
    for i, entry in enumerate(entries):
        place = f"categories[{i}]"
        category = Category(
            id=_field(entry, "id", file, place, _is_id, "an integer"),
            name=_field(entry, "name", file, place, _is_text, "a text that isn't empty"),
        )
        known = by_id.setdefault(category.id, category)
        if known.name != category.name:
            raise UserError(
                f"{file}: {place}.id: {category.id} is {category.name!r} here and "
                f"{known.name!r} before; give each category an id of its own"
            )
        if known is not category:
            findings.append(Finding("duplicate_category", category.id, category.name))
    names: dict[str, int] = {}
    for category in by_id.values():
        first = names.setdefault(category.name, category.id)
        if first != category.id:
            detail = f"{category.name!r} is also the name of {first}"
            findings.append(Finding("duplicate_category_name", category.id, detail))
    return tuple(by_id[i] for i in sorted(by_id))


def _images(entries: list[dict[str, Any]], file: str, findings: list[Finding]) -> list[ImageEntry]:
    by_id: dict[int, ImageEntry] = {}
    names: dict[str, int] = {}
    for i, entry in enumerate(entries):
        place = f"images[{i}]"
        expected = f"an integer from 0 to {LARGEST_ID}"
        image = ImageEntry(
            id=_field(entry, "id", file, place, _is_image_id, expected),
            file_name=_field(entry, "file_name", file, place, _is_text, "a file's name"),
            width=int(_field(entry, "width", file, place, _is_size, "a whole number of pixels")),
            height=int(_field(entry, "height", file, place, _is_size, "a whole number of pixels")),
        )
        fault = _path_fault(image.file_name)
        if fault:
            shown = _shown(image.file_name)
            raise UserError(
                f"{file}: {place}.file_name: {shown} {fault}; "
                "give paths relative to the split's folder"
            )
        known = by_id.setdefault(image.id, image)
        if known is not image:
            if known != image:
                raise UserError(
                    f"{file}: {place}.id: {image.id} is also the id of {_shown(known.file_name)}, "
                    "so its annotations can't be told apart; give each image an id of its own"
                )
            findings.append(Finding("duplicate_image", image.id, image.file_name))
            continue
        first = names.setdefault(image.file_name, image.id)
        if first != image.id:
            detail = f"{image.file_name} is also image {first}"
            findings.append(Finding("duplicate_file_name", image.id, detail))
    return list(by_id.values())


def _annotations(
    entries: list[dict[str, Any]],
    images: list[ImageEntry],
    file: str,
    findings: list[Finding],
) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = {image.id: [] for image in images}
    by_id: dict[int, dict[str, Any]] = {}
    clashes: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        annotation = _annotation(entry, file, f"annotations[{i}]")
        known = by_id.setdefault(annotation["id"], annotation)
        if known is not annotation:
            if _same(known, annotation):
                findings.append(Finding("duplicate_annotation", annotation["id"]))
                continue
            clashes.append(annotation)
        if annotation["image_id"] not in by_image:
            detail = f"image {annotation['image_id']}"
            findings.append(Finding("unknown_image", annotation["id"], detail))
            continue
        by_image[annotation["image_id"]].append(annotation)
        for key, kind in (("area", "missing_area"), ("iscrowd", "missing_iscrowd")):
            if entry.get(key) is None:
                findings.append(Finding(kind, annotation["id"]))
    # Tools that look annotations up by id would lose all but one of those that share it.
    fresh = max(by_id, default=0)
    for annotation in clashes:
        if annotation["image_id"] not in by_image:
            continue
        fresh += 1
        findings.append(Finding("renumbered", annotation["id"], f"now {fresh}"))
        annotation["id"] = fresh
    return by_image


def _annotation(entry: dict[str, Any], file: str, place: str) -> dict[str, Any]:
    box = _field(entry, "bbox", file, place, _is_box, f"4 finite numbers up to {FARTHEST}")
    annotation: dict[str, Any] = {
        "id": _field(entry, "id", file, place, _is_id, "an integer"),
        "image_id": _field(entry, "image_id", file, place, _is_id, "an integer"),
        "category_id": _field(entry, "category_id", file, place, _is_id, "an integer"),
        "bbox": box,
        "area": None,
        "iscrowd": 0,
        "segmentation": None,
    }
    if entry.get("area") is not None:
        annotation["area"] = _field(entry, "area", file, place, _is_area, "a finite number")
    for key in ("iscrowd", "ignore"):
        if entry.get(key) is not None:
            flag = int(_field(entry, key, file, place, _is_flag, "0 or 1"))
            if flag or key == "iscrowd":
                annotation[key] = flag
    segmentation = entry.get("segmentation")
    if segmentation is not None:
        fault = _segmentation_fault(segmentation)
        if fault:
            where, expected, found = fault
            raise _error(file, f"{place}.segmentation{where}", expected, found)
        annotation["segmentation"] = segmentation
    return annotation


def _segmentation_fault(segmentation: object) -> tuple[str, str, object] | None:
    """Where a segmentation isn't of COCO's form. Values that are wrong are found later."""
    if isinstance(segmentation, dict):
        rle = cast("dict[str, Any]", segmentation)
        size, counts = rle.get("size"), rle.get("counts")
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_id, size))):
            return ".size", "[height, width]", size
        if isinstance(counts, str):
            return None
        if not isinstance(counts, list) or not all(map(_is_id, counts)):
            return ".counts", "a compressed RLE's text or a list of integers", counts
        return None
    if not isinstance(segmentation, list):
        return "", "a list of polygons or an RLE", segmentation
    for i, part in enumerate(cast("list[Any]", segmentation)):
        if not isinstance(part, list):
            return f"[{i}]", "a list of coordinates", part
        if not set(map(type, part)) <= {int, float}:
            wrong = next(value for value in part if type(value) not in (int, float))
            return f"[{i}]", "numbers only", wrong
    return None


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    # As text, because NaN isn't equal to itself.
    return json.dumps(first) == json.dumps(second)


def _path_fault(name: str) -> str:
    """What makes a file's name unfit to be looked up below a folder; empty if nothing does."""
    if re.match(r"[/\\]|[A-Za-z]:", name):
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "leads out of the folder"
    if "\0" in name:
        return "holds a NUL character"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "can't be a file's name here"
    return ""


def _field(
    entry: dict[str, Any],
    key: str,
    file: str,
    place: str,
    test: Callable[[Any], bool],
    expected: str,
) -> Any:
    if key not in entry:
        raise UserError(f"{file}: {place}.{key}: missing, expected {expected}; mend it")
    if not test(entry[key]):
        raise _error(file, f"{place}.{key}", expected, entry[key])
    return entry[key]


def _error(file: str, place: str, expected: str, found: object) -> UserError:
    return UserError(f"{file}: {place}: expected {expected}, got {_shown(found)}; mend it")


def _shown(value: object) -> str:
    """A value in a few ASCII characters; whole it may be endless, or not printable."""
    if isinstance(value, (list, dict)) and len(cast("list[Any]", value)) > 8:
        return f"a {type(value).__name__} of {len(cast('list[Any]', value))}"
    if type(value) is int and abs(value) > 10**20:
        return "a huge integer"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_image_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_size(value: object) -> bool:
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole and 1 <= cast("float", value) <= FARTHEST


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and -FARTHEST <= cast("float", value) <= FARTHEST


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


def _is_area(value: object) -> bool:
    return type(value) in (int, float) and abs(cast("float", value)) <= FARTHEST**2


def _is_flag(value: object) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)
