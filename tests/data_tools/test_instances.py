import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from casc.data.sample import annotation_edges
from casc.data.segmentation import part_fault, polygon_areas
from data_tools.instances import Frame, Made, make_record, make_records
from data_tools.rings import fill_rings

FRAME = Frame(60, 50, 60, 50)
LABELS = {3: 0, 8: 1}


def annotation(**fields: Any) -> dict[str, Any]:
    return {
        "id": 5,
        "image_id": 1,
        "category_id": 8,
        "bbox": [10, 10, 20, 10],
        "area": 200,
        "iscrowd": 0,
        "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
        **fields,
    }


def kinds(record: Made) -> list[str]:
    assert all(finding.id == 5 for finding in record.findings)
    # Boxes are made up here; that they aren't their masks' is for test_boxes.
    return [finding.kind for finding in record.findings if finding.kind != "box_not_mask"]


def test_a_sound_annotation_stays_as_it_is():
    given = annotation()
    record = make_record(given, FRAME, LABELS)
    assert kinds(record) == []
    for key in ("id", "category_id", "bbox", "area", "iscrowd", "segmentation"):
        assert record.entry[key] == given[key]
    assert record.entry["label"] == 1
    assert record.entry["train"] is True
    assert record.entry["box"] == [10, 10, 30, 20]
    assert "rings" not in record.entry


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"iscrowd": 1}, "crowd"),
        ({"ignore": 1}, "ignore"),
        ({"category_id": 4}, "unknown_category"),
        ({"area": 0}, "degenerate_box"),
        ({"area": -3.0}, "degenerate_box"),
        ({"bbox": [10, 10, 0.9, 5]}, "degenerate_box"),
        ({"bbox": [10, 10, 5, -1]}, "degenerate_box"),
        ({"bbox": [60, 10, 5, 5]}, "outside_image"),
        ({"bbox": [10, -9, 5, 9]}, "outside_image"),
        ({"segmentation": None}, "no_mask"),
        ({"segmentation": []}, "no_mask"),
    ],
)
def test_the_reference_does_not_train_on(fields: dict[str, Any], found: str):
    record = make_record(annotation(**fields), FRAME, LABELS)
    assert kinds(record) == [found]
    assert record.entry["train"] is False
    assert record.entry["bbox"] == fields.get("bbox", [10, 10, 20, 10])


def test_least_box_is_one_pixel():
    record = make_record(annotation(bbox=[10, 10, 1, 1]), FRAME, LABELS)
    assert record.entry["train"] is True


@pytest.mark.parametrize("box", [[-0.6, 5, 9, 9], [5, 45, 5, 5.6], [55, 5, 6, 5]])
def test_boxes_that_reach_out_are_kept_and_reported(box: list[float]):
    record = make_record(annotation(bbox=box), FRAME, LABELS)
    assert kinds(record) == ["out_of_bounds"]
    assert record.entry["train"] is True
    x, y, w, h = box
    assert record.entry["box"] == [x, y, x + w, y + h]


NAN = float("nan")
GOOD = [10, 10, 30, 10, 30, 20, 10, 20]


@pytest.mark.parametrize(
    "part",
    [
        [],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, NAN, 4, 5, 6],
        [1, 2, 3, float("-inf"), 5, 6],
        [1, 2, 3, 10**400, 5, 6],
        [1, 2, 3, 4, 5, 101],
        [-61, 2, 3, 4, 5, 6],
    ],
)
def test_parts_that_are_no_polygons_are_left_out(part: list[float]):
    record = make_record(annotation(segmentation=[part, GOOD]), FRAME, LABELS)
    assert kinds(record) == ["bad_polygon_part"]
    assert record.entry["segmentation"] == [GOOD]
    assert record.entry["train"] is True
    record = make_record(annotation(segmentation=[part]), FRAME, LABELS)
    assert kinds(record) == ["bad_polygon_part", "no_mask"]
    assert record.entry["train"] is False
    assert coco_area(record.entry["segmentation"], 50, 60) == 0


def coco_area(segmentation: Any, height: int, width: int) -> int:
    """What pycocotools makes of a segmentation."""
    rle = coco_mask.frPyObjects(segmentation, height, width)
    return int(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))


