"""What evaluations say beside AP: losses on the other split, and when a run is to end."""

import json
import math
from dataclasses import replace

import chaos
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casc.checkpoints.model import load_trained
from casc.data.index import read_index
from casc.data.stream import evaluation_batches
from casc.device.compute import Compute
from casc.errors import UserError
from casc.model.preprocess import ImageConfig
from casc.model.steps import make_loss_step
from casc.train import evaluation
from casc.train.launch import launch
from casc.train.loop import train
from casc.train.patience import is_exhausted
from casc.train.run_lock import run_lock


def records(recipe, kind):
    lines = (recipe.folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def evaluated(recipe):
    return replace(recipe, evaluate_every=1, validation_loss=True)


def test_losses_of_the_other_split_are_recorded_and_change_nothing(tiny_recipe, tmp_path):
    """The same weights have the same losses: after stopping and going on, at any batch size."""
    plain = replace(tiny_recipe, evaluate_every=1)
    recipe = replace(evaluated(tiny_recipe), out=tmp_path / "with")
    states = [train(r).state for r in (plain, recipe)]
    for name, value in states[0].params.items():
        assert torch.equal(value, states[1].params[name]), name
    assert "losses" not in records(plain, "evaluation")[0]
    losses = [r["losses"] for r in records(recipe, "evaluation")]
    assert len(losses) == 2
    for each in losses:
        assert each["loss"] == pytest.approx(sum(v for k, v in each.items() if k != "loss"))
        assert {"loss_rpn_cls", "s0.loss_bbox", "s2.loss_mask"} <= each.keys()
    assert losses[0]["loss"] != losses[1]["loss"]
    assert "validation loss" in records(recipe, "evaluation")[0]["text"]
    # Stopped before its second evaluation, and with batches of which the last isn't full.
    again = replace(recipe, out=tmp_path / "again", max_steps=7)
    train(again)
    train(replace(again, max_steps=None))
    assert [r["losses"] for r in records(again, "evaluation")][::2] == losses


def expected_losses(recipe, params, buffers) -> dict[str, float]:
    """Image by image through the step itself; flips and scales at random have no part in it."""
    split = read_index(recipe.data).splits["val"]
    still = ImageConfig(recipe.image.short, recipe.image.long, flip=0.0)
    kind = {"masks": recipe.model.masks != "none"}
    step = make_loss_step(recipe.model, still, (64, 64), Compute(torch.float32, compile=False))
    sums: dict[str, list[float]] = {}
    for _, batch in evaluation_batches(recipe.data, split, batch=1, seed=recipe.seed, **kind):
        found = step(params, buffers, batch)
        for name, value in found.sums.items():
            one = [float(value.detach()), float(found.counts[name])]
            sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0]), one, strict=True)]
    losses = {name: total / max(count, 1) for name, (total, count) in sums.items()}
    return {"loss": sum(losses.values()), **losses}


def test_validation_losses_are_the_training_steps_own(tiny_recipe):
    random = {"flip": 1.0, "train_short": (32, 64), "colour": (0.9, 0.9, 0.9, 0.5), "erase": 1.0}
    image, model = replace(tiny_recipe.image, **random), replace(tiny_recipe.model, masks="none")
    recipe = replace(evaluated(tiny_recipe), image=image, model=model, epochs=1)
    state = train(recipe).state
    (found,) = (r["losses"] for r in records(recipe, "evaluation"))
    assert found == pytest.approx(expected_losses(recipe, state.params, state.buffers), rel=1e-5)


