"""Data sets as tools export them; their own pixels and boxes say which files were met."""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casc.data.index import Index, read_index
from casc.data.sample import iter_tar
from casc.errors import UserError
from casc.train.recipe_checks import check
from data_tools.cli import main
from data_tools.shard import shard_dataset


def export(file: Path, folder: Path, picture: Callable[..., bytes], **spelt: str) -> dict[int, Any]:
    """Three images in a folder and their annotation file; gives bytes and box by image id."""
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    first = 10 * (len(list(folder.rglob("*.jpg"))) + 1)
    images, annotations, true = [], [], {}
    for i in range(first, first + 3):
        data = picture(60, 50, seed=i)
        (folder / f"{i}.jpg").write_bytes(data)
        box, area = [i % 10, 5, 20, 10], 200
        polygon = [i % 10, 5, i % 10 + 20, 5, i % 10 + 20, 15, i % 10, 15]
        name = spelt.get("prefix", "") + f"{i}.jpg"
        images.append({"id": i, "file_name": name, "width": 60, "height": 50})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": area})
        annotations[-1] |= {"iscrowd": 0, "segmentation": [polygon]}
        true[i] = data, box
    categories = [{"id": 1, "name": "cat"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(data))
    return true


def stored(out: Path, split: str) -> dict[int, Any]:
    found = {}
    for shard in read_index(out).splits[split].shards:
        for _, image, text in iter_tar(out / shard.name):
            record = json.loads(text)
            found[record["image_id"]] = image, record["annotations"][0]["bbox"]
    return found


LAYOUTS = {
    "coco": ("annotations/instances_{}.json", "{}", ""),
    "roboflow": ("{}/_annotations.coco.json", "{}", ""),
    "fiftyone": ("{}/labels.json", "{}/data", ""),
    "two files, one folder": ("{}.json", ".", ""),
    "two files with images": ("annotations/{}.json", "images", ""),
    "underscores": ("annotations_{}.json", "images/{}", ""),
    "named folders": ("{}_coco.json", "{}", "{}/"),
    "supervisely": ("{}/annotations/instances.json", "{}/images", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_two_splits(layout: str, tmp_path, make_picture, settings, quiet_run):
    root, out = tmp_path / "data", tmp_path / "out"
    file, folder, prefix = LAYOUTS[layout]
    true = {
        split: export(
            root / file.format(split),
            root / folder.format(split),
            make_picture,
            prefix=prefix.format(split),
        )
        for split in ("train", "valid")
    }
    index = shard_dataset(root, out, None, settings, quiet_run())
    assert set(index.splits) == {"train", "valid"}
    for split in true:
        assert stored(out, split) == true[split]
        assert index.splits[split].report["images"]["unlisted_files"] == 0
    only = shard_dataset(root, tmp_path / "only", ["valid"], settings, quiet_run())
    assert set(only.splits) == {"valid"}


@pytest.mark.parametrize(
    ("file", "folder", "prefix"),
    [
        ("annotations/instances_default.json", "images", ""),
        ("annotations/instances_default.json", "images/default", ""),
        ("result.json", "images", "images/"),
        ("result.json", "images", "images\\\\"),
        ("labels.json", "data", ""),
        ("annotations.json", "images", ""),
        ("_annotations.coco.json", ".", "./"),
        ("coco.JSON", "JPEGImages", ""),
        ("annotations.json", "photos/2024", ""),
        ("export/annotations/instances_train.json", "export/train", ""),
        ("annotations/instances_train.json", "Train", ""),
        ("train/train.json", "train/img", "../img/"),
        ("result.json", "x/photos", "/data/local-files/?d=photos/"),
    ],
)
def test_layouts_of_one_part(
    file: str, folder: str, prefix: str, tmp_path, make_picture, settings, quiet_run
):
    root = tmp_path / "data"
    true = export(root / file, root / folder, make_picture, prefix=prefix.replace("\\\\", "\\"))
    shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    assert stored(tmp_path / "out", "train") == true


def test_images_of_another_part_are_not_taken_for_a_parts_own(
    tmp_path, make_picture, settings, quiet_run
):
    """Numbered from 1 in each part, they have the same names."""
    root = tmp_path / "data"
    export(root / "annotations/instances_val.json", root / "images/train", make_picture)
    with pytest.raises(UserError, match="--annotations FILE --images FOLDER"):
        shard_dataset(root, tmp_path / "out", None, settings, quiet_run())


def test_a_part_without_its_images_is_told(tmp_path, make_picture, settings, quiet_run):
    root, said = tmp_path / "data", []
    true = export(root / "annotations/instances_train.json", root / "train", make_picture)
    export(root / "annotations/instances_val.json", tmp_path / "elsewhere", make_picture)
    # A subset of train's images.
    text = (root / "annotations/instances_train.json").read_text()
    (root / "annotations/instances_train_first.json").write_text(text)
    working = quiet_run()._replace(say=said.append)
    shard_dataset(root, tmp_path / "out", None, settings, working)
    assert stored(tmp_path / "out", "train") == true
    assert set(read_index(tmp_path / "out").splits) == {"train"}
    told = [line for line in said if " is left out: " in line]
    assert len(told) == 2
    assert "instances_val.json: the folder of its images wasn't found; give --annot" in told[1]


HIDDEN = ("._{}", ".ipynb_checkpoints/{}")


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "labelme"])
def test_what_systems_hide_is_no_part_of_the_data(
    kind: str, tmp_path, make_picture, settings, quiet_run
):
    """macOS puts ._name beside each file of an archive, Jupyter a copy into a folder."""
    root = tmp_path / "data"
    files = {"images/1.jpg": make_picture(60, 50)}
    if kind == "coco":
        export(root / "data.json", root / "images", make_picture)
        files = {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*.*")}
    elif kind == "yolo":
        files["labels/1.txt"] = b"0 0.5 0.5 0.2 0.2"
        files["data.yaml"] = b"train: images\nnames: [cat]"
    elif kind == "voc":
        box = "".join(f"<{k}>9</{k}>" for k in ("xmin", "ymin", "xmax", "ymax"))
        thing = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
        files["Annotations/1.xml"] = f"<annotation>{thing}</annotation>".encode()
    else:
        about = {"imagePath": "1.jpg", "imageWidth": 60, "imageHeight": 50}
        ring = {"label": "cat", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
        files["images/1.json"] = json.dumps({**about, "shapes": [ring]}).encode()
    for name, data in files.items():
        for spelt in ("{}", *HIDDEN):
            file = (root / name).parent / spelt.format(Path(name).name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data if spelt == "{}" else b"\0\5\x16\7 <annotation" + data)
    index = shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    assert set(index.splits) == {"train"}
    report = index.splits["train"].report
    count = 3 if kind == "coco" else 1
    images = {"listed": count, "stored": count, "left_out": 0, "unlisted_files": 0}
    assert {key: report["images"][key] for key in images} == images
    assert report["annotations"]["listed"] == count


@pytest.mark.parametrize(
    ("name", "split"),
    [("annotations (1).json", "train"), ("instances_val (2).json", "val"), ("数据.json", "train")],
)
def test_splits_of_files_with_odd_names(name, split, tmp_path, make_picture, settings, quiet_run):
    true = export(tmp_path / "data" / name, tmp_path / "data/images", make_picture)
    shard_dataset(tmp_path / "data", tmp_path / "out", None, settings, quiet_run())
    assert stored(tmp_path / "out", split) == true


def test_layouts_that_are_not_read_are_named(tmp_path: Path, settings, quiet_run):
    """As the tools write them; none of COCO, LabelMe, YOLO or VOC."""
    region = {"shape_attributes": {"name": "polygon"}, "region_attributes": {}}
    supervisely = {"objects": [{"classTitle": "cat", "geometryType": "polygon"}]}
    detectron = [{"file_name": "1.jpg", "annotations": [{"bbox_mode": 0, "category_id": 0}]}]
    anything = {"image": {"file_name": "1.jpg"}, "annotations": [{"crop_box": [0, 0, 9, 9]}]}
    create = [{"image": "1.jpg", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}]
    studio = [{"data": {"image": "/data/upload/1.jpg"}, "annotations": [{"result": []}]}]
    detections = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    cases = {
        "annotations.xml": (
            "<annotations><version>1.1</version>",
            "CVAT's own XML; export .* COCO",
        ),
        "via.json": ({"1.jpg9": {"regions": [region]}}, r"\(VIA\); choose Export Annotations"),
        "ds/ann/1.jpg.json": (supervisely, "Supervisely's; export it as COCO"),
        "train.json": (detectron, "Detectron2's .*convert_to_coco_json"),
        "sa_1.json": (anything, "Segment Anything's, whose masks have no classes"),
        "_annotations.createml.json": (create, "CreateML's, which has boxes only"),
        "project.json": (studio, "Label Studio's own JSON; export it as COCO"),
        "detections.json": (detections, "list of detections; give the file of annotations"),
        "annotations/default.json": ({"info": {}, "items": []}, "Datumaro's; .*datum convert"),
        "data.json": (
            {"images": [], "annotations": []},
            "without all of .* categories; give --ann",
        ),
        "train.csv": ("ImageId,EncodedPixels\n1.jpg,1 3\n", "table of run lengths"),
        "segmentation.csv": ("MaskPath,ImageID,LabelName\n", "Open Images' table of masks"),
        "train/metadata.jsonl": ('{"file_name": "1.jpg"}', "Hugging Face's imagefolder"),
        "SegmentationClass/1.png": ("", r"objects aren't told apart; .* \(SegmentationObject/\)"),
        "data.zip": ("PK", "an archive; unpack it"),
    }
    for name, (content, told) in cases.items():
        root = tmp_path / name.replace("/", "-")
        (root / name).parent.mkdir(parents=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "1.jpg").write_bytes(b"")
        for encoding in ("utf-8", "utf-16"):
            (root / name).write_text(text, encoding=encoding)
            with pytest.raises(UserError) as refused:
                shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
            assert re.search(f": can't read {re.escape(name)}, .*{told}", str(refused.value)), name
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["annotations/panoptic_train2017.json", "panoptic.json"])
def test_panoptic_segments_are_refused_by_name(
    name: str, tmp_path: Path, make_picture, settings, quiet_run
):
    root = tmp_path / "data"
    true = export(root / name, root / "images", make_picture)
    whole = (root / name).read_text()
    data = json.loads(whole)
    about = {"bbox": [1, 2, 3, 4], "area": 9, "category_id": 1, "iscrowd": 0, "id": 8}
    data["annotations"] = [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": [about]} for i in true
    ]
    (root / name).write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"{name}: is of COCO's panoptic .*; give .*instances_\*"):
        shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    # As it says.
    (root / name).with_name("train.json").write_text(whole)
    shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    assert stored(tmp_path / "out", "train") == true


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["result.json", "annotations/instances_train.json", "train.JSON"])
def test_annotations_in_utf_16_are_refused_by_name(
    name: str, encoding: str, tmp_path: Path, make_picture, settings, quiet_run
):
    root = tmp_path / "data"
    true = export(root / name, root / "train", make_picture)
    text = (root / name).read_text()
    (root / name).write_bytes(text.encode(encoding))
    kind = encoding[:6].upper()
    with pytest.raises(UserError, match=rf"{name}: is {kind}; save it as UTF-8, as by iconv -f"):
        shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    # As PowerShell saves it.
    (root / name).write_text(text, encoding="utf-8-sig")
    shard_dataset(root, tmp_path / "out", None, settings, quiet_run())
    assert stored(tmp_path / "out", "train") == true


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_any_other_layout_by_flags(tmp_path: Path, make_picture, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    true = export(data / "deep/er/x.json", tmp_path / "elsewhere", make_picture)
    assert run("shard", data, "--out", out) == 1
    assert "--annotations FILE --images FOLDER --split NAME" in capsys.readouterr().err
    flags = ["--annotations", data / "deep/er/x.json", "--images", tmp_path / "elsewhere"]
    assert run("shard", *flags, "--split", "mine", "--out", out, "--workers", 1) == 0
    assert stored(out, "mine") == true
    assert run("shard", data, "--split", "mine", "--out", out) == 1
    assert "--annotations" in capsys.readouterr().err


def test_a_named_file_in_utf_16_is_called_that_before_its_images_are_asked_for(
    tmp_path: Path, make_picture, capsys
):
    """Its names can't be read, by which the folder would be found."""
    file = tmp_path / "data/x.json"
    true = export(file, tmp_path / "data/pictures", make_picture)
    text = file.read_text()
    arguments = ["shard", "--annotations", file, "--out", tmp_path / "out", "--workers", 1]
    file.write_text(text, encoding="utf-16")
    assert run(*arguments) == 1
    assert "x.json: is UTF-16; save it as UTF-8, as by iconv -f" in capsys.readouterr().err
    file.write_text(text)
    assert run(*arguments) == 0
    assert stored(tmp_path / "out", "x") == true


def test_files_that_are_one_split_are_refused(tmp_path: Path, make_picture, settings, quiet_run):
    for name in ("a/train.json", "b/train.json"):
        export(tmp_path / name, tmp_path / "images", make_picture)
    with pytest.raises(UserError, match=r"a/train\.json and .*b/train\.json are one split; give"):
        shard_dataset(tmp_path, tmp_path / "out", None, settings, quiet_run())


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("sub\\1.jpg", "sub/1.jpg"),
        ("1.jpg", "1.JPG"),
        ("Photo.JPG", "photo.jpg"),
        ("my%20im.jpg", "my im.jpg"),
        ("my im.jpg", "my%20im.jpg"),
        (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")),
        (unicodedata.normalize("NFD", "Café.jpg"), unicodedata.normalize("NFC", "café.JPG")),
        ("train/1.jpg", "1.jpg"),
        ("1.jpg", "seq/7/1.jpg"),
        ("1.jpg\n", "1.jpg"),
        ("\ufeff 1.jpg", "1.jpg"),
        ("/home/someone/coco/train/1.jpg", "1.jpg"),
        ("D:\\data\\1.jpg", "1.jpg"),
        ("../train/1.jpg", "1.jpg"),
        ("data\\images\\Caf%C3%A9.jpg", "café.jpg"),
        ("1.jpg?token=a%2Fb&e=1", "1.jpg"),
        ("https://store.example/a/my%20im.jpg?d=x#top", "my im.jpg"),
        ("/data/local-files/?d=sub/1.jpg", "1.jpg"),
        ("what?.JPG", "what?.jpg"),
        ("/data/local-files/?d=sub%2F1.jpg", "1a2b3c4d-1.jpg"),
        ("../../label-studio/data/media/upload/1/1A2B3C4D-1.jpg", "1.jpg"),
        ("images\\1a2b3c4d-my im.jpg", "my im.jpg"),
        ("https://store.example/a/1.jpg", "1a2b3c__1.jpg"),
    ],
)
def test_files_of_another_spelling_are_found(coco, make_picture, listed: str, there: str):
    data = make_picture(60, 50, seed=3)
    coco.object(coco.image(name=there, data=data))
    coco.images[0]["file_name"] = listed
    coco.object(coco.image(name="other.jpg"))
    index, out = coco.shard()
    report = index.splits["train"].report
    assert report["images"]["stored"] == 2
    assert report["images"]["unlisted_files"] == 0
    assert report["findings"]["other_spelling"]["count"] == 1
    assert stored(out, "train")[coco.images[0]["id"]][0] == data


