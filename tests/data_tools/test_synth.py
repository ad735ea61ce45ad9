import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.sample import signed_area
from casc.errors import UserError
from data_tools import synth
from data_tools.rings import trace_mask
from data_tools.shapes import SHAPES, SIMILAR_CLASSES, Shape, coverage, unit_area
from data_tools.synth import CLASSES, HARD, SynthSettings, draw_scene, mask_polygons, synthesise

COUNTS = {"train2017": 60, "val2017": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "data"
    lines = synthesise(out, COUNTS, SynthSettings())
    assert lines[0].startswith("train2017: 60 images")
    return out


def annotations(data: Path, split: str = "train2017") -> dict[str, Any]:
    return json.loads((data / "annotations" / f"instances_{split}.json").read_text())


def rasterise(segmentation: Any, height: int, width: int) -> np.ndarray:
    """What pycocotools makes of a segmentation."""
    rle = coco_mask.frPyObjects(segmentation, height, width)
    merged: Any = coco_mask.merge(rle) if isinstance(rle, list) else rle
    return coco_mask.decode(merged).astype(bool)


def test_it_is_laid_out_as_coco(data: Path):
    for split, count in COUNTS.items():
        listed = annotations(data, split)
        assert len(listed["images"]) == count
        assert [c["name"] for c in listed["categories"]] == list(CLASSES[:6])
        for image in listed["images"]:
            with Image.open(data / split / image["file_name"]) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (image["width"], image["height"])
                assert max(picture.size) == 256
                assert 0.6 < picture.width / picture.height < 1.7
    ids = [image["id"] for split in COUNTS for image in annotations(data, split)["images"]]
    assert len(set(ids)) == len(ids)


def test_it_has_all_that_coco_has(data: Path):
    listed = annotations(data)
    objects = [entry for entry in listed["annotations"] if not entry["iscrowd"]]
    crowds = [entry for entry in listed["annotations"] if entry["iscrowd"]]
    assert {entry["category_id"] for entry in objects} == {1, 2, 3, 4, 5, 6}
    assert any(len(entry["segmentation"]) > 1 for entry in objects)
    assert crowds
    assert all(isinstance(entry["segmentation"]["counts"], list) for entry in crowds)
    per_image = [
        sum(entry["image_id"] == image["id"] for entry in objects) for image in listed["images"]
    ]
    assert min(per_image) == 0
    assert max(per_image) >= 6
    assert len({(i["width"], i["height"]) for i in listed["images"]}) >= 4
    modes = set()
    for image in listed["images"]:
        with Image.open(data / "train2017" / image["file_name"]) as picture:
            modes.add(picture.mode)
    assert modes == {"RGB", "L"}


def test_boxes_areas_and_masks_agree(data: Path):
    listed = annotations(data)
    sizes = {image["id"]: (image["height"], image["width"]) for image in listed["images"]}
    for entry in listed["annotations"]:
        height, width = sizes[entry["image_id"]]
        mask = rasterise(entry["segmentation"], height, width)
        x, y, w, h = entry["bbox"]
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx(
            [x, y, x + w, y + h], abs=2.5
        )
        assert mask.sum() == pytest.approx(entry["area"], rel=0.06, abs=12)
        if not entry["iscrowd"]:
            assert min(w, h) >= 8
            assert entry["area"] >= 100


def test_objects_do_not_share_pixels(data: Path):
    listed = annotations(data)
    for image in listed["images"]:
        masks = [
            rasterise(entry["segmentation"], image["height"], image["width"])
            for entry in listed["annotations"]
            if entry["image_id"] == image["id"]
        ]
        for i, first in enumerate(masks):
            for second in masks[:i]:
                assert (first & second).sum() < 0.05 * min(first.sum(), second.sum()) + 6


@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_decides_everything(tmp_path: Path, seed: int):
    for name in ("a", "b"):
        synthesise(tmp_path / name, {"train2017": 6}, SynthSettings(size=96, seed=seed))
    synthesise(tmp_path / "c", {"train2017": 6}, SynthSettings(size=96, seed=seed + 1))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_a_longer_data_set_begins_like_a_shorter_one(tmp_path: Path):
    synthesise(tmp_path / "a", {"val2017": 3}, SynthSettings(size=96))
    synthesise(tmp_path / "b", {"val2017": 5}, SynthSettings(size=96))
    for path in (tmp_path / "a" / "val2017").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "val2017" / path.name).read_bytes()


