import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools import mask as coco_mask

from casc.data.index import read_index
from casc.data.reader import read_shard
from casc.data.record import parse_record
from casc.train.recipe import parse
from casc.train.recipe_checks import check
from data_tools.cli import main
from recipes.demo import demo


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = tmp_path / "data", tmp_path / "shards"
    assert run("synth", data, "--train", 12, "--val", 4, "--size", 96) == 0
    assert "train2017: 12 images" in capsys.readouterr().out
    assert run("shard", data, "--out", out, "--workers", 1, "--aspects", 1) == 0
    text = capsys.readouterr().out
    assert "train2017: 12 images" in text
    assert "val2017: 4 images" in text
    assert "no object of a listed category" not in text
    # What is typed next is what a recipe's parser takes, and fits these shards.
    (hint,) = re.findall(r"casc train RECIPE (.*)", text)
    recipe, _ = parse(demo(), None, hint.split())
    check(recipe, read_index(out))
    assert run("check", out, "--workers", 1) == 0
    assert "all well" in capsys.readouterr().out
    assert run("show", out, "--out", tmp_path / "c.png", "--split", "val2017", "--n", 2) == 0
    assert (tmp_path / "c.png").is_file()


def test_what_is_typed_next_fits_what_there_is_to_train_on(tmp_path: Path, capsys):
    """Boxes alone train without masks; nothing can be typed where there is nothing to train on."""
    data = tmp_path / "data"
    assert run("synth", data, "--train", 2, "--val", 1, "--size", 96) == 0
    source = data / "annotations/instances_train2017.json"
    listed = json.loads(source.read_text())
    for annotation in listed["annotations"]:
        annotation["segmentation"] = []
    source.write_text(json.dumps(listed))
    capsys.readouterr()
    run("shard", data, "--out", tmp_path / "boxes", "--splits", "train2017", "--workers", 1)
    (hint,) = re.findall(r"casc train RECIPE (.*?);", capsys.readouterr().out)
    recipe, _ = parse(demo(), None, hint.split())
    assert recipe.model.masks == "none"
    check(recipe, read_index(tmp_path / "boxes"))

    for annotation in listed["annotations"]:
        annotation["bbox"] = [0, 0, 0, 0]
    source.write_text(json.dumps(listed))
    run("shard", data, "--out", tmp_path / "nothing", "--splits", "train2017", "--workers", 1)
    text = capsys.readouterr()
    assert "casc train" not in text.out
    assert "nothing of it can be trained on" in text.err


def test_what_cvats_brush_drew_is_trained_on_if_asked(coco, tmp_path: Path, capsys):
    """CVAT exports it as RLE masks that are marked as crowds."""
    polygons = coco_mask.frPyObjects([[10, 10, 30, 10, 30, 20, 10, 20]], 50, 60)
    mask = {"size": [50, 60], "counts": coco_mask.merge(polygons)["counts"].decode()}  # type: ignore
    for _ in range(4):
        coco.object(coco.image(), iscrowd=1, segmentation=mask)
    coco.write()
    out = tmp_path / "shards"
    run("shard", coco.root, "--out", out, "--workers", 1)
    said = capsys.readouterr().err
    assert "4 of 4 annotations are marked as crowds" in said
    assert "--crowds objects" in said
    assert run("shard", coco.root, "--out", out, "--workers", 1, "--crowds", "objects") == 0
    assert "crowds" not in capsys.readouterr().err
    split = read_index(out).splits["train"]
    assert split.train_samples == split.report["annotations"]["trained"] == 4
    (shard,) = split.shards
    for _, _, record in read_shard(out, shard):
        (entry,) = parse_record(record, "")["annotations"]
        assert (entry["iscrowd"], entry["train"]) == (0, True)


def test_shards_go_below_the_current_folder(
    varied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run("shard", varied.write(), "--no-progress", "--workers", 1) == 0
    assert read_index(tmp_path / "shards").splits["train"].samples == 12
    text = capsys.readouterr().out
    assert "annotation: crowd" in text
    assert "shards are in shards" in text
    classes = len(read_index(tmp_path / "shards").categories)
    assert (
        f"--data shards --train-split train --evaluate-every 0 --model.classes {classes};" in text
    )
    assert "--val-share 0.1" in text


def test_no_aspects_make_one_bucket(varied, tmp_path: Path):
    out = tmp_path / "o"
    assert run("shard", varied.write(), "--out", out, "--workers", 1, "--aspects") == 0
    assert [bucket.name for bucket in read_index(out).splits["train"].buckets] == ["all"]


def test_mistakes_are_a_line_on_stderr(varied, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "export.zip").write_bytes(b"")
    for arguments in (
        ["shard", tmp_path / "absent"],
        ["shard", tmp_path / "export.zip"],
        ["shard", __file__],
        ["shard", varied.write(), "--workers", 0],
        ["shard", varied.write(), "--aspects", 2, 1],
        ["check", tmp_path],
        ["show", tmp_path],
        ["synth", tmp_path / "x", "--classes", 2],
    ):
        assert run(*arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("data_tools: ")
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert run("shard") == 2
    assert run("shrad", "x") == 2


def test_faults_are_printed_and_counted(varied, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    index, out = varied.shard()
    name = index.splits["train"].shards[0].name
    (out / name).unlink()
    assert run("check", out, "--workers", 1) == 1
    printed = capsys.readouterr()
    assert printed.err == f"{name}: missing\n"
    assert "1 faults" in printed.out


def test_help_explains_every_flag():
    command = [sys.executable, "-m", "data_tools", "shard", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--out", "--splits", "--aspects", "--max-size", "--samples-per-shard",
                 "--shard-mib", "--trace-tolerance", "--workers", "--no-progress"):  # fmt: skip
        assert flag in text
    assert "annotations/instances_<split>.json" in text


def test_nothing_heavy_is_imported():
    """Workers start in a moment, because torch isn't among what they import."""
    code = "import sys, data_tools.shard, data_tools.check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