def test_files_that_could_be_another_are_not_guessed(coco, tmp_path: Path, capsys):
    for name in ("1.JPG", "1.Jpg", "photo_one.jpg", "3.jpg"):
        coco.object(coco.image(name=name))
    coco.images[0]["file_name"] = "1.jpg"
    del coco.images[1]  # its file stays: now two fit
    coco.images[1]["file_name"] = "photo_on.jpg"
    coco.write()
    assert run("shard", coco.root, "--out", tmp_path / "out", "--workers", 1) == 1
    printed = capsys.readouterr()
    assert "did you mean 1.JPG or 1.Jpg?" in printed.out
    assert "did you mean photo_one.jpg?" in printed.out
    assert "2 of 3 images are lost" in printed.err
    assert "--allow-missing" in printed.err
    flags = ["--out", tmp_path / "out", "--workers", 1, "--allow-missing"]
    assert run("shard", coco.root, *flags) == 0
    assert "2 of 3 images are lost" in capsys.readouterr().err


def test_another_mark_is_another_file(coco):
    """Of names that both have one, or where two fit."""
    for name in ("20240101-1.jpg", "20240102-1.jpg", "20240103-1.jpg", "x.jpg", "y.jpg"):
        coco.object(coco.image(name=name))
    (coco.root / "train/20240101-1.jpg").unlink()
    del coco.images[1:3]
    coco.images[1]["file_name"] = "1.jpg"
    index, _ = coco.shard()
    assert index.splits["train"].report["findings"]["missing_file"]["count"] == 2


