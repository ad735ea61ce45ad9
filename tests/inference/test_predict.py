import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from casc.data.batch import Batch
from casc.data.index import Category, canvas
from casc.data.loader_config import EvalLoaderConfig
from casc.data.stream import evaluation_batches
from casc.device.compute import Compute
from casc.errors import UserError
from casc.evaluate.coco_results import image_results
from casc.evaluate.run import find_in_stream
from casc.inference import images
from casc.inference.detector import Detector
from casc.inference.image_files import base_name, find_images, listed_ids, targets_of
from casc.inference.images import batch_of, canvas_of, holding_canvas, read_image
from casc.inference.predict import predict
from casc.model.detector import init
from casc.model.detector_config import DetectorConfig
from casc.model.forward_detect import Detections
from casc.model.preprocess import ImageConfig
from data_tools.coco import check_annotations
from data_tools.plan import Settings
from data_tools.shard import Run, shard_dataset

CPU = torch.device("cpu")

CATEGORIES = (Category(4, "red"), Category(9, "green"))


def find(batch: Batch) -> Detections:
    """Find the red and the green rectangle, in pixels of the batch as the detector would."""
    slots = 3
    boxes, scores = torch.zeros(1, slots, 4), torch.zeros(1, slots)
    image = batch.image[0].int()
    height, width = (int(v) for v in batch.size[0])
    assert not image[height:].any()
    assert not image[:, width:].any()
    for label in range(2):
        hit = (image[..., label] - image[..., 1 - label]) > 60
        if hit.any():
            y, x = (np.flatnonzero(hit.any(dim=d).numpy()) for d in (1, 0))
            boxes[0, label] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1]).float()
            scores[0, label] = 0.9 - 0.5 * label
    scores[0, 2] = 0.99  # not valid, whatever the score
    return Detections(
        boxes,
        scores,
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[bool(scores[0, 0]), bool(scores[0, 1]), False]]),
        torch.ones(1, slots, 28, 28),
    )


def detecting(find: Callable[[Batch], Detections]) -> Detector:
    class Finder(Detector):
        def detect(self, batch, size, inference=None, image=None):
            return find(batch)

    config = DetectorConfig(classes=2)
    return Finder({}, {}, config, ImageConfig(), Compute(compile=False), CPU, CATEGORIES)


