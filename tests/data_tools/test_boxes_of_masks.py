"""Boxes that aren't their mask's are told; a file of corners is read as such; copies are scaled."""

import json
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from casc.data.index import read_index
from casc.data.sample import iter_tar
from data_tools.boxes import box_iou
from data_tools.report import parse_ids


def stored(out) -> dict[int, dict]:
    found = {}
    for shard in read_index(out).splits["train"].shards:
        for _, _, text in iter_tar(out / shard.name):
            found.update({entry["id"]: entry for entry in json.loads(text)["annotations"]})
    return found


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def ids(index, kind) -> list[int]:
    found = index.splits["train"].report["findings"].get(kind)
    return parse_ids(found["ids"]) if found else []


def fill(coco, boxes, convert=lambda box: list(box)) -> list[int]:
    number = coco.image()
    return [
        coco.object(number, bbox=convert(box), segmentation=rectangle(*box), area=box[2] * box[3])
        for box in boxes
    ]


BOXES = [(4, 5, 12, 9), (20, 10, 25, 30), (30, 3, 8, 40), (10, 20, 14, 11)]


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def test_a_file_of_corners_is_read_as_such(coco):
    numbers = fill(coco, BOXES, corners)
    bare = coco.object(coco.images[0]["id"], bbox=[1, 2, 11, 22], drop=("segmentation",))
    index, out = coco.shard()
    assert ids(index, "corners") == [*numbers, bare]
    assert ids(index, "box_not_mask") == []
    # pycocotools' own boxes of the masks.
    truth = COCO(str(coco.file))
    from pycocotools import mask

    for number in numbers:
        listed: Any = truth.loadAnns([number])[0]
        expected = mask.toBbox(truth.annToRLE(listed))
        assert stored(out)[number]["bbox"] == pytest.approx(expected)
    assert stored(out)[bare]["bbox"] == [1, 2, 10, 20]


@pytest.mark.parametrize("odd", [1, 2])
def test_a_few_boxes_of_corners_are_only_told(coco, odd):
    numbers = fill(coco, BOXES)
    wrong = fill(coco, BOXES[:odd], corners)
    index, out = coco.shard()
    assert ids(index, "corners") == []
    entries = {entry["id"]: entry for entry in coco.annotations}
    expected = [i for i in wrong if box_iou(entries[i]["bbox"], BOXES[wrong.index(i)]) < 0.5]
    assert ids(index, "box_not_mask") == expected
    assert {i: stored(out)[i]["bbox"] for i in numbers} == {
        i: list(box) for i, box in zip(numbers, BOXES, strict=True)
    }


def test_what_a_wrong_box_would_fit_as_is_said(coco):
    fill(coco, BOXES)
    (low,) = fill(coco, BOXES[:1], lambda box: [box[0], 50 - box[1] - box[3], box[2], box[3]])
    index, _ = coco.shard()
    about = index.splits["train"].report["findings"]["box_not_mask"]
    assert about["ids"] == str(low)
    assert "y from the bottom" in about["examples"][0]


def test_annotations_of_a_larger_original_are_scaled(coco, make_picture):
    number = coco.image(120, 100, data=make_picture(60, 50))
    box = (20, 10, 60, 40)
    mine = coco.object(number, bbox=list(box), segmentation=rectangle(*box), area=2400)
    index, out = coco.shard()
    assert ids(index, "rescaled") == [number]
    entry = stored(out)[mine]
    assert entry["train"]
    assert entry["bbox"] == [10, 5, 30, 20]
    assert entry["area"] == 600
    np.testing.assert_allclose(entry["segmentation"], rectangle(10, 5, 30, 20))


def test_an_image_of_another_shape_is_no_ground_truth(coco, make_picture):
    coco.object(coco.image())
    number = coco.image(60, 50, data=make_picture(50, 60))
    lost = coco.object(number)
    index, out = coco.shard()
    assert ids(index, "size_mismatch") == [number]
    assert ids(index, "image_left_out") == [lost]
    assert lost not in stored(out)
    assert index.splits["train"].samples == 1
