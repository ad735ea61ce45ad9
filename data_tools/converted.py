"""A split of LabelMe, YOLO or Pascal VOC, and what it is in COCO's format."""

from pathlib import Path
from typing import Any, NamedTuple

from pycocotools import mask as coco_mask

from data_tools.voc_files import VocSplit

SPLITS = ("train", "val", "valid", "validation", "test")
"""What folders of splits are called."""


class Foreign(NamedTuple):
    """A split that isn't in COCO's format."""

    split: str
    source: Path
    """LabelMe and VOC: the folder of JSON or XML files. YOLO: data.yaml, or a list of classes."""
    images: Path
    voc: VocSplit | None = None
    files: tuple[Path, ...] = ()
    """YOLO: the images, all below `images`."""
    fault: str = ""
    """Why it can't be read, where others of the data set may be."""


class Converted(NamedTuple):
    """What a split is in COCO's format."""

    data: dict[str, Any]
    digest: str
    """SHA-256 of all that was read."""
    other_shapes: list[tuple[int, str]]
    """Ids and kinds of what is no area: points and lines. These aren't in `data`."""
    broken: list[tuple[int, str]]
    """Of images whose own files are empty or broken off, an id and why. These aren't in `data`."""


def annotation(
    number: int,
    image_id: int,
    category: int,
    rings: list[list[float]] | dict[str, Any],
    box: list[float] | None = None,
) -> dict[str, Any]:
    """An object; its box is that of its rings, or of an RLE, unless one is given."""
    if isinstance(rings, dict):
        rle: Any = rings
        box = coco_mask.toBbox(rle).tolist()
    elif box is None:
        xs = [x for ring in rings for x in ring[0::2]]
        ys = [y for ring in rings for y in ring[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)] if xs else [0, 0, 0, 0]
    return {
        "id": number, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0,
        "segmentation": rings,
    }  # fmt: skip


def coco(images: list[Any], annotations: list[Any], categories: list[Any]) -> dict[str, Any]:
    """All that a file of COCO's holds."""
    return {"images": images, "annotations": annotations, "categories": categories}


def exists(path: Path) -> bool:
    """Whether there is such a file, also of names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
