import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from casc.errors import UserError
from casc.train import watching
from casc.train.log import run_log
from casc.train.loop import train
from casc.train.meter import Meter
from casc.train.watching import Activity, watchdog


def notes(folder, rank):
    lines = (folder / f"logs/rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The watchdog's time, which passes only when a test says so."""
    now = [0.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(watching, "time", fake)
    return now


def wait_for_a_batch_that_never_comes(clock, folder):
    for reports in (1, 2):
        clock[0] += 0.9
        while len(notes(folder, 3)) < reports:
            time.sleep(0.01)


def test_the_watchdog_says_who_is_stuck_with_what(tmp_path, capsys, clock):
    with run_log(tmp_path, start=0, total=9, rank=3) as log:
        activity = Activity(6)
        activity.detail = lambda: "worker 0: reading train/000012.tar at byte 4,096, for 42 s"
        activity.set("waiting for data", 7)
        with watchdog(activity, log, 0.2, tmp_path):
            wait_for_a_batch_that_never_comes(clock, tmp_path)
            activity.set("step")
    stuck = [note for note in notes(tmp_path, 3) if note["kind"] == "stuck"]
    assert len(stuck) == 2, "again and again, but not all the time"
    assert (stuck[0]["step"], stuck[0]["activity"]) == (7, "waiting for data")
    assert "no progress for" in stuck[0]["text"]
    assert "worker 0: reading train/000012.tar" in stuck[0]["text"]
    stacks = (tmp_path / "logs/stacks-rank-3.txt").read_text()
    assert "wait_for_a_batch_that_never_comes" in stacks
    assert "rank 3: no progress" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_progress_keeps_the_watchdog_silent(tmp_path, seconds, clock):
    with run_log(tmp_path, start=0, total=9) as log:
        activity = Activity(0)
        with watchdog(activity, log, seconds, tmp_path):
            for step in range(30):
                activity.set("step", step)
                time.sleep(0.02)  # the watchdog looks every 0.1 s
                clock[0] += 0.3
    assert not notes(tmp_path, 0)


def test_a_crash_leaves_a_report(tiny_recipe, monkeypatch, capsys):
    add = Meter.add_images

    def broken(meter, step, *rest):
        if step == 2:
            raise RuntimeError("CUDA error: device fell off the bus\nmore of it")
        add(meter, step, *rest)

    monkeypatch.setattr(Meter, "add_images", broken)
    recipe = replace(tiny_recipe, save_steps=1)
    with pytest.raises(RuntimeError, match="fell off"):
        train(recipe)
    path = recipe.folder / "logs/crash-rank-0.txt"
    report = path.read_text()
    for text in (
        "RuntimeError: CUDA error: device fell off the bus",
        "activity  computing, step 2",
        "bucket    ",
        f"torch {torch.__version__}",
        "Traceback",
        "in broken",
        '"name": "tiny"',
    ):
        assert text in report, text
    ids = json.loads(report.split("images    ")[1].splitlines()[0])
    assert len(ids) == 2
    assert all(1 <= image_id <= 9 for image_id in ids)
    error = capsys.readouterr().err
    assert f"rank 0: RuntimeError: CUDA error: device fell off the bus; see {path}" in error
    crash = notes(recipe.folder, 0)[-1]
    assert (crash["kind"], crash["step"]) == ("crash", 2)
    # What had been saved is whole, and the run goes on.
    monkeypatch.undo()
    assert train(replace(recipe, max_steps=3)).state.step == 3


def test_minutes_must_make_sense(tiny_recipe):
    with pytest.raises(UserError, match="--watchdog-minutes -1"):
        train(replace(tiny_recipe, watchdog_minutes=-1.0))
