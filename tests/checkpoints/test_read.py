import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from casc.checkpoints import read
from casc.checkpoints.model import Trained, class_names, load_trained
from casc.checkpoints.read import (
    Weights,
    download_weights,
    fit_weights,
    imagenet_weights,
    read_weights,
)
from casc.checkpoints.shapes import backbone_of
from casc.config import to_json
from casc.data.index import Category
from casc.device.compute import Compute
from casc.errors import UserError
from casc.inference.load import ready_detector
from casc.model import detector
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.train.recipe import Recipe

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.fixture(scope="module")
def model18():
    from casc.model.detector_config import DetectorConfig

    config = DetectorConfig(classes=2, backbone=ResNetConfig(depth=18))
    return config, *detector.init(config, torch.Generator().manual_seed(1))


def save_casc(path: Path, recipe: Recipe, params, buffers, categories=CATEGORIES):
    metadata = {
        "recipe": json.dumps(to_json(recipe)),
        "classes": json.dumps([{"id": c.id, "name": c.name} for c in categories]),
        "step": "5",
    }
    save_file({**params, **buffers}, path, metadata=metadata)


def test_torchvision_fills_the_whole_backbone(tmp_path, resnet18, model18):
    torch.save(resnet18, tmp_path / "r18.pth")
    weights = read_weights(str(tmp_path / "r18.pth"))
    assert weights.kind == "torchvision"
    _, params, buffers = model18
    new_params, new_buffers, fit = fit_weights(params, buffers, weights.tensors)
    assert len(fit.matched) == len(resnet18) - 2  # all but fc
    assert not fit.unused
    assert not fit.reshaped
    assert not [name for name in fit.missing if name.startswith("backbone.")]
    for name, value in resnet18.items():
        if not name.startswith("fc."):
            assert torch.equal({**new_params, **new_buffers}[f"backbone.{name}"], value)
    assert torch.equal(new_params["rpn_head.rpn_cls.weight"], params["rpn_head.rpn_cls.weight"])
    assert f"{len(fit.matched)} tensors taken" in str(fit)
    assert "roi_head.bbox_head.0.* x8" in str(fit)


def test_reference_checkpoints_import_by_name(tmp_path, model18):
    config, params, buffers = model18
    data = {
        "meta": {"CLASSES": ("cat", "dog"), "epoch": 12},
        "state_dict": {f"module.{k}": v for k, v in {**params, **buffers}.items()},
        "optimizer": {"state": {}},
    }
    torch.save(data, tmp_path / "epoch_12.pth")
    weights = read_weights(str(tmp_path / "epoch_12.pth"))
    assert weights.kind == "reference"
    trained = load_trained(str(tmp_path / "epoch_12.pth"))
    assert trained.model == replace(config, roi_align="adaptive")
    for found, expected in ((trained.params, params), (trained.buffers, buffers)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert class_names(trained) == (Category(1, "cat"), Category(2, "dog"))
    ready = ready_detector(trained, "cpu", compile="off")
    ready.check_classes(CATEGORIES, "shards")
    with pytest.raises(UserError, match="class 1 is 'dog', in shards it is 'cow'"):
        ready.check_classes((CATEGORIES[0], Category(9, "cow")), "shards")


@pytest.mark.parametrize("depth", [34, 50, 101, 152])
def test_depths_are_told_apart(depth):
    with torch.device("meta"):
        names = torchvision.models.get_model(f"resnet{depth}", weights=None).state_dict()
    tensors = {f"backbone.{k}": v for k, v in names.items()}
    assert backbone_of(tensors, "x") == ResNetConfig(depth=depth)


def test_casc_checkpoints_say_what_they_are(tmp_path, tiny_recipe):
    params, buffers = detector.init(tiny_recipe.model, torch.Generator().manual_seed(0))
    save_casc(tmp_path / "w.safetensors", tiny_recipe, params, buffers)
    trained = load_trained(str(tmp_path / "w.safetensors"))
    assert trained.model == tiny_recipe.model
    assert trained.image == tiny_recipe.image
    assert trained.weights.step == 5
    assert class_names(trained) == CATEGORIES
    ready = ready_detector(trained, "cpu", compile="off")
    ready.check_classes(CATEGORIES, "shards")
    with pytest.raises(
        UserError,
        match=r"class 0 is 'cat' \(id 3\), in shards it is 'dog'.*; .*casc train finetune --init",
    ):
        ready.check_classes(CATEGORIES[::-1], "shards")
    with pytest.raises(UserError, match="trained on 2 classes, shards has 1"):
        ready.check_classes(CATEGORIES[:1], "shards")
    del params["rpn_head.rpn_cls.bias"]
    save_casc(tmp_path / "w.safetensors", tiny_recipe, params, buffers)
    with pytest.raises(UserError, match=r"'rpn_head.rpn_cls.bias' is missing"):
        load_trained(str(tmp_path / "w.safetensors"))


def test_only_warnings_are_logged_as_warnings(tiny_recipe, monkeypatch, caplog):
    notes = ["compiling with inductor", "warning: no kernel, so plain ATen"]
    monkeypatch.setattr("casc.inference.load.choose_compute", lambda *_, **__: (Compute(), notes))
    trained = Trained(Weights("made up", "reference", {}), tiny_recipe.model, ImageConfig(), {}, {})
    with caplog.at_level("INFO"):
        ready_detector(trained, "cpu")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "compiling with inductor"),
        ("WARNING", "no kernel, so plain ATen"),
    ]


