"""The demo in miniature: every part of it once, on a handful of images."""

import importlib
import json
from dataclasses import replace

import pytest

from casc.data.index import INDEX_NAME
from casc.model.resnet import ResNetConfig
from data_tools import synth


def test_demo_makes_trains_evaluates_and_draws(tmp_path, monkeypatch, capsys):
    demo = importlib.import_module("casc.recipes.demo")
    monkeypatch.setattr(demo, "TRAIN", 8)
    monkeypatch.setattr(demo, "VAL", 3)
    out = tmp_path / "run"
    demo.main(
        [
            *("--out", str(out), "--data", str(tmp_path / "shards")),
            *("--epochs", "1", "--max-steps", "2", "--loading.workers", "0"),
        ]
    )
    pictures = sorted(p.name for p in (out / "pictures").glob("*.jpg"))
    images = sorted(p.name for p in (tmp_path / "images" / "val2017").glob("*.jpg"))
    assert pictures == images
    assert len(images) == 3
    assert (out / "first_batch.png").exists()
    shown = capsys.readouterr().out
    assert str(out / "pictures") in shown
    kinds = [json.loads(line)["kind"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert "train" in kinds
    assert "evaluation" in kinds


def test_an_interrupted_demo_can_be_started_again(tmp_path, monkeypatch):
    demo = importlib.import_module("casc.recipes.demo")
    monkeypatch.setattr(demo, "TRAIN", 2)
    monkeypatch.setattr(demo, "VAL", 2)
    recipe = replace(demo.demo(), data=tmp_path / "shards")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synth, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.make_data(recipe)
    assert demo.images_of(recipe).exists()
    demo.make_data(recipe)
    assert len(list((demo.images_of(recipe) / "train2017").glob("*.jpg"))) == 2
    assert (recipe.data / INDEX_NAME).exists()


def test_the_small_recipes_differ_from_the_reference_only_where_they_say():
    mini = importlib.import_module("casc.recipes.coco_mini").coco_mini()
    reference = importlib.import_module("casc.recipes.coco_1x").coco_1x()
    assert isinstance(mini.model.backbone, ResNetConfig)
    assert mini.model.backbone.depth == 50
    assert mini.model.classes == 80
    assert mini.model.rpn == reference.model.rpn
    assert mini.model.box_head == reference.model.box_head
    assert mini.model.stages == reference.model.stages


@pytest.mark.parametrize("data", ["none", "."])
def test_the_demo_makes_no_data_for_splits_of_other_names(tmp_path, monkeypatch, data):
    """Somebody's own shards were meant, and aren't where they were said to be."""
    demo = importlib.import_module("casc.recipes.demo")
    monkeypatch.chdir(tmp_path)
    own = ("--data", data, "--train-split", "train", "--val-split", "val")
    with pytest.raises(SystemExit) as stop:
        demo.main([*own, "--model.classes", "2", "--device", "cpu"])
    assert "not found; make shards with `data_tools shard COCO`" in str(stop.value.code)
    assert not list(tmp_path.rglob("*.jpg"))
