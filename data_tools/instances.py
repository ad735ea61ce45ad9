"""COCO annotations to the records of a sample: what is trained on, and why the rest is not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.sample import signed_area
from data_tools.report import Finding
from data_tools.rings import fill_rings, mask_iou, trace_mask

_BEYOND = 0.5
"""Pixels that a box may reach out of the image without being reported."""


class Frame(NamedTuple):
    """The pixels that annotations refer to, and what becomes of them."""

    width: int
    """As annotated."""
    height: int
    stored_width: int
    """In the shard; another size than annotated only where the image was reduced."""
    stored_height: int
    matches: bool = True
    """False where the image isn't of the annotated size, so nothing can be trained on."""


class Record(NamedTuple):
    """An annotation's entry in a sample's JSON."""

    entry: dict[str, Any]
    findings: list[Finding]


def make_record(
    annotation: Mapping[str, Any],
    frame: Frame,
    labels: Mapping[int, int],
    tolerance: float = 0.0,
) -> Record:
    """Turn an annotation of `data_tools.coco` into a record.

    Args:
        annotation: with the fields of `Annotations.by_image`.
        frame: sizes of its image.
        labels: label by category id.
        tolerance: pixels by which polygons traced from an RLE may deviate from it.
    """
    findings: list[Finding] = []
    number = annotation["id"]

    def find(kind: str, detail: str = "") -> None:
        findings.append(Finding(kind, number, detail))

    mask = _mask(annotation["segmentation"], frame, tolerance, find)
    across, down = frame.stored_width / frame.width, frame.stored_height / frame.height
    x, y, w, h = annotation["bbox"]
    area = annotation["area"]
    if area is None:
        area = mask.area if mask.area is not None else w * h
    if (across, down) != (1, 1):
        x, y, w, h = x * across, y * down, w * across, h * down
        area = area * across * down

    label = labels.get(annotation["category_id"], -1)
    reasons = _reasons(annotation, (x, y, w, h), area, label, frame)
    if mask.empty:
        reasons.append("no_mask")
    for reason in reasons:
        find(reason)
    overhang = max(-x, -y, x + w - frame.stored_width, y + h - frame.stored_height)
    if "outside_image" not in reasons and overhang > _BEYOND:
        find("out_of_bounds")

    entry: dict[str, Any] = {
        "id": number,
        "category_id": annotation["category_id"],
        "bbox": [x, y, w, h],
        "area": area,
        "iscrowd": annotation["iscrowd"],
        "segmentation": mask.segmentation,
        "label": label,
        "train": not reasons and frame.matches,
        "box": [x, y, x + w, y + h],
    }
    if annotation.get("ignore"):
        entry["ignore"] = 1
    if mask.rings is not None:
        entry["rings"] = [
            [int(v) if v.is_integer() else v for v in ring.reshape(-1).tolist()]
            for ring in mask.rings
        ]
        entry["mask_iou"] = mask.iou
    return Record(entry, findings)


class _Mask(NamedTuple):
    segmentation: Any
    """In stored pixels, always something that pycocotools can read."""
    empty: bool
    area: float | None = None
    """In annotated pixels."""
    rings: list[np.ndarray] | None = None
    iou: float | None = None


def _mask(segmentation: Any, frame: Frame, tolerance: float, find: Any) -> _Mask:
    if isinstance(segmentation, dict):
        return _rle_mask(segmentation, frame, tolerance, find)
    parts: list[list[float]] = []
    for part in segmentation or []:
        fault = _part_fault(part, frame)
        if fault:
            find("bad_polygon_part", fault)
        else:
            parts.append(part)
    if not parts:
        return _empty_mask(frame)
    if len(parts) > 1:
        find("multi_part")
    area = sum(abs(signed_area(np.reshape(part, (-1, 2)).astype(float))) for part in parts)
    scale = frame.stored_width / frame.width, frame.stored_height / frame.height
    if scale != (1, 1):
        parts = [(np.reshape(part, (-1, 2)) * scale).reshape(-1).tolist() for part in parts]
    return _Mask(parts, empty=False, area=area)


def _part_fault(part: Sequence[float], frame: Frame) -> str:
    if len(part) % 2:
        return f"odd number of coordinates ({len(part)})"
    if len(part) < 6:
        return f"only {len(part) // 2} points"
    # Comparisons, which NaN fails and integers of any size pass. What is further off than
    # the image is long isn't an inaccuracy, and would cost a rasteriser all its memory.
    if not all(-frame.width <= x <= 2 * frame.width for x in part[0::2]) or not all(
        -frame.height <= y <= 2 * frame.height for y in part[1::2]
    ):
        return "a coordinate that is NaN, infinite or far outside the image"
    return ""


def _rle_mask(rle: Mapping[str, Any], frame: Frame, tolerance: float, find: Any) -> _Mask:
    size = [frame.height, frame.width]
    if rle["size"] != size:
        find("bad_rle", f"size {rle['size']}, the image's is {size}")
        return _empty_mask(frame)
    try:
        counts = rle["counts"]
        counts = _decompress(counts) if isinstance(counts, str) else counts
        if any(count < 0 for count in counts):
            raise ValueError("a count is negative")
        total = sum(counts)
        if total != frame.width * frame.height:
            raise ValueError(f"counts sum to {total}, not {frame.width * frame.height}")
    except ValueError as error:
        find("bad_rle", str(error))
        return _empty_mask(frame)
    find("rle_mask")
    packed: Any = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)  # type: ignore[arg-type]
    mask = coco_mask.decode(packed).astype(bool)
    area = int(mask.sum())
    segmentation: Any = dict(rle)
    if (frame.stored_height, frame.stored_width) != (frame.height, frame.width):
        mask = _resize_mask(mask, frame)
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}
    if not mask.any():
        return _Mask(segmentation, empty=True, area=area)
    rings = trace_mask(mask, tolerance)
    filled = fill_rings(rings, *mask.shape)
    iou = round(mask_iou(mask, filled), 6)
    return _Mask(segmentation, empty=False, area=area, rings=rings, iou=iou)


def _decompress(text: str) -> list[int]:
    """COCO's packing of counts: 5 bits a character from "0" on, each less the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!a} isn't a character of a compressed RLE")
        value |= (bits & 0x1F) << shift
        shift += 5
        if shift > 60:
            raise ValueError("a count is too long")
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the text ends inside a count")
    return counts


def _resize_mask(mask: np.ndarray, frame: Frame) -> np.ndarray:
    size = frame.stored_width, frame.stored_height
    cover = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return np.asarray(cover) >= 0.5


def _empty_mask(frame: Frame) -> _Mask:
    # pycocotools can't read an empty list of polygons, but it can read an empty RLE.
    size = [frame.stored_height, frame.stored_width]
    return _Mask({"size": size, "counts": [size[0] * size[1]]}, empty=True)


def _reasons(
    annotation: Mapping[str, Any],
    box: tuple[float, float, float, float],
    area: float,
    label: int,
    frame: Frame,
) -> list[str]:
    """Why an annotation isn't trained on; as the reference has it (MMDetection's CocoDataset)."""
    x, y, w, h = box
    inside_w = min(x + w, frame.stored_width) - max(x, 0)
    inside_h = min(y + h, frame.stored_height) - max(y, 0)
    degenerate = area <= 0 or w < 1 or h < 1
    found = {
        "crowd": bool(annotation["iscrowd"]),
        "ignore": bool(annotation.get("ignore")),
        "unknown_category": label < 0,
        "degenerate_box": degenerate,
        "outside_image": not degenerate and (inside_w <= 0 or inside_h <= 0),
    }
    return [kind for kind, holds in found.items() if holds]
