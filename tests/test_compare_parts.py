"""The comparison of docs/recipes.md in miniature."""

import importlib.util
import json
import statistics
import tarfile
from pathlib import Path
from typing import Any

import pytest

from casc.config import differences, to_json
from casc.data.index import Bucket, Category, Index, Shard, Split, read_index
from casc.train.recipe_checks import check
from data_tools.cli import SynthCommand

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "compare_parts.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("compare_parts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_variant_can_run_and_is_another(script, tmp_path):
    split = Split(9, 9, (Bucket("all", 0.0, None, 96, 96, 9, 99, 9),), (
        Shard("a.tar", 0, True, 9, 1, "0" * 64),
    ))  # fmt: skip
    categories = tuple(Category(i + 1, f"c{i}") for i in range(5))
    index = Index(categories, {"train2017": split, "val2017": split})
    tried = script.variants(script.base(tmp_path, 5))
    for name, recipe in tried.items():
        check(recipe, index)
        changed = differences(to_json(tried["base"]), to_json(recipe))
        assert bool(changed) == (name != "base")
    found = [json.dumps(to_json(recipe), default=str) for recipe in tried.values()]
    assert len(set(found)) == len(found)


def test_the_table_has_means_and_deviations(script):
    def result(name: str, seed: int, value: float) -> dict:
        figures = {f"{kind} {key}": value for kind, key in script.FIGURES}
        return {"variant": name, "seed": seed, "figures": figures}

    values = [0.10, 0.14, 0.12]
    results = [result("base", seed, value) for seed, value in enumerate(values)]
    lines = script.table([*results, result("other", 0, 0.3)], ["base", "missing", "other"])
    deviation = 100 * statistics.stdev(values)
    assert f"| base | 3 | 12.0 ± {deviation:.1f} |" in lines
    assert "| other | 1 | 30.0 |" in lines
    assert "missing" not in lines


def test_photographs_keep_the_objects_of_one_class(script, tmp_path):
    coco = tmp_path / "coco"
    SynthCommand(coco, train=6, val=3, size=64, classes=5).run()
    name = json.loads((coco / "annotations/instances_train2017.json").read_text())["categories"][1]
    shards = script.make_photographs(tmp_path / "out", coco, name["name"])
    index = read_index(shards)
    assert [category.name for category in index.categories] == [name["name"]]
    for split in ("train2017", "val2017"):
        truth = json.loads((coco / f"annotations/instances_{split}.json").read_text())
        expected = sorted(
            each["id"] for each in truth["annotations"] if each["category_id"] == name["id"]
        )
        found = []
        for shard in (shards / split).glob("*.tar"):
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.name.endswith(".json"):
                        record = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                        found += [each["id"] for each in record["annotations"]]
        assert sorted(found) == expected


def test_augmentations_change_images_alone(script, tmp_path):
    tried = script.variants(script.base(tmp_path, 1))
    chosen = script.augmentations(tried)
    assert set(tried) - set(chosen) == {
        "GIoU, weight 10", "one mask head", "AdamW 1e-3, decay 0.05", "EMA 0.99", "no norm",
    }  # fmt: skip


def test_what_has_run_is_not_run_again(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "compare"
    arguments = ["--out", str(out), "--seeds", "1", "--epochs", "1", "--start-epochs", "1"]
    arguments += ["--images", "6", "--val", "2", "--only", "base"]
    script.main(arguments)
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["variant"] for line in lines] == ["base"]
    monkeypatch.setattr(script, "train", None)
    script.main(arguments)
    assert "| base | 1 |" in capsys.readouterr().out
    assert (out / "results.jsonl").read_text().splitlines() == lines
