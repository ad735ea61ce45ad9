"""Every command, with names and addresses that would command a terminal, or give secrets away."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulty_server import Answer, serving
from PIL import Image
from safetensors.torch import load_file, save_file

from casc.cli import main as cli
from casc.data.index import read_index, write_index
from casc.data.loader_config import TrainLoaderConfig
from casc.model import detector
from casc.printing import _UNSAFE
from casc.train.launch import launch
from casc.train.start import weights_metadata
from data_tools import cli as data_tools

EVIL = "\x1b]0;owned\x07cat\u202e\x9b2J"
SECRET = "s3cr3tSignature"


@pytest.fixture
def run(capfd, tiny_recipe):
    """Runs a command; gives its exit status and all that it printed."""

    def command(program, *args, recipe=tiny_recipe):
        mains = {
            "casc": cli.main,
            "data_tools": data_tools.main,
            "recipe": lambda given: launch(recipe, None, given),
        }
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        capfd.readouterr()
        code, said = 0, ""
        try:
            mains[program]([str(a) for a in args])
        except SystemExit as stop:
            said = stop.code if isinstance(stop.code, str) else ""
            code = 1 if said else int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
        out, err = capfd.readouterr()
        return code, out + err + said

    return command


def harmless(text, allowed="\n\t"):
    found = set(_UNSAFE.findall(text)) - set(allowed)
    assert not found, (found, text)
    assert SECRET not in text


def rename(shards, **names):
    index = read_index(shards)
    categories = tuple(replace(c, name=f"{EVIL}{c.id}") for c in index.categories)
    write_index(shards, replace(index, categories=categories))
    return read_index(shards)


def test_names_of_classes_and_files(run, tmp_path, tiny_recipe):
    """Train, evaluate, predict, report, convert and export with such names."""
    rename(tiny_recipe.data)
    recipe = replace(
        tiny_recipe,
        max_steps=1,
        evaluate_every=1,
        loading=TrainLoaderConfig(workers=0),
        name=f"x{EVIL}",
    )
    code, said = run("recipe", recipe=recipe)
    assert code == 0, said
    harmless(said)
    folder = recipe.folder
    page = tmp_path / "page.html"
    photo = tmp_path / f"photo{EVIL}.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(photo, "PNG")
    made = tmp_path / "out"
    cpu = ("--device", "cpu")
    for args in (
        ("eval", folder, tiny_recipe.data, "--split", "val", "--per-class", *cpu),
        ("predict", folder, photo, "--out", made, "--threshold", "0", *cpu),
        ("predict", folder, tmp_path / f"none{EVIL}", "--out", made, *cpu),
        ("report", folder, "--out", page, *cpu),
        ("convert", folder, tmp_path / f"c{EVIL}.safetensors"),
        ("convert", folder, tmp_path / f"c{EVIL}.pth", "--to", "mmdetection2"),
        ("export", folder, tmp_path / f"e{EVIL}", "--format", EVIL),
        ("verify", tmp_path / EVIL, *cpu),
        ("bench", "--canvas", EVIL),
        ("doctor", f"--{EVIL}"),
    ):
        _, said = run("casc", *args)
        assert said
        harmless(said)
    harmless(page.read_text())
    assert r"\x1b]0;owned\x07cat\u202e" in page.read_text()


def test_names_in_annotations_and_shards(run, tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    names = [f"a{EVIL}.png", "b.png", f"gone{EVIL}.png"]
    for name in names[:2]:
        Image.new("RGB", (64, 48), (200, 30, 30)).save(coco / "val2017" / name, "PNG")
    (coco / "val2017" / f"torn{EVIL}.png").write_bytes(b"no image")
    images = [
        {"id": i, "file_name": name, "width": 64, "height": 48}
        for i, name in enumerate([*names, f"torn{EVIL}.png"])
    ]
    entry = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}
    entry |= {"iscrowd": 0, "segmentation": [[1, 1, 10, 1, 10, 10, 1, 10]]}
    categories = [{"id": 1, "name": EVIL}, {"id": 2, "name": EVIL}]
    data = {"images": images, "annotations": [entry], "categories": categories}
    file = coco / "annotations/instances_val2017.json"
    file.write_text(json.dumps(data))
    shards = tmp_path / "s"
    commands = [
        ("shard", coco, "--out", shards, "--workers", 1, "--allow-missing"),
        ("check", shards, "--workers", 1),
        ("show", shards, "--out", tmp_path / "sheet.html"),
        ("show", shards, "--classes", EVIL + "x"),
        ("show", shards, "--split", EVIL),
    ]
    for args in commands:
        _, said = run("data_tools", *args)
        assert said
        harmless(said)
    harmless((tmp_path / "sheet.html").read_text())
    # An index from elsewhere, whose shards have such names and aren't there.
    index = json.loads((shards / "index.json").read_text())
    split = index["splits"].pop("val2017")
    for shard in split["shards"]:
        shard["name"] = f"{EVIL}.tar"
    index["splits"][EVIL] = split
    (shards / "index.json").write_text(json.dumps(index))
    for args in commands[1:]:
        code, said = run("data_tools", *args)
        assert code
        harmless(said)
    data["images"][0] = {**images[0], "width": EVIL}
    file.write_text(json.dumps(data))
    code, said = run("data_tools", *commands[0])
    assert code == 1
    harmless(said)


def test_what_weights_say_of_themselves(run, tmp_path, tiny_recipe):
    params, buffers = detector.init(tiny_recipe.model, torch.Generator().manual_seed(0))
    index = rename(tiny_recipe.data)
    said = weights_metadata(tiny_recipe, index, 1)
    for key, value in (("version", EVIL), ("casc", EVIL), ("recipe", EVIL), ("step", EVIL)):
        file = tmp_path / f"{key}.safetensors"
        metadata = {**said, key: value}
        if key == "casc":
            metadata["version"] = "99"
        save_file({**params, **buffers}, file, metadata)
        code, text = run("casc", "eval", file, tiny_recipe.data, "--device", "cpu")
        assert code == 1
        harmless(text)


@pytest.mark.slow
def test_what_a_server_says(run, tmp_path, tiny_recipe):
    """Signatures stay out of all that a run writes, prints and publishes."""
    quick = TrainLoaderConfig(workers=1, retries=1, timeout=1, backoff=0.01)
    with serving(tiny_recipe.data) as server:
        address = f"{server.url}?X-Amz-Signature={SECRET}"
        recipe = replace(
            tiny_recipe, data=Path(address), max_steps=1, evaluate_every=1, loading=quick
        )
        code, said = run("recipe", recipe=recipe)
        assert code == 0, said
        harmless(said)
        folder = recipe.folder
        for args in (
            ("casc", "eval", folder, address, "--split", "val", "--device", "cpu"),
            ("casc", "report", folder, "--shards", address, "--device", "cpu"),
            ("data_tools", "check", address, "--workers", 1),
            ("data_tools", "show", address, "--out", tmp_path / "sheet.html"),
        ):
            code, said = run(*args)
            assert code == (args[1] == "check"), said  # these shards aren't in its order
            harmless(said)
        code, said = run("casc", "report", folder, "--device", "cpu")
        assert code == 1
        assert "isn't stored with a run; give the whole URL" in said
        # The server goes wrong, in words of its own.
        server.reason = "Gone\x1b]0;owned\x07\x9b2J"  # latin-1 is all that HTTP has
        server.behave = lambda request: Answer(status=500)
        code, said = run("recipe", recipe=replace(recipe, out=tmp_path / "second"))
        assert code == 1
        assert "the server says 500" in said
        harmless(said)
        third = replace(tiny_recipe, out=tmp_path / "third")
        code, said = run("recipe", "--init", f"{server.url}/x.pth?{SECRET}", recipe=third)
        assert code == 1
        harmless(said)
    for file in [*folder.rglob("*"), *(tmp_path / "second").rglob("*"), tmp_path / "sheet.html"]:
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    assert load_file(next(folder.rglob("weights.safetensors")))
