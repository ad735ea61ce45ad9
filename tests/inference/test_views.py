"""Tiles, flips and scales: what several looks at an image find, as one."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import batched_nms

from casc.cli import main as cli
from casc.data.batch import Batch
from casc.data.index import Category
from casc.data.loader_config import EvalLoaderConfig
from casc.data.stream import evaluation_batches
from casc.device.compute import Compute
from casc.errors import UserError
from casc.evaluate.coco_results import ImageDetections
from casc.evaluate.run import evaluate, find_in_stream
from casc.inference.detector import Detector
from casc.inference.images import batch_of
from casc.inference.results import Results
from casc.inference.settings import Settings, Views
from casc.inference.views import View, merged, tile_starts, views_of
from casc.model.detector import init
from casc.model.detector_config import DetectorConfig, InferenceConfig
from casc.model.forward_detect import Detections
from casc.model.layers import grown
from casc.model.preprocess import ImageConfig

CPU = torch.device("cpu")
CATEGORIES = (Category(1, "red"), Category(2, "green"))
SIDE, CELLS = 200, 28


@given(st.integers(1, 3000), st.integers(32, 900), st.floats(0, 0.9))
def test_tiles_reach_from_end_to_end_and_overlap(length: int, side: int, overlap: float):
    starts = tile_starts(length, side, overlap)
    assert starts[0] == 0
    if length <= side:
        assert starts == [0]
        return
    assert starts[-1] == length - side
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (side - gaps >= int(overlap * side)).all()
    # As few as that takes.
    assert (len(starts) - 2) * int(side * (1 - overlap)) < length - side


def test_looks_are_the_whole_and_tiles_at_each_scale_and_mirrored():
    views = views_of(Views(tiles=100, overlap=0.0, flips=True, scales=(64, 96)), 80, 150, 90)
    windows = [view[:4] for view in views]
    assert len(views) == 3 * 2 * 2
    assert set(windows) == {(0, 0, 150, 90), (0, 0, 100, 90), (50, 0, 100, 90)}
    assert {view.short for view in views} == {64, 96}
    assert views_of(Views(tiles=150), 80, 150, 90) == [View(0, 0, 150, 90, False, 80)]
    image = np.arange(150 * 90 * 3).reshape(150, 90, 3)
    assert (View(50, 0, 100, 90, True, 80).of(image) == image[50:, ::-1]).all()


def painted(batch: Batch, most: int) -> Detections:
    """Each colour above 100 is an object, its class the channel; larger images show nothing."""
    found = Detections(
        *(torch.zeros(1, 8, 4), torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.long)),
        *(torch.zeros(1, 8, dtype=torch.bool), torch.zeros(1, 8, CELLS, CELLS)),
    )
    assert found.masks is not None
    height, width = (int(side) for side in batch.size[0])
    image = batch.image[0, :height, :width].numpy()
    if max(height, width) > most:
        return found
    colours = [c for c in np.unique(image.reshape(-1, 3), axis=0) if c.max() > 100]
    for row, colour in enumerate(colours):
        inside = (image == colour).all(axis=2)
        y, x = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        x0, y0, x1, y1 = x[0], y[0], x[-1] + 1, y[-1] + 1
        part = Image.fromarray(inside[y0:y1, x0:x1]).convert("F")
        mask = np.array(part.resize((CELLS, CELLS), Image.Resampling.BOX)) / 255
        found.boxes[0, row] = torch.tensor([x0, y0, x1, y1])
        # The larger part is found more surely.
        found.scores[0, row] = 0.5 + 0.4 * inside.sum() / inside.size
        found.labels[0, row] = int(colour.argmax())
        found.valid[0, row] = True
        found.masks[0, row] = torch.from_numpy(mask)
    return found


def painter(views: Views, most: int = SIDE) -> Detector:
    class Painter(Detector):
        def detect(self, batch, size, inference=None, image=None):
            return painted(batch, most)

    config = DetectorConfig(classes=2)
    compute = Compute(compile=False)
    found = Painter({}, {}, config, ImageConfig(), compute, CPU, CATEGORIES, views=views)
    assert isinstance(found, Painter)
    return found


def assert_found(found: Results, masks: list[np.ndarray], iou: float = 0.9) -> None:
    """Each of the objects, once, best first in some order."""
    assert len(found) == len(masks)
    pasted = found.masks
    assert pasted is not None
    for mask in masks:
        overlaps = [(mask & other).sum() / (mask | other).sum() for other in pasted]
        assert max(overlaps) >= iou
        row = int(np.argmax(overlaps))
        y, x = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])
        assert np.abs(found.boxes[row] - box).max() <= 1


@pytest.mark.parametrize("most", [SIDE, 10_000])
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [
        (20, 20, 60, 60),  # within a tile
        (120, 130, 100, 90),  # over four tiles
        (150, 0, 20, 500),  # from side to side
        (0, 0, 400, 500),  # all of the image
        (168, 10, 30, 30),  # in the overlap of two, whole in one
    ],
)
def test_an_object_is_one_whatever_tiles_cut(most: int, top, left, height, width):
    image = np.full((400, 500, 3), 40, np.uint8)
    image[top : top + height, left : left + width] = (200, 0, 0)
    found = painter(Views(tiles=SIDE), most)(image, threshold=0.0)
    assert_found(found, [image[..., 0] == 200], 0.98)
    assert found.image.shape == (400, 500, 3)


def test_boxes_without_masks_are_joined_too():
    image = np.full((400, 500, 3), 40, np.uint8)
    image[120:220, 130:420] = (200, 0, 0)
    image[300:330, 180:215] = (0, 200, 0)

    class Boxes(Detector):
        def detect(self, batch, size, inference=None, image=None):
            return painted(batch, SIDE)._replace(masks=None)

    with_masks = painter(Views(tiles=SIDE, flips=True))
    fields = {name: getattr(with_masks, name) for name in FIELDS}
    found = Boxes(**fields)(image, threshold=0.0)
    assert found.masks is None
    assert sorted(found.boxes.tolist()) == [[130, 120, 420, 220], [180, 300, 215, 330]]


def test_a_slanting_object_is_joined_where_boxes_hardly_overlap():
    image = np.full((500, 500, 3), 40, np.uint8)
    y, x = np.mgrid[:500, :500]
    bar = (np.abs(y - x) < 25) & (x > 20) & (x < 480) & (y > 20) & (y < 480)
    image[bar] = (200, 0, 0)
    assert_found(painter(Views(tiles=SIDE))(image, threshold=0.0), [bar], 0.75)


def test_different_objects_stay_apart():
    image = np.full((400, 400, 3), 40, np.uint8)
    # A small one before a large one, both cut by tiles; neighbours that share a border; classes.
    image[100:300, 100:300] = (200, 0, 0)
    image[180:220, 180:220] = (210, 0, 0)
    image[310:340, 150:195] = (220, 0, 0)
    image[310:340, 195:240] = (230, 0, 0)
    image[350:380, 150:240] = (0, 200, 0)
    masks = [image[..., 0] == value for value in (200, 210, 220, 230)]
    found = painter(Views(tiles=SIDE))(image, threshold=0.0)
    assert_found(found, [*masks, image[..., 1] == 200], 0.85)
    assert sorted(found.names) == ["green"] + ["red"] * 4


def test_each_tile_may_give_as_many_as_the_model():
    image = np.full((200, 1000, 3), 40, np.uint8)
    for number in range(6):
        image[20:40, 20 + 150 * number : 40 + 150 * number] = (200 + number, 0, 0)
    detector = painter(Views(tiles=SIDE))
    few = replace(detector.model, inference=InferenceConfig(detections=1))
    assert len(replace(detector, model=few)(image, threshold=0.0)) == 6
    assert detector.most is None
    assert painter(Views(flips=True)).most == 100


@pytest.mark.parametrize(
    "views",
    [
        Views(tiles=SIDE, flips=True, scales=(300, 600)),
        Views(tiles=SIDE),
        Views(flips=True),
        Views(),
    ],
)
def test_nothing_found_is_nothing(views: Views):
    found = painter(views)(np.full((400, 500, 3), 40, np.uint8), threshold=0.0)
    assert len(found) == 0
    assert found.masks is not None
    assert found.masks.shape == (0, 400, 500)
    assert found.to_coco() == []


def test_turned_photographs_are_cut_upright(tmp_path: Path):
    image = np.full((300, 420, 3), 40, np.uint8)
    image[100:260, 150:250] = (200, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    detector = painter(Views(tiles=SIDE, flips=True))
    found = detector(tmp_path / "a.png", threshold=0.0)
    assert found.image.shape == (420, 300, 3)
    assert_found(found, [np.rot90(image[..., 0] == 200)], 0.98)


@pytest.fixture(scope="module")
def detector(tiny) -> Detector:
    """Random weights that find discs everywhere."""
    config, image, _ = tiny
    config = replace(config, classes=2, inference=replace(config.inference, detections=20))
    params, buffers = init(config, torch.Generator().manual_seed(0))
    for stage in range(3):
        params[f"roi_head.bbox_head.{stage}.fc_cls.bias"][0] = 6
    return Detector(params, buffers, config, image, Compute(compile=False), CPU, CATEGORIES)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(a: ImageDetections, b: ImageDetections) -> bool:
    pairs = zip(a[1:], b[1:], strict=True)
    assert a.masks is not None
    return all(
        x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in pairs
    )


def test_an_image_that_fits_a_tile_is_looked_at_once(detector: Detector):
    tiled, image = detector.with_views(Views(tiles=120)), noise(100, 120)
    assert same(tiled(image, threshold=0.0).found, detector(image, threshold=0.0).found)
    assert not same(tiled(noise(100, 130)).found, detector(noise(100, 130)).found)


def test_flips_and_scales_are_merged_as_nms_merges_them(detector: Detector):
    """Boxes as torchvision's suppression of all looks together has them, masks their mean."""
    image = noise(90, 120)
    looks = []
    for short in (96, 64):
        long = detector.image.long * short // detector.image.short
        sized = replace(detector, image=replace(detector.image, short=short, long=long))
        for mirrored in (False, True):
            found = sized(image[:, ::-1] if mirrored else image, threshold=0.0).found
            boxes, masks = found.boxes.copy(), found.masks
            assert masks is not None
            if mirrored:
                boxes[:, [0, 2]], masks = 120 - boxes[:, [2, 0]], masks[:, :, ::-1]
            looks.append((boxes, found.scores, found.labels, masks))
    boxes, scores, labels, masks = (np.concatenate(column) for column in zip(*looks, strict=True))
    tensors = [torch.from_numpy(t) for t in (boxes, scores, labels)]
    iou = detector.model.inference.nms_iou
    keep = batched_nms(tensors[0], tensors[1], tensors[2], iou).numpy()[:20]
    views = Views(flips=True, scales=(96, 64))
    found = detector.with_views(views)(image, threshold=0.0).found
    assert len(found.scores) == 20
    np.testing.assert_allclose(found.scores, scores[keep], atol=1e-6)
    np.testing.assert_allclose(found.boxes, boxes[keep], atol=1e-4)
    assert (found.labels == labels[keep]).all()
    # What only one look has found keeps its mask; others are a mean, which lies between.
    assert found.masks is not None
    changed = (found.masks != masks[keep]).any(axis=(1, 2))
    assert 0 < changed.sum() < 20


