"""Pascal VOC: boxes and masks are those of the pixels that were drawn."""

import io
import json
import shutil
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.index import read_index
from casc.data.sample import iter_tar
from casc.errors import UserError
from data_tools.plan import Settings
from data_tools.shard import shard_dataset

WIDTH, HEIGHT = 60, 50


def numbered(seed: int, objects: int) -> np.ndarray:
    """Rectangles with a notch, numbered from 1, and VOC's border of 255 around."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number in range(1, objects + 1):
        x, y = 2 + 19 * (number - 1), int(rng.integers(1, 20))
        w, h = int(rng.integers(6, 15)), int(rng.integers(6, 25))
        mask[y - 1 : y + h + 1, x - 1 : x + w + 1] = 255
        mask[y : y + h, x : x + w] = number
        mask[y : y + 2, x : x + 2] = 255
    return mask


def inclusive(mask: np.ndarray) -> list[int]:
    """VOC's box of a mask: its first and last pixel, counted from 1."""
    ys, xs = np.nonzero(mask)
    return [int(v) + 1 for v in (xs.min(), ys.min(), xs.max(), ys.max())]


def coco_box(mask: np.ndarray) -> list[float]:
    return coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()


def xml(filename, objects, size=(WIDTH, HEIGHT), head="") -> str:
    things = "".join(
        f"<object><name>{escape(name)}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(
            f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, box, difficult in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"{head}<annotation><filename>{filename}</filename>{sides}{things}</annotation>"


def add(annotations, images, name, text, make_picture):
    for folder in (annotations, images):
        folder.mkdir(parents=True, exist_ok=True)
    (images / f"{name}.jpg").write_bytes(make_picture(WIDTH, HEIGHT, seed=len(name)))
    (annotations / f"{name}.xml").write_text(text, encoding="utf-8")


def shard(root, out, quiet_run):
    shard_dataset(root, out, None, Settings(), quiet_run())
    index, found = read_index(out), {}
    for split, about in index.splits.items():
        for each in about.shards:
            for _, image, text in iter_tar(out / each.name):
                record = json.loads(text)
                found[split, record["file_name"]] = image, record["annotations"]
    return index, found


def test_the_devkit_with_masks(tmp_path, make_picture, quiet_run):
    root = tmp_path / "VOCdevkit/VOC2012"
    lists = {"train": ["2007_1", "2007_22"], "val": ["2007_333"]}
    drawn = {name: numbered(len(name), 3) for name in ("2007_1", "2007_22", "2007_333")}
    for name in [*drawn, "2007_4444"]:
        mask = drawn.get(name, numbered(9, 3))
        objects = [(n, inclusive(mask == i), int(i == 3)) for i, n in enumerate("cab", 1)]
        text = xml(f"{name}.jpg", objects)
        add(root / "Annotations", root / "JPEGImages", name, text, make_picture)
    (root / "SegmentationObject").mkdir()
    for name, mask in drawn.items():
        image = Image.new("P", (WIDTH, HEIGHT))
        data = io.BytesIO()
        image.putpalette(bytes(range(256)) * 3)
        image.putdata(mask.reshape(-1).tolist())
        image.save(data, "PNG")
        (root / "SegmentationObject" / f"{name}.png").write_bytes(data.getvalue())
    for kind, more in (("Segmentation", []), ("Main", ["2007_4444"])):
        (root / "ImageSets" / kind).mkdir(parents=True)
        for split, names in lists.items():
            file = root / "ImageSets" / kind / f"{split}.txt"
            file.write_text("".join(f"{name}\n" for name in names + more))
        (root / "ImageSets" / kind / "trainval.txt").write_text("2007_1\n")
    (root / "ImageSets/Main/a_train.txt").write_text("2007_1 -1\n")
    index, found = shard(tmp_path / "VOCdevkit", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["a", "b", "c"]
    assert sorted(found) == [("train", "2007_1.jpg"), ("train", "2007_22.jpg"),
                             ("val", "2007_333.jpg")]  # fmt: skip
    for (_, file), (image, entries) in found.items():
        mask = drawn[file[:-4]]
        assert image == (root / "JPEGImages" / file).read_bytes()
        for number, entry in enumerate(entries, 1):
            own = mask == number
            assert entry["bbox"] == coco_box(own)
            np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), own)
            assert entry["area"] == own.sum()
            assert (entry.get("ignore", 0), entry["train"]) == (int(number == 3), number < 3)
        assert [index.categories[entry["label"]].name for entry in entries] == ["c", "a", "b"]
    assert "box_not_mask" not in index.splits["train"].report["findings"]


