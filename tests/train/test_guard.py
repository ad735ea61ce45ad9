import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from casc.device.devices import choose_dtype
from casc.errors import UserError
from casc.train.loop import train


def records(recipe, kind):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_float16_finds_its_scale_and_goes_on_with_it(tiny_recipe, tmp_path):
    # A CPU has no fast convolutions in float16.
    image = replace(tiny_recipe.image, short=32, long=32)
    recipe = replace(tiny_recipe, image=image, dtype="float16", max_steps=6, save_steps=4)
    recipe = replace(recipe, keep_last=0)
    whole = train(recipe)
    rows = records(recipe, "train")
    # The first scale is too much for this model: updates are skipped, named, and it falls.
    skipped = [row["step"] - 1 for row in rows if row["skipped"]]
    assert whole.state.guard["skipped"] == len(skipped) > 0
    assert whole.state.guard["loss_scale"] == 65536 / 2 ** len(skipped)
    assert len(skipped) < 6
    texts = [row["text"] for row in records(recipe, "warning")]
    assert [text.split(":")[1] for text in texts if "skipped" in text] == [
        f" step {step}" for step in skipped
    ]
    assert all("images of the step: [" in text for text in texts if "skipped" in text)
    broken = replace(recipe, out=tmp_path / "broken", max_steps=3)
    train(broken)
    again = train(replace(broken, max_steps=6))
    for a, b in zip(whole.state[1:], again.state[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_float16_where_there_are_no_kernels(monkeypatch):
    def no(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", no)
    with pytest.raises(UserError, match=r"--dtype float16: .* use --dtype bfloat16"):
        choose_dtype("float16", torch.device("cpu"))


def test_accumulating_counts_its_images(tiny_recipe):
    recipe = replace(tiny_recipe, batch=1, accumulate=2, max_steps=3)
    train(recipe)
    (run,) = records(recipe, "run")
    assert run["steps_per_epoch"] == 5
    whole = replace(tiny_recipe, out=tiny_recipe.folder / "whole", max_steps=3)
    train(whole)
    rows, others = records(recipe, "train"), records(whole, "train")
    assert [row["lr"] for row in rows] == [row["lr"] for row in others]
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in others]
    assert any("2 images on 1 x cpu" in row["text"] for row in records(recipe, "message"))
    # The samples are the larger batch's: all anchors are counted alike, so is what they show.
    assert rows[0]["rpn.positives"] == others[0]["rpn.positives"]


def test_skipping_too_often_ends_the_run(tiny_recipe, tmp_path):
    train(replace(tiny_recipe, max_steps=1))
    weights = tiny_recipe.folder / "checkpoints/step-00000001/weights.safetensors"
    tensors = load_file(weights)
    tensors["rpn_head.rpn_cls.bias"].fill_(float("nan"))
    save_file(tensors, tmp_path / "bad.safetensors")
    recipe = replace(
        tiny_recipe,
        init=str(tmp_path / "bad.safetensors"),
        out=tmp_path / "bad",
        optim=replace(tiny_recipe.optim, max_skips=3),
    )
    with pytest.raises(UserError, match=r"step 2: .* 3 updates in a row .* --optim.max-skips"):
        train(recipe)
    assert [row["step"] for row in records(recipe, "train")] == [1, 2]