def test_parts_are_reported():
    record = make_record(annotation(segmentation=[GOOD, [1, 1, 5, 1, 5, 5]]), FRAME, LABELS)
    assert kinds(record) == ["multi_part"]
    assert len(annotation_edges(record.entry)) == 7


def test_missing_areas_are_measured():
    both = [GOOD, [1, 1, 5, 1, 5, 5]]
    record = make_record(annotation(segmentation=both, area=None), FRAME, LABELS)
    assert record.entry["area"] == coco_area(both, 50, 60)
    record = make_record(annotation(segmentation=None, area=None), FRAME, LABELS)
    assert record.entry["area"] == 200
    rle = {"size": [50, 60], "counts": [100, 70, 2830]}
    assert make_record(annotation(segmentation=rle, area=None), FRAME, LABELS).entry["area"] == 70


random_masks = arrays(bool, (9, 7))


@given(mask=random_masks, compressed=st.booleans())
def test_rles_are_traced_exactly(mask: np.ndarray, compressed: bool):
    packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts: Any = packed["counts"].decode()
    if not compressed:
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    rle = {"size": [9, 7], "counts": counts}
    record = make_record(annotation(bbox=[0, 0, 7, 9], segmentation=rle), Frame(7, 9, 7, 9), LABELS)
    assert record.entry["segmentation"] == rle
    if not mask.any():
        assert kinds(record) == ["no_mask"]
        return
    assert kinds(record) == ["rle_mask"]
    assert record.entry["train"] is True
    assert record.entry.get("mask_iou") == 1
    traced = record.entry.get("rings") or []
    rings = [np.reshape(ring, (-1, 2)).astype(float) for ring in traced]
    np.testing.assert_array_equal(fill_rings(rings, 9, 7), mask)
    # The edges that training sees wind round the mask and not round its holes.
    x0, y0, _, y1 = annotation_edges(record.entry).T
    y, x = np.mgrid[:9, :7] + 0.5
    crossed = ((y0 <= y[..., None]) != (y1 <= y[..., None])) & (x0 < x[..., None])
    np.testing.assert_array_equal((crossed * np.sign(y0 - y1)).sum(-1), mask)


def test_what_is_not_trained_on_is_not_traced():
    packed: Any = coco_mask.encode(np.asfortranarray(np.ones((50, 60), np.uint8)))
    rle = {"size": [50, 60], "counts": packed["counts"].decode()}
    for name, iscrowd in (("objects", 0), ("crowds", 1)):
        record = make_record(annotation(segmentation=rle, iscrowd=iscrowd), FRAME, LABELS)
        assert record.entry["segmentation"] == rle, name
        assert ("rings" in record.entry, "rle_mask" in kinds(record)) == (not iscrowd,) * 2


@pytest.mark.parametrize(
    ("rle", "why"),
    [
        ({"size": [60, 50], "counts": [3000]}, "size [60, 50]"),
        ({"size": [50, 60], "counts": [10, 20]}, "counts sum to 30, not 3000"),
        ({"size": [50, 60], "counts": [3010, -10]}, "negative"),
        ({"size": [50, 60], "counts": [3000, 2**62]}, "counts sum to"),
        ({"size": [50, 60], "counts": []}, "counts sum to 0"),
        ({"size": [50, 60], "counts": ""}, "counts sum to 0"),
        ({"size": [50, 60], "counts": "\u00ff\u00ff"}, "isn't a character"),
        ({"size": [50, 60], "counts": "abc"}, "ends inside a count"),
        ({"size": [50, 60], "counts": "o"}, "ends inside a count"),
        ({"size": [50, 60], "counts": "o" * 20}, "a count is too long"),
    ],
)
def test_rles_that_do_not_fit_are_emptied_and_reported(rle: dict[str, Any], why: str):
    record = make_record(annotation(segmentation=rle), FRAME, LABELS)
    assert kinds(record) == ["bad_rle", "no_mask"]
    assert why in record.findings[0].detail
    assert record.entry["train"] is False
    assert coco_area(record.entry["segmentation"], 50, 60) == 0


@given(st.text(max_size=12))
def test_any_text_as_an_rle_is_decoded_or_reported(counts: str):
    rle = {"size": [3, 2], "counts": counts}
    record = make_record(annotation(segmentation=rle), Frame(2, 3, 2, 3), LABELS)
    assert kinds(record)[0] in ("bad_rle", "rle_mask")


