import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from casc.cli import main as cli
from casc.train.loop import train


@pytest.fixture
def trained(tiny_recipe):
    recipe = replace(tiny_recipe, max_steps=1)
    train(recipe)
    return recipe


def run(*args) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    code = stop.value.code
    assert isinstance(code, int)
    return code


def test_help_is_there_and_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "casc", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for word in ("eval", "predict", "verify", "recipes"):
        assert word in done.stdout
    assert not any(f" {name}\n" in done.stderr for name in ("torch", "numpy"))


@pytest.mark.parametrize("command", ["eval", "predict", "verify"])
def test_each_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    assert "--device" in capsys.readouterr().out


def test_wrong_usage_exits_with_2(capsys):
    assert run("eval") == 2
    assert run("evaluate") == 2


def test_eval(trained, tmp_path, capsys):
    out = tmp_path / "figures.json"
    args = ("--loading.workers", 0, "--device", "cpu", "--per-class", "--out", out)
    assert run("eval", trained.folder, trained.data, *args) == 0
    output = capsys.readouterr().out
    assert "step-00000001" in output
    assert "5 images" in output
    assert "green" in output
    figures = json.loads(out.read_text())
    assert figures["images"] == 5
    assert set(figures["figures"]) == {"bbox", "segm"}
    assert run("eval", trained.folder, trained.data, "--split", "train", *args) == 0
    assert "10 images" in capsys.readouterr().out


def test_eval_refuses_other_classes(trained, tmp_path, capsys, write_shards):
    write_shards(tmp_path / "other", {"val": [(0, 1, True)]})
    index = tmp_path / "other/index.json"
    index.write_text(index.read_text().replace('"green"', '"blue"'))
    assert run("eval", trained.folder, tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert "class 1 is 'green' (id 2)" in error
    assert "'blue'" in error
    assert error.count("\n") == 1


def test_predict(trained, tmp_path, capsys, write_shards):
    Image.new("RGB", (80, 50), (20, 200, 30)).save(tmp_path / "7.png")
    (tmp_path / "8.png").write_bytes(b"no image")
    args = ("--out", tmp_path / "found", "--threshold", 0, "--device", "cpu")
    assert run("predict", trained.folder, tmp_path / "7.png", *args) == 0
    assert "1 pictures" in capsys.readouterr().out
    results = json.loads((tmp_path / "found/predictions.json").read_text())
    assert all(result["image_id"] == 1 for result in results)
    assert {result["category_id"] for result in results} <= {1, 2}
    with Image.open(tmp_path / "found/7.jpg") as picture:
        assert picture.format == "JPEG"
    # One that can't be read is skipped, and the exit status says so.
    assert run("predict", trained.folder, tmp_path / "*.png", *args) == 1
    assert "8.png" in capsys.readouterr().out


def test_mistakes_are_one_line(trained, capsys):
    run_folder, data = trained.folder, trained.data
    for args, message in (
        (("eval", "nowhere", data), "nowhere: no such file or folder"),
        (("eval", run_folder, "nowhere"), "nowhere: not found"),
        (("eval", run_folder, data, "--split", "test"), "it has train, val"),
        (("eval", run_folder, data, "--device", "tpu"), "--device tpu: expected auto or one of"),
        (("eval", run_folder, data, "--batch", "0"), "--batch must be"),
        (("predict", run_folder), "no images given"),
        (("verify", data), str(data)),
    ):
        assert run(*args) == 1
        error = capsys.readouterr().err
        assert error.startswith("casc: ")
        assert error.count("\n") == 1
        assert message in error


def test_verify_says_passed_or_failed(monkeypatch, capsys):
    import casc.verify

    seen = []

    def fake(folder, device, *, compile, log):
        seen.append((folder, device.type, compile))
        log("the table")
        return compile

    monkeypatch.setattr(casc.verify, "verify", fake)
    assert run("verify", "folder", "--device", "cpu", "--compile") == 0
    assert run("verify", "folder", "--device", "cpu") == 1
    assert seen == [(Path("folder"), "cpu", True), (Path("folder"), "cpu", False)]
    assert "the table" in capsys.readouterr().out
