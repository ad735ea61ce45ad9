import json
import multiprocessing
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from casc.checkpoints import format as checkpoint
from casc.checkpoints.model import load_trained
from casc.errors import UserError
from casc.report.history import read_history
from casc.train.loop import train
from casc.train.watching import Activity


def records(recipe, kind):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    "failing", ["nothing", "saving", "evaluating", "computing the validation loss"]
)
def test_no_worker_outlives_a_run(tiny_recipe, monkeypatch, failing):
    """Also where an error is kept, which keeps the run's frames."""
    follow = Activity.set

    def fail(activity, what, *rest):
        if what == failing:
            raise RuntimeError(what)
        follow(activity, what, *rest)

    monkeypatch.setattr(Activity, "set", fail)
    recipe = replace(tiny_recipe, max_steps=7, evaluate_every=1, validation_loss=True)
    fails = pytest.raises(RuntimeError, match=failing)
    with nullcontext() if failing == "nothing" else fails:
        train(recipe)
    assert multiprocessing.active_children() == []


def test_stopping_and_resuming_changes_nothing(tiny_recipe, tmp_path):
    straight = replace(tiny_recipe, max_steps=7, save_steps=4, keep_last=0)
    whole = train(straight)
    assert whole.state.step == 7
    broken = replace(straight, out=tmp_path / "broken", max_steps=3)
    train(broken)
    # Into the second epoch (5 steps each), so order, rate and flips must carry over.
    second = train(replace(broken, max_steps=7))
    assert second.state.step == 7
    for a, b in zip(whole.state[1:], second.state[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
    losses = [[r["loss"] for r in records(recipe, "train")] for recipe in (straight, broken)]
    assert len(losses[0]) == 7
    assert losses[0] == losses[1]
    assert [r["lr"] for r in records(straight, "train")] == [
        r["lr"] for r in records(broken, "train")
    ]


def test_training_lowers_the_loss(tiny_recipe):
    recipe = replace(tiny_recipe, epochs=12, schedule=replace(tiny_recipe.schedule, drops=()))
    train(recipe)
    losses = [r["loss"] for r in records(recipe, "train")]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[3:13])


def test_what_a_run_leaves_behind(tiny_recipe, capsys):
    recipe = replace(tiny_recipe, epochs=2, evaluate_every=1, log_every=2)
    summary = train(recipe)
    folder = recipe.folder
    (run,) = records(recipe, "run")
    assert run["steps"] == 10
    assert run["recipe"]["optim"]["lr"] == 0.01
    assert json.loads((folder / "recipe.json").read_text()) == run["recipe"]
    rows = records(recipe, "train")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    for key in ("loss", "lr", "epoch", "grad_norm", "images_per_second", "data_wait", "memory",
                "s0.loss_mask", "s2.positives", "rpn.positives"):  # fmt: skip
        assert all(isinstance(row[key], float | int) for row in rows), key
    assert 0 <= rows[-1]["data_wait"] <= 1
    evaluations = records(recipe, "evaluation")
    assert [record["step"] for record in evaluations] == [5, 10]
    assert {"box_ap", "box_ap50", "mask_ap", "mask_arl"} <= evaluations[0]["figures"].keys()
    assert (folder / "evaluations/step-00000010.json").is_file()
    assert summary.evaluation is not None
    assert summary.evaluation.images == 5
    assert (folder / "first_batch.png").stat().st_size > 500
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-00000005", "step-00000010"} <= names
    columns = capsys.readouterr().out.splitlines()[-3]
    assert not columns.strip("| -")
    (result,) = records(recipe, "results")
    assert list(result["row"]) == [
        "NAME", "Batch_Size", "Epochs", "Throughput", "Box AP", "Mask AP", "AMP_Type",
        "Torch_Version",
    ]  # fmt: skip
    assert result["row"]["Batch_Size"] == "2 (1 x 2)"
    # The same command again has nothing to do, and says so.
    assert train(recipe).state.step == 10
    assert "already at its end" in capsys.readouterr().out
    assert len(records(recipe, "train")) == 5


def test_weights_know_what_they_are(tiny_recipe):
    train(replace(tiny_recipe, max_steps=1))
    path = tiny_recipe.folder / "checkpoints/step-00000001/weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert json.loads(metadata["classes"]) == [
        {"id": 1, "name": "red"},
        {"id": 2, "name": "green"},
    ]
    assert metadata["step"] == "1"
    assert metadata["torch"] == torch.__version__
    assert json.loads(metadata["recipe"])["name"] == "tiny"
    assert {"backbone.conv1.weight", "rpn_head.rpn_cls.bias"} <= names