@pytest.mark.parametrize("classes", [5, 8])
def test_every_class_can_be_drawn(classes: int):
    kinds = set()
    for i in range(40):
        scene = draw_scene(np.random.default_rng(i), SynthSettings(size=128, classes=classes))
        assert scene.image.dtype == np.uint8
        for kind, mask in scene.objects:
            kinds.add(kind)
            assert mask.shape == scene.image.shape[:2]
            assert mask.any()
            assert mask_polygons(mask)
    assert kinds == set(range(classes))


def test_shapes_by_name(tmp_path: Path):
    """Chosen ones look as they do among all, under the classes that were asked for."""
    chosen = ("ring", "disc")
    synthesise(tmp_path, {"train2017": 12}, SynthSettings(size=96, names=chosen))
    data = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(1, "ring"), (2, "disc")]
    assert {a["category_id"] for a in data["annotations"]} == {1, 2}
    settings = SynthSettings(size=96, names=chosen)
    holes: dict[int, set[bool]] = {0: set(), 1: set()}
    for i in range(20):
        for label, mask in draw_scene(np.random.default_rng(i), settings).objects:
            rings = trace_mask(mask, 0.5)
            holes[label].add(any(signed_area(ring) < -20 for ring in rings))
    # A ring has a hole, unless it is cut or covered, and a disc has none.
    assert True in holes[0]
    assert holes[1] == {False}


@given(
    x=st.integers(8, 40),
    y=st.integers(8, 40),
    outer=st.integers(16, 25),
    inner=st.integers(3, 10),
)
def test_holes_are_cut_open(x: int, y: int, outer: int, inner: int):
    ys, xs = np.mgrid[:64, :64]
    distance = np.hypot(xs - x, ys - y)
    mask = (distance < outer) & (distance > inner)
    polygons = mask_polygons(mask)
    filled = rasterise(polygons, 64, 64)
    iou = (filled & mask).sum() / (filled | mask).sum()
    assert iou > 0.92
    assert not filled[y, x]


# ---- hard scenes ----

HARD_SETTINGS = SynthSettings(size=128, classes=30, hard=True)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard") / "data"
    synthesise(out, {"train2017": 60}, HARD_SETTINGS)
    return out