def save(path: Path, width: int = 200, height: int = 150, **options) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    image[height // 3 : height // 3 * 2, width // 4 : width // 2] = (230, 20, 20)
    image[-height // 5 :, -width // 5 :] = (20, 230, 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def run(paths: Sequence[Path | str], out: Path, **options):
    options = {"log": lambda line: None, **options}
    return predict(detecting(find), paths, out, **options)


def test_pictures_and_results_are_written(tmp_path: Path):
    save(tmp_path / "photos" / "a.png")
    lines: list[str] = []
    done = run([tmp_path / "photos" / "a.png"], tmp_path / "out", log=lines.append)
    assert done.exit_code == 0
    assert done.pictures == [tmp_path / "out" / "a.jpg"]
    stored = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert stored == done.results
    assert done.results_file == tmp_path / "out" / "predictions.json"
    (only,) = stored
    assert set(only) == {
        "image_id",
        "file_name",
        "category_id",
        "bbox",
        "score",
        "segmentation",
    }
    assert (only["image_id"], only["file_name"], only["category_id"]) == (1, "a.png", 4)
    assert only["bbox"] == [50, 50, 50, 50]
    assert only["segmentation"]["size"] == [150, 200]
    assert coco_mask.toBbox(only["segmentation"]).tolist() == [50, 50, 50, 50]
    assert lines == [
        f"{tmp_path / 'photos' / 'a.png'}: 1 red -> {tmp_path / 'out' / 'a.jpg'}",
    ]
    with Image.open(done.pictures[0]) as picture:
        assert picture.width >= 200
        assert picture.width / picture.height == pytest.approx(200 / 150)


def test_threshold_chooses(tmp_path: Path):
    save(tmp_path / "a.png")
    low = run([tmp_path / "a.png"], tmp_path / "out", threshold=0.3)
    assert [r["category_id"] for r in low.results] == [4, 9]
    high = run([tmp_path / "a.png"], tmp_path / "out", threshold=0.95)
    assert high.results == []
    assert high.pictures[0].exists()
    with pytest.raises(UserError, match="threshold must"):
        run([], tmp_path / "out", threshold=50)


@pytest.mark.parametrize("size", [(2000, 1500), (1500, 2100), (3000, 400), (60, 40)])
def test_large_images_keep_their_own_coordinates(tmp_path: Path, size: tuple[int, int]):
    width, height = size
    save(tmp_path / "big.png", width, height)
    (found,) = run([tmp_path / "big.png"], tmp_path / "out").results
    x, y, w, h = found["bbox"]
    slack = max(width, height) / 320 * 1.5 + 1e-3
    assert abs(x - width // 4) <= slack
    assert abs(y - height // 3) <= slack
    assert abs(x + w - width // 2) <= slack
    assert abs(y + h - height // 3 * 2) <= slack
    assert found["segmentation"]["size"] == [height, width]


def test_bad_images_are_reported_and_the_others_done(tmp_path: Path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"not an image")
    save(tmp_path / "in" / "c.png")
    data = (tmp_path / "in" / "c.png").read_bytes()
    (tmp_path / "in" / "c.png").write_bytes(data[: len(data) // 2])
    save(tmp_path / "in" / "d.png")
    lines: list[str] = []
    done = run(
        [tmp_path / "in", tmp_path / "none.jpg", tmp_path / "*.tiff"],
        tmp_path / "out",
        log=lines.append,
    )
    assert done.exit_code == 1
    assert [p.name for p in done.pictures] == ["a.jpg", "d.jpg"]
    failed = {Path(name).name: reason for name, reason in done.failed}
    assert set(failed) == {"b.jpg", "c.png", "none.jpg", "*.tiff"}
    assert "known format" in failed["b.jpg"]
    assert failed["none.jpg"] == "No such file or directory"
    assert failed["*.tiff"] == "no file matches"
    assert sum("skipped" in line for line in lines) == 4


def test_folders_patterns_and_repeats(tmp_path: Path):
    for name in ("b.JPG", "a.png", "notes.txt", "deeper/c.png", ".hidden/d.png", ".e.png"):
        save(tmp_path / name, format="PNG")
    (tmp_path / "empty").mkdir()
    files, failed = find_images([tmp_path, str(tmp_path / "*.png"), tmp_path / "notes.txt"])
    names = [f.relative_to(tmp_path).as_posix() for f in files if isinstance(f, Path)]
    assert names == ["a.png", "b.JPG", "deeper/c.png", "notes.txt"]
    assert failed == []
    files, failed = find_images([str(tmp_path / "**" / "*.png"), tmp_path / "empty"])
    assert sorted(map(base_name, files)) == ["a.png", "c.png"]
    assert failed == [(str(tmp_path / "empty"), "the folder has no images")]


def test_what_names_no_file_is_told(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found, failed = find_images(["", "http://", "http://[", "https://a/b.png"])
    assert found == ["https://a/b.png"]
    assert [name for name, _ in failed] == ["''", "http://", "http://["]
    assert targets_of([tmp_path / "loop"], tmp_path / "out") == [tmp_path / "out" / "loop.jpg"]


def test_names_with_brackets_are_files_first(tmp_path: Path):
    save(tmp_path / "photo [1].png")
    files, _ = find_images([tmp_path / "photo [1].png"])
    assert [*map(base_name, files)] == ["photo [1].png"]


def test_same_names_dont_overwrite_each_other(tmp_path: Path):
    for name in ("x/a.png", "y/a.png", "y/a-2.png"):
        save(tmp_path / name)
    done = run([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert len({p.name for p in done.pictures}) == 3
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 3
    assert {r["file_name"] for r in done.results} == {
        (tmp_path / name).as_posix() for name in ("x/a.png", "y/a.png", "y/a-2.png")
    }


def test_input_images_are_never_overwritten(tmp_path: Path):
    save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(UserError, match=r"a\.jpg: would overwrite"):
        run([tmp_path / "a.jpg"], tmp_path)
    assert (tmp_path / "a.jpg").read_bytes() == before


def test_ids_are_places_or_as_a_list_says(tmp_path: Path, write_shards):
    for name in ("000000000139.png", "in/000000000285.png"):
        save(tmp_path / "photos" / name)
    folder = tmp_path / "photos"
    assert [r["image_id"] for r in run([folder], tmp_path / "out").results] == [1, 2]
    entries = [{"id": 7, "file_name": "000000000139.png", "width": 1, "height": 1}]
    entries.append({"id": 8, "file_name": "in/000000000285.png", "width": 1, "height": 1})
    data = {"images": entries, "annotations": [], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    ids = listed_ids(tmp_path / "coco.json")
    assert [r["image_id"] for r in run([folder], tmp_path / "out", ids=ids).results] == [7, 8]
    save(folder / "x.png")
    with pytest.raises(UserError, match=r"lists no image of the name x\.png"):
        run([folder], tmp_path / "out", ids=ids)
    entries.append({**entries[0], "id": 9})
    (tmp_path / "coco.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="twice, as 7 and 9"):
        listed_ids(tmp_path / "coco.json")
    write_shards(tmp_path / "shards", {"val": [(0, 2, True)]})
    assert listed_ids(tmp_path / "shards") == {"000000000001.png": 1, "000000000002.png": 2}


@pytest.mark.parametrize(
    "entry",
    [
        {"id": 7.0, "file_name": "a/1.jpg", "width": 6.0, "height": "5"},
        {"id": "7", "file_name": "a\\1.jpg"},
        {"id": 7, "coco_url": "http://images.example/set/a/1.jpg"},
        {"id": 7, "file_name": None, "coco_url": "http://images.example/set/a/1.jpg"},
    ],
)
def test_ids_are_taken_as_sharding_takes_them(tmp_path: Path, entry):
    other = {"id": 8, **{k: v.replace("1.", "2.") for k, v in entry.items() if "1.j" in str(v)}}
    file = tmp_path / "coco.json"
    file.write_text(json.dumps({"images": [entry, other]}))
    assert listed_ids(file) == {"a/1.jpg": 7, "a/2.jpg": 8}
    file.write_text(json.dumps({"images": [{**entry, "id": "6f1c-a"}]}))
    assert listed_ids(file) == {"a/1.jpg": check_annotations(
        {"images": [{"id": "6f1c-a", "file_name": "a", "width": 1, "height": 1}], "annotations": [],
         "categories": [{"id": 1, "name": "a"}]}, "f").images[0].id}  # fmt: skip
    for wrong in ({"id": 7}, {**entry, "id": 7.5}, {**entry, "id": True}, {**entry, "id": []}, 3):
        file.write_text(json.dumps({"images": [other, wrong]}))
        with pytest.raises(UserError, match=r"coco\.json: images\[1\]\.(id|file_name): expected"):
            listed_ids(file)


def test_urls_are_read_and_named_by_their_path(tmp_path: Path, monkeypatch):
    save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(images, "read_remote", lambda url, loading: data)
    done = run(["https://host/photos/b.png?key=1", tmp_path / "a.png"], tmp_path / "out")
    assert [p.name for p in done.pictures] == ["b.jpg", "a.jpg"]
    assert [r["file_name"] for r in done.results] == ["b.png", "a.png"]


def test_photographs_are_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (200, 150, 3)
    (found,) = run([tmp_path / "a.png"], tmp_path / "out").results
    assert found["segmentation"]["size"] == [200, 150]
    exif[0x0112] = 77
    save(tmp_path / "b.png", exif=exif)
    assert read_image(tmp_path / "b.png").shape == (150, 200, 3)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_any_mode_is_read(tmp_path: Path, mode: str):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (40, 30)).save(tmp_path / f"a.{suffix}")
    assert run([tmp_path / f"a.{suffix}"], tmp_path / "out").exit_code == 0


def test_results_survive_an_interruption(tmp_path: Path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    calls: list[Batch] = []

    def interrupted(batch: Batch) -> Detections:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find(batch)

    with pytest.raises(KeyboardInterrupt):
        predict(detecting(interrupted), [tmp_path], tmp_path / "out", log=lambda line: None)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 1


def test_nan_scores_are_refused_not_hidden(tmp_path: Path):
    save(tmp_path / "a.png")

    def broken(batch: Batch) -> Detections:
        found = find(batch)
        return found._replace(scores=found.scores * float("nan"))

    with pytest.raises(UserError, match="not finite"):
        predict(detecting(broken), [tmp_path], tmp_path / "out")


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_few_canvases_hold_images_of_any_size(height: int, width: int):
    canvas = canvas_of(ImageConfig(), height, width)
    assert canvas in {(800, 1088), (800, 1216), (800, 1344), (1088, 800), (1216, 800), (1344, 800)}
    # What the network sees fits.
    scale = min(1333 / max(height, width), 800 / min(height, width))
    assert int(height * scale + 0.5) <= canvas[0]
    assert int(width * scale + 0.5) <= canvas[1]


def test_a_batch_of_images_has_no_ground_truth():
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    batch = batch_of({7: image, 0: image[:20]}, (64, 96), 3)
    assert (batch.image[0, :30, :40].numpy() == image).all()
    assert batch.image.sum() == int(image.sum()) + int(image[:20].sum())
    assert batch.size.tolist() == [[30, 40], [20, 40], [1, 1]]
    assert batch.image_id.tolist() == [7, 0, -1]
    assert not batch.valid.any()


@pytest.mark.parametrize("side", [1, 64, 65, 100, 640, 4000, 4097])
def test_whole_images_are_held_by_few_canvases(side: int):
    height, width = holding_canvas(side, 6000)
    assert side <= height <= max(side + 63, 1.26 * side)
    assert width >= 6000
    assert len({holding_canvas(n, 1)[0] for n in range(1, 8193)}) <= 32


def test_evaluation_and_prediction_find_the_same_to_the_bit(tiny_recipe, tmp_path: Path):
    """Photographs of many sizes, larger and smaller than the network sees, some turned by EXIF."""
    config, image = tiny_recipe.model, tiny_recipe.image
    params, buffers = init(config, torch.Generator().manual_seed(0))
    categories = (Category(1, "red"), Category(2, "green"))
    compute = Compute(compile=False)
    detector = Detector(params, buffers, config, image, compute, CPU, categories)
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (300, 200), (200, 333), (1700, 1000), (90, 500)]
    folder, images, boxes = tmp_path / "coco" / "val", [], []
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    folder.mkdir()
    for number, (width, height) in enumerate(sizes, 1):
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 2 else 1
        noise = rng.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height))
        picture.save(folder / f"{number}.png", exif=exif)
        upright = (height, width) if number % 2 else (width, height)
        images.append({"id": number, "file_name": f"{number}.png"})
        images[-1] |= dict(zip(("width", "height"), upright, strict=True))
        boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 9, 9]})
    data = {"images": images, "annotations": boxes}
    data["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    (tmp_path / "coco" / "annotations" / "instances_val.json").write_text(json.dumps(data))
    plan = Settings((1 / 1.52, 1 / 1.36, 1.0, 1.36, 1.52), None, 64, 256.0, 0.0)
    shards = tmp_path / "made"
    index = shard_dataset(tmp_path / "coco", shards, None, plan, Run(say=lambda line: None))
    split = index.splits["val"]
    stream = evaluation_batches(shards, split, batch=1, loading=EvalLoaderConfig(workers=0))
    canvases = [canvas(bucket, image.short, image.long) for bucket in split.buckets]
    every = find_in_stream(detector, stream, canvases)
    found = [result for each in every for result in image_results(each, [1, 2])]
    done = predict(
        replace(detector, categories=index.categories),
        [folder],
        tmp_path / "out",
        threshold=config.inference.score_threshold,
        log=lambda line: None,
    )
    ours = [{k: v for k, v in r.items() if k != "file_name"} for r in done.results]
    assert len({result["image_id"] for result in found}) == len(sizes)
    by_image = {n: [r for r in found if r["image_id"] == n] for n in range(1, len(sizes) + 1)}
    assert ours == [result for results in by_image.values() for result in results]