def painted(numbers: np.ndarray, colours: dict[int, tuple[int, ...]]) -> bytes:
    rgb = np.zeros((*numbers.shape, 3), np.uint8)
    for number, colour in colours.items():
        rgb[numbers == number] = colour
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


DEVKIT = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 255: (224, 224, 192)}
RANDOM = {1: (9, 200, 30), 2: (7, 7, 7), 3: (250, 1, 77), 255: (224, 224, 192)}
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:184,61,245::\ndog:50,83,9::\n"
PAINTED = {1: (50, 83, 9), 2: (184, 61, 245), 3: (50, 83, 9), 255: (224, 224, 192)}


@pytest.mark.parametrize("colours", [DEVKIT, RANDOM])
@pytest.mark.parametrize("boxes", [None, [], [3, 1]])
@pytest.mark.parametrize("name", ["a", "sub/a"])
def test_painted_masks(colours, boxes, name, tmp_path, make_picture, quiet_run):
    """CVAT's and Datumaro's, whose XML files, where there are any, have boxes in another order."""
    root, mask = tmp_path / "set", numbered(5, 3)
    for folder in ("Annotations", "JPEGImages", "SegmentationObject", "SegmentationClass"):
        (root / folder / name).parent.mkdir(parents=True)
    (root / f"JPEGImages/{name}.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
    if boxes is None:
        shutil.rmtree(root / "Annotations")
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/default.txt").write_text("a\nempty\n")
        (root / "JPEGImages/empty.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
    else:
        corners = [coco_box(mask == n) for n in boxes]
        things = [("dog", [x, y, x + w, y + h], 0) for x, y, w, h in corners]
        text = xml("a.jpg", [*things, ("cat", [0, 40, 60, 50], 0)] if boxes else [])
        (root / f"Annotations/{name}.xml").write_text(text)
    (root / f"SegmentationObject/{name}.png").write_bytes(painted(mask, colours))
    (root / f"SegmentationClass/{name}.png").write_bytes(painted(mask, PAINTED))
    (root / "labelmap.txt").write_text(LABELMAP)
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat", "dog"]
    entries = found["train", f"{name}.jpg"][1]
    alone = [e for e in entries if not e["train"]]
    assert [e["bbox"] for e in alone] == ([[0, 40, 60, 10]] if boxes else [])
    labels = {}
    for entry in entries:
        if entry["train"]:
            own = coco_mask.decode(entry["segmentation"])
            [number] = np.unique(mask[own > 0])
            labels[int(number)] = entry["label"]
            np.testing.assert_array_equal(own, mask == number)
            assert entry["bbox"] == coco_box(own)
    assert labels == {1: 1, 2: 0, 3: 1}
    assert index.splits["train"].report["findings"].get("box_not_mask") is None
    if boxes is None:
        assert found["train", "empty.jpg"][1] == []


def test_numbered_masks_without_xml_files(tmp_path, make_picture, quiet_run):
    """As labelme2voc writes them, the classes in class_names.txt by number; or the devkit's."""
    root, mask = tmp_path / "set", numbered(5, 3)
    (root / "JPEGImages").mkdir(parents=True)
    (root / "JPEGImages/a.jpg").write_bytes(make_picture(WIDTH, HEIGHT))
    classes = np.where(mask == 255, 255, np.array([0, 2, 1, 2])[np.minimum(mask, 3) % 4])
    for folder, pixels in (("SegmentationObject", mask), ("SegmentationClass", classes)):
        (root / folder).mkdir()
        image = Image.fromarray(pixels.astype(np.uint8), "L")
        image.putpalette(bytes(range(256)) * 3)
        image.save(root / folder / "a.png")
    _, found = shard(root, tmp_path / "voc", quiet_run)
    assert [e["category_id"] for e in found["train", "a.jpg"][1]] == [2, 1, 2]  # of twenty
    (root / "class_names.txt").write_text("_background_\nzebra\nowl\n")
    index, found = shard(root, tmp_path / "out", quiet_run)
    entries = found["train", "a.jpg"][1]
    assert [c.name for c in index.categories] == ["owl", "zebra"]
    assert [e["label"] for e in entries] == [0, 1, 0]
    for number, entry in enumerate(entries, 1):
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask == number)
    (root / "class_names.txt").write_text("_background_\nzebra\n")
    with pytest.raises(
        UserError, match=r"Class/a\.png: object 1 has number 2, which is no class's"
    ):
        shard(root, tmp_path / "out", quiet_run)
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(UserError, match=r"Object/a\.png: object 1 is in no XML file, and there is"):
        shard(root, tmp_path / "out", quiet_run)
    smooth = np.arange(3 * mask.size, dtype=np.uint32).astype(">u4").view(np.uint8)
    smooth = smooth.reshape(HEIGHT, WIDTH, 3, 4)[:, :, 0, 1:]
    Image.fromarray(smooth).save(root / "SegmentationObject/a.png")
    with pytest.raises(UserError, match=r"a\.png: has .* colours, expected one of each object"):
        shard(root, tmp_path / "out", quiet_run)


@pytest.mark.parametrize(
    ("annotations", "images", "lists", "expected"),
    [
        ("outer/VOCdevkit/VOC2012/Annotations/{}", "outer/VOCdevkit/VOC2012/JPEGImages/{}", {},
         {"train": "ab"}),
        ("VOC2012_train_val/x/Annotations/{}", "VOC2012_train_val/x/JPEGImages/{}", {},
         {"train": "ab"}),
        ("Annotations/day 1/{}", "JPEGImages/day 1/{}", {}, {"train": ["day 1/a", "day 1/b"]}),
        ("Annotations/day1/{}", "JPEGImages/{}", {}, {"train": "ab"}),
        ("Annotations/{}", "JPEGImages/day1/{}", {}, {"train": ["day1/a", "day1/b"]}),
        ("Annotations/day1/{}", "JPEGImages/day1/{}", {"train": "day1/a", "val": "b"},
         {"train": ["day1/a"], "val": ["day1/b"]}),
        ("Annotations/{}", "JPEGImages/{}", {"Train": "a", "Validation": "b"},
         {"train": "a", "val": "b"}),
        ("Annotations/{split}/{}", "JPEGImages/{split}/{}", {},
         {"train": ["train/a"], "val": ["valid/b"]}),
        ("x/{split}/Annotations/{}", "x/{split}/images/{}", {}, {"train": "a", "val": "b"}),
        ("{kind}/{}", "{kind}/{}", {}, {"train": ["cats/a", "dogs/b"]}),
    ],
)  # fmt: skip
def test_folders_in_folders(
    annotations, images, lists, expected, tmp_path, make_picture, quiet_run
):
    root = tmp_path / "set"
    for name, split, kind in (("a", "train", "cats"), ("b", "valid", "dogs")):
        text = xml(f"{name}.jpg", [("cat", [1, 1, 9, 9], 0)])
        near, far = (
            (root / place.format(name, split=split, kind=kind)).parent
            for place in (annotations, images)
        )
        add(near, far, name, text, make_picture)
    for split, name in lists.items():
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert set(found) == {(split, f"{n}.jpg") for split, names in expected.items() for n in names}
    assert all(split.report["images"]["unlisted_files"] == 0 for split in index.splits.values())
    assert not any("missing_file" in s.report["findings"] for s in index.splits.values())


def test_main_lists_without_masks(tmp_path, make_picture, quiet_run):
    root = tmp_path / "VOC2007"
    for i in range(4):
        text = xml(f"{i}.jpg", [("cat", [1, 1, WIDTH, HEIGHT], 0)])
        add(root / "Annotations", root / "JPEGImages", str(i), text, make_picture)
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("0\n1\n")
    (root / "ImageSets/Main/test.txt").write_text("2\n3\n")
    _, found = shard(root, tmp_path / "out", quiet_run)
    assert {split for split, _ in found} == {"train", "test"}
    # The whole image, by VOC's counting.
    assert all(e["bbox"] == [0, 0, WIDTH, HEIGHT] for _, [e] in found.values())
    assert not any(e["train"] for _, [e] in found.values())  # boxes only


@pytest.mark.parametrize(
    "spelt",
    ["{}.jpg", "JPEGImages/{}.JPG", "..\\JPEGImages\\{}.jpg", "{} -1", "{}.jpg  1", '"{}"'],
)
def test_lists_of_other_spellings(spelt, tmp_path, make_picture, quiet_run):
    root, lists = tmp_path / "set", {"train": ["a", "my b"], "val": ["c.d", "e 1"]}
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, names in lists.items():
        for name in names:
            text = xml(f"{name}.jpg", [("cat", [1, 1, 9, 9], 0)])
            add(root / "Annotations", root / "JPEGImages", name, text, make_picture)
        lines = "".join(spelt.format(name) + "\n" for name in names)
        (root / "ImageSets/Main" / f"{split}.txt").write_text(lines)
    _, found = shard(root, tmp_path / "out", quiet_run)
    assert set(found) == {(split, f"{n}.jpg") for split, names in lists.items() for n in names}


@pytest.mark.parametrize("above", ["VOCdevkit", "."])
def test_several_years_are_not_passed_over(above, tmp_path, make_picture, quiet_run):
    root, names = tmp_path / "set", {"VOC2007": "000001", "VOC2012": "2008_1"}
    for year, name in names.items():
        base = root / above / year
        text = xml(f"{name}.jpg", [("cat", [1, 1, 9, 9], 0)])
        add(base / "Annotations", base / "JPEGImages", name, text, make_picture)
    with pytest.raises(
        UserError, match=r"VOC2007, .*VOC2012\); give one of these folders, or copy"
    ):
        shard(root, tmp_path / "out", quiet_run)
    # Both ways that it names work.
    _, one = shard(root / above / "VOC2012", tmp_path / "one", quiet_run)
    assert set(one) == {("train", "2008_1.jpg")}
    for year in names:
        shutil.copytree(root / above / year, tmp_path / "both", dirs_exist_ok=True)
    _, both = shard(tmp_path / "both", tmp_path / "out", quiet_run)
    assert set(both) == {("train", f"{name}.jpg") for name in names.values()}


@pytest.mark.parametrize(
    ("place", "more"),
    [
        ("{}/{}", "extra/{}"),
        ("{}/{}", "{}"),
        ("{}/{}", "all/Annotations/{}"),
        ("{}/Annotations/{}", "extra/{}"),
        ("deep/{}/{}", "deep/extra/{}"),
        ("Annotations/{}/{}", "Annotations/extra/{}"),
    ],
)
def test_what_lies_beside_the_splits_is_left_out(place, more, tmp_path, make_picture, quiet_run):
    """And is no part of training or validation."""
    root, said = tmp_path / "set", []
    splits = {"train": "train", "valid": "val", "test": "test"}
    files = {
        f"{split}-{n}": (root / place.format(split, n)).parent for split in splits for n in "ab"
    }
    files |= {f"more-{n}": (root / more.format(n)).parent for n in "ab"}
    for name, folder in files.items():
        text = xml(f"{name}.jpg", [("cat" if "more" not in name else "dog", [1, 1, 9, 9], 0)])
        add(folder, folder, name, text, make_picture)
    shard_dataset(root, tmp_path / "out", None, Settings(), quiet_run()._replace(say=said.append))
    index = read_index(tmp_path / "out")
    assert {s: about.samples for s, about in index.splits.items()} == dict.fromkeys(
        splits.values(), 2
    )
    assert [c.name for c in index.categories] == ["cat"]
    [told] = [line for line in said if " is left out: " in line]
    assert str((root / more.format("a")).parent).removesuffix("/Annotations") in told
    assert told.endswith("; move the files that are to be taken into one")
    for name in ("more-a", "more-b"):
        for suffix in (".xml", ".jpg"):
            to = (root / place.format("train", name)).with_suffix(suffix)
            (files[name] / f"{name}{suffix}").rename(to)
    index, found = shard(root, tmp_path / "again", quiet_run)
    assert sum(split == "train" for split, _ in found) == 4
    assert [c.name for c in index.categories] == ["cat", "dog"]


def test_a_class_may_be_called_train(tmp_path, make_picture, quiet_run):
    for name in ("train", "cat"):
        text = xml("a.jpg", [(name, [1, 1, 9, 9], 0)])
        add(tmp_path / "set" / name, tmp_path / "set" / name, name, text, make_picture)
    with pytest.raises(UserError, match=r"several data sets of VOC's \(cat, train\); give one"):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("{}", "{}"),
        ("{}/Annotations", "{}/JPEGImages"),
        ("annotations", "images"),
        ("Annotations", "JPEGImages"),
        (".", "."),
        ("labels", "."),
        ("ANNOTATIONS", "IMAGES"),
        ("Labels", "jpegImages"),
        ("{}/XMLs", "{}/Imgs"),
        ("annots", "images"),
    ],
)
def test_xml_files_of_labelling_tools(annotations, images, tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    splits = ("train", "valid") if "{}" in annotations else ("train",)
    for split in splits:
        for name, listed in ((f"{split}-a", "C:\\me\\a.png"), (f"{split}-b", "")):
            # Counted from 0 here: no pixel of VOC's has that number.
            objects = [("Kätzchen & Co", ["0", "4.5", "20", "14.5"], 0)]
            text = xml(listed, objects, size=(0, 0))
            places = root / annotations.format(split), root / images.format(split)
            add(*places, name, text, make_picture)
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert set(index.splits) == ({"train", "val"} if len(splits) == 2 else {"train"})
    assert len(found) == 2 * len(splits)
    for _, [entry] in found.values():
        assert entry["bbox"] == [0, 4.5, 20, 10]
    assert index.categories[0].name == "Kätzchen & Co"
    for split in index.splits.values():
        assert split.report["images"]["unlisted_files"] == 0
        assert "size_mismatch" not in split.report["findings"]


RING = [10.0, 5.0, 30.5, 6.0, 25.0, 40.0, 8.0, 30.0]


def test_outlines_are_trained_on(tmp_path, make_picture, quiet_run):
    """As Roboflow and supervision write them, x1 y1 x2 y2 beside the box and counted from 1."""
    root, second = tmp_path / "set/train", [40.0, 10.0, 50.0, 10.0, 50.0, 20.0]
    polygons = ""
    for ring in (RING, second):
        pairs = zip(ring[0::2], ring[1::2], strict=True)
        each = (f"<x{i}>{x + 1}</x{i}><y{i}>{y + 1}</y{i}>" for i, (x, y) in enumerate(pairs, 1))
        polygons += f"<polygon>{''.join(each)}</polygon>"
    text = xml("a.jpg", [("cat", [9, 6, 51, 41], 0), ("dog", [3, 4, 9, 9], 0)])
    text = text.replace("</bndbox><part>", f"</bndbox>{polygons}<part>", 1)
    add(root, root, "a", text, make_picture)
    bad = text.replace("<y2>", "<z>").replace("</y2>", "</z>")
    _, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    cat, dog = found["train", "a.jpg"][1]
    assert (cat["segmentation"], cat["bbox"]) == ([RING, second], [8, 5, 42, 35])
    assert (cat["train"], dog["train"]) == (True, False)
    assert dog["bbox"] == [2, 3, 7, 6]
    (root / "a.xml").write_text(bad)
    with pytest.raises(UserError, match=r"a\.xml: object 1: polygon: expected x1, y1, x2"):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


def test_outlines_of_labelmes_web_tool(tmp_path, make_picture, quiet_run):
    """Points from 0 without a box; what was deleted stays in the file."""
    pairs = zip(RING[0::2], RING[1::2], strict=True)
    points = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in pairs)
    things = "".join(
        f"<object><name>{name}</name><deleted>{int(name == 'old')}</deleted>"
        f"<polygon><username>me</username>{points}</polygon></object>"
        for name in ("cat", "old")
    )
    text = f"<annotation><filename>a.jpg</filename>{things}</annotation>"
    add(tmp_path / "set/Annotations", tmp_path / "set/Images", "a", text, make_picture)
    index, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat"]
    [entry] = found["train", "a.jpg"][1]
    assert (entry["segmentation"], entry["bbox"]) == ([RING], [8, 5, 22.5, 35])


