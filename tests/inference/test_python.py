"""casc from Python: what `import casc` offers, and docs/python.md, block by block."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import casc
from casc.checkpoints import format as checkpoint
from casc.config import to_json
from casc.errors import UserError
from casc.evaluate.coco_results import read_results
from casc.evaluate.ground_truth import read_coco
from casc.evaluate.metrics import evaluate
from casc.inference import images
from casc.inference.detector import Detector
from casc.inference.images import Picture, read_image
from casc.inference.results import Results
from casc.inference.settings import Settings
from casc.model.detector import init
from casc.train.state import new_state
from data_tools.shapes import CLASSES
from data_tools.synth import SynthSettings, synthesise
from recipes.demo import demo

ROOT = Path(__file__).resolve().parents[2]


def test_casc_offers_four_functions_and_imports_them_late():
    code = """
import sys, casc
print({"torch", "numpy", "tyro"} & set(sys.modules), sorted(n for n in dir(casc) if n[0] != "_"))
import casc.train.loop
import casc.evaluate.metrics as metrics
print(callable(casc.train), callable(casc.evaluate), callable(casc.load), callable(casc.shard))
"""
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == "set() ['evaluate', 'load', 'shard', 'train']\nTrue True True True\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        casc.lode  # noqa: B018
    with pytest.raises(TypeError, match="shards"):
        casc.evaluate(None)  # type: ignore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """What docs/python.md speaks of: a run that finds discs everywhere, a photo, a data set."""
    folder = tmp_path_factory.mktemp("python")
    list(synthesise(folder / "COCO", {"train2017": 6, "val2017": 4}, SynthSettings(96, 5)))
    recipe = replace(demo(), image=tiny[1], model=replace(tiny[0], classes=5))
    params, buffers = init(recipe.model, torch.Generator().manual_seed(0))
    for stage in range(3):
        params[f"roi_head.bbox_head.{stage}.fc_cls.bias"][0] = 6
    classes = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES[:5])]
    metadata = {"recipe": json.dumps(to_json(recipe)), "classes": json.dumps(classes)}
    state = new_state(recipe.model, params, buffers, torch.device("cpu"), torch.contiguous_format)
    checkpoints = folder / "runs" / "shapes" / "checkpoints"
    checkpoint.save(checkpoints, state, metadata=metadata, position={"step": 0})
    # Larger than the network sees, and turned: both are undone.
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (52, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1440, 1040)).save(folder / "photo.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return casc.load(folder / "runs" / "shapes")


def test_every_block_of_the_page_runs(folder: Path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text()
    monkeypatch.chdir(folder)
    names: dict = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert len(names["results"]) > 0
    assert 0 <= names["figures"]["bbox"]["AP50"] <= 1
    assert (folder / "annotated.png").exists()


def same(a: Results, b: Results) -> bool:
    columns = zip(a.found[3:], b.found[3:], strict=True)
    return all(
        x is y or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in columns
    )


def test_an_image_is_the_same_however_it_comes(folder: Path, detector: Detector, monkeypatch):
    path = folder / "photo.jpg"
    by_path = detector(path)
    assert by_path.image.shape == (1440, 1040, 3)
    upright = by_path.image
    monkeypatch.setattr(images, "read_remote", lambda url, loading: path.read_bytes())
    with Image.open(path) as opened:
        ways: list[Picture] = [str(path), "http://x/photo.jpg", path.read_bytes(), opened, upright]
        ways += [upright[:, ::-1][:, ::-1], torch.from_numpy(upright).permute(2, 0, 1)]
        ways += [torch.from_numpy(upright).permute(2, 0, 1) / 255]
        assert all(same(by_path, detector(way)) for way in ways)
    assert not same(by_path, detector(upright[..., ::-1]))


def test_tiff_is_turned_once(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.tif", "a.png"):
        Image.fromarray(np.arange(600, dtype=np.uint8).reshape(10, 20, 3)).save(
            tmp_path / name, exif=exif
        )
    assert read_image(tmp_path / "a.tif").shape == (20, 10, 3)
    assert (read_image(tmp_path / "a.tif") == read_image(tmp_path / "a.png")).all()
    with Image.open(tmp_path / "a.tif") as opened:
        assert (read_image(opened) == read_image(tmp_path / "a.png")).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((4, 5), np.uint8), r"\[h, w, 3\] uint8 RGB"),
        (np.zeros((4, 5, 3)), r"not \[4, 5, 3\] float64"),
        (np.zeros((0, 5, 3), np.uint8), r"\[h, w, 3\]"),
        (torch.zeros(4, 5, 3), r"\[3, h, w\], not \[4, 5, 3\]"),
        (torch.full((3, 4, 5), 2.0), r"in \[0, 1\]"),
        (torch.full((3, 4, 5), float("nan")), r"in \[0, 1\]"),
        (torch.zeros((3, 4, 5), dtype=torch.int64), "uint8, or float"),
        (b"not an image", "known format"),
        (b"", "empty"),
    ],
)
def test_what_is_no_image_is_refused(detector: Detector, wrong, says: str):
    with pytest.raises(UserError, match=says):
        detector(wrong)


def test_settings_of_a_call_are_checked(detector: Detector):
    with pytest.raises(UserError, match="threshold"):
        detector([], threshold=1.5)
    with pytest.raises(UserError, match="batch"):
        detector([], batch=0)


def test_batches_find_what_single_images_do(detector: Detector):
    rng = np.random.default_rng(0)
    sizes = [(60, 90), (90, 60), (300, 420), (61, 90)]
    every = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    single = [detector(image) for image in every]
    for together in (detector(every, batch=3), list(detector.stream(iter(every), batch=2))):
        for one, other in zip(single, together, strict=True):
            assert one.image.shape == other.image.shape
            assert len(one) == len(other)
            np.testing.assert_allclose(one.boxes, other.boxes, atol=0.05)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_threads_share_a_detector(detector: Detector):
    rng = np.random.default_rng(0)
    every = [rng.integers(0, 256, (40 + 8 * i, 64, 3), dtype=np.uint8) for i in range(4)]
    alone = [detector(image) for image in every]
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(casc.load(detector.source), every))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_threshold_below_the_models_own_takes_effect(detector: Detector):
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    model = detector.model
    strict = replace(model, inference=replace(model.inference, score_threshold=0.999))
    high = replace(detector, model=strict)
    assert len(high(image, threshold=0.999)) == 0
    assert same(high(image, threshold=0.05), detector(image, threshold=0.05))
    assert len(high(image, threshold=0.05)) > 0


def test_settings_change_what_is_found(detector: Detector):
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    usual = detector(image, threshold=0.0)
    for settings in (Settings(), Settings(nms_iou=0.5, detections=10, soft_nms="off")):
        assert same(usual, detector.with_settings(settings)(image, threshold=0.0))
    assert len(detector.with_settings(Settings(detections=3))(image)) == 3
    many = detector.with_settings(Settings(detections=300, nms_iou=1.0))(image)
    assert len(many) > len(usual)
    stars = detector.with_settings(Settings(classes=("star",), threshold=0.0))
    assert set(stars(image, threshold=0.0).names) == {"star"}
    wrong = Settings(nms_iou=1.5), Settings(threshold=-1.0), Settings(detections=0)
    for settings in (*wrong, Settings(classes=("dsic",))):
        with pytest.raises(UserError, match=r"--|no class"):
            detector.with_settings(settings)


def test_evaluation_counts_as_many_detections_as_asked(folder: Path, detector: Detector):
    casc.shard(folder / "COCO", folder / "made", say=lambda line: None)
    with pytest.raises(UserError, match="--detections 300 makes it give more"):
        casc.evaluate(detector, folder / "made", max_dets=300)
    with pytest.raises(UserError, match="more than 10"):
        casc.evaluate(detector, folder / "made", max_dets=10)
    many, file = detector.with_settings(Settings(detections=300)), folder / "results.json"
    evaluation = casc.evaluate(many, folder / "made", max_dets=300, results=file, errors=True)
    assert "AR300" in evaluation.figures["segm"]
    # What was written is what was measured.
    truth = read_coco(folder / "COCO" / "annotations" / "instances_val2017.json")
    again = evaluate(truth, read_results(file), max_dets=300)
    assert again.figures == evaluation.figures
    assert evaluation.errors is not None
    assert sum(evaluation.errors["segm"]["count"].values()) > 0


def test_results_are_read_like_an_array(folder: Path, detector: Detector):
    found = detector(folder / "photo.jpg", threshold=0.1)
    assert found.masks is not None
    assert len(found) == len(found.names) == len(found.masks) > 2
    assert found.masks.shape == (len(found), *found.image.shape[:2])
    for i, one in enumerate(found):
        assert (one.score, one.label) == (found.scores[i], found.labels[i])
        assert one.box == tuple(found.boxes[i].tolist())
        assert one.name == detector.names[one.label]
        assert (one.mask == found.masks[i]).all()
    assert len(found[-1]) == 1
    assert found[-1].scores[0] == found.scores[-1]
    assert len(found[1:]) == len(found) - 1
    with pytest.raises(IndexError):
        found[len(found)]
    middle = float(found.scores[len(found) // 2])
    assert len(found.filter(threshold=middle)) == (found.scores >= middle).sum()
    assert len(found.filter(classes=["disc"])) == (found.labels == 0).sum()
    assert len(found.filter(classes=[1])) == (found.labels == 1).sum()
    with pytest.raises(UserError, match="no class 'dics'; the model knows disc"):
        found.filter(classes=["dics"])
    with pytest.raises(UserError, match="no class 5"):
        found.filter(classes=[5])


def test_results_are_written_as_others_read_them(folder: Path, detector: Detector):
    found = detector(folder / "photo.jpg", threshold=0.1)
    coco, plain = found.to_coco(17), found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["height"], plain["width"]) == found.image.shape[:2]
    assert found.masks is not None
    for i, (one, other) in enumerate(zip(coco, plain["detections"], strict=True)):
        assert (one["image_id"], one["category_id"]) == (17, found.labels[i] + 1)
        x0, y0, x1, y1 = other["box"]
        assert one["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert (coco_mask.decode(one["segmentation"]) == found.masks[i]).all()
        assert one["segmentation"] == other["mask"]
    assert found.draw().size == found.image.shape[1::-1]
    assert json.dumps(found[:0].to_dict()["detections"]) == "[]"


def test_supervision_takes_them(folder: Path, detector: Detector):
    supervision = pytest.importorskip("supervision")
    found = detector(folder / "photo.jpg", threshold=0.1)
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert (theirs.xyxy == found.boxes).all()
    assert (theirs.mask == found.masks).all()
    assert theirs.data["class_name"].tolist() == found.names
    assert len(theirs[theirs.confidence > 0.99]) == (found.scores > 0.99).sum()
    assert len(found[:0].to_supervision()) == 0


def test_nothing_that_is_not_finite_passes(detector: Detector):
    broken = replace(detector, params={k: v * float("nan") for k, v in detector.params.items()})
    found = broken(np.zeros((40, 40, 3), np.uint8))
    assert len(found) == 0
    good = detector(np.full((90, 90, 3), 99, np.uint8), threshold=0.0)
    with pytest.raises(UserError, match="detection 0: its score is not finite"):
        replace(good, found=good.found._replace(scores=good.found.scores * np.float32("nan")))


def test_evaluating_says_what_does_not_fit(folder: Path, detector: Detector):
    casc.shard(folder / "COCO", folder / "made", say=lambda line: None)
    with pytest.raises(UserError, match="no such split; it has train2017, val2017"):
        casc.evaluate(detector, folder / "made", "test")
    other = replace(detector, categories=(*detector.categories[1:], detector.categories[0]))
    with pytest.raises(UserError, match=r"class 0 is 'triangle' \(id 2\), in .*made it is 'disc'"):
        casc.evaluate(other, folder / "made")
