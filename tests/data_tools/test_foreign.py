"""LabelMe and YOLO segmentation: areas and boxes as pycocotools has them of the same outlines."""

import base64
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.index import read_index
from casc.data.sample import iter_tar
from casc.errors import UserError
from data_tools.cli import main
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", ["labelme", "yolo", "obj"])
def test_texts_as_windows_writes_them(kind, encoding, tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    if kind == "labelme":
        labelme(root, "a", [shape("Kätzchen", RING)], make_picture)
        (root / "a.json").rename(root / "a.JSON")
        texts = [root / "a.JSON"]
    else:
        files = {"labels/a.TXT": f"0 {spelt(RING)}\n", "labels/classes.txt": "Kätzchen\n"}
        if kind == "obj":
            files |= {"obj.data": "train = list.txt\nnames = labels/classes.txt\n"}
            files |= {"list.txt": "images/a.jpg\n"}
        else:
            files |= {"data.yaml": "train: images\nnames: [Kätzchen]\n"}
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        (root / "images").mkdir()
        (root / "images/a.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
        texts = [root / name for name in files]
    for file in texts:
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["Kätzchen"]
    [[_, [entry]]] = found.values()
    assert entry["area"] == area(RING)
    assert index.splits["train"].report["images"]["unlisted_files"] == 0


@pytest.mark.parametrize("name", ["a.json", "labels/train/a.txt", "data.yaml"])
def test_texts_of_other_encodings_are_named(name, tmp_path, make_picture, quiet_run):
    if name == "a.json":
        labelme(tmp_path / "set", "a", [shape("cat", RING)], make_picture)
    else:
        yolo(tmp_path / "set", make_picture, [f"0 {spelt(RING)}"])
    file = tmp_path / "set" / name
    file.write_bytes(file.read_bytes().replace(b"cat", "猫".encode("gbk") + b"\xff") + b"# \xff")
    with pytest.raises(UserError, match=rf"{name}: isn't in UTF-8 .*save it as that"):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


def test_leaving_out_what_is_invalid_is_cocos(tmp_path, make_picture, quiet_run):
    root, out = tmp_path / "set", tmp_path / "out"
    labelme(root, "a", [shape("dog", RING)], make_picture)
    with pytest.raises(UserError, match=r"--skip-invalid: .* COCO's files only, .*set is none"):
        shard_dataset(root, out, None, Settings(skip_invalid=True), quiet_run())
    assert shard(root, out, quiet_run)[0].splits["train"].samples == 1


def test_labelme_in_parts_shares_its_classes(tmp_path, make_picture, quiet_run):
    labelme(tmp_path / "set/train", "a", [shape("dog", RING)], make_picture)
    labelme(tmp_path / "set/val", "b", [shape("cat", RING)], make_picture)
    index, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat", "dog"]
    assert {key: entries[0]["label"] for key, (_, entries) in found.items()} == {
        ("train", "a.jpg"): 1, ("val", "b.jpg"): 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folders", "images"),
    [
        ("Train Valid", None),
        ("deep/train deep/val", None),
        ("json/train json/val", "images/{}"),
        ("train/json validation/json", None),
        ("TRAIN/json Val/json", "{}/images"),
    ],
)
def test_labelmes_splits_are_told_by_any_folder(folders, images, tmp_path, make_picture, quiet_run):
    """They made one split, in which validation was trained on."""
    root = tmp_path / "set"
    for folder, name in zip(folders.split(), ("a", "bb"), strict=True):
        labelme(root / folder, name, [shape("cat", RING)], make_picture)
        if images:
            to = root / images.format(folder.split("/")["json" in folder.split("/")[0]])
            to.mkdir(parents=True)
            (root / folder / f"{name}.jpg").rename(to / f"{name}.jpg")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert {(split, Path(file).name) for split, file in found} == {
        ("train", "a.jpg"), ("val", "bb.jpg"),
    }  # fmt: skip
    assert all(len(entries) == 1 for _, entries in found.values())
    assert all(split.report["images"]["unlisted_files"] == 0 for split in index.splits.values())


def test_labelmes_folders_of_one_split_are_named(tmp_path, make_picture, quiet_run):
    for place in ("1/train", "2/train", "2/val"):
        labelme(tmp_path / "set" / place, "a", [shape("cat", RING)], make_picture)
    with pytest.raises(UserError, match=r"1/train and .*2/train: are one split; put their files"):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


def test_what_lies_beside_labelmes_splits_is_left_out(tmp_path, make_picture, quiet_run):
    """It made one split of all, in which validation was trained on."""
    for place, name in (("train", "a"), ("val", "bb"), ("extra", "ccc"), (".", "dddd")):
        labelme(tmp_path / "set" / place, name, [shape("cat", RING)], make_picture)
    said = []
    working = quiet_run()._replace(say=said.append)
    index = shard_dataset(tmp_path / "set", tmp_path / "out", None, Settings(), working)
    assert {split: about.samples for split, about in index.splits.items()} == {"train": 1, "val": 1}
    [told] = [line for line in said if "left out" in line]
    assert "dddd.json and 1 more: in no folder that is called by a split" in told


def test_labelmes_relatives(tmp_path, make_picture, quiet_run):
    """X-AnyLabeling: rectangles of four corners, turned ones too; others: JSON apart from images,
    without a size or a path."""
    root = tmp_path / "set"
    turned = [30.0, 10.0, 45.0, 25.0, 30.0, 40.0, 15.0, 25.0]
    shapes = [
        shape("cat", [5, 5, 25, 5, 25, 20, 5, 20], "rectangle"),
        shape("dog", turned, "rotation"),
    ]
    for name, gone in (("a", ["imageWidth", "imageHeight"]), ("bb", ["imagePath"])):
        labelme(root / "json", name, shapes, make_picture)
        file = root / "json" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(gone)))
    (root / "pictures").mkdir()
    (root / "json/bb.jpg").rename(root / "pictures/bb.jpg")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert set(found) == {("train", "json/a.jpg"), ("train", "pictures/bb.jpg")}
    for _, entries in found.values():
        assert [e["bbox"] for e in entries] == [[5, 5, 20, 15], [15, 10, 30, 30]]
        assert [e["area"] for e in entries] == [300, area(turned)]
    assert "rescaled" not in index.splits["train"].report["findings"]
    (root / "json/a.jpg").rename(root / "pictures/a.jpg")
    with pytest.raises(UserError, match=r"a\.json: imageWidth .*missing.* or put the image there"):
        shard(root, tmp_path / "out", quiet_run)


