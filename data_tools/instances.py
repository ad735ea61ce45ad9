"""COCO annotations to the records of a sample: what is trained on, and why the rest is not."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.record import AnnotationRecord
from casc.data.segmentation import (
    Box,
    mask_area,
    mask_box,
    pack,
    part_fault,
    polygon_areas,
    rle_counts,
)
from data_tools.boxes import mismatch
from data_tools.report import Finding
from data_tools.rings import (
    fill_rings,
    mask_iou,
    measure_outlines,
    trace_mask,
    trace_within,
)

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
    """Turn a single annotation into a record, see `make_records`."""
    return make_records([([annotation], frame)], labels, tolerance)[0][0]


def make_records(
    images: Sequence[tuple[Sequence[Mapping[str, Any]], Frame]],
    labels: Mapping[int, int],
    tolerance: float | None = None,
) -> list[list[Made]]:
    """Turn the annotations of some images into records, at little cost each where they are many.

    Args:
        images: of each its annotations, with the fields of `data_tools.store.normal`, and sizes.
        labels: label by category id.
        tolerance: pixels by which polygons traced from an RLE may deviate from it. None: not at
            all, except that those of over `RAGGED_EDGES` are simplified within `LEAST_IOU`.
    """
    polygons = iter(
        _polygons(
            [
                (annotation["segmentation"], frame)
                for annotations, frame in images
                for annotation in annotations
            ]
        )
    )
    return [
        [_make(annotation, next(polygons), frame, labels, tolerance) for annotation in annotations]
        for annotations, frame in images
    ]


def _make(
    annotation: Mapping[str, Any],
    polygons: "_Polygons",
    frame: Frame,
    labels: Mapping[int, int],
    tolerance: float | None,
) -> Made:
    findings: list[Finding] = []
    number = annotation["id"]

    def find(kind: str, detail: str = "") -> None:
        findings.append(Finding(kind, number, detail))

    if isinstance(annotation["segmentation"], dict):
        mask = _rle_mask(annotation["segmentation"], frame, tolerance, find)
    else:
        mask = _polygon_mask(polygons, frame, tolerance, find)
    across, down = frame.stored_width / frame.width, frame.stored_height / frame.height
    x, y, w, h = annotation["bbox"]
    area = annotation["area"]
    if area is None:
        area = mask.area() if mask.area is not None else w * h
    if (across, down) != (1, 1):
        x, y, w, h = x * across, y * down, w * across, h * down
        area = area * across * down

    label = labels.get(annotation["category_id"], -1)
    if mask.box is not None and not annotation["iscrowd"]:
        differs = mismatch((x, y, w, h), mask.box, frame.stored_height)
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
    # What isn't trained on is evaluated only, from the segmentation itself: crowds cost most.
    if mask.trace is not None and not reasons:
        rings, iou = mask.trace()
        entry["rings"] = [
            [int(v) if v.is_integer() else v for v in ring.reshape(-1).tolist()] for ring in rings
        ]
        entry["mask_iou"] = iou
    return Made(entry, findings)


class _Mask(NamedTuple):
    segmentation: Any
    """In stored pixels, always something that pycocotools can read."""
    empty: bool
    area: Callable[[], int] | None = None
    """In annotated pixels, as pycocotools counts them."""
    box: Box | None = None
    """In stored pixels; None where there is no mask."""
    trace: Callable[[], tuple[list[np.ndarray], float]] | None = None
    """Where training needs other outlines: gives rings, and their IoU with the mask."""


class _Polygons(NamedTuple):
    """The usable parts of a segmentation."""

    parts: list[list[float]]
    """In annotated pixels."""
    stored: list[list[float]]
    """In stored pixels."""
    faults: list[str]
    """Of the parts that can't be used."""
    box: Box | None = None
    """Of `stored`, in stored pixels; None where there is none."""
    backward: Sequence[bool] = ()
    """Of each of `stored`, as in `Outlines`."""
    overlapping: Sequence[bool] = ()
    pixels: int = 0
    """Of `stored`. Pycocotools loses some outlines thinner than a pixel, a pixel's centre in them
    or not."""


