"""COCO annotations to the records of a sample: what is trained on, and why the rest is not."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.record import AnnotationRecord
from casc.data.sample import signed_area
from casc.data.segmentation import mask_area, pack, part_fault, rle_counts
from data_tools.boxes import mask_box, mismatch
from data_tools.report import Finding
from data_tools.rings import fill_rings, mask_iou, overlaps_itself, trace_mask, trace_within

RAGGED_EDGES = 500
"""Edges from which on a traced outline is simplified, unless a tolerance is given."""
LEAST_IOU = 0.99
"""With the mask, that a simplified outline has to keep."""
_IGNORED = {"crowd", "ignore", "no_mask"}
"""Why an annotation isn't trained on, though there may be something that looks like an object."""
_BEYOND = 0.5
"""Pixels that a box may reach out of the image without being reported."""


class Frame(NamedTuple):
    """The pixels that annotations refer to, and what becomes of them."""

    width: int
    """As annotated."""
    height: int
    stored_width: int
    """In the shard; another size than annotated where the image was reduced, or is a copy."""
    stored_height: int


class Made(NamedTuple):
    """An annotation of a sample, and what was found in it."""

    entry: AnnotationRecord
    findings: list[Finding]


def make_record(
    annotation: Mapping[str, Any],
    frame: Frame,
    labels: Mapping[int, int],
    tolerance: float | None = None,
) -> Made:
    """Turn an annotation of `data_tools.coco` into a record.

    Args:
        annotation: with the fields of `Annotations.by_image`.
        frame: sizes of its image.
        labels: label by category id.
        tolerance: pixels by which polygons traced from an RLE may deviate from it. None: not at
            all, except that those of over `RAGGED_EDGES` are simplified within `LEAST_IOU`.
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
        area = mask.area() if mask.area is not None else w * h
    if (across, down) != (1, 1):
        x, y, w, h = x * across, y * down, w * across, h * down
        area = area * across * down

    label = labels.get(annotation["category_id"], -1)
    bounds = mask_box(mask.segmentation, frame.stored_width, frame.stored_height)
    if bounds is not None and not annotation["iscrowd"]:
        differs = mismatch((x, y, w, h), bounds, frame.stored_height)
        if differs:
            find("box_not_mask", differs)
    reasons = _reasons(annotation, (x, y, w, h), area, label, frame)
    if mask.empty:
        reasons.append("no_mask")
    for reason in reasons:
        find(reason)
    overhang = max(-x, -y, x + w - frame.stored_width, y + h - frame.stored_height)
    if "outside_image" not in reasons and overhang > _BEYOND:
        find("out_of_bounds")

    entry: AnnotationRecord = {
        "id": number,
        "category_id": annotation["category_id"],
        "bbox": [x, y, w, h],
        "area": area,
        "iscrowd": annotation["iscrowd"],
        "segmentation": mask.segmentation,
        "label": label,
        "train": not reasons,
        "box": [x, y, x + w, y + h],
    }
    if annotation.get("ignore"):
        entry["ignore"] = 1
    if reasons == ["no_mask"]:
        entry["box_only"] = True
    if reasons and set(reasons) <= _IGNORED:
        entry["region"] = True
    if mask.rings is not None:
        entry["rings"] = [
            [int(v) if v.is_integer() else v for v in ring.reshape(-1).tolist()]
            for ring in mask.rings
        ]
        entry["mask_iou"] = mask.iou
    return Made(entry, findings)


class _Mask(NamedTuple):
    segmentation: Any
    """In stored pixels, always something that pycocotools can read."""
    empty: bool
    area: Callable[[], int] | None = None
    """In annotated pixels, as pycocotools counts them."""
    rings: list[np.ndarray] | None = None
    iou: float | None = None


def _mask(segmentation: Any, frame: Frame, tolerance: float | None, find: Any) -> _Mask:
    if isinstance(segmentation, dict):
        return _rle_mask(segmentation, frame, tolerance, find)
    parts: list[list[float]] = []
    for part in segmentation or []:
        fault = part_fault(part, frame.width, frame.height)
        if fault:
            find("bad_polygon_part", fault)
        else:
            parts.append(part)
    if not parts:
        return _empty_mask(frame)
    if len(parts) > 1:
        find("multi_part")
    return _polygon_mask(parts, frame, tolerance, find)


def _polygon_mask(
    parts: list[list[float]], frame: Frame, tolerance: float | None, find: Any
) -> _Mask:
    """Training fills outlines by the non-zero rule, pycocotools by the even-odd one.

    They differ where an outline overlaps itself: then training gets pycocotools' mask, traced.
    """
    width, height = frame.stored_width, frame.stored_height
    scale = width / frame.width, height / frame.height
    whole = parts
    if scale != (1, 1):
        parts = [(np.reshape(part, (-1, 2)) * scale).reshape(-1).tolist() for part in parts]
    outlines = [np.reshape(part, (-1, 2)).astype(np.float64) for part in parts]
    outlines = [ring if signed_area(ring) >= 0 else ring[::-1] for ring in outlines]
    overlapping = [overlaps_itself(ring, height, width) for ring in outlines]
    # Pycocotools loses some outlines thinner than a pixel, a pixel's centre in them or not.
    empty = not mask_area(parts, width, height)

    def area() -> int:
        return mask_area(whole, frame.width, frame.height)

    if not any(overlapping):
        return _Mask(parts, empty=empty, area=area)
    find("self_overlap")
    if empty:
        return _Mask(parts, empty=True, area=area)
    rings: list[np.ndarray] = []
    for part, ring, overlaps in zip(parts, outlines, overlapping, strict=True):
        rings += _trace(_decode([part], width, height), tolerance, find) if overlaps else [ring]
    iou = mask_iou(_decode(parts, width, height), fill_rings(rings, height, width))
    return _Mask(parts, empty=False, area=area, rings=rings, iou=round(iou, 6))


def _trace(mask: np.ndarray, tolerance: float | None, find: Any) -> list[np.ndarray]:
    rings = trace_mask(mask, tolerance or 0)
    edges = sum(map(len, rings))
    if tolerance is not None or edges <= RAGGED_EDGES:
        return rings
    fewer, iou = trace_within(mask, LEAST_IOU)
    find("simplified", f"{edges:,} edges to {sum(map(len, fewer)):,}, IoU {iou:.4f}")
    return fewer


def _decode(segmentation: Any, width: int, height: int) -> np.ndarray:
    return coco_mask.decode(pack(segmentation, width, height)).astype(bool)  # type: ignore[arg-type]


def _rle_mask(rle: Mapping[str, Any], frame: Frame, tolerance: float | None, find: Any) -> _Mask:
    try:
        counts = rle_counts(rle, frame.width, frame.height)
    except ValueError as error:
        find("bad_rle", str(error))
        return _empty_mask(frame)
    find("rle_mask")
    mask = _decode({"counts": counts}, frame.width, frame.height)
    area = sum(counts[1::2])
    segmentation: Any = dict(rle)
    if (frame.stored_height, frame.stored_width) != (frame.height, frame.width):
        mask = _resize_mask(mask, frame)
        packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}
    if not mask.any():
        return _Mask(segmentation, empty=True, area=lambda: area)
    rings = _trace(mask, tolerance, find)
    filled = fill_rings(rings, *mask.shape)
    iou = round(mask_iou(mask, filled), 6)
    return _Mask(segmentation, empty=False, area=lambda: area, rings=rings, iou=iou)


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