def test_hard_data_has_the_same_bytes_again(hard: Path, tmp_path: Path):
    synthesise(tmp_path / "b", {"train2017": 60}, HARD_SETTINGS)
    files = [path.relative_to(hard) for path in hard.rglob("*.*")]
    assert len(files) == 61
    for file in files:
        assert (hard / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_hard_data_is_hard(hard: Path):
    listed = annotations(hard)
    objects = [entry for entry in listed["annotations"] if not entry["iscrowd"]]
    names = [category["name"] for category in listed["categories"]]
    assert names == list(SIMILAR_CLASSES)
    assert len(set(names)) == 30
    # Each class is in a tenth of the images or so, and an image has three at most.
    images = {name: set() for name in range(1, 31)}
    for entry in objects:
        images[entry["category_id"]].add(entry["image_id"])
    assert max(len(found) for found in images.values()) <= 15
    for image in listed["images"]:
        assert sum(image["id"] in found for found in images.values()) <= 3
    # From the smallest to the largest side it is a factor of twenty, or nearly.
    sides = [max(entry["bbox"][2:]) for entry in objects]
    assert min(sides) < 0.06 * 128
    assert max(sides) > 0.6 * 128
    assert HARD.radius[1] / HARD.radius[0] == pytest.approx(20)
    # Many have lost a part to others or to clutter.
    parts = sum(len(entry["segmentation"]) > 1 for entry in objects)
    assert parts > len(objects) / 20


def test_masks_of_hard_data_fit_its_boxes(hard: Path):
    listed = annotations(hard)
    sizes = {image["id"]: (image["height"], image["width"]) for image in listed["images"]}
    for entry in listed["annotations"]:
        mask = rasterise(entry["segmentation"], *sizes[entry["image_id"]])
        x, y, w, h = entry["bbox"]
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx(
            [x, y, x + w, y + h], abs=2.5
        )
        assert mask.sum() == pytest.approx(entry["area"], rel=0.1, abs=16)


def test_masks_are_what_later_things_leave(monkeypatch: pytest.MonkeyPatch):
    """Of all that is painted, in order, each mask is one thing less what lies in front of it."""
    painted: list[np.ndarray] = []
    paint = synth.paint

    def watched(rng: Any, canvas: np.ndarray, cover: np.ndarray, *others: Any):
        painted.append(cover >= 0.5)
        paint(rng, canvas, cover, *others)

    monkeypatch.setattr(synth, "paint", watched)
    fronts = 0
    for i in range(12):
        painted.clear()
        scene = draw_scene(np.random.default_rng(i), HARD_SETTINGS)
        left, over = set(), np.zeros(scene.image.shape[:2], bool)
        for cover in reversed(painted):
            left.add((cover & ~over).tobytes())
            over |= cover
        assert scene.objects
        for _, mask in scene.objects:
            assert mask.tobytes() in left
        fronts += painted[-1].tobytes() != scene.objects[-1][1].tobytes()
    # Clutter lies in front of the last object in most of them.
    assert fronts > 6


@pytest.mark.parametrize("kind", range(len(CLASSES), len(SHAPES)))
def test_similar_shapes_repeat_as_their_names_say(kind: int):
    """The outline's distance from the centre, as a wave round it, has that frequency."""
    count = int(SHAPES[kind].rpartition("-")[2])
    cover = coverage(Shape(kind, 200, 200, 128, 0.3, 1.0), 400, 400)
    y, x = np.mgrid[:400, :400] + 0.5 - 200
    angle = np.arctan2(y, x)
    bins = np.floor((angle + np.pi) / (2 * np.pi) * 360).astype(int).clip(0, 359)
    reach = np.bincount(bins.ravel(), (cover * (np.hypot(x, y) > 60)).ravel(), 360)
    waves = np.abs(np.fft.rfft(reach - reach.mean()))
    assert waves[1:20].argmax() + 1 == count
    assert 0.5 < unit_area(kind) < 3


@pytest.mark.parametrize(
    ("counts", "settings", "flag"),
    [
        ({"train2017": 0}, SynthSettings(), "--train"),
        ({"val2017": -1}, SynthSettings(), "--val"),
        (COUNTS, SynthSettings(size=8), "--size"),
        (COUNTS, SynthSettings(classes=4), "--classes"),
        (COUNTS, SynthSettings(classes=9), "--classes"),
        (COUNTS, SynthSettings(classes=31, hard=True), "--classes: expected 5 to 30"),
        (COUNTS, SynthSettings(hard=True, names=("disc",)), "--names disc: .*gear-8"),
        (COUNTS, SynthSettings(seed=-1), "--seed"),
        (COUNTS, SynthSettings(names=("disc", "disk")), "--names disc disk: .*crescent"),
        (COUNTS, SynthSettings(names=("disc", "ring", "disc")), "--names"),
    ],
)
def test_senseless_settings_are_refused(
    tmp_path: Path, counts: dict[str, int], settings: SynthSettings, flag: str
):
    with pytest.raises(UserError, match=flag):
        synthesise(tmp_path / "x", counts, settings)
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synth, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            synthesise(tmp_path, {"train2017": 2, "val2017": 2}, SynthSettings(size=64))
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished"]
    synthesise(tmp_path, {"train2017": 2}, SynthSettings(size=64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations", "train2017"]


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="exists already"):
        synthesise(tmp_path, COUNTS, SynthSettings())
