"""Input that nobody would give on purpose: a line that says what is wrong, and no harm done."""

import hashlib
import io
import json
import pickle
import struct
import tarfile
import typing
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save_file
from torch import nn

from casc.cli import main as cli
from casc.cli.bench import Bench
from casc.data.index import INDEX_NAME, VERSION, Index, write_index
from casc.data.stream import TrainLoaderConfig
from casc.model import detector
from casc.train.launch import launch
from casc.train.recipe import Recipe
from casc.train.start import weights_metadata
from data_tools import cli as data_tools

SIDE = 50_000


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on stderr."""
        return [line for line in self.err.splitlines() if line.strip()]


Run = Callable[..., Done]


@pytest.fixture
def run(capsys, tiny_recipe) -> Run:
    """Runs `casc ...`, `data_tools ...` or `recipe ...` in this process."""
    tiny = replace(tiny_recipe, loading=TrainLoaderConfig(workers=0), max_steps=1, save_every=0)

    def command(program: str, *arguments: object) -> Done:
        args = [str(argument) for argument in arguments]
        mains: dict[str, Callable[[list[str]], object]] = {
            "casc": cli.main,
            "data_tools": data_tools.main,
            "recipe": lambda given: launch(tiny, None, given),
        }
        capsys.readouterr()
        code, said = 0, ""
        try:
            mains[program](args)
        except SystemExit as stop:
            # What Python does with a text is to print it and to exit with 1.
            said = stop.code if isinstance(stop.code, str) else ""
            code = 1 if said else int(stop.code or 0)
        out, err = capsys.readouterr()
        return Done(code, out, err + said)

    return command


def refused(done: Done, *words: object) -> None:
    """One line on stderr with these words, and an exit status that isn't 0."""
    assert done.code != 0
    assert len(done.lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert str(word) in done.err


@dataclass(frozen=True)
class Files:
    """Input that is as it should be."""

    shards: Path
    index: Index
    checkpoint: Path
    image: Path


@pytest.fixture
def files(tmp_path, tiny_recipe: Recipe, write_shards) -> Files:
    index = write_shards(tmp_path / "good", {"val": [(0, 3, True)]})
    params, buffers = detector.init(tiny_recipe.model, torch.Generator().manual_seed(0))
    checkpoint = tmp_path / "good.safetensors"
    recipe = replace(tiny_recipe, val_split="val")
    save_file({**params, **buffers}, checkpoint, weights_metadata(recipe, index, 1))
    image = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(image)
    return Files(tmp_path / "good", index, checkpoint, image)


# Checkpoints


class Attack:
    """Unpickling this would make a file."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.flag,)


def missing(folder: Path, flag: Path) -> Path:
    return folder / "nowhere.pth"


def text(folder: Path, flag: Path) -> Path:
    (folder / "notes.pth").write_text("not a checkpoint\n")
    return folder / "notes.pth"


def text_as_safetensors(folder: Path, flag: Path) -> Path:
    (folder / "notes.safetensors").write_text("not a checkpoint\n")
    return folder / "notes.safetensors"


def empty(folder: Path, flag: Path) -> Path:
    (folder / "empty.pth").write_bytes(b"")
    return folder / "empty.pth"


def truncated_safetensors(folder: Path, flag: Path) -> Path:
    save_file({"a": torch.zeros(1000)}, folder / "cut.safetensors")
    return _cut(folder / "cut.safetensors")


def truncated_pth(folder: Path, flag: Path) -> Path:
    torch.save(nn.Linear(50, 50).state_dict(), folder / "cut.pth")
    return _cut(folder / "cut.pth")


def attacking_pth(folder: Path, flag: Path) -> Path:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": Attack(flag)}, folder / "zip.pth")
    return folder / "zip.pth"


def attacking_old_pth(folder: Path, flag: Path) -> Path:
    data = {"state_dict": {"a": torch.zeros(1)}, "meta": Attack(flag)}
    torch.save(data, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def attacking_pkl(folder: Path, flag: Path) -> Path:
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": Attack(flag)}))
    return folder / "model.pkl"


def nothing_of_ours(folder: Path, flag: Path) -> Path:
    torch.save({"some.weight": torch.zeros(3)}, folder / "other.pth")
    return folder / "other.pth"


def folder_without(folder: Path, flag: Path) -> Path:
    (folder / "bare").mkdir()
    return folder / "bare"


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-500])
    return path


ATTACKS = (attacking_pth, attacking_old_pth, attacking_pkl)
CHECKPOINTS = (
    missing, text, text_as_safetensors, empty, truncated_safetensors, truncated_pth,
    nothing_of_ours, folder_without, *ATTACKS,
)  # fmt: skip

READERS: dict[str, Callable[[Files, Path, Path], Sequence[object]]] = {
    "eval": lambda f, bad, out: ("casc", "eval", bad, f.shards, "--device", "cpu"),
    "predict": lambda f, bad, out: ("casc", "predict", bad, f.image, "--out", out),
    "convert": lambda f, bad, out: ("casc", "convert", bad, f.shards / "made.safetensors"),
    "export": lambda f, bad, out: ("casc", "export", bad, f.shards / "made.onnx"),
    "report": lambda f, bad, out: ("casc", "report", bad),
    "recipe": lambda f, bad, out: ("recipe", "--init", bad, "--out", out),
}


@pytest.mark.parametrize("spoil", CHECKPOINTS)
@pytest.mark.parametrize("reader", READERS)
def test_checkpoint(reader, spoil, run: Run, files: Files, tmp_path):
    _needs(reader)
    flag = tmp_path / "executed"
    bad = spoil(tmp_path, flag)
    done = run(*READERS[reader](files, bad, tmp_path / "out"))
    refused(done, bad.name)
    assert not flag.exists()


@pytest.mark.parametrize("spoil", ATTACKS)
def test_attacks_would_work(spoil, tmp_path):
    flag = tmp_path / "executed"
    bad = spoil(tmp_path, flag)
    with bad.open("rb") as file:
        pickle.load(file) if bad.suffix == ".pkl" else torch.load(file, weights_only=False)
    assert flag.exists()


def test_torn_checkpoint_of_a_run(run: Run, files: Files, tiny_recipe, tmp_path):
    run_folder = tiny_recipe.folder
    args = ("--max-steps", 1, "--save-every", 1, "--loading.workers", 0)
    assert run("recipe", *args).code == 0
    (weights,) = sorted(run_folder.glob("checkpoints/*/weights.safetensors"))
    _cut(weights)
    refused(run("casc", "eval", run_folder, files.shards, "--device", "cpu"), weights.parent.name)


# Shards


def no_folder(shards: Path) -> str:
    (shards / INDEX_NAME).unlink()
    return INDEX_NAME


def newer_index(shards: Path) -> str:
    _change(shards, version=VERSION + 1)
    return "update casc"


def foreign_index(shards: Path) -> str:
    _change(shards, format="something else")
    return "format is 'something else'"


def truncated_index(shards: Path) -> str:
    file = shards / INDEX_NAME
    file.write_text(file.read_text()[:100])
    return "not valid JSON"


def binary_index(shards: Path) -> str:
    (shards / INDEX_NAME).write_bytes(bytes(range(256)))
    return INDEX_NAME


def _change(shards: Path, **values: object) -> None:
    file = shards / INDEX_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


INDEXES = (no_folder, newer_index, foreign_index, truncated_index, binary_index)
SHARD_READERS: dict[str, Callable[[Files], Sequence[object]]] = {
    "eval": lambda f: ("casc", "eval", f.checkpoint, f.shards, "--device", "cpu"),
    "predict": lambda f: ("casc", "predict", f.checkpoint, f.image, "--shards", f.shards),
    "convert": lambda f: (
        "casc", "convert", f.checkpoint, f.shards / "made.pth", "--to", "mmdetection",
        "--shards", f.shards,
    ),
    "bench loader": lambda f: ("casc", "bench", "loader", f.shards),
    "recipe": lambda f: ("recipe", "--data", f.shards, "--evaluate-every", 0),
    "check": lambda f: ("data_tools", "check", f.shards, "--workers", 1),
    "show": lambda f: ("data_tools", "show", f.shards, "--out", f.shards / "sheet.png"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", INDEXES)
@pytest.mark.parametrize("reader", SHARD_READERS)
def test_index(reader, spoil, run: Run, files: Files):
    _needs(reader)
    word = spoil(files.shards)
    refused(run(*SHARD_READERS[reader](files)), word, INDEX_NAME)


# Those that read the shards themselves, in this process.
CONTENT_READERS: dict[str, Callable[[Files], Sequence[object]]] = {
    "eval": lambda f: (*SHARD_READERS["eval"](f), "--loading.workers", 0, "--split", "val"),
    "recipe": lambda f: (*SHARD_READERS["recipe"](f), "--train-split", "val"),
    "check": SHARD_READERS["check"],
    "show": SHARD_READERS["show"],
}


@pytest.mark.parametrize("reader", CONTENT_READERS)
def test_shard_that_is_cut_short(reader, run: Run, files: Files):
    (shard,) = files.shards.rglob("*.tar")
    shard.write_bytes(shard.read_bytes()[:2000])
    done = run(*CONTENT_READERS[reader](files))
    assert done.code == 1
    assert "Traceback" not in done.err
    assert shard.name in done.err


@pytest.mark.parametrize("reader", CONTENT_READERS)
def test_shard_that_is_missing(reader, run: Run, files: Files):
    (shard,) = files.shards.rglob("*.tar")
    shard.unlink()
    done = run(*CONTENT_READERS[reader](files))
    assert done.code == 1
    assert "Traceback" not in done.err
    assert shard.name in done.err


# Images


def bomb() -> bytes:
    """A PNG of a few bytes that declares 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.fixture
def no_decoding(monkeypatch) -> None:
    """Fails when pixels of a large image are asked for."""
    load = ImageFile.ImageFile.load

    def guarded(image: ImageFile.ImageFile) -> Any:
        assert image.size[0] * image.size[1] < 10**6, "decoding has begun"
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", guarded)


@pytest.mark.usefixtures("no_decoding")
def test_image_bomb_in_predict(run: Run, files: Files, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    out = tmp_path / "out"
    args = (files.checkpoint, tmp_path / "bomb.png", files.image, "--out", out, "--device", "cpu")
    done = run("casc", "predict", *args)
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if "skipped" in line]
    assert "bomb.png" in line
    assert "too large" in line
    assert (out / "photo.jpg").is_file()  # the other image is done all the same


@pytest.mark.usefixtures("no_decoding")
def test_image_bomb_in_shard(run: Run, tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val").mkdir()
    (coco / "val" / "bomb.png").write_bytes(bomb())
    entry = {"id": 1, "file_name": "bomb.png", "width": SIDE, "height": SIDE}
    listed = {"images": [entry], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (coco / "annotations" / "instances_val.json").write_text(json.dumps(listed))
    done = run("data_tools", "shard", coco, "--out", tmp_path / "s", "--workers", 1)
    refused(done, "too large")
    assert not list((tmp_path / "s").rglob("*.tar"))


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("reader", CONTENT_READERS)
def test_image_bomb_in_a_shard(reader, run: Run, files: Files):
    (shard,) = files.shards.rglob("*.tar")
    with tarfile.open(shard) as archive:
        members = [(m.name, archive.extractfile(m)) for m in archive.getmembers()]
        contents = [(name, file.read()) for name, file in members if file is not None]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            changed = bomb() if name.endswith(".png") else data
            member.size = len(changed)
            archive.addfile(member, io.BytesIO(changed))
    whole = shard.read_bytes()
    (entry,) = files.index.splits["val"].shards
    entry = replace(entry, bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    split = replace(files.index.splits["val"], shards=(entry,))
    write_index(files.shards, replace(files.index, splits={"val": split}))
    done = run(*CONTENT_READERS[reader](files))
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "too large" in done.err


# Other files


@pytest.mark.parametrize("content", [None, "text", "cut"])
def test_annotations_and_goldens(content, run: Run, tmp_path):
    coco, goldens = tmp_path / "coco", tmp_path / "goldens"
    if content:
        (coco / "annotations").mkdir(parents=True)
        (coco / "val").mkdir()
        goldens.mkdir()
        said = {"text": "hello", "cut": '{"images": [{"id": 1, "file_'}[content]
        (coco / "annotations" / "instances_val.json").write_text(said)
        (goldens / "goldens_A.json").write_text(said)
        save_file({"a": torch.zeros(1000)}, goldens / "goldens_A.safetensors")
        _cut(goldens / "goldens_A.safetensors")
    refused(run("data_tools", "shard", coco, "--out", tmp_path / "s", "--workers", 1), coco)
    refused(run("casc", "verify", goldens, "--device", "cpu"), goldens)


@pytest.mark.parametrize(
    "arguments",
    [
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--device", "gpu"),
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--split", "nosuch"),
        ("casc", "predict", "CHECKPOINT", "/nowhere/*.jpg", "--device", "gpu"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--threshold", "2"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--device", "cpu:7"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--device", "cpu:"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--detections", "99999999999999999999"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--device", "cpu", "--scales", "99999999"),
        ("casc", "predict", "CHECKPOINT", "IMAGE", "--device", "cpu", "--out", "IMAGE"),
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--device", "cpu", "--split", ""),
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--device", "cpu", "--results", "SHARDS"),
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--device", "cpu", "--out", "nowhere/a.json"),
        ("casc", "eval", "CHECKPOINT", "http://", "--device", "cpu"),
        ("casc", "eval", "CHECKPOINT", "http://[", "--device", "cpu"),
        ("casc", "eval", "CHECKPOINT", "SHARDS", "--loading.workers", "99999"),
        ("data_tools", "check", "SHARDS", "--workers", "99999"),
        ("casc", "bench", "--canvas", "500", "500"),
        ("casc", "bench", "inference", "--batch", "0"),
        ("data_tools", "synth", "OUT", "--classes", "900"),
        ("data_tools", "show", "SHARDS", "--n", "0"),
        ("data_tools", "show", "SHARDS", "--seed", "-1"),
        ("data_tools", "show", "SHARDS", "--cell", "99999999"),
        ("recipe", "--batch", "0"),
        ("recipe", "--train-split", "nosuch"),
        ("recipe", "--data", "SHARDS", "--profile", "x.txt", "--train-split", "val"),
    ],
)
def test_value_that_cannot_be(arguments, run: Run, files: Files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {
        "CHECKPOINT": files.checkpoint, "SHARDS": files.shards, "IMAGE": files.image,
        "OUT": tmp_path / "synth",
    }  # fmt: skip
    refused(run(*(places.get(argument, argument) for argument in arguments)))


# Flags


def _subcommands(union: Any) -> list[tuple[str, Any]]:
    """Names and types of what `tyro.conf.subcommand` names in a union."""
    found = []
    for choice in typing.get_args(union):
        kind, *notes = typing.get_args(choice)
        found += [(note.name, kind) for note in notes if getattr(note, "name", None)]
    return found


def _needs(reader: str) -> None:
    name = reader.split()[0]
    own = {name for name, _ in _subcommands(cli.Command)}
    if name not in own | {"recipe", "check", "show"}:
        pytest.skip(f"there is no casc {name}")


COMMANDS = [
    *(("casc", name) for name, _ in _subcommands(cli.Command) if name != "bench"),
    *(("casc", "bench", name) for name, _ in _subcommands(Bench)),
    *(("data_tools", name) for name, _ in _subcommands(data_tools.Command)),
    ("recipe",),
]


def test_all_commands_are_covered():
    assert {("casc", "eval"), ("casc", "bench", "loader"), ("data_tools", "shard")} <= {*COMMANDS}
    assert len(COMMANDS) >= 13


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_unknown_flag(command, run: Run):
    done = run(*command, "--no-such-flag", "3")
    refused(done, "unknown flag --no-such-flag", "--help")
    assert done.code == 2
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("casc", "eval", "a", "b", "--bach", "3"), "--batch"),
        (("data_tools", "shard", "a", "--wokers=3"), "--workers"),
        (("recipe", "--lr", "0.1"), "--optim.lr"),
        (("recipe", "--weight_decay", "0.1"), "--optim.weight-decay"),
    ],
)
def test_misspelt_flag_says_what_was_meant(arguments, meant, run: Run):
    refused(run(*arguments), f"did you mean {meant}")


def test_argument_too_many(run: Run):
    refused(run("data_tools", "check", "shards", "more"), "unexpected argument 'more'")
