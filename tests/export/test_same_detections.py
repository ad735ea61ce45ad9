"""One photograph, four ways: `casc.load`, `casc predict`, `casc eval` and an exported ONNX."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import casc
from casc.cli import main as cli
from casc.config import to_json
from casc.export.check import Tolerances, compare_image
from casc.export.runner import detect, open_program
from casc.inference.images import read_image
from casc.model.detector import init
from casc.model.detector_config import STAGES
from casc.model.forward_detect import Detections

SIZE = (1040, 1440)
"""As stored; both sides exceed the recipe's, and EXIF turns it."""
TOLERANCES = Tolerances(boxes=0.1, scores=1e-4, masks=1e-3)
"""In pixels of the photograph, of which 11 are one of what the network sees."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny) -> Path:
    """A checkpoint, a photograph, and a data set of it."""
    folder = tmp_path_factory.mktemp("same")
    config, image, _ = tiny
    config = replace(config, classes=2, backbone=replace(config.backbone, norm="gn"))
    config = replace(config, backbone=replace(config.backbone, frozen_stages=-1))
    # Of one stage, as writing ONNX takes so long for each.
    config = replace(config, stages=STAGES[:1])
    params, buffers = init(config, torch.Generator().manual_seed(0))
    params["roi_head.bbox_head.0.fc_cls.bias"][0] = 6
    categories = [{"id": 3, "name": "disc"}, {"id": 8, "name": "star"}]
    recipe = {"model": to_json(config), "image": to_json(image), "dtype": "float32"}
    metadata = {"recipe": json.dumps(recipe), "classes": json.dumps(categories)}
    save_file(params | buffers, folder / "weights.safetensors", metadata)

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIZE[0] // 20, SIZE[1] // 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "COCO" / "val2017").mkdir(parents=True)
    (folder / "COCO" / "annotations").mkdir()
    photo = folder / "COCO" / "val2017" / "photo.jpg"
    Image.fromarray(noise).resize((SIZE[1], SIZE[0])).save(photo, exif=exif)
    entry = {"id": 17, "file_name": photo.name, "height": SIZE[1], "width": SIZE[0]}
    objects = [{"id": 1, "image_id": 17, "category_id": 3, "bbox": [10, 10, 90, 90]}]
    data = {"images": [entry], "annotations": objects, "categories": categories}
    (folder / "COCO" / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    casc.shard(folder / "COCO", folder / "shards", say=lambda line: None)
    return folder


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 0


def test_a_photograph_is_the_same_four_ways(folder: Path, tmp_path: Path):
    weights, photo = folder / "weights.safetensors", folder / "COCO" / "val2017" / "photo.jpg"
    detector = casc.load(weights)
    loaded = detector(photo, threshold=detector.model.inference.score_threshold)
    assert loaded.image.shape == (*SIZE[::-1], 3)
    assert len(loaded) > 5

    # Python and both commands: to the bit.
    annotations = folder / "COCO" / "annotations" / "instances_val2017.json"
    settings = ("--threshold", detector.model.inference.score_threshold, "--ids", annotations)
    command("predict", weights, photo, "--out", tmp_path / "out", *settings)
    predicted = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r.pop("file_name") for r in predicted] == ["photo.jpg"] * len(loaded)
    found = tmp_path / "found.json"
    evaluate = ("eval", weights, folder / "shards", "--results", found, "--loading.workers", 0)
    command(*evaluate, "--batch", 1)
    evaluated = json.loads(found.read_text())
    assert predicted == evaluated == loaded.to_coco(17)

    # In a batch of two a CPU's convolutions sum in another order: to rounding.
    command(*evaluate, "--batch", 2)
    batched = json.loads(found.read_text())
    assert len(batched) == len(evaluated)
    for one in evaluated:
        alike = [two for two in batched if two["category_id"] == one["category_id"]]
        gaps = [np.abs(np.subtract(one["bbox"], two["bbox"])).max() for two in alike]
        assert min(gaps) < TOLERANCES.boxes
        assert abs(one["score"] - alike[np.argmin(gaps)]["score"]) < TOLERANCES.scores

    # ONNX Runtime, on the canvas of such photographs, to rounding.
    path = tmp_path / "detector.onnx"
    command("export", weights, path, "--pixels", *SIZE[::-1], "--canvas", 128, 96, "--no-check")
    (outputs,) = detect(open_program(path), [read_image(photo)])
    columns = {name: torch.from_numpy(outputs[name]) for name in ("boxes", "scores", "labels")}
    every = torch.ones(len(outputs["scores"]), dtype=torch.bool)
    exported = Detections(**columns, valid=every, masks=torch.from_numpy(outputs["masks"]))
    columns = {name: torch.from_numpy(getattr(loaded, name)) for name in columns}
    every = torch.ones(len(loaded), dtype=torch.bool)
    assert loaded.found.masks is not None
    ours = Detections(**columns, valid=every, masks=torch.from_numpy(loaded.found.masks))
    agreement = compare_image(exported, ours, detector.model.inference, TOLERANCES)
    assert agreement.paired >= len(loaded) - 1
    assert agreement.within(TOLERANCES), agreement
