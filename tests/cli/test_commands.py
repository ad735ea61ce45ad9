"""What the command lines say of themselves, and how they end."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

import casc
from casc.arguments import parse_arguments
from casc.cli import main as cli
from casc.cli.bench import with_default
from casc.cli.main import main
from casc.cli.recipes import descriptions
from casc.config import to_json
from casc.inference.settings import Settings, Views
from casc.train.recipe import parse
from data_tools import cli as data_tools
from recipes.coco_1x import coco_1x
from recipes.coco_mini import coco_mini

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(f.stem for f in (ROOT / "recipes").glob("[!_]*.py"))


def said(capsys, *arguments: str) -> tuple[str, str, object]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return out, err, stop.value.code


def test_the_version_is_told(capsys):
    assert said(capsys, "--version") == (f"casc {casc.__version__}\n", "", 0)


def test_help_waits_for_nothing_that_takes_long():
    code = "import sys, casc.cli.main; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize("command", ["recipes", "train"])
def test_recipes_are_listed_with_cost_and_figures(capsys, command: str):
    out, _, code = said(capsys, command)
    assert code == 0
    names = [line for line in out.splitlines() if not line.startswith(" ")]
    assert names == RECIPES
    assert "It costs: 7,330 steps of 16 images an epoch" in out
    assert "To expect: box AP 41.2, mask AP 36.0" in out
    assert all("What" not in text.split("\n\n")[0] for text in descriptions().values())


def test_train_runs_the_recipe_of_a_name(capsys):
    out, err, code = said(capsys, "train", "coco_2x")
    assert code == 2
    assert "no recipe 'coco_2x'; there is coco_1x, " in err
    before = list(sys.argv)
    try:
        out, _, code = said(capsys, "train", "coco_mini", "--help")
        assert code == 0
        assert "--optim.lr" in out
        assert "usage: casc train coco_mini" in out
        _, err, code = said(capsys, "train", "coco_mini", "--data", "nowhere", "--dry-run")
        assert "nowhere" in str(code)
        # What a recipe's own main does is done: this one takes the classes of the shards.
        _, _, code = said(capsys, "train", "finetune", "--data", "nowhere")
        assert "--init runs/coco_1x: isn't there" in str(code)
    finally:
        sys.argv[:] = before


def test_a_saved_recipe_is_begun_with_and_changed_by_flags(tmp_path, capsys):
    saved = replace(coco_mini(), epochs=3, batch=5, out=tmp_path / "out")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(to_json(saved)))
    other = replace(coco_mini(), name="other")
    for flags in (["--config", str(file)], [f"--config={file}"]):
        assert parse(other, None, flags) == (saved, False)
    changed, dry_run = parse(other, None, ["--epochs", "7", "--config", str(file), "--dry-run"])
    assert (changed, dry_run) == (replace(saved, epochs=7), True)
    file.write_text(json.dumps({**to_json(saved), "epochs": "many"}))
    for flags, says in (
        (["--config", str(file)], "recipe.json.epochs"),
        (["--config"], "--config"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(other, None, flags)
        assert says in f"{stop.value.code}{capsys.readouterr().err}"


def test_help_names_every_command(capsys):
    out, _, code = said(capsys, "--help")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    names = {f.stem for f in (ROOT / "casc" / "cli").glob("[!_]*.py")} - {
        "main",
        "device_checks",
        "card",
    }
    assert names | {"train"} <= {line.split()[0] for line in lines if line.startswith("  ")}
    with pytest.raises(SystemExit):
        data_tools.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("shard", "check", "synth", "show"))


def commands() -> list[tuple[str, type]]:
    unions = {"casc": cli.Command, "data_tools": data_tools.Command}
    kinds = [(name, kind) for name, union in unions.items() for kind in get_args(union)]
    return [(f"{name} {get_args(kind)[1].name}", get_args(kind)[0]) for name, kind in kinds]


@pytest.mark.parametrize(("name", "kind"), commands(), ids=[name for name, _ in commands()])
def test_help_shows_two_examples_and_names_what_goes_where(capsys, name: str, kind: type):
    program, command = name.split()
    text = inspect.getdoc(kind) or ""
    examples = re.findall(rf"`({name}\b[^`]*)`", text.partition("Examples:")[2])
    assert len(examples) >= 2 or command == "recipes"
    union = cli.Command if program == "casc" else data_tools.Command
    for example in examples:
        words = with_default(" ".join(example.split()).split()[1:])
        if words[:1] != ["train"] and "--help" not in words:
            parse_arguments(union, words, prog=program)
    with pytest.raises(SystemExit):
        parse_arguments(union, [command, "--help"], prog=program)
    usage = capsys.readouterr().out.splitlines()[0]
    assert not re.search(r"\b(STR|PATH|None)\b", usage)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("casc", "a command is missing: train, recipes, eval, "),
        ("casc predct photo.jpg", "there is no command 'predct' (did you mean predict?): train, "),
        ("casc bench nothing", "there is no command 'nothing': train, inference, graph, "),
        ("casc eval", "CHECKPOINT and SHARDS missing"),
        ("casc convert a.pth", "OUT missing"),
        ("casc eval run shards --device", "Missing value for argument '--device'."),
        ("casc eval run shards --batch x", "--batch: invalid literal for int() with base 10: 'x'"),
        ("casc bench train --canvas a b", "--canvas: Could not parse arguments ['a', 'b']"),
        ("casc export run a.onnx --canvas 64", "--canvas: expected {INT INT}, got ['64']"),
        ("casc bench graph --card nope", "invalid choice 'nope' for argument '--card'."),
        ("casc eval run shards more", "unexpected argument 'more'"),
        ("casc --nothing", "unknown flag --nothing"),
        ("data_tools", "a command is missing: shard, check, synth, show"),
        ("data_tools synth out --train x", "--train: invalid literal"),
        ("recipe --epochs", "Missing value for argument '--epochs'."),
        ("recipe --epochs many", "--epochs: invalid literal"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_wrong_usage_is_told_in_one_line(capsys, monkeypatch, line: str, says: str, encoding: str):
    """Whatever tyro draws boxes with."""
    program, *words = line.split()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    mains: dict[str, Callable[[list[str]], object]] = {
        "casc": cli.main,
        "data_tools": data_tools.main,
        "recipe": lambda given: parse(coco_1x(), None, given),
    }
    with pytest.raises(SystemExit) as stop:
        mains[program](words)
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    name = "error" if program == "recipe" else program
    assert told.startswith(f"{name}: {says}")
    assert told.endswith("; --help lists what there is")


@pytest.mark.parametrize("width", ["80", "250"])
def test_a_recipes_flags_are_in_few_groups_the_most_used_first(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit) as stop:
        parse(coco_1x(), "Nothing is lost of it.", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "Nothing is lost of it." in out
    assert os.environ["COLUMNS"] == width
    _, *boxes = out.split("╭─ ")
    assert len(boxes) <= 12
    flags = [re.findall(r"^│ (?:-h, )?(--[\w.-]+)", box, re.MULTILINE) for box in boxes]
    assert flags[0] == ["--help", "--data", "--out", "--init", "--epochs", "--batch", "--optim.lr",
                        "--device", "--dtype", "--resume", "--dry-run"]  # fmt: skip
    assert sorted(flag for group in flags for flag in group) == sorted(set(every_flag(coco_1x())))
    assert out.count("(default:") == sum(map(len, flags)) - 1


@pytest.mark.parametrize("line", ["casc eval", "casc predict", "casc export", "data_tools shard"])
def test_a_commands_flags_are_in_groups(capsys, line: str):
    program, name = line.split()
    run, union = {"casc": (main, cli.Command), "data_tools": (data_tools.main, data_tools.Command)}[
        program
    ]
    with pytest.raises(SystemExit) as stop:
        run([name, "--help"])
    assert stop.value.code == 0
    head, *boxes = capsys.readouterr().out.split("╭─ ")
    titles = [box.partition(" ─")[0] for box in boxes]
    assert titles[:2] == ["positional arguments", "options"]
    assert len(set(titles)) == len(titles) > 2
    assert "Examples:" in head
    (kind,) = [a for a, about in map(get_args, get_args(union)) if about.name == name]
    positional = re.findall(r"^│ ([A-Z[][\w.\]]*)", boxes[0], re.MULTILINE)
    flags = re.findall(r"^│ (?:-h, )?--([\w.-]+)", "".join(boxes[1:]), re.MULTILINE)
    assert len(flags) == len(set(flags))
    nested = {"settings": Settings, "views": Views}
    expected = {"help"}
    for f in fields(kind)[len(positional) :]:
        inner = [n.name for n in fields(nested[f.name])] if f.name in nested else [f.name]
        expected |= {name.replace("_", "-") for name in inner}
    assert {flag for flag in flags if "." not in flag} == expected - {"loading"}
    assert any(flag.startswith("loading.") for flag in flags) == ("loading" in expected)


def every_flag(config: object, prefix: str = "") -> Iterator[str]:
    """The first name of each field's flag, and of those that only the command line has."""
    if not prefix:
        yield from ("--help", "--dry-run", "--config")
    for f in fields(config):  # type: ignore[arg-type]
        name, value = f.name.replace("_", "-"), getattr(config, f.name)
        nested = isinstance(value, tuple) and value and is_dataclass(value[0])
        for at, part in enumerate(value) if nested else [(None, value)]:
            place = prefix + name + ("" if at is None else f".{at}")
            if is_dataclass(part):
                yield from every_flag(part, f"{place}.")
            else:
                yield f"--{place}"


def test_flags_that_are_on_are_listed_with_their_opposite(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(data_tools.Command, ["shard", "--help"], prog="data_tools")
    assert "--progress, --no-progress" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["casc", "casc train coco_mini", "data_tools", "casc.recipes.coco_mini"]
)
def test_a_reader_that_leaves_ends_a_command_in_silence(module: str):
    """As `... --help | head -1` does; here the reader is gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", *module.split(), "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141
