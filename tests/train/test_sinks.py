"""Sinks and traces in whole runs, and the script in docs/logging.md."""

import contextlib
import gzip
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from casc.data.stream import TrainLoaderConfig
from casc.errors import UserError
from casc.train import launch as launching
from casc.train.loop import train
from casc.train.profile import NEEDED, STEPS, profiling

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logging.md"


def test_the_documented_script_logs_a_run(tiny_recipe, monkeypatch):
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    calls, launched = [], {}
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(("init", given))  # type: ignore[attr-defined]
    wandb.log = lambda *given, step: calls.append(("log", *given, step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def launch(recipe, description, *, sinks):
        launched.update(recipe=recipe, sinks=sinks)

    monkeypatch.setattr(launching, "launch", launch)
    exec(compile(script, PAGE.name, "exec"), {"__name__": "__main__", "__doc__": None})
    assert launched["recipe"].name == "coco_1x"

    recipe = replace(tiny_recipe, max_steps=3, evaluate_every=1, save_every=0)
    recipe = replace(recipe, loading=TrainLoaderConfig(workers=0))
    summary = train(recipe, sinks=launched["sinks"])
    (begin, given), *logged = calls
    assert begin == "init"
    assert (given["id"], given["config"]["max_steps"]) == ("tiny", 3)
    steps = [step for _, figures, step in logged if "train/loss" in figures]
    assert steps == [1, 2, 3]
    (val,) = [figures for _, figures, step in logged if "val/box_ap" in figures]
    assert summary.evaluation is not None
    assert val["val/box_ap"] == pytest.approx(summary.evaluation.figures["bbox"]["AP"])


def test_trace_holds_the_steps_operators(tiny_recipe, tmp_path):
    file = tmp_path / "new" / "trace.json.gz"
    recipe = replace(tiny_recipe, max_steps=NEEDED, save_every=0, profile=file)
    train(replace(recipe, loading=TrainLoaderConfig(workers=0)))
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    # What Perfetto needs of a slice.
    slices = [event for event in events if event.get("ph") == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(event) for event in slices)
    marks = [event for event in slices if event["name"].startswith("ProfilerStep#")]
    assert len(marks) == STEPS
    for mark in marks:
        within = {
            event["name"]
            for event in slices
            if mark["ts"] <= event["ts"] < mark["ts"] + mark["dur"]
        }
        for operator in ("aten::convolution", "casc::nms", "aten::convolution_backward"):
            assert operator in within
        assert any("sgd" in name.lower() for name in within)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": NEEDED - 1}, rf"--profile: the trace needs {NEEDED} steps"),
        ({"profile": Path("trace.txt")}, r"--profile trace.txt: a trace's name ends in .json.gz"),
    ],
)
def test_a_trace_that_cannot_be_made_is_refused(tiny_recipe, change, message):
    recipe = replace(tiny_recipe, profile=tiny_recipe.folder / "trace.json.gz")
    with pytest.raises(UserError, match=message):
        train(replace(recipe, **change))
    assert not recipe.folder.exists()


def test_a_file_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--profile .*can't be written"),
        profiling(tmp_path / "file" / "trace.json"),
    ):
        pass
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(profiling(None))
        step()