def test_annotations_follow_a_reduced_image():
    frame = Frame(60, 50, 30, 25)
    record = make_record(annotation(), frame, LABELS)
    assert record.entry["bbox"] == [5, 5, 10, 5]
    assert record.entry["box"] == [5, 5, 15, 10]
    assert record.entry["area"] == 50
    assert record.entry["segmentation"] == [[5, 5, 15, 5, 15, 10, 5, 10]]

    mask = np.zeros((50, 60), np.uint8)
    mask[10:20, 10:30] = 1
    packed: Any = coco_mask.encode(np.asfortranarray(mask))
    rle = {"size": [50, 60], "counts": packed["counts"].decode()}
    record = make_record(annotation(segmentation=rle), frame, LABELS)
    assert record.entry["segmentation"]["size"] == [25, 30]
    small = coco_mask.decode(record.entry["segmentation"])
    np.testing.assert_array_equal(small, mask[::2, ::2])
    # A degenerate box is judged by what training would see.
    record = make_record(annotation(bbox=[10, 10, 1.5, 20]), frame, LABELS)
    assert "degenerate_box" in kinds(record)


def test_a_tolerance_saves_edges():
    y, x = np.mgrid[:50, :60]
    mask = (np.hypot(x - 30, y - 25) < 20).astype(np.uint8)
    packed: Any = coco_mask.encode(np.asfortranarray(mask))
    rle = {"size": [50, 60], "counts": packed["counts"].decode()}
    exact = make_record(annotation(segmentation=rle), FRAME, LABELS)
    rough = make_record(annotation(segmentation=rle), FRAME, LABELS, tolerance=0.5)
    assert len(annotation_edges(rough.entry)) < len(annotation_edges(exact.entry)) / 2
    iou = rough.entry.get("mask_iou")
    assert iou is not None
    assert 0.95 < iou < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), 121, -61])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_coordinate_that_is_nowhere_is_found_at_any_place(value, place):
    """In an image of 60 x 60; up to its own length outside is near enough."""
    part: list[float] = [1.5, 2, 120, -60, 7, 120]
    assert part_fault(part, 60, 60) == ""
    part[place] = value
    assert "NaN, infinite or far outside" in part_fault(part, 60, 60)


def test_areas_of_more_objects_than_a_byte_counts():
    rng = np.random.default_rng(0)
    objects = [rng.uniform(0, 60, (1 + i % 3, 8)).tolist() for i in range(600)]
    alone = [coco_mask.merge(coco_mask.frPyObjects(parts, 60, 60)) for parts in objects]
    assert polygon_areas(objects, 60, 60) == [int(coco_mask.decode(rle).sum()) for rle in alone]


def test_images_together_are_what_each_is_alone():
    rng = np.random.default_rng(3)
    images = []
    for _ in range(30):
        width, height = rng.integers(32, 90, 2).tolist()
        frame = Frame(width, height, *((width, height) if rng.random() < 0.7 else (50, 40)))
        annotations = []
        for number in range(int(rng.integers(0, 5))):
            parts = [
                (rng.uniform(-0.2, 1.2, (int(rng.integers(2, 9)), 2)) * (width, height)).round(2)
                for _ in range(int(rng.integers(0, 4)))
            ]
            annotations.append(
                {
                    "id": number, "category_id": 1, "bbox": [1, 2, 30, 20], "area": None,
                    "iscrowd": 0, "segmentation": [part.reshape(-1).tolist() for part in parts],
                }
            )  # fmt: skip
        images.append((annotations, frame))
    together = make_records(images, {1: 0})
    alone = [
        [make_records([([one], frame)], {1: 0})[0][0] for one in annotations]
        for annotations, frame in images
    ]
    assert together == alone
    for (annotations, frame), made in zip(images, together, strict=True):
        for annotation, each in zip(annotations, made, strict=True):
            usable = [part for part in annotation["segmentation"] if len(part) >= 6]
            if usable:
                rle: Any = coco_mask.frPyObjects(usable, frame.height, frame.width)
                scale = frame.stored_width / frame.width * frame.stored_height / frame.height
                true = int(coco_mask.area(coco_mask.merge(rle)))
                assert each.entry["area"] == pytest.approx(true * scale)
