"""Steps that an emulated NPU replays give the same bits as steps that are launched one by one.

The emulator keeps what is launched while a graph is captured, and runs it again on the same
memory; whatever a step takes from the host, or keeps elsewhere, would stay what it was.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casc.config import to_json
from casc.model.detector import init
from casc.model.resnet import ResNetConfig
from casc.model.timm_backbone import TimmConfig
from casc.model.vit import ViTConfig
from casc.train.ema import Ema
from casc.train.schedule import Schedule

STEPS = 6


def log_of(folder: Path, kind: str = "train") -> list[dict]:
    """Every step's figures without the clock's, or what else was recorded."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clock = ("time", "images_per_second", "data_wait", "memory")
    return [
        {k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] == kind
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "backbone"), [(1, None), (2, None), (1, TimmConfig("convnext_atto", drop_path=0.3))]
)
def test_replayed_steps_are_launched_steps(
    tiny_recipe, write_shards, tmp_path, emulator, run_ranks, world, backbone
):
    """Two canvases, changing batches and rates, accumulation, averages, a resume in between; and
    paths that are dropped, other ones in each step."""
    write_shards(tmp_path / "both", {"train": [(0, 9, True), (1, 9, True)], "val": [(0, 3, True)]})
    recipe = replace(
        tiny_recipe, data=tmp_path / "both", batch=1, accumulate=2 if world == 1 else 1,
        device="npu", compile=False, ema=Ema(0.9), max_steps=STEPS, save_steps=3, log_every=1,
        evaluate_every=0, schedule=Schedule(warmup_steps=4, warmup_ratio=0.1, warmup_limit=1),
    )  # fmt: skip
    if backbone is not None:
        recipe = replace(recipe, model=replace(recipe.model, backbone=backbone))
    runs = {
        "off": replace(recipe, replay="off"),
        "on": replace(recipe, replay="on"),
    }
    half = replace(runs["on"], max_steps=3)
    scaled = {
        f"scaled-{name}": replace(run, dtype="float16", max_steps=4) for name, run in runs.items()
    }
    jobs = []
    for name, run in [("off", runs["off"]), ("on", half), ("on", runs["on"]), *scaled.items()]:
        out = tmp_path / name
        jobs.append([to_json(replace(run, out=out)), f"{out}-{{rank}}.safetensors"])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("train_jobs.py", tmp_path / "jobs.json", environment=emulator, world=world)
    for launched, replayed in (("off", "on"), ("scaled-off", "scaled-on")):
        logs = [log_of(tmp_path / name) for name in (launched, replayed)]
        assert logs[0] == logs[1]
        # Of updates that were skipped, with the steps' numbers.
        warned = [log_of(tmp_path / name, "warning") for name in (launched, replayed)]
        assert warned[0] == warned[1]
        assert bool(warned[0]) == (launched == "scaled-off")
        assert len({line["lr"] for line in logs[0]}) > 2
        for rank in range(world):
            right, made = (
                load_file(tmp_path / f"{name}-{rank}.safetensors") for name in (launched, replayed)
            )
            assert all((right[key] == made[key]).all() for key in right)
    # Weights, momentum, averages, guards.
    for file in ("weights", "state"):
        right, made = (
            load_file(tmp_path / f"{name}/checkpoints/step-{STEPS:08d}/{file}.safetensors")
            for name in ("off", "on")
        )
        assert right.keys() == made.keys()
        assert all((right[key] == made[key]).all() for key in right)
    # Float16's first loss scale is too large, so updates are skipped.
    assert sum(line["skipped"] for line in log_of(tmp_path / "scaled-on")) > 0
    text = (tmp_path / "on/log.txt").read_text() if (tmp_path / "on/log.txt").exists() else ""
    assert "replayed" in text or "replayed" in (tmp_path / "on/log.jsonl").read_text()


FAMILIES = {
    "resnet": ResNetConfig(depth=18, width=16, frozen_stages=1),
    "convnext": TimmConfig("test_convnext", drop_path=0.3),
    "convnextv2": TimmConfig("convnextv2_atto", drop_path=0.3),
    "swin": TimmConfig("swin_tiny_patch4_window7_224", drop_path=0.3),
    "timm's resnet": TimmConfig("test_resnet"),
    "efficientnet": TimmConfig("test_efficientnet", drop_path=0.3),
    "mobilenet": TimmConfig("mobilenetv3_small_050", drop_path=0.3),
    "plain": TimmConfig("test_vit", drop_path=0.3),
    "vitdet": ViTConfig(
        channels=32, depth=2, heads=2, grid=3, window=3, global_blocks=(1,), relative_grid=4,
        drop_path=0.3,
    ),
}  # fmt: skip


@pytest.mark.slow
def test_each_kind_of_backbone_is_replayed(
    tiny_recipe, write_shards, tmp_path, emulator, run_ranks
):
    """To the weights that three launched steps leave; frozen layers and dropped paths included."""
    write_shards(tmp_path / "one", {"train": [(0, 6, True)], "val": [(0, 1, True)]})
    weights = tmp_path / "weights.safetensors"
    params, buffers = init(
        replace(tiny_recipe.model, backbone=FAMILIES["resnet"]), torch.Generator().manual_seed(0)
    )
    save_file(params | buffers, weights)
    recipe = replace(tiny_recipe, data=tmp_path / "one", device="npu", epochs=1)
    jobs = []
    for name, backbone in FAMILIES.items():
        for replay in ("off", "on"):
            run = replace(
                recipe, out=tmp_path / f"{name}-{replay}", replay=replay,
                init=str(weights) if name == "resnet" else "random",
                model=replace(recipe.model, backbone=backbone),
            )  # fmt: skip
            jobs.append([to_json(run), f"{run.out}.safetensors"])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("train_jobs.py", tmp_path / "jobs.json", environment=emulator)
    for name in FAMILIES:
        runs = [tmp_path / f"{name}-{replay}" for replay in ("off", "on")]
        launched, replayed = (load_file(f"{run}.safetensors") for run in runs)
        for key, value in launched.items():
            assert value.equal(replayed[key]), f"{name}: {key}"
        logs = [log_of(run) for run in runs]
        assert len(logs[0]) == 3
        assert logs[0] == logs[1], name
        assert "replayed" in (runs[1] / "log.jsonl").read_text()


def test_replayed_detections_are_launched_ones(tmp_path, emulator, run_ranks):
    """Over changing batches, two canvases in turns, and weights that change in place."""
    run_ranks("replayed_detections.py", tmp_path / "found.safetensors", environment=emulator)
    found = load_file(tmp_path / "found.safetensors")
    keys = {key.partition(".")[2] for key in found if not key.endswith("launches")}
    assert len(keys) == 5 * 5
    for key in keys:
        assert (found[f"launched.{key}"] == found[f"replayed.{key}"]).all(), key
    masks = [found[f"replayed.{number}.masks"] for number in range(5)]
    assert all((masks[i] != masks[j]).any() for i in range(5) for j in range(i))
    launches = [int(found[f"replayed.{number}.launches"]) for number in range(5)]
    # A canvas's first call records; the others copy the batch, replay and copy the results.
    assert min(launches[:2]) > 1000
    assert max(launches[2:]) < 20