def test_heads_of_other_classes_keep_their_initial_values(model18, tiny_recipe):
    _, params, buffers = model18
    tensors = dict(params)
    tensors["roi_head.bbox_head.1.fc_cls.weight"] = torch.zeros(81, 1024)
    new_params, _, fit = fit_weights(params, buffers, tensors)
    assert fit.reshaped == [("roi_head.bbox_head.1.fc_cls.weight", (3, 1024), (81, 1024))]
    assert new_params["roi_head.bbox_head.1.fc_cls.weight"].shape == (3, 1024)
    assert sorted(fit.missing) == sorted(buffers)


class Trap:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"a": 1}, tmp_path / "no_tensors.pth")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Trap()}, tmp_path / "trap.pth")
    for name, message in {
        "absent.pth": "no such file",
        "empty": "no checkpoint in this folder",
        "text.pth": "not a file of tensors",
        "text.safetensors": "not readable as safetensors",
        "no_tensors.pth": "no state_dict",
        "trap.pth": "asks for (builtins.)?print.*nothing of it was run",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_weights(str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights of a Cascade Mask R-CNN"):
        load_trained(str(tmp_path / "other.pth"))


def test_imagenet_weights_come_from_torch_hubs_cache(tmp_path, monkeypatch, resnet18):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    # torch.hub trusts a file that lies there already.
    torch.save(resnet18, cache / Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name)
    weights = imagenet_weights(18)
    assert weights.kind == "torchvision"
    assert "backbone.layer4.1.bn2.running_var" in weights.tensors
    assert not [name for name in weights.tensors if "fc" in name]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder, with a network of files by URL instead of the world's."""
    files = {}
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    monkeypatch.setattr(read, "open_remote", lambda url, *_, **__: io.BytesIO(files[url]))
    return files


def test_files_of_one_name_from_two_urls_are_two(hub):
    urls = [f"https://host/{part}/model_final.pth" for part in ("a", "b")]
    hub.update({urls[0]: b"first", urls[1]: b"second"})
    first, second = map(download_weights, urls)
    assert (first.read_bytes(), second.read_bytes()) == (b"first", b"second")
    hub.clear()  # from here on the cache has to do
    assert download_weights(urls[0]) == first
    first.write_bytes(b"changed")
    with pytest.raises(UserError, match=r"SHA-256 isn't .*; delete it"):
        download_weights(urls[0])


def test_the_hash_in_a_name_is_asked_for(hub):
    digest = hashlib.sha256(b"right").hexdigest()[:8]
    urls = [f"https://host/resnet-{each}.pth" for each in (digest, "0123abcd")]
    hub.update(dict.fromkeys(urls, b"right"))
    assert download_weights(urls[0]).name == f"resnet-{digest}.pth"
    with pytest.raises(UserError, match=f"begins {digest}, not 0123abcd"):
        download_weights(urls[1])


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.pth"])
def test_only_http_is_downloaded(url):
    with pytest.raises(UserError, match=r"only http\(s\)"):
        read_weights(url)