@pytest.mark.parametrize(
    ("declared", "encoding", "mark"),
    [
        (None, "utf-8", "\ufeff"),
        ("utf-16", "utf-16-le", "\ufeff"),
        ("UTF-16", "utf-16-be", "\ufeff"),
        (None, "utf-16-le", "\ufeff"),
        ("utf-16", "utf-16-le", ""),
        ("utf-8", "utf-16-le", "\ufeff"),
        ("utf-16", "utf-8", ""),
        ("utf-16", "utf-8", "\ufeff"),
        ("ISO-8859-1", "latin-1", ""),
        ("windows-1251", "cp1251", ""),
        ("gb2312", "gbk", ""),
        ("Shift_JIS", "shift_jis", ""),
    ],
)
def test_encodings_that_xml_files_have(declared, encoding, mark, tmp_path, make_picture, quiet_run):
    """Whether they are the declared ones or not: .NET's strings declare UTF-16 in UTF-8."""
    label = {"cp1251": "кот", "gbk": "貓", "shift_jis": "猫"}.get(encoding, "Kätzchen")
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    text = xml("a.jpg", [(label, [1, 1, 9, 9], 0)], head=mark + head)
    add(tmp_path / "set/Annotations", tmp_path / "set/JPEGImages", "a", "", make_picture)
    (tmp_path / "set/Annotations/a.xml").write_bytes(text.encode(encoding))
    index, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == [label]
    assert [entry["bbox"] for entry in found["train", "a.jpg"][1]] == [[0, 0, 9, 9]]


