import gzip
import json
import subprocess
from pathlib import Path

import pytest
import torch

from casc.bench.batch import Job, Load
from casc.bench.card import CardPlan, card_page, jobs, kernels, measure_card
from casc.bench.train import WholeStep
from casc.bench.worker import Worker
from casc.cli.main import main
from casc.errors import UserError


def plan_of(out: Path, **changes) -> CardPlan:
    values = {
        "out": out, "goldens": None, "device": "cpu", "dtype": "float32", "compile": False,
        "canvases": [(64, 96), (96, 64)], "batches": (2, 4), "inference_batches": (1,),
        "steps": 1, "seconds": 600.0,
    }  # fmt: skip
    return CardPlan(**values | changes)


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path):
    """Inference alone: a training step and its trace take a CPU minutes."""
    plan = plan_of(tmp_path, batches=(), canvases=[(64, 64)], inference_batches=(1,))
    said: list[str] = []
    report = measure_card(plan, said.append)
    assert json.loads((tmp_path / "card.json").read_text()) == report
    (step,) = report["steps"]
    assert step["name"] == "inference, batch 1, 64 x 64"
    assert "error" not in step
    assert step["img_per_s"] == pytest.approx(step["batch"] / step["step_s"])
    assert step["peak_rss_gib"] > 0.1
    assert "cpu" in report["doctor"]["usable"]
    assert report["not_run"] == []
    assert report["verify"]["lines"] == ["not run: no golden files; give them by --goldens"]
    assert said == ["verify", step["name"]]
    assert "inference, batch 1, 64 x 64" in (tmp_path / "card.html").read_text()


def test_steps_come_in_the_order_of_what_they_tell(tmp_path):
    order = [(job.what, job.load.batch, job.load.canvas[0]) for job in jobs(plan_of(tmp_path))]
    assert order == [
        ("train", 2, 64), ("inference", 1, 64), ("train", 4, 64),
        ("train", 2, 96), ("inference", 1, 96), ("train", 4, 96),
    ]  # fmt: skip


def test_an_accelerator_is_timed_replayed_and_launched(tmp_path, monkeypatch):
    monkeypatch.setattr("casc.bench.card.replay_missing", lambda device: None)
    training = [job.replay for job in jobs(plan_of(tmp_path)) if job.what == "train"]
    assert training == [True, False] * 4


@pytest.mark.slow
def test_a_whole_step_learns(tmp_path):
    """What is timed is the step with its update."""
    load = Load(canvas=(64, 64), batch=1, objects=2)
    step = WholeStep(Job("train", "casc", load, "float32", "cpu", compile=False, replay=False))
    step.rate.fill_(1e-3)
    before = {k: v.detach().clone() for k, v in step.params.items()}
    step.step()
    assert step.state.guard["updates"] == 1
    moved = [
        not torch.equal(before[name], value.detach())
        for name, value in step.optimizer.trained.items()
    ]
    assert sum(moved) > 0.9 * len(moved)


def test_what_there_is_no_time_for_is_said(tmp_path):
    report = measure_card(plan_of(tmp_path, seconds=0.01), lambda line: None)
    assert report["steps"] == []
    assert len(report["not_run"]) == 6
    assert "Verify was not run" in (tmp_path / "card.html").read_text()
    assert (
        "train, batch 4, 96 x 64, launched: the time was over"
        in (tmp_path / "card.html").read_text()
    )


