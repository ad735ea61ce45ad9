"""Models of images with one channel or more than three, from pretrained weights to predictions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import casc
from casc.checkpoints.converting import convert
from casc.checkpoints.foreign import Stated
from casc.checkpoints.model import Trained
from casc.checkpoints.read import Weights, fit_weights
from casc.checkpoints.shapes import model_of
from casc.data.batch import Batch
from casc.data.index import read_index
from casc.errors import UserError
from casc.export import runner
from casc.export.metadata import describe
from casc.export.pictures import read_pictures
from casc.export.program import Shape, capture, infer
from casc.inference.predict import predict
from casc.model import detector
from casc.model.detector_config import DetectorConfig
from casc.model.layers import grown
from casc.model.preprocess import ImageConfig, per_channel, plain_view, prepare
from casc.train.loop import train
from casc.train.recipe_checks import advice, check
from data_tools.plan import Settings
from data_tools.shard import shard

STEM = "backbone.conv1.weight"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_planes_that_are_alike_give_the_response_of_their_rgb_copy(channels: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 7, 7, generator=generator)
    plane = torch.randn(2, 1, 20, 24, generator=generator)
    fits = grown(weight, channels)
    assert fits.shape == (8, channels, 7, 7)
    ours = F.conv2d(plane.expand(-1, channels, -1, -1), fits, stride=2, padding=3)
    rgb = F.conv2d(plane.expand(-1, 3, -1, -1), weight, stride=2, padding=3)
    torch.testing.assert_close(ours, rgb, rtol=1e-4, atol=1e-4)
    if channels >= 3:
        assert torch.equal(fits[:, :3], weight * (3 / channels))


@pytest.mark.parametrize("channels", [1, 5])
def test_pretrained_weights_fit_in_all_but_the_first_convolution(tiny, channels: int):
    config = tiny[0]
    rgb, buffers = detector.init(config, torch.Generator().manual_seed(1))
    fresh, others = detector.init(config, torch.Generator().manual_seed(2), channels)
    params, _, fit = fit_weights(fresh, others, rgb | buffers)
    assert not fit.reshaped
    assert not fit.missing
    assert torch.equal(params[STEM], grown(rgb[STEM], channels))
    assert all(torch.equal(params[name], rgb[name]) for name in rgb if name != STEM)


def test_each_channel_has_its_numbers():
    assert per_channel(ImageConfig()) == ImageConfig()
    grey = per_channel(ImageConfig(channels=1))
    assert grey.mean == pytest.approx([(123.675 + 116.28 + 103.53) / 3])
    assert grey.std == pytest.approx([(58.395 + 57.12 + 57.375) / 3])
    five = per_channel(ImageConfig(channels=5))
    assert five.mean == pytest.approx([123.675, 116.28, 103.53, 114.495, 114.495])
    own = ImageConfig(channels=2, mean=(1.0, 2.0), std=(3.0, 4.0))
    assert per_channel(own) == own


@pytest.mark.parametrize("channels", [1, 5])
def test_planes_are_resized_and_normalised_as_those_of_rgb(tiny_batch, channels: int):
    rgb = tiny_batch([1, 2])
    planes = torch.randint(0, 256, (*rgb.image.shape[:3], channels), dtype=torch.uint8)
    numbers = torch.arange(channels) + 100.0, torch.arange(channels) + 50.0
    mean, std = (tuple(values.tolist()) for values in numbers)
    config = ImageConfig(short=96, long=128, channels=channels, mean=mean, std=std)
    view = plain_view(rgb.size, config)._replace(flip=torch.tensor([True, False]))

    def seen(batch: Batch, config: ImageConfig) -> torch.Tensor:
        return prepare(batch, view, config, (96, 128), torch.float32).image

    found = seen(rgb._replace(image=planes), config)
    assert found.shape == (2, channels, 96, 128)
    for i in (0, channels - 1):
        copy = rgb._replace(image=planes[..., i : i + 1].expand(-1, -1, -1, 3).contiguous())
        alone = replace(config, channels=3, mean=mean[i : i + 1] * 3, std=std[i : i + 1] * 3)
        torch.testing.assert_close(found[:, i], seen(copy, alone)[:, 0], rtol=1e-6, atol=1e-5)


def data_set(root, channels):
    """Two bright rectangles an image, each in some of the planes: as npy, or as grey PNG."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, 5):
            image = rng.integers(0, 60, (48, 64, channels), dtype=np.uint8)
            for label in range(2):
                w, h = rng.integers(12, 24, 2).tolist()
                x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
                image[y : y + h, x : x + w, label::2] = 230 - 90 * label
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": i, "category_id": label + 1,
                        "bbox": [x, y, w, h], "iscrowd": 0, "area": w * h,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )  # fmt: skip
            name = f"{i}.png" if channels == 1 else f"{i}.npy"
            if channels == 1:
                Image.fromarray(image[..., 0]).save(root / split / name)
            else:
                np.save(root / split / name, image)
            images.append({"id": i, "file_name": name, "width": 64, "height": 48})
        names = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
        data = {"images": images, "annotations": annotations, "categories": names}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(data))
    return root


