"""The whole loop on emulated NPUs against the same loop on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from casc.config import to_json

STEPS = 4


def jobs(recipe, folder: Path, *, device: str, compile: bool) -> list:
    """A run that is interrupted halfway and goes on from its checkpoint, then is evaluated."""
    name = f"{device}-{'compiled' if compile else 'eager'}"
    whole = replace(
        recipe, out=folder / name, device=device, compile=compile, max_steps=STEPS, save_steps=2,
        compile_cache=folder / "programs", evaluate_every=1,
    )  # fmt: skip
    half = replace(whole, max_steps=STEPS // 2, evaluate_every=0)
    path = str(folder / f"{name}-{{rank}}.safetensors")
    return [[to_json(half), path], [to_json(whole), path]]


def results(folder: Path, name: str) -> tuple[list[dict], dict]:
    """Every step's losses, and the figures of the evaluation."""
    records = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    losses = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in losses] == list(range(1, STEPS + 1))
    (evaluation,) = (r for r in records if r["kind"] == "evaluation")
    return losses, evaluation["figures"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_is_the_cpus(tiny_recipe, tmp_path, emulator, run_ranks, world):
    recipe = replace(tiny_recipe, batch=2 // world)
    for device, environment in (("cpu", {}), ("npu", emulator)):
        todo = jobs(recipe, tmp_path, device=device, compile=False)
        if device == "npu":
            todo += jobs(recipe, tmp_path, device=device, compile=True)
        (tmp_path / "jobs.json").write_text(json.dumps(todo))
        run_ranks("train_jobs.py", tmp_path / "jobs.json", environment=environment, world=world)
    expected, figures = results(tmp_path, "cpu-eager")
    for name in ("npu-eager", "npu-compiled"):
        losses, own_figures = results(tmp_path, name)
        for ours, cpus in zip(losses, expected, strict=True):
            for key in cpus:
                if "loss" in key or "positives" in key or key == "grad_norm":
                    assert ours[key] == pytest.approx(cpus[key], rel=1e-6, abs=1e-9), (key, name)
        assert own_figures == pytest.approx(figures, rel=1e-6)
        params = load_file(tmp_path / "cpu-eager-0.safetensors")
        for rank in range(world):
            found = load_file(tmp_path / f"{name}-{rank}.safetensors")
            assert found.keys() == params.keys()
            for key, value in params.items():
                error = (found[key] - value).abs().max() / value.abs().max().clamp(min=1e-9)
                assert error <= 1e-6, (key, name, rank)
                assert torch.isfinite(found[key]).all()