def _polygons(segmentations: Sequence[tuple[Any, Frame]]) -> list[_Polygons]:
    """Those of annotations and their images' sizes; none of an RLE."""
    found: list[_Polygons] = []
    for segmentation, frame in segmentations:
        scale = frame.stored_width / frame.width, frame.stored_height / frame.height
        parts: list[list[float]] = []
        faults: list[str] = []
        for part in [] if isinstance(segmentation, dict) else segmentation or []:
            fault = part_fault(part, frame.width, frame.height)
            if fault:
                faults.append(fault)
            else:
                parts.append(part)
        stored = parts
        if scale != (1, 1):
            stored = [(np.reshape(part, (-1, 2)) * scale).reshape(-1).tolist() for part in parts]
        found.append(_Polygons(parts, stored, faults))
    used = [i for i, each in enumerate(found) if each.stored]
    if not used:
        return found
    frames = [segmentations[i][1] for i in used]
    bounds = list(itertools.accumulate((len(found[i].stored) for i in used), initial=0))
    about = measure_outlines(
        [part for i in used for part in found[i].stored],
        [f.stored_height for i, f in zip(used, frames, strict=True) for _ in found[i].stored],
        [f.stored_width for i, f in zip(used, frames, strict=True) for _ in found[i].stored],
    )
    low = np.minimum.reduceat(about.low, bounds[:-1])
    size = np.maximum.reduceat(about.high, bounds[:-1]) - low
    boxes = np.concatenate([low, size], axis=1).tolist()
    backward, overlapping = about.backward.tolist(), about.overlapping.tolist()
    areas: list[int] = []
    for (width, height), same in itertools.groupby(
        zip(used, frames, strict=True), lambda pair: pair[1][2:]
    ):
        areas += polygon_areas([found[i].stored for i, _ in same], width, height)
    for i, box, pixels, (first, last) in zip(
        used, boxes, areas, itertools.pairwise(bounds), strict=True
    ):
        found[i] = found[i]._replace(
            box=tuple(box),
            backward=backward[first:last],
            overlapping=overlapping[first:last],
            pixels=pixels,
        )
    return found


def _polygon_mask(polygons: _Polygons, frame: Frame, tolerance: float | None, find: Any) -> _Mask:
    """Training fills outlines by the non-zero rule, pycocotools by the even-odd one.

    They differ where an outline overlaps itself: then training gets pycocotools' mask, traced.
    """
    for fault in polygons.faults:
        find("bad_polygon_part", fault)
    parts = polygons.stored
    if not parts:
        return _empty_mask(frame)
    if len(parts) > 1:
        find("multi_part")
    width, height = frame.stored_width, frame.stored_height
    pixels = polygons.pixels

    def area() -> int:
        if polygons.parts is parts:
            return pixels
        return mask_area(polygons.parts, frame.width, frame.height)

    made = _Mask(parts, empty=not pixels, area=area, box=polygons.box)
    if not any(polygons.overlapping):
        return made
    find("self_overlap")

    def trace() -> tuple[list[np.ndarray], float]:
        rings: list[np.ndarray] = []
        for part, backward, overlaps in zip(
            parts, polygons.backward, polygons.overlapping, strict=True
        ):
            ring = np.reshape(part, (-1, 2)).astype(np.float64)
            if overlaps:
                rings += _trace(_decode([part], width, height), tolerance, find)
            else:
                rings.append(ring[::-1] if backward else ring)
        return rings, _agreement(_decode(parts, width, height), rings)

    return made._replace(trace=trace)


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
    area = sum(counts[1::2])
    segmentation: Any = dict(rle)
    mask = None
    if (frame.stored_height, frame.stored_width) != (frame.height, frame.width):
        mask = _resize_mask(_decode({"counts": counts}, frame.width, frame.height), frame)
        packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}
    if not (area if mask is None else mask.any()):
        return _Mask(segmentation, empty=True, area=lambda: area)

    def trace() -> tuple[list[np.ndarray], float]:
        find("rle_mask")
        pixels = _decode({"counts": counts}, frame.width, frame.height) if mask is None else mask
        rings = _trace(pixels, tolerance, find)
        return rings, _agreement(pixels, rings)

    box = mask_box(segmentation, frame.stored_width, frame.stored_height)
    return _Mask(segmentation, empty=False, area=lambda: area, box=box, trace=trace)


def _agreement(mask: np.ndarray, rings: list[np.ndarray]) -> float:
    return round(mask_iou(mask, fill_rings(rings, *mask.shape)), 6)


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