@pytest.fixture
def planes_recipe(tiny_recipe, tmp_path):
    def make(channels):
        out = tmp_path / f"shards-{channels}"
        root = data_set(tmp_path / f"coco-{channels}", channels)
        shard(root, out, settings=Settings(channels=channels), say=lambda _: None)
        image = replace(tiny_recipe.image, channels=channels)
        return replace(tiny_recipe, data=out, image=image), root

    return make


@pytest.mark.parametrize("channels", [1, 5])
def test_a_run_on_planes_from_shards_to_predictions(planes_recipe, tmp_path, channels: int):
    recipe, root = planes_recipe(channels)
    recipe = replace(recipe, epochs=1, evaluate_every=1)
    summary = train(recipe)
    assert summary.evaluation is not None
    assert summary.evaluation.images == 4
    assert summary.state.params[STEM].shape[1] == channels
    assert (recipe.folder / "first_batch.png").stat().st_size > 500

    found = casc.load(recipe.folder, device="cpu")
    assert casc.evaluate(found, recipe.data, "val").figures == summary.evaluation.figures
    file = sorted((root / "val").iterdir())[0]
    array = np.load(file) if channels == 5 else np.asarray(Image.open(file))
    results = [
        found(source, threshold=0.0)
        for source in (file, file.read_bytes(), array, torch.from_numpy(
            np.moveaxis(array.reshape(48, 64, channels), -1, 0).copy()))
    ]  # fmt: skip
    assert len(results[0]) > 0
    for result in results:
        assert np.array_equal(result.boxes, results[0].boxes)
        assert result.image.shape == (48, 64, channels)
        assert np.asarray(result.draw()).shape[2] == 3
    made = predict(found, [root / "val"], tmp_path / "out", threshold=0.0, log=lambda _: None)
    assert len(made.pictures) == 4
    assert not made.failed
    with pytest.raises(UserError, match=rf"must be \[h, w, {channels}\] uint8"):
        found(np.zeros((48, 64, 3), np.uint8))

    # The same weights go through `casc convert`, though to no other program.
    weights = str(next(recipe.folder.glob("checkpoints/*/weights.safetensors")))
    convert(weights, tmp_path / "again.safetensors", to="casc", stated=Stated())
    again = casc.load(tmp_path / "again.safetensors", device="cpu", dtype="float32")
    assert np.array_equal(again(file, threshold=0.0).boxes, results[0].boxes)
    with pytest.raises(UserError, match=rf"image\.channels {channels}: checkpoints for other"):
        convert(weights, tmp_path / "theirs.pth", to="mmdetection", stated=Stated())

    # Other channels than the shards' are refused in a line that says what mends it.
    other = replace(recipe, image=replace(recipe.image, channels=3))
    with pytest.raises(
        UserError, match=f"has images of {channels}; use --image.channels {channels}"
    ):
        check(other, read_index(recipe.data))
    check(recipe, read_index(recipe.data))


