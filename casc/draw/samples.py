"""Ground truth of a shard's sample on its image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.decode import decode_image
from casc.data.index import Category
from casc.data.record import SampleRecord
from casc.draw.instances import draw_instances


def draw_sample(
    image: bytes,
    record: SampleRecord,
    categories: Sequence[Category],
    long_side: int | None = None,
    seen_at: int | None = None,
    channels: int = 3,
) -> np.ndarray:
    """Draw all annotations of a sample, those that aren't trained on included.

    Args:
        image: the sample's encoded image.
        record: its JSON, parsed.
        categories: of the index.
        long_side: the picture's longest side in pixels; see `draw_instances`.
        seen_at: see `draw_instances`.
        channels: of the image, as its split says.

    Returns:
        `[H, W, 3]` uint8 RGB.

    Raises:
        UserError: the image can't be decoded.
    """
    names = {category.id: category.name for category in categories}
    entries = record["annotations"]
    segmentations = [entry["segmentation"] for entry in entries]
    return draw_instances(
        decode_image(image, record["orientation"], channels),
        np.array([entry["box"] for entry in entries], float).reshape(-1, 4),
        [names.get(entry["category_id"], f"category {entry['category_id']}") for entry in entries],
        labels=[entry["label"] for entry in entries],
        masks=[_rle(s) if isinstance(s, dict) else None for s in segmentations],
        polygons=[[] if isinstance(s, dict) else s for s in segmentations],
        crowds=[bool(entry["iscrowd"]) for entry in entries],
        long_side=long_side,
        seen_at=seen_at,
    )


def _rle(segmentation: dict[str, Any]) -> Any:
    packed: Any = segmentation
    if isinstance(segmentation["counts"], list):
        packed = coco_mask.frPyObjects(packed, *segmentation["size"])
    return packed