def test_a_link_that_leads_nowhere_is_called_that(coco, tmp_path: Path, capsys):
    for name in ("1.jpg", "2.jpg"):
        coco.object(coco.image(name=name))
    (coco.root / "train/1.jpg").unlink()
    (coco.root / "train/1.jpg").symlink_to("elsewhere.jpg")
    coco.write()
    assert run("shard", coco.root, "--out", tmp_path / "out", "--workers", 1) == 1
    printed = capsys.readouterr().out
    assert "1.jpg: no such file; it is a link to a file that isn't there" in printed
    assert "did you mean" not in printed


def test_images_of_another_shape_are_lost_too(coco, tmp_path: Path, capsys):
    for _ in range(3):
        coco.object(coco.image())
    whole = dict(coco.images[1])
    coco.images[1] |= {"width": 50, "height": 60}
    coco.write()
    flags = ["shard", coco.root, "--out", tmp_path / "out", "--workers", 1]
    assert run(*flags) == 1
    printed = capsys.readouterr()
    assert "60 x 50, annotated 50 x 60: width and height are exchanged" in printed.out
    said = (
        "1 of 3 images are lost, of another shape than annotated; mend their width and height, or"
    )
    assert said in printed.err
    assert run(*flags, "--allow-missing") == 0
    coco.images[1] = whole  # the mend that is named
    coco.write()
    assert run(*flags) == 0
    assert "lost" not in capsys.readouterr().err.splitlines()[-1:]