def test_images_in_labelmes_files(tmp_path, make_picture, quiet_run):
    """Where there is no file of it, whatever imagePath says; a file goes first."""
    root, pictures = tmp_path / "set", {}
    for name, path in (("a", "a.jpg"), ("bb", "C:\\me\\bb.jpg"), ("ccc", "ccc.jpg")):
        labelme(root, name, [shape("cat", RING)], make_picture, path=path)
        file = root / f"{name}.json"
        pictures[name] = make_picture(WIDTH, HEIGHT, seed=40 + len(name))
        about = {"imageData": base64.b64encode(pictures[name]).decode()}
        about |= {"imageWidth": None, "imageHeight": None} if name == "bb" else {}
        file.write_text(json.dumps(json.loads(file.read_text()) | about))
        if name != "ccc":
            (root / f"{name}.jpg").unlink()
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert set(found) == {("train", name) for name in ("a.json", "bb.json", "ccc.jpg")}
    assert found["train", "a.json"][0] == pictures["a"]
    assert found["train", "bb.json"][0] == pictures["bb"]
    assert found["train", "ccc.jpg"][0] == (root / "ccc.jpg").read_bytes()
    assert all(entries[0]["train"] for _, entries in found.values())
    findings = index.splits["train"].report["findings"]
    assert set(findings) == {"embedded"}
    assert findings["embedded"]["count"] == 2
    about = json.loads((root / "a.json").read_text()) | {"imageData": "?"}
    (root / "a.json").write_text(json.dumps(about))
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert (
        "imageData: no image"
        in index.splits["train"].report["findings"]["unreadable"]["examples"][0]
    )


