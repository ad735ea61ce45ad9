import errno
import io
import json
import math
import sys

import pytest

from casc.errors import UserError
from casc.train.log import run_log
from casc.train.results import COLUMNS, results_table
from casc.train.sinks import scalars

VALUES = {
    "loss": 1.25, "lr": 0.002, "images_per_second": 12.5, "data_wait": 0.031, "memory": 3 * 2**30,
}  # fmt: skip


def read(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_without_a_terminal(tmp_path, capsys):
    with run_log(tmp_path, start=0, total=20) as log:
        log.train(10, VALUES)
        log.warn("look out")
        with log.progress(5, "evaluating") as watch:
            watch(5)
    output = capsys.readouterr().out
    assert (
        "step 10/20  loss 1.2500  lr 0.002  12.50 img/s  wait 3%  mem 3.0 GiB  eta 0:00:00"
        in output
    )
    assert "warning: look out" in output
    train, warning = read(tmp_path)
    assert (train["kind"], train["step"], train["loss"]) == ("train", 10, 1.25)
    assert train["time"] > 1.7e9
    assert (warning["kind"], warning["text"]) == ("warning", "warning: look out")


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with run_log(tmp_path, start=5, total=20) as log:
        for step in range(6, 21):
            log.advance(step)
        log.train(20, VALUES)
        log.say("a message")
        with log.progress(5, "evaluating") as watch:
            watch(5)
    shown = terminal.getvalue()
    assert "20/20" in shown
    assert "loss 1.2500  lr 0.002  12.50 img/s  wait 3%  mem 3.0 GiB" in shown
    assert "evaluating" in shown
    output = capsys.readouterr().out
    assert "a message" in output
    assert "step 20" not in output


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with run_log(tmp_path, start=0, total=1) as log:
        log.record("x", value=float("nan"), nested=[float("inf"), {"path": tmp_path}])
    (record,) = read(tmp_path)
    assert record["value"] == "nan"
    assert record["nested"] == ["inf", {"path": str(tmp_path)}]


def test_other_ranks_are_silent(tmp_path, capsys):
    with run_log(tmp_path, start=0, total=1, rank=1) as log:
        log.say("x")
        log.train(1, VALUES)
        log.record("y")
        log.warn("a disk is slow")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    (own,) = (tmp_path / "logs").iterdir()
    assert own.name == "rank-1.jsonl"
    (record,) = map(json.loads, own.read_text().splitlines())
    assert (record["kind"], record["text"]) == ("warning", "a disk is slow")
    assert capsys.readouterr() == ("", "")


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "whole"}\n{"kind": "cu')
    with run_log(tmp_path, start=0, total=1) as log:
        log.record("next")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line[:16] for line in lines] == ['{"kind": "whole"', '{"kind": "cu', '{"kind": "next",']


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys, monkeypatch):
    with run_log(tmp_path, start=0, total=1) as log:
        assert log.file is not None

        class Full(io.RawIOBase):
            def write(self, line):
                raise OSError(errno.ENOSPC, "No space left on device")

        log.file.file.close()
        monkeypatch.setattr(log.file, "file", Full())
        log.record("x")
        log.record("y")
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--out .*file: can't be written"),
        run_log(tmp_path / "file", start=0, total=1),
    ):
        pass


def test_a_second_run_appends(tmp_path):
    for step in (1, 2):
        with run_log(tmp_path, start=0, total=2) as log:
            log.train(step, VALUES)
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with run_log(tmp_path, start=0, total=2, board=True) as log:
        log.train(1, VALUES)
        log.say("x", "evaluation", step=1, figures={"box_ap": 0.5, "box_apl": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"train/loss" in data
    assert b"val/box_ap" in data
    assert b"val/box_apl" not in data


def test_sinks_get_every_record_of_the_main_rank(tmp_path):
    told, other = [], []
    with run_log(tmp_path, start=0, total=2, sinks=[told.append]) as log:
        log.train(1, VALUES | {"grad_norm": float("inf")})
        log.say("well", "evaluation", step=1, figures={"box_ap": 0.5, "box_apl": None})
        log.warn("look out")
    with run_log(tmp_path, start=0, total=2, rank=1, sinks=[other.append]) as log:
        log.train(1, VALUES)
        log.warn("look out")
    assert [r["kind"] for r in told] == [r["kind"] for r in read(tmp_path)]
    assert [r["time"] for r in told] == [r["time"] for r in read(tmp_path)]
    assert told[0]["grad_norm"] == math.inf
    assert [scalars(r) for r in told] == [
        {f"train/{name}": value for name, value in (VALUES | {"grad_norm": math.inf}).items()},
        {"val/box_ap": 0.5},
        {},
    ]
    assert other == []


def test_a_sink_that_fails_is_left_out_and_said_once(tmp_path, capsys):
    told = []

    def broken(record):
        raise ConnectionError("no route to host")

    with run_log(tmp_path, start=0, total=2, sinks=[broken, told.append]) as log:
        log.train(1, VALUES)
        log.train(2, VALUES)
    shown = capsys.readouterr().out
    assert shown.count("broken: ConnectionError: no route to host; it gets no more records") == 1
    assert [r["step"] for r in told if r["kind"] == "train"] == [1, 2]
    assert [r["kind"] for r in read(tmp_path)] == ["train", "warning", "train"]


def test_results_table():
    row = {name: f"value of {i}" for i, name in enumerate(COLUMNS)}
    head, line, body = results_table(row).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "NAME", "Batch_Size", "Epochs", "Throughput", "Box AP", "Mask AP", "AMP_Type",
        "Torch_Version",
    ]  # fmt: skip
    assert len(head) == len(line) == len(body)
    assert body.count("value of") == 8