def test_a_listed_file_is_not_taken_for_another(coco):
    for name in ("1.jpg", "2.jpg"):
        coco.object(coco.image(name=name))
    (coco.root / "train" / "2.jpg").unlink()
    coco.images[1]["file_name"] = "1.JPG"
    index, _ = coco.shard()
    assert index.splits["train"].report["findings"]["missing_file"]["count"] == 1


@pytest.mark.parametrize("keep", [False, True])
def test_images_without_objects_are_trained_on_if_asked(coco, keep: bool):
    coco.object(coco.image())
    empty = coco.image()
    coco.object(coco.image(), segmentation=[])
    coco.object(coco.image(), category_id=99)
    index, _ = coco.shard(negatives=keep)
    split = index.splits["train"]
    assert split.train_samples == 1 + keep
    found = split.report["findings"]
    if keep:
        assert found["negative"]["ids"] == str(empty)
    assert found["only_maskless"]["ids"] == str(empty + 5)
    assert found["no_annotations"]["count"] == 2 - keep


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"segmentation": []}, "6 no_mask"), ({"area": 0}, "6 degenerate_box")],
)
def test_training_on_nothing_is_refused(coco, tiny_recipe, fields: dict[str, Any], reason: str):
    for _ in range(3):
        number = coco.image()
        coco.object(number, **fields)
        coco.object(number, **fields)
    index: Index = coco.shard(coco.root.with_name("mine"))[0]
    model = replace(tiny_recipe.model, classes=len(index.categories))
    recipe = replace(tiny_recipe, train_split="train", evaluate_every=0, model=model)
    with pytest.raises(UserError, match=f"nothing to train on: of 6 annotations none.*{reason}"):
        check(recipe, index)
