import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from casc.checkpoints.model import load_trained
from casc.errors import UserError
from casc.model.detector import init, trainable
from casc.train.ema import Ema, average, decay_at
from casc.train.flat import flatten
from casc.train.loop import train


def averaged(recipe, tmp_path, name, **changes):
    return replace(recipe, out=tmp_path / name, keep_last=0, **changes)


def test_the_average_is_the_sum_of_its_definition():
    """Against the closed form: each update's weights times what later ones have left of it."""
    rng = np.random.default_rng(0)
    course = rng.normal(size=(30, 5)).astype(np.float32)
    ema = flatten({"a": torch.from_numpy(course[0].copy())})
    decays = [decay_at(0.9, step) for step in range(29)]
    for values, decay in zip(course[1:], decays, strict=True):
        params = flatten({"a": torch.from_numpy(values)})
        params["a"].requires_grad_()
        average(ema, params, torch.tensor(1 - decay))
    weights = [(1 - decay) * np.prod(decays[i + 1 :]) for i, decay in enumerate(decays)]
    expected = course[0] * np.prod(decays) + np.array(weights) @ course[1:]
    np.testing.assert_allclose(ema["a"].numpy(), expected, rtol=1e-4, atol=1e-6)
    assert sum(weights) + np.prod(decays) == pytest.approx(1)


def test_the_decay_warms_up():
    assert decay_at(0.9998, 0) == 0.1
    made = [decay_at(0.99, step) for step in range(2000)]
    assert made == sorted(made)
    assert made[-1] == 0.99
    assert made.index(0.99) == 890  # (1 + 890) / (10 + 890)


def test_nothing_is_read_back():
    """On meta tensors there would be nothing to read."""
    ema, params = (flatten({"a": torch.empty(3, device="meta")}) for _ in range(2))
    average(ema, params, torch.empty((), device="meta"))


def test_a_run_averages_what_trains(tiny_recipe, tmp_path):
    """Weights of every step, from its checkpoints, give the average that the last one holds."""
    backbone = replace(tiny_recipe.model.backbone, frozen_stages=-1)
    recipe = averaged(
        tiny_recipe, tmp_path, "run", max_steps=5, save_steps=1, ema=Ema(0.7, evaluate=False),
        model=replace(tiny_recipe.model, backbone=backbone),
    )  # fmt: skip
    state = train(recipe).state
    assert state.ema.keys() == trainable(recipe.model, state.params).keys()
    saved = [
        load_file(recipe.folder / f"checkpoints/step-{step:08d}/weights.safetensors")
        for step in range(1, 6)
    ]
    raw = train(averaged(tiny_recipe, tmp_path, "raw", max_steps=5)).state
    for name, value in state.params.items():
        # The average changes nothing of the training.
        assert torch.equal(value, raw.params[name])
        assert torch.equal(saved[-1][name], value)
    name = "roi_head.bbox_head.0.fc_cls.weight"
    first, _ = init(recipe.model, torch.Generator().manual_seed(recipe.seed))
    expected = first[name].double()
    for step, weights in enumerate(saved):
        expected = torch.lerp(weights[name].double(), expected, decay_at(0.7, step))
    torch.testing.assert_close(state.ema[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("evaluate", [True, False])
def test_stopping_and_resuming_changes_nothing(tiny_recipe, tmp_path, evaluate):
    changes = {"ema": Ema(0.9, evaluate=evaluate), "max_steps": 6}
    whole = train(averaged(tiny_recipe, tmp_path, "whole", **changes)).state
    broken = averaged(tiny_recipe, tmp_path, "broken", **changes)
    train(replace(broken, max_steps=3))
    second = train(broken).state
    assert whole.ema
    for a, b in zip(whole[1:], second[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_what_is_evaluated_is_what_is_saved(tiny_recipe, tmp_path):
    changes = {"max_steps": 4, "evaluate_every": 1}
    run = averaged(tiny_recipe, tmp_path, "run", ema=Ema(0.9), **changes)
    state = train(run).state
    shown = load_trained(str(run.folder))
    name = "roi_head.bbox_head.2.fc_cls.weight"
    assert torch.equal(shown.params[name], state.ema[name])
    assert not torch.equal(shown.params[name], state.params[name])
    off = averaged(tiny_recipe, tmp_path, "off", ema=Ema(0.9, evaluate=False), **changes)
    train(off)
    assert torch.equal(load_trained(str(off.folder)).params[name], state.params[name])
    # Starting from the averaged checkpoint and standing still evaluates to the same figures.
    again = averaged(
        tiny_recipe, tmp_path, "again", init=str(run.folder), max_steps=1, evaluate_every=1,
        optim=replace(tiny_recipe.optim, lr=1e-30),
    )  # fmt: skip
    train(again)
    figures = [evaluation(recipe) for recipe in (run, again)]
    assert figures[0] == figures[1]


def evaluation(recipe):
    lines = map(json.loads, (recipe.folder / "log.jsonl").read_text().splitlines())
    return [line["figures"] for line in lines if line["kind"] == "evaluation"][-1]


def test_nothing_is_kept_without(tiny_recipe, tmp_path):
    run = averaged(tiny_recipe, tmp_path, "run", max_steps=1)
    assert train(run).state.ema == {}
    names = load_file(run.folder / "checkpoints/step-00000001/state.safetensors")
    assert not [name for name in names if name.startswith(("ema.", "raw."))]


def test_a_run_goes_on_with_its_average_only(tiny_recipe, tmp_path):
    run = averaged(tiny_recipe, tmp_path, "run", max_steps=1, ema=Ema(0.9))
    train(run)
    with pytest.raises(UserError, match=r"--ema.decay: the run in .* has 0.9, now it is None"):
        train(replace(run, max_steps=2, ema=Ema()))
    with pytest.raises(UserError, match=r"--ema.evaluate"):
        train(replace(run, max_steps=2, ema=Ema(0.9, evaluate=False)))