@pytest.mark.parametrize("label", [None, "", " ", ["cat"]])
def test_a_shape_without_a_label_is_named(tmp_path, make_picture, quiet_run, label):
    shapes = [shape("cat", RING), shape(label, RING)]
    labelme(tmp_path / "set", "a", shapes, make_picture)
    with pytest.raises(UserError, match=r"a\.json: shapes\[1\]\.label: expected a class's name"):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


@pytest.mark.parametrize("left", [b"", bytes(99), b'{"shapes": [], "imagePath": "\xc3', 60, -3])
def test_broken_files_of_labelme_are_left_out_with_their_images(
    left, tmp_path, make_picture, quiet_run, capsys
):
    root = tmp_path / "set"
    for name in ("a", "bb", "ccc"):
        labelme(root, name, [shape("cat", RING)], make_picture)
    file = root / "bb.json"
    file.write_bytes(left if isinstance(left, bytes) else file.read_bytes()[:left])
    (root / "notes.json").write_text("of no image")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert sorted(name for _, name in found) == ["a.jpg", "ccc.jpg"]
    report = index.splits["train"].report
    [told] = report["findings"]["broken_file"]["examples"]
    assert ": bb.json: not valid JSON (" in told
    images = report["images"]
    assert (images["listed"], images["left_out"], images["stored"]) == (3, 1, 2)
    # As of lost images, more than one in a hundred are too many.
    command = ["shard", str(root), "--out", str(tmp_path / "again"), "--workers", "1"]
    for more, status in (([], 1), (["--allow-missing"], 0)):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == status
        assert "1 of 3 images are lost, without a whole XML or JSON" in capsys.readouterr().err


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


def test_labelmes_masks(tmp_path, make_picture, quiet_run):
    """Of a part of the image, as its AI tools save them; the last reaches over the edge."""
    rng, shapes, true = np.random.default_rng(5), [], []
    for x, y in ((7, 9), (48, 41)):
        part = rng.random((12, 15)) < 0.6
        picture = io.BytesIO()
        Image.fromarray(part).save(picture, "PNG")
        corners = [x, y, x + 14, y + 11]
        data = base64.b64encode(picture.getvalue()).decode()
        shapes.append({**shape("dog", corners, "mask"), "mask": data})
        whole = np.zeros((HEIGHT + 20, WIDTH + 20), bool)
        whole[y : y + 12, x : x + 15] = part
        true.append(whole[:HEIGHT, :WIDTH])
    labelme(tmp_path / "set", "a", shapes, make_picture)
    _, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    for entry, mask in zip(found["train", "a.jpg"][1], true, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask)
        assert entry["area"] == mask.sum()
        assert entry["train"]
    labelme(tmp_path / "bad", "a", [{**shapes[0], "mask": "?"}], make_picture)
    with pytest.raises(UserError, match=r"a\.json: shapes\[0\]\.mask: not a picture"):
        shard(tmp_path / "bad", tmp_path / "no", quiet_run)


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