def test_ranks_share_the_images_and_end_alike(tiny_recipe, tmp_path):
    """The rate is so low that no figure rises; the run ends with the second evaluation."""
    optim = replace(tiny_recipe.optim, lr=1e-12)
    recipe = replace(evaluated(tiny_recipe), epochs=5, patience=1, optim=optim)
    ranks = chaos.start(recipe, tmp_path / "output.txt")
    assert chaos.finish(ranks, 300) == [0, 0], (tmp_path / "output.txt").read_text()
    (run,) = records(recipe, "run")
    evaluations = records(recipe, "evaluation")
    assert [r["step"] for r in evaluations] == [run["steps_per_epoch"], 2 * run["steps_per_epoch"]]
    trained = load_trained(str(recipe.folder))
    assert trained.weights.step == evaluations[1]["step"]
    expected = expected_losses(recipe, trained.params, trained.buffers)
    assert evaluations[1]["losses"] == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.none() | st.integers(0, 4)), st.integers(1, 4))
def test_patience_ends_when_nothing_has_risen(figures, patience):
    values = [-math.inf if f is None else f for f in figures]
    before, last = values[:-patience], values[-patience:]
    risen = len(values) < patience or max(last) > max(before, default=-math.inf)
    assert is_exhausted(figures, patience) is not risen


def with_figures(monkeypatch, figures):
    """Let evaluations find these, one after the other."""
    waiting = iter(figures)
    monkeypatch.setattr(evaluation, "figures_of", lambda _: {"mask_ap": next(waiting)})


def test_a_run_ends_when_the_kept_figure_no_longer_rises(tiny_recipe, monkeypatch, capsys):
    recipe = replace(tiny_recipe, epochs=6, evaluate_every=1, patience=2, save_every=3, keep_last=0)
    with_figures(monkeypatch, [0.1, 0.3, 0.3])
    # Stopped after three evaluations, of which the last hasn't risen; the fourth is the second.
    train(replace(recipe, max_steps=15))
    capsys.readouterr()
    with_figures(monkeypatch, [0.2] * 9)
    assert train(recipe).state.step == 20
    output = capsys.readouterr().out
    line = "--patience 2: mask_ap hasn't risen above 30.0 % in the last 2 of 4 evaluations"
    assert f"{line}; the run ends at step 20 of 30" in output
    assert json.loads((recipe.folder / "results.json").read_text())["step"] == 20
    metrics = recipe.folder / "checkpoints/step-00000020/metrics.json"
    assert json.loads(metrics.read_text()) == {"mask_ap": 0.2}
    # The same command has nothing more to do; with more patience it goes on.
    assert train(recipe).state.step == 20
    assert "already at its end, step 20 (--patience 2" in capsys.readouterr().out
    assert train(replace(recipe, patience=3)).state.step == 25


def test_patience_and_validation_losses_need_evaluations(tiny_recipe):
    for change, message in (
        ({"patience": 2}, "--patience: there are no evaluations"),
        ({"validation_loss": True}, "--validation-loss: there are no evaluations"),
        ({"patience": 0, "evaluate_every": 1}, "--patience 0: must be at least 1"),
        ({"patience": 2, "evaluate_every": 1, "keep_best": "none"}, "--keep-best"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(tiny_recipe, **change))


def test_a_dry_run_looks_at_the_run_that_is_there(tiny_recipe, capsys):
    train(replace(tiny_recipe, max_steps=3))
    there = sorted(tiny_recipe.folder.rglob("*"))
    capsys.readouterr()
    launch(tiny_recipe, None, ["--dry-run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"existing run    goes on from {tiny_recipe.folder}/checkpoints/step-00000003 at step 3"
    )
    for flags, message in (
        (["--seed", "1"], "--seed: the run in .* has 0, now it is 1"),
        (["--batch", "1"], "images_per_step 2, now it is 1"),
        (["--resume", "never"], "--resume never"),
    ):
        with pytest.raises(SystemExit, match=message):
            launch(tiny_recipe, None, [*flags, "--dry-run"])
    assert sorted(tiny_recipe.folder.rglob("*")) == there
    with run_lock(tiny_recipe.folder), pytest.raises(SystemExit, match="trains in this folder"):
        launch(tiny_recipe, None, ["--dry-run"])