def test_evaluation_refuses_shards_of_other_channels(planes_recipe, tiny_recipe):
    recipe = replace(tiny_recipe, max_steps=1)
    train(recipe)
    planes, _ = planes_recipe(5)
    model = casc.load(recipe.folder, device="cpu")
    with pytest.raises(UserError, match=r"has images of 5 channels, the model was trained on 3"):
        casc.evaluate(model, planes.data, "val")


def test_numbers_for_other_channels_are_refused_and_a_frozen_stem_is_told(planes_recipe):
    recipe, _ = planes_recipe(4)
    index = read_index(recipe.data)
    for flag, numbers in (("mean", (1.0, 2.0)), ("std", (1.0,) * 5), ("std", (1.0, 0.0, 1.0))):
        with pytest.raises(UserError, match=rf"--image\.{flag}"):
            check(replace(recipe, image=replace(recipe.image, **{flag: numbers})), index)
    with pytest.raises(UserError, match=r"--image\.colour: changes RGB"):
        check(replace(recipe, image=replace(recipe.image, colour=(0.4, 0, 0, 0))), index)
    with pytest.raises(UserError, match=r"--image\.channels 0"):
        check(replace(recipe, image=replace(recipe.image, channels=0)), index)
    assert not [text for text in advice(recipe) if "first convolution" in text]
    backbone = replace(recipe.model.backbone, frozen_stages=1)
    frozen = replace(recipe, model=replace(recipe.model, backbone=backbone))
    assert [text for text in advice(frozen) if "--model.backbone.frozen-stages -1" in text]


def test_an_exported_program_takes_planes(tiny, tmp_path, monkeypatch):
    config, image, canvas = tiny
    config = replace(config, stages=config.stages[:1], masks="none")
    image = replace(image, channels=5)
    params, buffers = detector.init(config, torch.Generator().manual_seed(0), 5)
    shape = Shape(1, (40, 50), canvas)
    program = capture(params, buffers, config, image, shape)
    pixels = torch.randint(0, 256, (1, 40, 50, 5), dtype=torch.uint8)
    size = torch.tensor([[40, 50]])
    with torch.no_grad():
        eager = infer(params, buffers, config, image, canvas, pixels, size)
        run = program.module()
        found = run(pixels, size)
    assert eager.masks is None
    assert len(found) == 4
    for ours, theirs in zip(found, eager, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    trained = Trained(Weights("x", "casc", {}), config, image, params, buffers)
    said = describe(trained, shape, "pt2")
    assert said["inputs"][0]["shape"] == [1, 40, 50, 5]
    assert [o["name"] for o in said["outputs"]] == ["boxes", "scores", "labels", "valid"]
    assert "masks" not in said
    assert len(said["preprocessing"]["mean"]) == 5

    # The runner takes as many; writing and reading a file would take a minute.
    def session(images: np.ndarray, sizes: np.ndarray, _: list[str]) -> list[np.ndarray]:
        with torch.no_grad():
            return [v.numpy() for v in run(torch.from_numpy(images), torch.from_numpy(sizes))]

    monkeypatch.setattr(runner, "_onnx", lambda *_: (json.dumps(said), session))
    opened = runner.open_program("a.onnx")
    (ran,) = runner.detect(opened, [pixels[0].numpy()])
    np.testing.assert_allclose(ran["scores"], eager.scores[eager.valid], atol=1e-4)
    with pytest.raises(ValueError, match=r"must be \[h, w, 5\] uint8, not \[40, 50, 3\] uint8"):
        list(runner.detect(opened, [pixels[0, ..., :3].numpy()]))

    # The command's check reads them from arrays in a folder.
    np.save(tmp_path / "a.npy", pixels[0].numpy())
    ((read, height_width),) = read_pictures([str(tmp_path)], (40, 50), 5)
    assert torch.equal(read, pixels[0])
    assert height_width == (40, 50)


def test_a_file_of_tensors_says_its_channels_and_that_it_has_no_masks():
    config = DetectorConfig(classes=2, masks="none")
    params, buffers = detector.init(config, torch.Generator().manual_seed(0), 4)
    found = model_of(params | buffers, "x")
    assert found.masks == "none"
    assert found.classes == 2