def test_yolo_of_other_spellings(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    yolo(root, make_picture, [f"\ufeff1.0 {spelt(RING)}"])
    (root / "data.yaml").rename(root / "coco8-seg.yml")
    text = (root / "coco8-seg.yml").read_text()
    head = text[: text.index("names:")]
    (root / "coco8-seg.yml").write_text(head + "names: {'0': cat, '1': dog}\n")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [(c.id, c.name) for c in index.categories] == [(0, "cat"), (1, "dog")]
    assert found["train", "a.jpg"][1][0]["label"] == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [("0 0.1 0.1 0.2 nan 0.2 0.2", "0 to 1, got nan; mend"),
     ("0 12 10 30 10 30 20.5", "0 to 1, got 12.0; mend"), ("0 320 240 64 64", "got 320"),
     ("7 0.1 0.1 0.2 0.1 0.2 0.2", "class 7 .*; name it, or"),
     ("0 0.1 0.1 0.2 0.1 0.2", "5 numbers; mend or remove"),
     ("cat 0.1", "expected a class's number .*; mend or remove the line"),
     ("0, 0.5, 0.5, 0.2, 0.2", "with spaces .*; write spaces in place of commas"),
     ("# of a cat, mine", "remove the comment"), ("0 0.5 0.5 0.2 0.2 # cat", "remove the comment")],
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path, make_picture, quiet_run, line, named):
    root = tmp_path / "set"
    yolo(root, make_picture, ["0 0.5 0.5 0.5 0.2", line])
    with pytest.raises(UserError, match=rf"a\.txt: line 2: .*{named}"):
        shard(root, tmp_path / "out", quiet_run)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0,0.5,0.5,0.2,0.2\n", "write spaces"),
        ("# mine\n0 0.5 0.5 0.2 0.2\n", "remove the comment"),
    ],
)
def test_lines_of_another_form_are_yolos_without_a_yaml_too(
    text, told, tmp_path, make_picture, quiet_run
):
    root = tmp_path / "set"
    boxed(root, "images/a.jpg", 3, make_picture)
    (root / "labels/a.txt").write_text(text)
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match=rf"labels/a\.txt: line 1: .*; {told}"):
        shard(root, tmp_path / "out", quiet_run)