def test_a_torn_checkpoint_is_named_and_passed_over(tiny_recipe, capsys):
    recipe = replace(tiny_recipe, max_steps=4, save_steps=2)
    train(recipe)
    newest = recipe.folder / "checkpoints/step-00000004/state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    losses = {r["step"]: r["loss"] for r in records(recipe, "train")}
    train(recipe)
    output = capsys.readouterr().out
    assert f"{newest}: sha256" in output
    assert "continuing from" in output
    again = [(r["step"], r["loss"]) for r in records(recipe, "train")][4:]
    assert again == [(3, losses[3]), (4, losses[4])]
    checkpoint.verify(newest.parent)
    for path in (recipe.folder / "checkpoints").glob("step-*"):
        (path / "checkpoint.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole"):
        train(recipe)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"seed": 1}, "--seed: the run in .* has 0, now it is 1"),
        ({"optim.lr": 0.5}, "--optim.lr: the run in .* has 0.01"),
        ({"batch": 1}, "--batch, --accumulate or the number of processes: .* 2, now it is 1"),
        ({"schedule.warmup_steps": 7}, "--schedule.warmup-steps"),
        ({"resume": "never"}, "--resume never"),
    ],
)
def test_another_recipe_does_not_continue_a_run(tiny_recipe, change, flag):
    train(replace(tiny_recipe, max_steps=3))
    other = replace(tiny_recipe, max_steps=4)
    for name, value in change.items():
        room, _, field = name.rpartition(".")
        part = replace(getattr(other, room), **{field: value}) if room else value
        other = replace(other, **{room or field: part})
    with pytest.raises(UserError, match=flag):
        train(other)


def test_other_data_does_not_continue_a_run(tiny_recipe, write_shards):
    train(replace(tiny_recipe, max_steps=1))
    index = tiny_recipe.data / "index.json"
    before = index.read_text()
    index.write_text(before.replace('"green"', '"blue"'))
    with pytest.raises(UserError, match="--data: "):
        train(replace(tiny_recipe, max_steps=2))
    shutil.rmtree(tiny_recipe.data)
    write_shards(tiny_recipe.data, {"train": [(0, 9, True)], "val": [(0, 1, True)]})
    with pytest.raises(UserError, match="--data: "):
        train(replace(tiny_recipe, max_steps=2))


def test_what_may_change_when_a_run_continues(tiny_recipe):
    train(replace(tiny_recipe, max_steps=5))
    recipe = replace(
        tiny_recipe,
        epochs=3,
        max_steps=6,
        log_every=2,
        loading=replace(tiny_recipe.loading, workers=0),
    )  # fmt: skip
    assert train(recipe).state.step == 6


