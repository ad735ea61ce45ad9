"""How well an image's detections fit its objects: one number per image, to find the extremes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from casc.evaluate.coco_eval import IouType

MATCH_IOU = 0.5


class Quality(NamedTuple):
    """What was found of an image's objects."""

    value: float | None
    """0 to 1; None where there is nothing to find and nothing was found."""
    found: int
    missed: int
    wrong: int
    """Detections without an object of their class."""


def image_quality(
    objects: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    iou_type: IouType = "segm",
) -> Quality:
    """Measure an image's detections by their masks, or by their boxes.

    The sum of the matches' IoU over the mean number of objects and detections: panoptic
    quality (Kirillov et al. 2019, arXiv:1801.00868, equation 1). As instances may overlap here,
    matches are made as COCO's evaluation makes them: the surest detection first, with the
    object of its class that it overlaps most, at an IoU of at least 0.5. What lies in a crowd of
    its class counts neither way.

    Args:
        objects: annotations as `with_masks` gives them; or, of boxes, `usable_objects`.
        results: detections in COCO's format, those that are to count.
        size: the image's (h, w).
        iou_type: by which overlap.
    """
    found = wrong = 0
    total = 0.0
    single = [o for o in objects if not o["iscrowd"]]
    for category in {entry["category_id"] for entry in (*objects, *results)}:
        theirs = [o for o in objects if o["category_id"] == category]
        mine = sorted(
            (r for r in results if r["category_id"] == category),
            key=lambda result: -result["score"],
        )
        if not theirs or not mine:
            wrong += len(mine)
            continue
        crowd = np.array([bool(o["iscrowd"]) for o in theirs])
        overlap = np.asarray(
            coco_mask.iou(
                [_region(result, size, iou_type) for result in mine],
                [_region(o, size, iou_type) for o in theirs],
                crowd.astype(np.uint8).tolist(),
            )
        ).reshape(len(mine), len(theirs))
        free = ~crowd
        for row in overlap:
            best = int(np.argmax(np.where(free, row, -1)))
            if free[best] and row[best] >= MATCH_IOU:
                free[best] = False
                found += 1
                total += float(row[best])
            elif not (row[crowd] >= MATCH_IOU).any():
                wrong += 1
    missed = len(single) - found
    weight = found + (missed + wrong) / 2
    return Quality(total / weight if weight else None, found, missed, wrong)


def _region(entry: Mapping[str, Any], size: tuple[int, int], iou_type: IouType) -> Any:
    return entry["bbox"] if iou_type == "bbox" else _rle(entry["segmentation"], size)


def _rle(segmentation: Any, size: tuple[int, int]) -> Any:
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        packed: Any = coco_mask.frPyObjects(segmentation, *size)
        return packed
    return segmentation