@pytest.mark.parametrize("channels", [1, 5])
def test_planes_are_looked_at_as_their_rgb_copy(detector: Detector, channels: int):
    """Planes that are alike, by weights that are made to fit."""
    stem = "backbone.conv1.weight"
    image = replace(detector.image, mean=(100.0,) * 3, std=(50.0,) * 3)
    views = Views(tiles=80, flips=True, scales=(64, 96))
    rgb = replace(detector, image=image, views=views)
    params = {**detector.params, stem: grown(detector.params[stem], channels)}
    planes = replace(rgb, params=params, image=replace(image, channels=channels))
    plane = noise(100, 120)[..., :1]
    expected = rgb(plane.repeat(3, axis=2), threshold=0.0).found
    copies = plane.repeat(channels, axis=2)
    (evaluated,) = planes.find([(batch_of({7: copies}, (128, 128), 1), (96, 128))])
    for found in (planes(copies, threshold=0.0).found, evaluated):
        assert len(found.scores) == len(expected.scores) > 20
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


def test_masks_of_two_looks_are_averaged():
    rng = np.random.default_rng(0)
    box, views = np.array([[10, 20, 40, 60]], np.float32), views_of(Views(flips=True), 80, 90, 100)
    masks = rng.random((2, 1, CELLS, CELLS)).astype(np.float32)
    one = ImageDetections(0, 90, 100, box, np.array([0.9], np.float32), np.array([1]), masks[0])
    mirrored = np.array([[60, 20, 90, 60]], np.float32)
    other = one._replace(boxes=mirrored, masks=masks[1][..., ::-1], scores=one.scores / 2)
    found = merged(views, [one, other], (90, 100), InferenceConfig())
    assert found.boxes.tolist() == box.tolist()
    assert found.scores.tolist() == one.scores.tolist()
    assert found.masks is not None
    np.testing.assert_allclose(found.masks, masks.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("views", "says"),
    [
        (Views(tiles=10), "--tiles 10: must be at least 32"),
        (Views(tiles=100, overlap=1.0), r"--overlap 1.0: must be in"),
        (Views(overlap=0.3), "--overlap 0.3: of what"),
        (Views(scales=(64, 8)), "--scales 64 8: each must be"),
        (Views(scales=(64, 64)), "--scales 64 64: one is there twice"),
    ],
)
def test_looks_that_cannot_be_are_refused(detector: Detector, views: Views, says: str):
    with pytest.raises(UserError, match=says):
        detector.with_views(views)