def as_an_earlier_version_saved(folder):
    """Give a run's files the names that fields and values of recipes had before."""
    text = (folder / "recipe.json").read_text()
    for new, old in (
        ('"ddp_bucket_mb"', '"bucket_mb"'),
        ('"nms_kernel": "fixed"', '"nms_kernel": "matrix"'),
    ):
        assert new in text
        text = text.replace(new, old)
    text, found_limit = re.subn(r'"warmup_limit": [\d.]+,\s*', "", text)
    assert found_limit == 1
    (folder / "recipe.json").write_text(text)
    for found in (folder / "checkpoints").glob("step-*"):
        with safe_open(found / checkpoint.WEIGHTS, "pt") as file:
            metadata = file.metadata() | {"recipe": text}
        save_file(load_file(found / checkpoint.WEIGHTS), found / checkpoint.WEIGHTS, metadata)
        manifest = json.loads((found / checkpoint.MANIFEST).read_text())
        manifest["files"][checkpoint.WEIGHTS] = {
            "bytes": (found / checkpoint.WEIGHTS).stat().st_size,
            "sha256": sha256((found / checkpoint.WEIGHTS).read_bytes()).hexdigest(),
        }
        (found / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_run_with_fields_of_other_names_goes_on(tiny_recipe):
    model = replace(
        tiny_recipe.model,
        rpn=replace(tiny_recipe.model.rpn, nms_kernel="fixed"),
        inference=replace(tiny_recipe.model.inference, nms_kernel="fixed"),
    )
    recipe = replace(tiny_recipe, model=model, evaluate_every=0)
    train(replace(recipe, max_steps=1))
    as_an_earlier_version_saved(recipe.folder)
    trained = load_trained(str(recipe.folder))
    assert trained.model == model
    assert read_history(recipe.folder).recipe["ddp_bucket_mb"] == recipe.ddp_bucket_mb
    # There was no limit to warm-up: 3 of the 10 steps, which this one allows and a tenth doesn't.
    some, less = (replace(recipe.schedule, warmup_limit=limit) for limit in (0.3, 0.1))
    with pytest.raises(
        UserError, match=r"--schedule.warmup-limit: the run in .* has 1.0, now it is"
    ):
        train(replace(recipe, schedule=less, max_steps=2))
    assert train(replace(recipe, schedule=some, max_steps=2)).state.step == 2


def test_resume_must(tiny_recipe):
    with pytest.raises(UserError, match=r"--resume must: .* has no checkpoint"):
        train(replace(tiny_recipe, resume="must"))


def test_a_run_of_an_earlier_version_says_how_to_go_on(tiny_recipe, monkeypatch, tmp_path):
    train(replace(tiny_recipe, max_steps=1))
    load = checkpoint.load

    def earlier(folder):
        loaded = load(folder)
        position = {k: v for k, v in loaded.position.items() if k != "phases"}
        return loaded._replace(position=position)

    monkeypatch.setattr(checkpoint, "load", earlier)
    with pytest.raises(UserError, match=r"earlier version of casc.*--init") as error:
        train(tiny_recipe)
    # What it advises works.
    weights = str(error.value).split("--init ")[1].split(" and ")[0]
    train(replace(tiny_recipe, init=weights, out=tmp_path / "new", max_steps=1))


def test_a_loss_that_is_not_finite_names_step_and_images(tiny_recipe, tmp_path):
    train(replace(tiny_recipe, max_steps=1))
    weights = tiny_recipe.folder / "checkpoints/step-00000001/weights.safetensors"
    tensors = load_file(weights)
    tensors["roi_head.mask_head.1.conv_logits.bias"].fill_(float("nan"))
    save_file(tensors, tmp_path / "bad.safetensors")
    recipe = replace(
        tiny_recipe,
        init=str(tmp_path / "bad.safetensors"),
        out=tmp_path / "bad",
        log_every=4,
        optim=replace(tiny_recipe.optim, max_skips=1),
    )
    # Steps without a positive RoI don't read the broken bias; 4 steps surely have one.
    with pytest.raises(UserError, match=r"step [0-3]: the loss .* of the step: \[\d+, \d+\]"):
        train(recipe)
    assert not list((recipe.folder / "checkpoints").glob("step-*"))


def test_heads_without_positives_warn(tiny_recipe, capsys):
    # Anchors of 64 cells and more overlap nothing in these images by 0.7 or 0.3.
    anchors = replace(tiny_recipe.model.anchors, scale=64)
    recipe = replace(
        tiny_recipe, max_steps=2, save_every=0, model=replace(tiny_recipe.model, anchors=anchors)
    )
    train(recipe)
    assert capsys.readouterr().out.count("warning: rpn had no positive sample") == 1
    assert len(records(recipe, "warning")) >= 1


def test_speed_only(tiny_recipe):
    recipe = replace(tiny_recipe, max_steps=4, save_every=0, evaluate_every=0)
    summary = train(recipe)
    assert summary.images_per_second > 0
    assert summary.evaluation is None
    assert not list((recipe.folder / "checkpoints").iterdir())
    (result,) = records(recipe, "results")
    assert result["row"]["Box AP"] == "-"
    assert result["row"]["Epochs"] == "0.8"