def test_yolos_keypoints_are_no_outline(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    lines = ["0 0.5 0.5 0.5 0.2 0.4 0.4 2 0.6 0.6 2", f"1 {spelt(RING)}", "0 0.5 0.5 0.5 0.2"]
    yolo(root, make_picture, lines)
    with (root / "data.yaml").open("a") as stream:
        stream.write("kpt_shape: [2, 3]\n")
    _, found = shard(root, tmp_path / "out", quiet_run)
    entries = found["train", "a.jpg"][1]
    assert entries[0]["bbox"] == entries[2]["bbox"] == pytest.approx([15, 20, 30, 10])
    assert [e["train"] for e in entries] == [False, True, False]
    with (root / "data.yaml").open("a") as stream:
        stream.write("kpt_shape: 17\n")
    with pytest.raises(UserError, match=r"data\.yaml: kpt_shape: expected \[keypoints, numbers"):
        shard(root, tmp_path / "out", quiet_run)


def boxed(root, name, x, make_picture):
    """An image and, where Ultralytics looks, its label: a box whose left edge is at x pixels."""
    image = root / name
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(make_picture(WIDTH, HEIGHT, seed=x))
    head, found, tail = str(image).rpartition("/images/")
    label = (head + "/labels/" + tail if found else str(image)).rpartition(".")[0] + ".txt"
    Path(label).parent.mkdir(parents=True, exist_ok=True)
    Path(label).write_text(f"1 {(x + 5) / WIDTH} 0.5 {10 / WIDTH} 0.2\n")
    return image


def lefts(found, part) -> dict[str, int]:
    """Where each image's box begins: which label it got."""
    return {
        name: round(entries[0]["bbox"][0])
        for (split, name), (_, entries) in found.items()
        if split == part
    }


def test_yolo_lists_of_images(tmp_path, make_picture, quiet_run):
    root, data = tmp_path / "set", tmp_path / "set/data"
    for name, x in (("images/a.jpg", 3), ("images/b.png", 7), ("images/images/c.jpg", 11)):
        boxed(data, name, x, make_picture)
    boxed(data, "images/unlisted.jpg", 1, make_picture)
    far = boxed(data, "more/d.jpg", 20, make_picture)
    boxed(data, "lists/images/e.jpg", 30, make_picture)
    # Of Windows; relative to path:; absolute; relative to the list itself; twice.
    (data / "lists").mkdir(exist_ok=True)
    (data / "lists/train.txt").write_bytes(
        f"\ufeffimages\\a.jpg\r\n\r\nimages/images/c.jpg\r\n{far}\r\n./images/e.jpg\r\n"
        "images/a.jpg\r\n".encode()
    )
    (data / "val.txt").write_text("./images/b.png\n")
    (root / "data.yaml").write_text(
        "path: data\ntrain: lists/train.txt\nval: val.txt\nnames: [cat, dog]\n"
    )
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert lefts(found, "train") == {
        "images/a.jpg": 3, "images/images/c.jpg": 11, "more/d.jpg": 20, "lists/images/e.jpg": 30,
    }  # fmt: skip
    assert lefts(found, "val") == {"b.png": 7}
    report = index.splits["train"].report
    assert report["findings"]["duplicate_image"]["count"] == 1
    assert report["images"]["unlisted_files"] == 1


OBJ_DATA = "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"


@pytest.mark.parametrize(
    ("folder", "files", "splits"),
    [
        ("images", {"classes.txt": "cat\ndog\n", "notes.json": "{}"}, ("train",)),  # Label Studio
        ("images", {"labels/classes.txt": "cat\ndog"}, ("train",)),
        (".", {"classes.txt": "cat\ndog\n"}, ("train",)),  # LabelImg
        ("images/{}", {"classes.txt": "cat\ndog"}, ("train", "val")),
        ("{}/images", {"{}/classes.txt": "cat\ndog"}, ("train", "val")),
        ("{}", {"{}/_darknet.labels": "cat\ndog"}, ("train", "valid")),  # Roboflow
        ("obj_train_data", {"obj.data": OBJ_DATA, "obj.names": "cat\ndog\n"}, ("train",)),  # CVAT
    ],
)
def test_yolo_without_a_yaml(folder, files, splits, tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    for split in splits:
        for name, x in (("a", 3), ("b", 9)):
            boxed(root, f"{folder}/{split}-{name}.jpg".format(split), x, make_picture)
        for name, text in files.items():
            (root / name.format(split)).write_text(text)
        if "obj.data" in files:
            names = (f"data/{folder}/{split}-{name}.jpg\n" for name in "ab")
            (root / f"{split}.txt").write_text("".join(names))
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [(c.id, c.name) for c in index.categories] == [(0, "cat"), (1, "dog")]
    assert set(index.splits) == {"val" if split == "valid" else split for split in splits}
    for split, about in index.splits.items():
        assert sorted(lefts(found, split).values()) == [3, 9]
        assert about.report["images"]["unlisted_files"] == 0


@pytest.mark.parametrize(
    ("images", "labels"),
    [("Images", "Labels"), ("images", "Labels"), ("IMAGES", "labels"), ("Images", "Images")],
)
def test_yolos_folders_in_capitals(images, labels, tmp_path, make_picture, quiet_run):
    """And labels beside their images, wherever these are."""
    root = tmp_path / "set"
    for split, x in (("train", 3), ("val", 9)):
        boxed(root, f"images/{split}/a.jpg", x, make_picture)
    for folder, name in (("images", images), ("labels", labels)):
        (root / folder).rename(root / "moved")
        shutil.copytree(root / "moved", root / name, dirs_exist_ok=True)
        shutil.rmtree(root / "moved")
    (root / "classes.txt").write_text("cat\ndog\n")
    index, found = shard(root, tmp_path / "out", quiet_run)
    for split, x in (("train", 3), ("val", 9)):
        assert lefts(found, split) == {f"{images}/{split}/a.jpg": x}
        assert index.splits[split].report["images"]["unlisted_files"] == 0


def test_yolo_whose_classes_are_not_told(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    boxed(root, "images/a.jpg", 3, make_picture)
    with pytest.raises(
        UserError, match=r"labels of YOLO's, such as labels/a\.txt, .* write classes"
    ):
        shard(root, tmp_path / "out", quiet_run)
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(
        UserError, match=r"a\.txt: line 1: class 1 isn't among the 1 that are named"
    ):
        shard(root, tmp_path / "out", quiet_run)
    (root / "labels/classes.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt and labels/classes\.txt name other classes"):
        shard(root, tmp_path / "out", quiet_run)
    for captions in root.rglob("*.txt"):
        captions.write_text("a cat on a mat")
    with pytest.raises(UserError, match="no COCO annotation file with its images"):
        shard(root, tmp_path / "out", quiet_run)


def test_yolo_without_any_labels_is_refused(tmp_path, make_picture, quiet_run):
    """Where they lie elsewhere, all images would be background."""
    root = tmp_path / "set"
    yolo(root, make_picture, [f"1 {spelt(RING)}"])
    (root / "labels/val").rename(root / "val")
    assert shard(root, tmp_path / "out", quiet_run)[1]["val", "a.jpg"][1] == []
    (root / "labels/train").rename(root / "elsewhere")
    told = r"data\.yaml: none of the 2 images of train has labels; .*first's at .*train/a\.txt"
    with pytest.raises(UserError, match=told):
        shard(root, tmp_path / "out", quiet_run)


def test_labelmes_image_of_another_kind(tmp_path, make_picture, quiet_run):
    """The JSON file has its name still; sizes may be texts, or told as nonsense."""
    root = tmp_path / "set"
    labelme(root, "a", [shape("cat", RING)], make_picture, path="a.png")
    about = json.loads((root / "a.json").read_text())
    (root / "a.json").write_text(json.dumps(about | {"imageWidth": "60", "imageHeight": 50.0}))
    _, found = shard(root, tmp_path / "out", quiet_run)
    assert found["train", "a.jpg"][0] == (root / "a.jpg").read_bytes()
    (root / "a.json").write_text(json.dumps(about | {"imageWidth": "wide"}))
    with pytest.raises(UserError, match=r"a\.json: imageWidth: expected .*'wide'; remove it"):
        shard(root, tmp_path / "out", quiet_run)
    (root / "a.json").write_text(json.dumps({k: v for k, v in about.items() if k != "imageWidth"}))
    shard(root, tmp_path / "again", quiet_run)


def test_yolo_several_folders(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    boxed(root, "one/images/a.jpg", 3, make_picture)
    boxed(root, "two/images/deep/a.jpg", 9, make_picture)
    boxed(root, "three/images/b.jpg", 15, make_picture)
    (root / "val.txt").write_text("./three/images/b.jpg\n")
    (root / "data.yaml").write_text(
        "train:\n  - one/images\n  - ../two/images\n  - val.txt\nval: three/images\n"
        "names: [cat, dog]\n"
    )
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert lefts(found, "train") == {
        "one/images/a.jpg": 3, "two/images/deep/a.jpg": 9, "three/images/b.jpg": 15,
    }  # fmt: skip
    assert lefts(found, "val") == {"b.jpg": 15}
    assert index.splits["train"].report["images"]["unlisted_files"] == 0


@pytest.mark.parametrize(
    ("train", "listed", "named"),
    [
        ("none.txt", "", r"data\.yaml: train: 'none\.txt': no such folder or list"),
        ("[list.txt, [3]]", "", r"data\.yaml: train: expected a folder .* got \['3'\]"),
        ("list.txt", "\n", r"data\.yaml: train: there is no image in .*list\.txt"),
        ("list.txt", "a.jpg\nclip.mp4", r"list\.txt: line 2: expected an image's path"),
        ("list.txt", "\udcff", r"list\.txt: isn't in UTF-8 .*; save it as that"),
    ],
)
def test_a_yolo_list_that_cant_be_followed(tmp_path, quiet_run, train, listed, named):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/list.txt").write_text(listed, errors="surrogateescape")
    (tmp_path / "set/data.yaml").write_text(f"train: {train}\nnames: [cat]\n")
    with pytest.raises(UserError, match=named):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


@pytest.mark.parametrize("where", ["folder", "list"])
def test_yolo_paths_of_another_machine(tmp_path, make_picture, quiet_run, where):
    """By their last parts, of which those that tell train from val stay."""
    root = tmp_path / "set"
    # Whoever looked for a.jpg alone, or for images/, would find these.
    for name, x in (("train/images/a.jpg", 3), ("valid/images/a.jpg", 7), ("images/a.jpg", 20)):
        boxed(root, name, x, make_picture)
    train, val = "/content/my set/train/images", "D:\\set\\valid\\images"
    if where == "list":
        (root / "train.txt").write_text(f"{train}/a.jpg\n")
        (root / "val.txt").write_text(f"{val}\\a.jpg\n")
        train, val = "/kaggle/train.txt", "..\\val.txt"
    (root / "data.yaml").write_text(
        f"\ufeffpath: /content/my set\ntrain: {train}\nval: {val}\nnames: [cat, dog]\n"
    )
    _, found = shard(root, tmp_path / "out", quiet_run)
    assert (lefts(found, "train"), lefts(found, "val")) == ({"a.jpg": 3}, {"a.jpg": 7})


def test_a_yolo_split_that_isnt_there(tmp_path, make_picture, quiet_run):
    """Roboflow names a test split, whether it has one or not."""
    root, said = tmp_path / "set", []
    yolo(root, make_picture, [f"1 {spelt(RING)}"])
    with (root / "data.yaml").open("a") as stream:
        stream.write("test: ../test/images\n")

    def run(splits=None):
        working = quiet_run()._replace(say=said.append)
        return shard_dataset(root, tmp_path / "out", splits, Settings(), working)

    assert set(run().splits) == {"train", "val"}
    assert [line for line in said if "test is left out: " in line and "'../test/images'" in line]
    with pytest.raises(UserError, match=r"test: '\.\./test/images': no such folder"):
        run(["train", "test"])


def test_yolo_classes_are_called_as_is_written(tmp_path, make_picture, quiet_run):
    """YAML's no is a truth value, its null nothing, its 2024-01-02 a date, its 1.10 a number."""
    root = tmp_path / "set"
    yolo(root, make_picture, [f"1 {spelt(RING)}"])
    text = (root / "data.yaml").read_text()
    names = ["yes", "no", "null", "2024-01-02", "1.10", "007"]
    (root / "data.yaml").write_text(text[: text.index("names")] + f"names: [{', '.join(names)}]\n")
    index, _ = shard(root, tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == names
    for wrong in ("{0: a, b: c}", "{a: 0}", "[a, [b]]", "{-1: a}", "[" * 5000 + "]" * 5000):
        (root / "data.yaml").write_text(text[: text.index("names")] + f"names: {wrong}\n")
        with pytest.raises(UserError, match=r"data\.yaml: (names: expected|not valid YAML)"):
            shard(root, tmp_path / "out", quiet_run)


def test_what_yolo_doesnt_use_is_counted(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    boxed(root, "images/a.jpg", 3, make_picture)
    label = (root / "labels/a.txt").read_text()
    for name in ("images/heic.heic", "images/train.cache"):
        (root / name).write_text("x")
    for name in ("labels/lost.txt", "labels/heic.txt"):
        (root / name).write_text(label)
    (root / "labels/classes.txt").write_text("cat\n3 dogs of 4 in 2 or 1\n")
    (root / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    index, _ = shard(root, tmp_path / "out", quiet_run)
    assert index.splits["train"].report["images"]["unlisted_files"] == 2  # heic.heic, lost.txt


def test_a_yolo_list_of_images_that_are_gone(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    boxed(root, "images/a.jpg", 3, make_picture)
    (root / "list.txt").write_text("images/a.jpg\nimages/gone.jpg\n")
    (root / "data.yaml").write_text("train: list.txt\nnames: [cat, dog]\n")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert list(found) == [("train", "a.jpg")]
    assert index.splits["train"].report["findings"]["missing_file"]["count"] == 1