def test_soft_nms_and_several_looks_exclude_each_other(detector: Detector):
    soft = detector.with_settings(Settings(soft_nms="linear"))
    soft.with_views(Views(scales=(64,)))
    with pytest.raises(UserError, match="--soft-nms: what tiles"):
        soft.with_views(Views(flips=True))


def test_evaluation_looks_as_prediction_does(tiny_recipe, detector: Detector, tmp_path: Path):
    views = Views(tiles=40, flips=True)
    looking = detector.with_views(views)
    stream = evaluation_batches(
        tiny_recipe.data,
        evaluation_split(tiny_recipe.data),
        batch=2,
        loading=EvalLoaderConfig(workers=0),
    )
    pictures = {}

    class Seen(Detector):
        def _look(self, images, inference, batch):
            pictures.update({len(pictures) + i: image.copy() for i, image in enumerate(images)})
            return super()._look(images, inference, batch)

    seeing = Seen(**{f: getattr(looking, f) for f in FIELDS})
    found = list(find_in_stream(seeing, stream, [(64, 96), (96, 64)]))
    assert len(found) == len(pictures) == 5
    for image, each in zip(pictures.values(), found, strict=True):
        alone = looking(image, threshold=detector.model.inference.score_threshold).found
        np.testing.assert_allclose(each.boxes, alone.boxes, atol=0.02)
        np.testing.assert_allclose(each.scores, alone.scores, atol=1e-5)
    evaluation = evaluate(looking, tiny_recipe.data, "val", max_dets=300)
    assert "AR300" in evaluation.figures["bbox"]


