"""The JSON member of a sample in a shard: `data_tools shard` writes it, all others read it."""

import hashlib
import json
import math
import re
from typing import Any, NoReturn, NotRequired, TypedDict, cast

from casc.errors import UserError


def as_id(value: object) -> int | None:
    """The number for an id of an image or annotation in COCO's format; None if it is none.

    Whole numbers may have gone through a table of floats or texts, or of both ("007", " 7", "7.0").
    A text that isn't a number, such as a UUID, gives the first 52 bits of its SHA-256: the same in
    every file, and whole in JSON.
    """
    if is_text_id(value) and str(value).strip():
        digest = hashlib.sha256(str(value).encode("utf-8", "surrogatepass"))
        value = int(digest.hexdigest()[:13], 16)
    elif isinstance(value, str) and value.strip():
        value = int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def is_text_id(value: object) -> bool:
    """Whether `as_id` makes up the number."""
    return isinstance(value, str) and not re.fullmatch(
        r"\s*[-+]?\d{1,19}(\.0*)?\s*", value, re.ASCII
    )


class AnnotationRecord(TypedDict):
    """An annotation as COCO gave it, in pixels of the stored image, and what training sees."""

    id: int
    category_id: int
    bbox: list[float]
    """[x, y, w, h]."""
    area: float
    iscrowd: int
    segmentation: Any
    """Polygons or an RLE, as pycocotools reads them."""
    ignore: NotRequired[int]
    label: int
    """0-based, from the category; -1 where the index doesn't have it."""
    train: bool
    """Whether it is trained on."""
    box_only: NotRequired[bool]
    """Whether its mask alone is amiss: it is trained on where no masks are."""
    region: NotRequired[bool]
    """Whether it may become a region to ignore: a crowd, marked as ignore, or without a mask."""
    box: list[float]
    """xyxy, not clipped to the image."""
    rings: NotRequired[list[list[float]]]
    """Outlines traced from the mask where the segmentation itself isn't what training fills:
    positive area bounds the mask, negative area a hole."""
    mask_iou: NotRequired[float | None]
    """Of the rings with pycocotools' mask."""


class SampleRecord(TypedDict):
    """All that is known of an image."""

    image_id: int
    file_name: str
    width: int
    """Of the stored image, upright, in pixels."""
    height: int
    orientation: int
    """EXIF's, from 1 to 8, by which decoding turns the stored image."""
    train: bool
    """Whether training reads it; evaluation reads all."""
    annotations: list[AnnotationRecord]


def parse_record(data: bytes | str, name: str = "its JSON") -> SampleRecord:
    """Parse a sample's JSON member and see that its fields are what they have to be.

    Args:
        data: the member.
        name: what errors call it.

    Raises:
        UserError: naming the field.
    """
    try:
        record = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise UserError(f"{name}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None
    try:
        fault = _fault(record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        fault = f"a field is missing or of another type ({type(error).__name__}: {error})"
    if fault:
        raise UserError(f"{name}: {fault}")
    return cast(SampleRecord, record)


MOST_PIXELS = 2**28
"""Of a mask."""
FARTHEST = 10_000_000
"""Largest coordinate, in pixels."""


def _fault(record: Any) -> str:
    """What is wrong with a record, with the field; empty if nothing is."""
    if not isinstance(record, dict):
        return "isn't an object"
    for key, least, most in (
        ("image_id", -(2**63), 2**63 - 1), ("width", 1, FARTHEST), ("height", 1, FARTHEST),
        ("orientation", 1, 8),
    ):  # fmt: skip
        if type(record.get(key)) is not int or not least <= record[key] <= most:
            wanted = f"a whole number from {least} to {most}"
            return f"{key}: expected {wanted}, got {_shown(record, key)}"
    for key, kind in (("file_name", str), ("train", bool), ("annotations", list)):
        if type(record.get(key)) is not kind:
            return f"{key}: expected a {kind.__name__}, got {_shown(record, key)}"
    for i, entry in enumerate(record["annotations"]):
        if fault := _annotation_fault(entry):
            return f"annotations[{i}]{fault}"
    return ""


def _annotation_fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ": isn't an object"
    # What only evaluation reads may be missing, as in COCO's own files; then it says so.
    for key in ("label", *(key for key in ("id", "category_id", "iscrowd") if key in entry)):
        if type(entry.get(key)) is not int or not -(2**63) <= entry[key] < 2**63:
            return f".{key}: expected a whole number, got {_shown(entry, key)}"
    if type(entry.get("train")) is not bool:
        return f".train: expected true or false, got {_shown(entry, 'train')}"
    for key in ("box_only", "region"):
        if type(entry.get(key, False)) is not bool:
            return f".{key}: expected true or false, got {_shown(entry, key)}"
    trained = entry["train"] or entry.get("box_only", False)
    if not -1 + trained <= entry["label"] < 2**31:
        return f".label: {entry['label']} is no class"
    for key in ("box", *(key for key in ("bbox",) if key in entry)):
        if not _are_numbers(entry.get(key)) or len(entry[key]) != 4:
            return f".{key}: expected 4 finite numbers, got {_shown(entry, key)}"
    if not _are_numbers([entry.get("area", 0)], most=FARTHEST**2):
        return f".area: expected a finite number, got {_shown(entry, 'area')}"
    shape = entry.get("segmentation")
    if isinstance(shape, dict):
        sides: Any = shape.get("size")
        if not _are_numbers(sides) or len(sides) != 2 or not 0 <= math.prod(sides) <= MOST_PIXELS:
            return f".segmentation.size: expected [height, width], got {_shown(shape, 'size')}"
        if not isinstance(shape.get("counts", []), (str, list)):
            return f".segmentation.counts: expected a text or a list, got {_shown(shape, 'counts')}"
    outline = "rings" if "rings" in entry else "segmentation"
    if entry["train"] and "segmentation" not in entry:
        return ".segmentation: expected polygons or an RLE, got nothing"
    if entry["train"] and not isinstance(entry.get(outline), list):
        return f".{outline}: expected polygons to train on, got {_shown(entry, outline)}"
    for key in ("segmentation", "rings"):
        parts = entry.get(key, [])
        if isinstance(parts, dict) and key == "segmentation":
            continue
        if not isinstance(parts, list):
            return f".{key}: expected polygons, got {_shown(entry, key)}"
        for part in parts:
            if not _are_numbers(part):
                return f".{key}: expected lists of finite numbers, got {part!r:.60}"
            if entry["train"] and key == outline and len(part) % 2:
                return f".{key}: expected pairs of numbers, got {len(part)} numbers"
    return ""


def _are_numbers(values: Any, most: int = FARTHEST) -> bool:
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    return not values or (-most <= min(values) and max(values) <= most)


def _shown(entry: dict[str, Any], key: str) -> str:
    return f"{entry[key]!r:.60}" if key in entry else "nothing"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