def test_what_each_part_found_is_in_the_report(tmp_path, monkeypatch):
    """Of made-up parts: verify and the replayed step fail, the one that is launched is traced."""

    class Made:
        def __init__(self, job, timeout):
            self.job, self.times = job, iter([9.0, 5.0, 0.5, 0.3, 0.4])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def step(self):
            if self.job.replay:
                raise UserError("it reads")
            return {"step_s": next(self.times)}

        def memory(self):
            return {"peak_device_gib": 2.5}

        def trace(self, file):
            assert (self.job.what, self.job.replay) == ("train", False)
            written([event("gemm", 0, 6, "kernel")], file)

    def run(command, seconds):
        failed = command[0] == "verify"
        return subprocess.CompletedProcess(command, int(failed), "" if failed else "{}", "no\n")

    monkeypatch.setattr("casc.bench.card.Worker", Made)
    monkeypatch.setattr("casc.bench.card._casc", run)
    monkeypatch.setattr("casc.bench.card.replay_missing", lambda device: None)
    plan = plan_of(tmp_path, goldens=tmp_path, canvases=[(64, 96)], batches=(4,), steps=3)
    report = measure_card(plan, lambda line: None)
    assert report["verify"] == {"passed": False, "lines": ["no"]}
    assert "Verify did NOT pass" in (tmp_path / "card.html").read_text()
    replayed, launched, inference = report["steps"]
    assert replayed["error"] == "it reads"
    assert "img_per_s" not in replayed
    assert (launched["first_step_s"], launched["step_s"]) == (9.0, 0.4)
    assert launched["img_per_s"] == pytest.approx(10.0)
    assert launched["step_s_spread"] == {"median": 0.4, "low": 0.3, "high": 0.5}
    assert inference["img_per_s"] == pytest.approx(2.5)
    assert inference["peak_device_gib"] == 2.5
    assert [row["name"] for row in report["kernels"]] == ["gemm"]


def test_a_process_that_takes_too_long_is_ended():
    job = Job("train", "casc", Load(canvas=(64, 64), batch=1), "float32", "cpu", compile=False)
    with Worker(job, timeout=0.05) as worker, pytest.raises(UserError, match="the time was over"):
        worker.step()
    worker.process.join(10)
    assert not worker.process.is_alive()


def written(events: list[dict], file: Path) -> Path:
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": events}, text)
    return file


def event(name: str, ts: float, dur: float, cat: str, tid: int = 1) -> dict:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


def test_kernels_of_a_device_are_summed_per_step(tmp_path):
    events = [event("aten::mm", 0, 500, "cpu_op")]
    events += [event("gemm", 10 * i, 6, "kernel") for i in range(6)]
    events += [event("copy", 10 * i, 3, "gpu_memcpy") for i in range(3)]
    rows = kernels(written(events, tmp_path / "t.json.gz"))
    assert [(r["name"], r["calls"], r["us"]) for r in rows] == [("gemm", 2, 12), ("copy", 1, 3)]
    assert [r["share"] for r in rows] == [0.8, 0.2]


def test_operators_of_a_cpu_count_without_those_within(tmp_path):
    events = [
        event("outer", 0, 100, "cpu_op"), event("inner", 10, 30, "cpu_op"),
        event("inner", 50, 20, "cpu_op"), event("innermost", 55, 5, "cpu_op"),
        event("outer", 100, 10, "cpu_op"), event("inner", 0, 7, "cpu_op", tid=2),
    ]  # fmt: skip
    rows = {r["name"]: 3 * r["us"] for r in kernels(written(events, tmp_path / "t.json.gz"))}
    assert rows == pytest.approx({"outer": 60, "inner": 52, "innermost": 5})


def test_names_on_the_page_are_text(tmp_path):
    report = {
        "device": "<b>", "dtype": "float32", "compiled": False, "doctor": None, "verify": None,
        "steps": [{"name": "<i>", "error": "<script>"}], "kernels": [], "not_run": ["<u>"],
    }  # fmt: skip
    page = card_page(report, "t")
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<script>&"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "must be positive"),
        (["--minutes", "nan"], "must be positive"),
        (["--minutes", "inf"], "must be positive"),
        (["--canvases", "65", "64"], "multiples of 32"),
        (["--goldens", "nowhere"], "no golden files"),
    ],
)
def test_what_cant_be_measured_is_said_in_a_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["bench", "card", "--out", str(tmp_path / "o"), *arguments])
    assert message in capsys.readouterr().err
