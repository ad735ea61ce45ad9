"""LabelMe and YOLO segmentation: areas and boxes as pycocotools has them of the same outlines."""

import json
import math

import pytest
from pycocotools import mask as coco_mask

from casc.data.index import read_index
from casc.data.sample import iter_tar
from casc.errors import UserError
from data_tools.plan import Settings
from data_tools.shard import shard_dataset

WIDTH, HEIGHT = 60, 50
RING = [10.0, 5.0, 30.5, 6.0, 25.0, 40.0, 8.0, 30.0]


def shard(root, out, quiet_run):
    index = shard_dataset(root, out, None, Settings(), quiet_run())
    found = {}
    for name, split in index.splits.items():
        for each in split.shards:
            for _, image, text in iter_tar(out / each.name):
                record = json.loads(text)
                found[name, record["file_name"]] = image, record["annotations"]
    return read_index(out), found


def area(*rings) -> int:
    rles = coco_mask.frPyObjects([list(ring) for ring in rings], HEIGHT, WIDTH)
    return int(coco_mask.area(coco_mask.merge(rles)))


def bounds(*rings) -> list[float]:
    xs = [x for ring in rings for x in ring[0::2]]
    ys = [y for ring in rings for y in ring[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def pairs(ring) -> list[list[float]]:
    return [list(pair) for pair in zip(ring[0::2], ring[1::2], strict=True)]


def labelme(root, name, shapes, make_picture, path=None):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.jpg").write_bytes(make_picture(WIDTH, HEIGHT, seed=len(name)))
    about = {"version": "5.4", "imagePath": path or f"{name}.jpg", "imageData": None,
             "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": shapes}  # fmt: skip
    (root / f"{name}.json").write_text(json.dumps(about))


def shape(label, ring, kind="polygon", group=None):
    return {"label": label, "points": pairs(ring), "shape_type": kind, "group_id": group}


def test_labelme(tmp_path, make_picture, quiet_run):
    root, second = tmp_path / "set", [40.0, 10.0, 50.0, 10.0, 50.0, 20.0]
    shapes = [
        shape("dog", RING, group=4), shape("dog", second, group=4),
        shape("cat", [5, 5, 25, 20], "rectangle"),
        shape("cat", [30, 25, 30, 35], "circle"),
        shape("nose", [3, 3], "point"),
    ]  # fmt: skip
    labelme(root, "a", shapes, make_picture)
    labelme(root, "bb", [shape("dog", second)], make_picture, path="..\\elsewhere\\bb.jpg")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat", "dog", "nose"]
    image, entries = found["train", "a.jpg"]
    assert image == (root / "a.jpg").read_bytes()
    by_class = {(e["label"], e["bbox"][0]): e for e in entries}
    dog = by_class[1, 8.0]
    assert (dog["area"], dog["bbox"]) == (area(RING, second), bounds(RING, second))
    assert by_class[0, 5.0]["bbox"] == [5, 5, 20, 15]
    assert by_class[0, 5.0]["area"] == 300
    disc = by_class[0, 20.0]
    assert disc["bbox"] == pytest.approx([20, 15, 20, 20])
    assert disc["area"] == pytest.approx(math.pi * 100, rel=0.03)
    assert len(found["train", "bb.jpg"][1]) == 1
    report = index.splits["train"].report
    assert report["findings"]["other_shape"]["count"] == 1
    assert report["images"]["unlisted_files"] == 0


def test_labelme_in_parts_shares_its_classes(tmp_path, make_picture, quiet_run):
    labelme(tmp_path / "set/train", "a", [shape("dog", RING)], make_picture)
    labelme(tmp_path / "set/val", "b", [shape("cat", RING)], make_picture)
    index, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat", "dog"]
    assert {key: entries[0]["label"] for key, (_, entries) in found.items()} == {
        ("train", "a.jpg"): 1, ("val", "b.jpg"): 0,
    }  # fmt: skip


def yolo(root, make_picture, lines, yaml=None):
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        (root / "images" / part / "a.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
        (root / "labels" / part / "a.txt").write_text("\n".join(lines) + "\n")
    (root / "images/train/empty.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
    (root / "data.yaml").write_text(
        yaml or "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"
    )


def spelt(ring) -> str:
    return " ".join(str(v / (HEIGHT if i % 2 else WIDTH)) for i, v in enumerate(ring))


def test_yolo_segmentation(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    yolo(root, make_picture, [f"1 {spelt(RING)}", "", "0 0.5 0.5 0.5 0.2"])
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [(c.id, c.name) for c in index.categories] == [(0, "cat"), (1, "dog")]
    for part in ("train", "val"):
        ring, box = found[part, "a.jpg"][1]
        assert ring["label"] == 1
        assert ring["bbox"] == pytest.approx(bounds(RING))
        assert ring["area"] == pytest.approx(area(RING), abs=2)
        assert box["bbox"] == pytest.approx([15, 20, 30, 10])
        assert not box["train"]
    assert found["train", "empty.jpg"][1] == []


@pytest.mark.parametrize(
    ("line", "named"),
    [("7 0.1 0.1 0.2 0.1 0.2 0.2", "class 7"), ("0 0.1 0.1 0.2 0.1 0.2", "5 numbers"),
     ("cat 0.1", "expected a class")],
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path, make_picture, quiet_run, line, named):
    root = tmp_path / "set"
    yolo(root, make_picture, ["0 0.5 0.5 0.5 0.2", line])
    with pytest.raises(UserError, match=rf"a\.txt: line 2: .*{named}"):
        shard(root, tmp_path / "out", quiet_run)
