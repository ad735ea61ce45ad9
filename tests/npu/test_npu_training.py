"""The whole loop on emulated NPUs against the same loop on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from casc.config import to_json

STEPS = 4


def jobs(recipe, folder: Path, *, device: str) -> list:
    """A run that stops halfway and goes on from its checkpoint, and is evaluated; compiled anew."""
    # An NPU's own RoIAlign sums up in another order; it has a run of its own. A CPU would count its
    # mask RoIs, and sum up over those alone.
    mask_head = replace(recipe.model.mask_head, capacity="full")
    model = replace(recipe.model, roi_kernel="aten", mask_head=mask_head)
    whole = replace(
        recipe, model=model, device=device, out=folder / f"{device}-eager", max_steps=STEPS,
        save_steps=2, evaluate_every=1,
    )  # fmt: skip
    half = replace(whole, max_steps=STEPS // 2, evaluate_every=0)
    if device == "cpu":
        return [as_job(half), as_job(whole)]
    compiled = replace(
        whole, compile=True, compile_backend="aot_eager", out=folder / "npu-compiled",
        compile_cache=folder / "programs",
    )  # fmt: skip
    native = replace(recipe, device=device, out=folder / "npu-native", max_steps=1)
    return [as_job(each) for each in (half, whole, compiled, native)]


def as_job(recipe) -> list:
    return [to_json(recipe), str(recipe.out) + "-{rank}.safetensors"]


def results(folder: Path, name: str) -> tuple[list[dict], dict]:
    """Every step's losses, and the figures of the evaluation."""
    losses = records(folder / name, "train")
    assert [r["step"] for r in losses] == list(range(1, STEPS + 1))
    (evaluation,) = records(folder / name, "evaluation")
    return losses, evaluation["figures"]


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_is_the_cpus(tiny_recipe, write_shards, tmp_path, emulator, run_ranks, world):
    # One canvas: each is compiled.
    write_shards(tmp_path / "wide", {"train": [(0, 8, True)], "val": [(0, 5, True)]})
    recipe = replace(tiny_recipe, data=tmp_path / "wide", batch=2 // world)
    for device, environment in (("cpu", {}), ("npu", emulator)):
        (tmp_path / "jobs.json").write_text(json.dumps(jobs(recipe, tmp_path, device=device)))
        run_ranks("train_jobs.py", tmp_path / "jobs.json", environment=environment, world=world)
    expected, figures = results(tmp_path, "cpu-eager")
    params = load_file(tmp_path / "cpu-eager-0.safetensors")
    for name in ("npu-eager", "npu-compiled"):
        losses, own_figures = results(tmp_path, name)
        for ours, cpus in zip(losses, expected, strict=True):
            assert_losses_equal(ours, cpus, 1e-6)
        assert own_figures == figures
        for rank in range(world):
            found = load_file(tmp_path / f"{name}-{rank}.safetensors")
            assert found.keys() == params.keys()
            for key, value in params.items():
                error = (found[key] - value).abs().max() / value.abs().max().clamp(min=1e-9)
                assert error <= 1e-6, (key, name, rank)
    (native,) = records(tmp_path / "npu-native", "train")
    assert_losses_equal(native, expected[0], 1e-4)


def assert_losses_equal(ours: dict, cpus: dict, tolerance: float) -> None:
    checked = [k for k in cpus if "loss" in k or "positives" in k or k == "grad_norm"]
    assert len(checked) >= 12
    for key in checked:
        assert ours[key] == pytest.approx(cpus[key], rel=tolerance, abs=1e-9), key
