"""COCO segmentations of any quality: what of one can be used, and what pycocotools makes of it.

Sharding and evaluation share these rules, so that an annotation file and its shards are the
same ground truth.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Box = tuple[float, float, float, float]
"""x, y, width and height in pixels."""


def is_flat(segmentation: object) -> bool:
    """Whether it is the coordinates of a single outline, without the list of outlines around."""
    return (
        isinstance(segmentation, list)
        and bool(segmentation)
        and set(map(type, segmentation)) <= {int, float}
    )


def part_fault(part: object, width: int, height: int) -> str:
    """Why a polygon's part can't be used; empty if it can.

    Args:
        part: should be a flat list of coordinates in pixels.
        width: the image's, in pixels.
        height: likewise.
    """
    if not isinstance(part, list) or not set(map(type, part)) <= {int, float}:
        return "not a list of numbers"
    if len(part) % 2:
        return f"odd number of coordinates ({len(part)})"
    if len(part) < 6:
        return f"only {len(part) // 2} points"
    # What is further off than the image is long isn't an inaccuracy, and would cost a rasteriser
    # all its memory. A NaN, which min() and max() may pass over, shows in the sum.
    xs, ys = part[0::2], part[1::2]
    near = -width <= min(xs) and max(xs) <= 2 * width and -height <= min(ys)
    if not (near and max(ys) <= 2 * height) or math.isnan(sum(part)):
        return "a coordinate that is NaN, infinite or far outside the image"
    return ""


def rle_counts(rle: Mapping[str, Any], width: int, height: int) -> list[int]:
    """Give an RLE's run lengths down the columns, those off the mask first.

    Raises:
        ValueError: when it can't be decoded or isn't of this size.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"size {size}, the image's is {[height, width]}")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("counts are neither a text nor a list of integers")
    if any(count < 0 for count in counts):
        raise ValueError("a count is negative")
    total = sum(counts)
    if total != width * height:
        raise ValueError(f"counts sum to {total}, not {width * height}")
    return counts


def usable_segmentation(
    segmentation: object, width: int, height: int
) -> list[list[float]] | Mapping[str, Any] | None:
    """Give what pycocotools can read of a segmentation; None if nothing, or an RLE without a pixel.

    A polygon too thin to hold a pixel counts as a mask, as it does for pycocotools.
    """
    if isinstance(segmentation, list):
        every = [segmentation] if is_flat(segmentation) else segmentation
        parts = [part for part in every if not part_fault(part, width, height)]
        return parts or None
    if not isinstance(segmentation, Mapping):
        return None
    try:
        counts = rle_counts(segmentation, width, height)
    except ValueError:
        return None
    return segmentation if any(counts[1::2]) else None


def pack(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Give pycocotools' compressed RLE of what `usable_segmentation` gave; parts are united."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))  # type: ignore[arg-type]
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)  # type: ignore[arg-type]
    counts = counts.encode("ascii") if isinstance(counts, str) else counts
    return {"size": [height, width], "counts": counts}


def mask_box(segmentation: object, width: int, height: int) -> Box | None:
    """Give the bounds of a segmentation, None where there is no mask."""
    usable = usable_segmentation(segmentation, width, height)
    if usable is None:
        return None
    if isinstance(usable, list):
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in usable])
        low, high = points.min(axis=0), points.max(axis=0)
        return (*low.tolist(), *(high - low).tolist())
    return tuple(coco_mask.toBbox(pack(usable, width, height)).tolist())  # type: ignore[arg-type]


def mask_area(segmentation: Any, width: int, height: int) -> int:
    """Give the pixels of what `usable_segmentation` gave."""
    return int(coco_mask.area(pack(segmentation, width, height)))  # type: ignore[arg-type]


def polygon_areas(
    objects: Sequence[Sequence[Sequence[float]]], width: int, height: int
) -> list[int]:
    """Give `mask_area` of many polygons, none of them empty, at once."""
    rles = coco_mask.frPyObjects([part for parts in objects for part in parts], height, width)  # type: ignore[arg-type]
    bounds = list(itertools.accumulate(map(len, objects), initial=0))
    united = (
        rles[low] if high == low + 1 else coco_mask.merge(rles[low:high])
        for low, high in itertools.pairwise(bounds)
    )
    # One by one: pycocotools counts to 255 where it is given a list.
    return [int(coco_mask.area(rle)) for rle in united]


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