FIELDS = ("params", "buffers", "model", "image", "compute", "device", "categories", "views")


def evaluation_split(folder: Path):
    from casc.data.index import read_index

    return read_index(folder).splits["val"]


def test_commands_take_them(detector: Detector, tmp_path: Path, monkeypatch, tiny_recipe):
    monkeypatch.setattr("casc.inference.load.load", lambda *args, **kwargs: detector)
    Image.fromarray(noise(100, 200)).save(tmp_path / "a.png")
    settings = ("--detections", "5", "--threshold", "0")

    def found(*arguments: str) -> list[dict]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["predict", "run", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"),
                      *settings, *arguments])  # fmt: skip
        assert stop.value.code == 0
        return json.loads((tmp_path / "out" / "predictions.json").read_text())

    assert len(found()) == 5
    tiled = found("--tiles", "100", "--overlap", "0")
    assert len(tiled) > 5
    assert found("--tiles", "100") != tiled
    assert found("--flips", "--scales", "64", "96") != found("--flips")
    # Evaluation, too, makes of scores what it is told to.
    for arguments in ((), ("--detections", "1"), ("--detections", "1", "--tiles", "32")):
        results = tmp_path / "results.json"
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", "run", str(tiny_recipe.data), "--split", "val", "--results",
                      str(results), "--loading.workers", "0", *arguments])  # fmt: skip
        assert stop.value.code == 0
        count = len(json.loads(results.read_text()))
        assert (count == 5) == (arguments == ("--detections", "1"))


def test_paths_come_from_standard_input(detector: Detector, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("casc.inference.load.load", lambda *args, **kwargs: detector)
    for name in ("a.png", "b c.png", "d.png"):
        Image.fromarray(noise(40, 60)).save(tmp_path / name)
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"{tmp_path / 'b c.png'}\n\n{tmp_path / 'd.png'}\n")
    )
    given = (str(tmp_path / "a.png"), "-", "--out", str(tmp_path / "out"), "--threshold", "0")
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "run", *given])
    assert stop.value.code == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(dict.fromkeys(r["file_name"] for r in found)) == ["a.png", "b c.png", "d.png"]
