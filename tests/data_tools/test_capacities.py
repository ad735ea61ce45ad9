"""Images that make every batch of their bucket large are named; ragged outlines get fewer edges."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.sample import annotation_edges
from data_tools.instances import Frame, make_record


def findings(index) -> dict[str, Any]:
    return index.splits["train"].report["findings"]


def test_an_image_of_many_objects_is_named(coco):
    ids = [coco.image() for _ in range(5)]
    for number in ids:
        for _ in range(250 if number == ids[2] else 2):
            coco.object(number)
    index, _ = coco.shard()
    found = findings(index)["many_objects"]
    assert found["ids"] == str(ids[2])
    assert "250 objects; 99 % of images: up to 2" in found["examples"][0]
    (bucket,) = index.splits["train"].buckets
    assert (bucket.instances, bucket.edges) == (250, 1000)


def test_a_huge_image_among_small_ones_is_named(coco, make_picture):
    ids = [coco.image() for _ in range(3)]
    huge = coco.image(1920, 1600, data=make_picture(1920, 1600))
    for number in (*ids, huge):
        coco.object(number)
    index, _ = coco.shard()
    found = findings(index)["large_image"]
    assert found["ids"] == str(huge)
    assert "3,072,000 pixels; 99 % of images: up to 3,000" in found["examples"][0]
    assert "--max-size 60 " in found["examples"][0]
    smaller, _ = coco.shard(max_size=60)
    assert "large_image" not in findings(smaller)


def test_a_huge_image_alone_in_its_bucket_is_named_too(coco, make_picture):
    for number in [coco.image() for _ in range(3)]:
        coco.object(number)
    panorama = coco.image(4000, 800, data=make_picture(4000, 800))
    for _ in range(201):
        coco.object(panorama)
    index, _ = coco.shard()
    assert findings(index)["large_image"]["ids"] == str(panorama)
    assert findings(index)["many_objects"]["ids"] == str(panorama)


def test_an_even_bucket_names_nothing(coco):
    for _ in range(3):
        number = coco.image()
        for _ in range(250):
            coco.object(number)
    index, _ = coco.shard()
    assert not {"many_objects", "many_edges", "large_image"} & set(findings(index))


def wound(edges: np.ndarray, height: int, width: int) -> np.ndarray:
    """Brute force: pixels whose centre the edges wind round."""
    x0, y0, x1, y1 = (v[:, None] for v in edges.astype(np.float64).T)
    rows = []
    for y in np.arange(height) + 0.5:
        way = ((y0 <= y) & (y1 > y)).astype(int) - ((y0 > y) & (y1 <= y)).astype(int)
        x = x0 + (y - y0) * (x1 - x0) / np.where(y1 == y0, 1, y1 - y0)
        rows.append((way * (x > np.arange(width) + 0.5)).sum(axis=0) != 0)
    return np.array(rows)


def test_a_ragged_outline_gets_fewer_edges_within_the_iou():
    height, width = 300, 400
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    disc = np.hypot(x - 200, y - 150) < 130 + 2 * np.sin(np.arctan2(y - 150, x - 200) * 60)
    mask = disc | (rng.random((height, width)) < 0.0005)
    rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    entry = {
        "id": 5, "category_id": 1, "bbox": [0, 0, width, height], "area": None, "iscrowd": 0,
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
    }  # fmt: skip
    frame = Frame(width, height, width, height)
    made = make_record(entry, frame, {1: 0})
    exact = make_record(entry, frame, {1: 0}, tolerance=0)
    assert [f.kind for f in made.findings] == ["simplified", "rle_mask"][::-1]
    edges, all_edges = annotation_edges(made.entry), annotation_edges(exact.entry)
    assert len(edges) < len(all_edges) / 3
    filled = wound(edges, height, width)
    assert (filled & mask).sum() / (filled | mask).sum() > 0.985
    entry_iou: Any = made.entry.get("mask_iou")
    assert entry_iou >= 0.99
    # What counts in evaluation stays as it was given, and what is asked for exactly is exact.
    assert made.entry["segmentation"] == entry["segmentation"]
    assert np.array_equal(wound(all_edges, height, width), mask)
