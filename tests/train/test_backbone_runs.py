"""Whole runs with a backbone of timm and with a plain transformer, small: train, go on, use."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import casc
from casc.checkpoints.model import load_trained
from casc.device.compute import Compute
from casc.export.operators import plain
from casc.export.program import Shape, capture, infer
from casc.model.detector import init
from casc.model.steps import make_loss_step
from casc.model.timm_backbone import TimmConfig
from casc.model.vit import ViTConfig
from casc.train.loop import train
from casc.train.optim import Optim
from casc.train.recipe import Recipe
from casc.train.schedule import Schedule

BACKBONES = {
    "timm": TimmConfig("convnext_atto", drop_path=0.3),
    "vit": ViTConfig(
        channels=32, depth=2, heads=2, grid=3, window=3, global_blocks=(1,), relative_grid=4,
        drop_path=0.3,
    ),
}  # fmt: skip


@pytest.fixture(params=BACKBONES)
def recipe(request, tiny_recipe, write_shards, tmp_path) -> Recipe:
    """One canvas; AdamW with layer-wise rates, bf16, layer norms."""
    write_shards(tmp_path / "one", {"train": [(0, 5, True)], "val": [(0, 3, True)]})
    model = tiny_recipe.model
    return replace(
        tiny_recipe,
        data=tmp_path / "one",
        dtype="bfloat16",
        optim=Optim("adamw", lr=1e-3, reference_batch=2, layer_decay=0.7, decay_vectors=False),
        schedule=Schedule(kind="cosine", warmup_steps=2),
        model=replace(model, backbone=BACKBONES[request.param], fpn=replace(model.fpn, norm="ln")),
    )


def test_a_run_goes_on_to_the_same_bits(recipe, tmp_path):
    """Dropped paths, moments and rates of each layer included."""
    straight = replace(recipe, max_steps=4)
    whole = train(straight)
    broken = replace(recipe, out=tmp_path / "broken", max_steps=2)
    train(broken)
    second = train(replace(broken, max_steps=4))
    for a, b in zip(whole.state[1:], second.state[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
    still = replace(recipe.model.backbone, drop_path=0.0)
    other = train(
        replace(
            recipe, out=tmp_path / "still", max_steps=4, model=replace(recipe.model, backbone=still)
        )
    )
    assert any(
        not torch.equal(value, other.state.params[k]) for k, value in whole.state.params.items()
    )


def test_a_runs_rates_fall_from_layer_to_layer(tiny_recipe, tmp_path):
    """By SGD's first step, which moves what is at a half of the rate half as far."""
    moved = []
    for decay in (1.0, 0.5):
        run = replace(
            tiny_recipe, out=tmp_path / str(decay), max_steps=1,
            optim=replace(tiny_recipe.optim, lr=0.5, layer_decay=decay),
            schedule=replace(tiny_recipe.schedule, warmup_steps=0),
        )  # fmt: skip
        first, _ = init(run.model, torch.Generator().manual_seed(run.seed))
        made = train(run).state.params
        moved.append({name: (made[name].detach() - value).norm() for name, value in first.items()})
    layers = {"conv1": 5, "layer1.0": 4, "layer2.1": 3, "layer3.0": 2, "layer4.1": 1}
    for start, name in (
        *((f"backbone.{start}.", start) for start in layers), ("neck.", ""), ("rpn_head.", ""),
        ("roi_head.", ""),
    ):  # fmt: skip
        found = [moved[1][k] / moved[0][k] for k in moved[0] if moved[0][k] and k.startswith(start)]
        assert found
        torch.testing.assert_close(
            torch.stack(found), torch.full((len(found),), 0.5 ** layers.get(name, 0)),
            rtol=2e-3, atol=0,
        )  # fmt: skip


def test_a_run_is_evaluated_loaded_and_exported(recipe):
    summary = train(replace(recipe, epochs=1, evaluate_every=1))
    assert summary.evaluation is not None
    assert all(value.isfinite().all() for value in summary.state.params.values())
    trained = load_trained(str(recipe.folder))
    assert trained.model.backbone == recipe.model.backbone
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8))
    casc.load(recipe.folder, device="cpu")(pixels[0].numpy())
    shape, size = Shape(1, (48, 64), (64, 64)), torch.tensor([[48, 64]])
    one = trained.params, trained.buffers, trained.model, trained.image
    program = plain(capture(*one, shape))
    with torch.no_grad():
        expected = infer(*one, shape.canvas, pixels, size)
        found = program.module()(pixels, size)
    for ours, theirs in zip(found, expected[:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_whole_step_is_one_graph(kind, tiny, tiny_batch):
    """With dropped paths; other noise is no other graph."""
    config, image, canvas = tiny
    config = replace(
        config, backbone=BACKBONES[kind], mask_head=replace(config.mask_head, capacity="full")
    )
    params, buffers = init(config, torch.Generator().manual_seed(0))
    torch.compiler.reset()
    eager, compiled = (
        make_loss_step(config, image, canvas, Compute(compile=on, backend="eager"))
        for on in (False, True)
    )
    with torch.no_grad():
        compiled(params, buffers, tiny_batch([2, 1]))
        batch = tiny_batch([2, 1], seed=1)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = compiled(params, buffers, batch)
        expected = eager(params, buffers, batch)
    assert found.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-4, atol=1e-5)
