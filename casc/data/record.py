"""The JSON member of a sample in a shard: `data_tools shard` writes it, all others read it."""

import json
from typing import Any, NotRequired, TypedDict, cast


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


def parse_record(data: bytes | str) -> SampleRecord:
    """Parse a sample's JSON member, which the index's hash of its shard vouches for.

    Raises:
        ValueError: when it isn't JSON.
    """
    return cast(SampleRecord, json.loads(data))
