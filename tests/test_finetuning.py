"""docs/finetuning.md's example, command by command."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from data_tools import cli as data_tools

PAGE = Path(__file__).resolve().parent.parent / "docs/finetuning.md"


def example() -> list[list[str]]:
    text = PAGE.read_text().partition("## An example")[2].replace("\\\n", " ")
    lines = re.findall(r"^    ((?:data_tools|python) .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def run(command: list[str]) -> None:
    if command[0] == "data_tools":
        with pytest.raises(SystemExit) as stop:
            # In this process: others would take longer to start than to work.
            data_tools.main([*command[1:], *(["--workers", "1"] if "shard" in command else [])])
        assert not stop.value.code
    else:
        assert command[1] == "-m"
        importlib.import_module(command[2]).main([*command[3:], "--device", "cpu"])


def records(folder: str, kind: str) -> list[dict]:
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in example():
        run(command)
    tuned, scratch = (records(f"runs/{name}", "run")[0] for name in ("three", "scratch"))
    # The same data, steps and rates; what differs is where they began.
    assert tuned["steps"] == scratch["steps"]
    for settings in (tuned["recipe"], scratch["recipe"]):
        settings["schedule"].pop("drops")  # the cosine has none
    for room in ("optim", "schedule", "image", "batch", "accumulate", "data", "model"):
        assert tuned["recipe"][room] == scratch["recipe"][room], room
    ap = [
        records(f"runs/{name}", "evaluation")[-1]["figures"]["box_ap"]
        for name in ("three", "scratch")
    ]
    assert ap[0] > ap[1] + 0.01
    # The report that the page shows is the one that the run began with.
    said = [line["text"] for line in records("runs/three", "message")]
    shown = re.findall(r"^    (classes: .*|re-made: .*)$", PAGE.read_text(), re.MULTILINE)
    assert len(shown) == 2
    assert set(shown) <= set(said)