@pytest.mark.parametrize("upper", ["ab", "b"])
def test_names_that_end_in_upper_case(upper, tmp_path, make_picture, quiet_run):
    root, mask = tmp_path / "set", numbered(3, 1)
    (root / "SegmentationObject").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, split in (("a", "train"), ("b", "val")):
        text = xml(f"{name}.jpg", [("cat", inclusive(mask == 1), 0)])
        add(root / "Annotations", root / "JPEGImages", name, text, make_picture)
        (root / f"SegmentationObject/{name}.png").write_bytes(painted(mask, DEVKIT))
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")
        for file in (f"Annotations/{name}.xml", f"SegmentationObject/{name}.png"):
            if name in upper:
                (root / file).rename((root / file).with_suffix(file[-4:].upper()))
    _, found = shard(root, tmp_path / "out", quiet_run)
    assert set(found) == {("train", "a.jpg"), ("val", "b.jpg")}
    for _, [entry] in found.values():
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask == 1)


@pytest.mark.parametrize("left", [b"", bytes(99), "<annotation>é".encode()[:-1], 60, -3])
def test_broken_files_are_left_out_with_their_images(left, tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    for name, label in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        text = xml(f"{name}.jpg", [(label, [1, 1, 9, 9], 0)])
        add(root / "Annotations", root / "JPEGImages", name, text, make_picture)
    file = root / "Annotations/b.xml"
    whole = file.read_bytes()
    file.write_bytes(left if isinstance(left, bytes) else whole[:left])
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert sorted(name for _, name in found) == ["a.jpg", "c.jpg"]
    report = index.splits["train"].report
    [told] = report["findings"]["broken_file"]["examples"]
    assert told.startswith("2: b.xml: not valid XML (")
    images = report["images"]
    assert (images["listed"], images["left_out"], images["stored"]) == (3, 1, 2)
    assert [c.name for c in index.categories] == ["cat"]
    file.write_bytes(whole)
    index, found = shard(root, tmp_path / "out", quiet_run)
    assert sorted(name for _, name in found) == ["a.jpg", "b.jpg", "c.jpg"]
    assert "broken_file" not in index.splits["train"].report["findings"]
    assert [c.name for c in index.categories] == ["cat", "dog"]


OUTSIDE = '<!DOCTYPE annotation SYSTEM "annotation.dtd">'


@pytest.mark.parametrize("head", ["<!DOCTYPE annotation>", OUTSIDE])
def test_a_document_type_that_declares_nothing_is_passed_over(
    head, tmp_path, make_picture, quiet_run
):
    text = xml("a.jpg", [("cat & dog", [1, 1, 9, 9], 0)], head=head)
    add(tmp_path / "set/Annotations", tmp_path / "set/JPEGImages", "a", text, make_picture)
    index, found = shard(tmp_path / "set", tmp_path / "out", quiet_run)
    assert [c.name for c in index.categories] == ["cat & dog"]
    assert [entry["bbox"] for entry in found["train", "a.jpg"][1]] == [[0, 0, 9, 9]]


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (xml("a.jpg", [], head=BOMB), r"a\.xml: has a document type .*; remove <!DOCTYPE"),
        (
            xml("a.jpg", [("c", [1, 2, 3, 4], 0)], head=OUTSIDE).replace(
                "<name>c", "<name>c&nbsp;"
            ),
            r"a\.xml: &nbsp; is declared elsewhere, which isn't read; write",
        ),
        (xml("a.jpg", [("cat", [1, 2, "x", 4], 0)]), r"a\.xml: object 1: bndbox: expected xmin"),
        (xml("a.jpg", [(" ", [1, 2, 3, 4], 0)]), r"a\.xml: object 1: name: missing"),
        (xml("a.jpg", [])[:-5], r"a\.xml: not valid XML"),
        (xml("a.jpg", [], head='<?xml version="1.0" encoding="klingon"?>'), "; save it as UTF-8"),
        (xml("a.jpg", [], head='<?xml version="1.0" encoding="hex"?>'), "; save it as UTF-8"),
        (xml("Ä.jpg", [], head='<?xml version="1.0" encoding="ascii"?>'), "; save it as UTF-8"),
        ("<annotation>" + "<a>" * 100 + "</a>" * 100 + "</annotation>", "nested too deeply"),
    ],
)
def test_what_is_refused(text, message, tmp_path, make_picture, quiet_run):
    add(tmp_path / "set/Annotations", tmp_path / "set/JPEGImages", "a", text, make_picture)
    with pytest.raises(UserError, match=message):
        shard(tmp_path / "set", tmp_path / "out", quiet_run)


def test_masks_of_another_size_and_lost_files_are_named(tmp_path, make_picture, quiet_run):
    root = tmp_path / "set"
    text = xml("a.jpg", [("cat", [1, 2, 30, 40], 0)])
    add(root / "Annotations", root / "JPEGImages", "a", text, make_picture)
    (root / "SegmentationObject").mkdir()
    (root / "SegmentationObject/a.png").write_bytes(make_picture(10, 10, kind="PNG", mode="L"))
    with pytest.raises(UserError, match=r"a\.png: expected a palette image of 60 x 50"):
        shard(root, tmp_path / "out", quiet_run)
    (root / "SegmentationObject/a.png").unlink()
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"b\.xml: not found; the list of train"):
        shard(root, tmp_path / "out", quiet_run)
