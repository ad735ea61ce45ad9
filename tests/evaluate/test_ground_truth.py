import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casc.data.index import Category, Index
from casc.errors import UserError
from casc.evaluate.ground_truth import (
    ground_truth_from_samples,
    ground_truth_from_shards,
    read_coco,
)
from casc.evaluate.metrics import evaluate


def test_samples_give_their_annotations_back_verbatim():
    crowd = {
        "id": 4,
        "category_id": 7,
        "bbox": [1, 2, 3.5, 4],
        "area": 9.25,
        "iscrowd": 1,
        "segmentation": {"size": [48, 64], "counts": [3072]},
    }
    ours = {"label": 0, "train": False, "box": [1, 2, 4.5, 6], "rings": [], "mask_iou": 0.99}
    sample: Any = {
        "image_id": 11,
        "file_name": "x.jpg",
        "width": 64,
        "height": 48,
        "orientation": 1,
        "train": False,
        "annotations": [{**crowd, **ours}],
    }
    truth = ground_truth_from_samples([sample], [Category(7, "cat")])
    assert truth == {
        "images": [{"id": 11, "file_name": "x.jpg", "width": 64, "height": 48}],
        "annotations": [{"image_id": 11, **crowd}],
        "categories": [{"id": 7, "name": "cat"}],
    }


def test_shards_give_a_data_set_with_every_image(
    tmp_path: Path, write_shards: Callable[..., Index]
):
    index = write_shards(tmp_path, {"val": [(0, 3, True), (1, 2, False)]})
    truth = ground_truth_from_shards(tmp_path, index, "val")
    assert [image["id"] for image in truth["images"]] == [1, 2, 3, 4, 5]
    assert truth["images"][4] == {
        "id": 5,
        "file_name": "000000000005.png",
        "width": 48,
        "height": 64,
    }
    evaluation = evaluate(truth, [])
    assert evaluation.instances == len(truth["annotations"]) > 0
    with pytest.raises(UserError, match="no split 'train'; there is val"):
        ground_truth_from_shards(tmp_path, index, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "images: expected a list"),
        ({"images": [{"id": 1, "width": 4}]}, r"images\[0\]\.height: expected int"),
        ({"annotations": [3]}, r"annotations\[0\]: expected an object"),
        ({"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\]\.id"),
    ],
)
def test_files_that_arent_coco_are_refused(tmp_path: Path, change: dict, message: str):
    file = tmp_path / "a.json"
    good = {"images": [], "annotations": [], "categories": []}
    file.write_text(json.dumps(good))
    assert read_coco(file) == good
    file.write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read_coco(file)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"a\.json"):
        read_coco(file)
