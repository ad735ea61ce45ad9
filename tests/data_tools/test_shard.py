import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset.compat
from PIL import Image

from casc.data.decode import decode_image
from casc.data.index import read_index
from casc.data.sample import annotation_edges, iter_tar, read_sample
from casc.errors import UserError
from data_tools import shard as shard_module
from data_tools import source as source_module
from data_tools import write as write_module
from data_tools.check import check_shards, fault_lines
from data_tools.cli import main
from data_tools.plan import Settings, order_key
from data_tools.report import parse_ids
from data_tools.shard import Run, shard_dataset
from data_tools.tarball import write_tar


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(folder: Path, split: str = "train") -> dict[int, dict[str, Any]]:
    """Sample JSONs by image id."""
    found = {}
    for shard in read_index(folder).splits[split].shards:
        for _, _, text in iter_tar(folder / shard.name):
            record = json.loads(text)
            found[record["image_id"]] = record
    return found


def sound(folder: Path) -> bool:
    return fault_lines(check_shards(folder)) == []


def test_shards_hold_the_images_own_bytes(varied):
    index, out = varied.shard()
    split = index.splits["train"]
    assert split.samples == 12
    assert split.train_samples == 10
    seen = []
    for shard in split.shards:
        entries = list(iter_tar(out / shard.name))
        assert len(entries) == shard.samples <= 4
        for key, image, text in entries:
            record = json.loads(text)
            assert key == f"{record['image_id']:012d}"
            assert image == (varied.root / "train" / record["file_name"]).read_bytes()
            assert record["train"] == shard.train
            seen.append(record["image_id"])
    assert sorted(seen) == [image["id"] for image in varied.images]
    assert sound(out)


def test_annotations_are_kept_word_for_word(varied):
    _, out = varied.shard()
    stored = [entry for record in records(out).values() for entry in record["annotations"]]
    listed = {entry["id"]: entry for entry in varied.annotations}
    assert {entry["id"] for entry in stored} == set(listed)
    for entry in stored:
        for key in ("category_id", "bbox", "area", "iscrowd", "segmentation"):
            assert entry[key] == listed[entry["id"]][key]
        # Labels count the categories by ascending id: ant (1) is 0, cat (3) is 1.
        assert entry["label"] == {1: 0, 3: 1}[entry["category_id"]]


def test_the_index_holds_the_shapes_that_training_needs(varied):
    index, out = varied.shard()
    assert [(c.id, c.name) for c in index.categories] == [(1, "ant"), (3, "cat")]
    assert index == read_index(out)
    by_id = records(out)
    for number, bucket in enumerate(index.splits["train"].buckets):
        members = [
            read_sample(image, text)
            for shard in index.splits["train"].shards
            if shard.bucket == number
            for _, image, text in iter_tar(out / shard.name)
        ]
        assert bucket.samples == len(members)
        assert bucket.height == max(sample.image.shape[0] for sample in members)
        assert bucket.width == max(sample.image.shape[1] for sample in members)
        assert bucket.instances == max(1, *(len(sample.boxes) for sample in members))
        edges = [sum(map(len, sample.edges)) for sample in members]
        assert bucket.edges == max([1, *edges])
    report = index.splits["train"].report
    assert report["images"] == {
        "listed": 12, "stored": 12, "trained": 10, "left_out": 0, "unlisted_files": 0,
    }  # fmt: skip
    assert report["annotations"] == {"listed": 19, "stored": 19, "trained": 18, "left_out": 0}
    # Three images have no objects. One of them has a crowd, and is trained on as background.
    assert sorted(i for i, record in by_id.items() if not record["train"]) == [27, 47]
    assert [entry["train"] for entry in by_id[7]["annotations"]] == [False]


def test_tars_are_plain_and_anonymous(varied):
    index, out = varied.shard()
    for shard in index.splits["train"].shards:
        data = (out / shard.name).read_bytes()
        assert len(data) == shard.bytes
        assert data[257:263] == b"ustar\0"
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
                assert not member.pax_headers


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_them(varied):
    index, out = varied.shard()
    urls = [str(out / shard.name) for shard in index.splits["train"].shards]
    seen = {}
    for sample in webdataset.compat.WebDataset(urls, shardshuffle=False, empty_check=False):
        seen[int(sample["__key__"])] = json.loads(sample["json"])
        assert decode_image(sample["jpg"]).ndim == 3
    assert seen == records(out)


def test_output_is_the_same_whatever_the_workers_and_runs(
    varied, tmp_path: Path, settings: Settings, quiet_run: Callable[..., Run]
):
    varied.write()
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        shard_dataset(varied.root, tmp_path / name, None, settings, quiet_run(workers))
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [name for name in contents(tmp_path / "one") if not name.endswith(".tar")] == [
        "index.json"
    ]


def test_a_copy_of_the_data_gives_the_same(varied, another_coco, settings, quiet_run):
    _, out = varied.shard()
    copy = another_coco("copy")
    for name, data in contents(varied.root).items():
        path = copy.root / name
        path.write_bytes(data)
        os.utime(path, (0, 0))
    shard_dataset(copy.root, copy.root.with_name("out"), None, settings, quiet_run())
    assert contents(copy.root.with_name("out")) == contents(out)


def spied(run: Run, heard: list[str]) -> Run:
    return run._replace(say=heard.append)


def test_a_second_run_reuses_everything(varied, settings, quiet_run, monkeypatch):
    _, out = varied.shard()
    before, heard = contents(out), []
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(shard_module, "write_shard", None)
    shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    assert heard == ["train: nothing has changed, 6 shards reused"]


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_a_second_run_mends_damaged_shards(varied, settings, quiet_run, damage: str):
    index, out = varied.shard()
    before, heard = contents(out), []
    path = out / index.splits["train"].shards[1].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data)
    shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    assert contents(out) == before
    assert heard == ["train: shards are missing or damaged, and made again"]


def test_changed_input_is_noticed(varied, settings, quiet_run, make_picture):
    index, out = varied.shard()
    name = varied.images[3]["file_name"]
    (varied.root / "train" / name).write_bytes(make_picture(40, 64, seed=99))
    changed = shard_dataset(varied.root, out, None, settings, quiet_run())
    assert changed.splits["train"].source != index.splits["train"].source
    assert sound(out)
    fresh = out.with_name("fresh")
    shard_dataset(varied.root, fresh, None, settings, quiet_run())
    assert contents(out) == contents(fresh)


def test_other_settings_remove_the_old_shards(varied, settings, quiet_run):
    _, out = varied.shard()
    (out / "train" / "notes.txt").write_text("mine")
    heard: list[str] = []
    one = settings._replace(aspects=(), samples_per_shard=100)
    shard_dataset(varied.root, out, None, one, spied(quiet_run(), heard))
    names = sorted(path.name for path in (out / "train").iterdir())
    assert names == ["all-000000.tar", "all-eval-000000.tar", "notes.txt"]
    assert heard == ["train: 6 shards of an earlier run removed"]
    assert sound(out)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_run_is_taken_up(
    varied, settings, quiet_run, monkeypatch, stop_at: int, tmp_path: Path
):
    _, whole = varied.shard(tmp_path / "whole")
    out, written = tmp_path / "out", []

    def stopping(task):
        if len(written) == stop_at:
            (task.path.parent).mkdir(parents=True, exist_ok=True)
            task.path.with_name(task.path.name + ".tmp").write_bytes(b"half")
            raise StopError
        written.append(task.path.name)
        return write_module.write_shard(task)

    monkeypatch.setattr(shard_module, "write_shard", stopping)
    with pytest.raises(StopError):
        shard_dataset(varied.root, out, None, settings, quiet_run())
    assert not (out / "index.json").exists()

    # The journal's last line may be torn.
    journal = out / ".unfinished" / "train.jsonl"
    with journal.open("a") as stream:
        stream.write('["shard 1", "train/x')
    heard: list[str] = []
    monkeypatch.setattr(shard_module, "write_shard", counting := Counting())
    monkeypatch.setattr(shard_module, "probe_image", None)  # all images are known
    shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    assert contents(out) == contents(whole)
    assert counting.calls == 6 - stop_at
    assert heard[0] == "train: going on with an interrupted run, 12 images known"
    if stop_at:
        assert heard[1] == f"train: {stop_at} of 6 shards reused"


@pytest.mark.parametrize("stop_at", [None, 3])
@pytest.mark.parametrize("val_share", [0.0, 0.5])
def test_shards_of_an_older_version_are_not_reused(
    varied, settings, quiet_run, monkeypatch, stop_at: int | None, val_share: float
):
    """Neither those of the index nor an interrupted run's: the same input made others then."""
    varied.write()
    out, settings = varied.root.with_name("out"), settings._replace(val_share=val_share)
    written: list[str] = []

    def older(task):
        if len(written) == stop_at:
            raise StopError
        result = write_module.write_shard(task)
        written.append(task.path.name)
        return result

    monkeypatch.setattr(shard_module, "write_shard", older)
    monkeypatch.setattr(source_module, "_CONTENT_VERSION", source_module._CONTENT_VERSION - 1)
    with contextlib.nullcontext() if stop_at is None else pytest.raises(StopError):
        shard_dataset(varied.root, out, None, settings, quiet_run())
    assert written
    monkeypatch.undo()

    monkeypatch.setattr(shard_module, "write_shard", counting := Counting())
    heard: list[str] = []
    index = shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    assert counting.calls == sum(len(split.shards) for split in index.splits.values())
    assert not any("reused" in line for line in heard)
    assert sound(out)


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, task):
        self.calls += 1
        return write_module.write_shard(task)


SLOW = """
import sys, time
from data_tools import journal
from data_tools.cli import main

add = journal.Journal.add_shard

def add_and_rest(*arguments):
    add(*arguments)
    time.sleep(0.5)

journal.Journal.add_shard = add_and_rest
main(sys.argv[1:])
"""
"""The command line, with a rest after every shard, so that one can be in the middle of it."""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_can_be_run_again(
    varied, tmp_path: Path, settings: Settings, quiet_run, how: signal.Signals
):
    varied.write()
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings = settings._replace(samples_per_shard=1)
    shard_dataset(varied.root, whole, None, settings, quiet_run())

    arguments = ["shard", str(varied.root), "--out", str(out), "--workers", "2"]
    arguments += ["--samples-per-shard", "1", "--aspects", *map(str, settings.aspects)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal = out / ".unfinished" / "train.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and b'"shard' in journal.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if how == signal.SIGINT:  # as a terminal sends it, and by someone impatient
        os.killpg(process.pid, how)
        time.sleep(0.02)
        os.killpg(process.pid, how)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert errors == "data_tools: interrupted; the same command takes it up again\n"
        assert process.returncode == 130
    assert not (out / "index.json").exists()
    wait_for_end_of_group(process.pid)

    heard: list[str] = []
    shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    assert heard[0] == "train: going on with an interrupted run, 12 images known"
    assert "of 12 shards reused" in heard[1]
    assert contents(out) == contents(whole)


def wait_for_end_of_group(group: int) -> None:
    """Workers end with their parent, however it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("workers outlive their parent")


def test_a_journal_that_outlived_its_run_is_removed(varied, settings, quiet_run):
    """As when the disk is full, or a kill comes, after the index and before the journal is gone."""
    _, out = varied.shard()
    journal = out / ".unfinished" / "train.jsonl"
    journal.parent.mkdir()
    journal.write_text("[]\n")
    shard_dataset(varied.root, out, None, settings, quiet_run())
    assert not journal.parent.exists()


def test_splits_are_added_to_the_index(varied, another_coco, settings, quiet_run):
    _, out = varied.shard()
    val = another_coco("coco")
    val.split = "val"
    (val.root / "val").mkdir()
    val.object(val.image())
    val.write()
    train = contents(out / "train")
    index = shard_dataset(val.root, out, ["val"], settings, quiet_run())
    assert sorted(index.splits) == ["train", "val"]
    assert contents(out / "train") == train
    assert sound(out)

    both = out.with_name("both")
    shard_dataset(val.root, both, None, settings, quiet_run())
    assert contents(both) == contents(out)

    val.categories[0]["name"] = "dog"
    val.write()
    with pytest.raises(UserError, match=r"categories: id 3 is 'dog', in .*index.json it is 'cat'"):
        shard_dataset(val.root, out, ["val"], settings, quiet_run())
    with pytest.raises(UserError, match="categories: id 3"):
        shard_dataset(val.root, out, None, settings, quiet_run())
    assert contents(both) == contents(out)


def test_images_in_two_splits_are_told(
    varied, another_coco, settings, quiet_run, make_picture, capsys
):
    """By their bytes, under any name; in one run, in a run of each, and when all is reused."""
    varied.write()
    other = another_coco("coco")
    other.split = "val"
    (other.root / "val").mkdir()
    same = [(varied.root / "train" / varied.images[i]["file_name"]).read_bytes() for i in (2, 5)]
    for name, data in (("x.jpg", same[0]), ("7.jpg", same[1]), ("own.jpg", None)):
        size = (64, 40) if name == "x.jpg" else (60, 50)
        other.object(other.image(*size, name=name, data=data, id=900 + len(other.images)))
    other.write()

    def found(index):
        return {
            name: s.report["findings"].get("in_other_split") for name, s in index.splits.items()
        }

    both = varied.root.with_name("both")
    each = varied.root.with_name("each")
    made = shard_dataset(varied.root, both, None, settings, quiet_run())
    assert found(made)["train"] is None
    about = found(made)["val"]
    assert (about["count"], about["ids"]) == (2, "900 901")
    assert about["examples"] == ["900: x.jpg is in train", "901: 7.jpg is in train"]
    assert read_index(both) == made
    assert shard_dataset(varied.root, both, None, settings, quiet_run()) == made
    for split in ("train", "val"):
        index = shard_dataset(varied.root, each, [split], settings, quiet_run())
    assert index == made
    with pytest.raises(SystemExit) as stop:
        main(["shard", str(varied.root), "--out", str(both), "--workers", "1"])
    assert stop.value.code == 0
    assert "val: 2 of 3 images are in another split too" in capsys.readouterr().err
    (varied.root / "val/x.jpg").write_bytes(make_picture(64, 40, seed=77))
    index = shard_dataset(varied.root, both, ["val"], settings, quiet_run())
    assert found(index)["val"]["ids"] == "901"


def test_an_index_never_describes_shards_that_are_not_there(
    varied, settings, quiet_run, monkeypatch
):
    _, out = varied.shard()
    varied.object(7)
    varied.write()

    def fail(task):
        raise StopError

    monkeypatch.setattr(shard_module, "write_shard", fail)
    with pytest.raises(StopError):
        shard_dataset(varied.root, out, None, settings, quiet_run())
    assert not (out / "index.json").exists()


def test_old_shards_never_get_new_categories(varied, settings, quiet_run, monkeypatch):
    (varied.root / "val").mkdir()
    varied.write()
    val = varied.file.with_name("instances_val.json")
    data = varied.file.read_text()
    for path in (varied.root / "train").iterdir():
        (varied.root / "val" / path.name).write_bytes(path.read_bytes())
    val.write_text(data)
    out = varied.root.with_name("shards")
    shard_dataset(varied.root, out, None, settings, quiet_run())
    for file in (varied.file, val):
        file.write_text(data.replace('"ant"', '"bee"'))

    def stop_at_val(task):
        if "val" in task.path.parts:
            raise StopError
        return write_module.write_shard(task)

    monkeypatch.setattr(shard_module, "write_shard", stop_at_val)
    with pytest.raises(StopError):
        shard_dataset(varied.root, out, None, settings, quiet_run())
    assert sorted(read_index(out).splits) == ["train"]
    assert read_index(out).categories[0].name == "bee"
    assert sound(out)


def test_an_unreadable_index_is_set_aside(varied, settings, quiet_run):
    _, out = varied.shard()
    before = contents(out)
    (out / "index.json").write_text('{"format": "casc-shards", "version": 99}')
    heard: list[str] = []
    shard_dataset(varied.root, out, None, settings, spied(quiet_run(), heard))
    after = contents(out)
    assert b"99" in after.pop("index.json.old")
    assert after == before
    assert "index.json: version is 99" in heard[0]


def found(index, kind: str) -> list[int]:
    findings = index.splits["train"].report["findings"]
    return parse_ids(findings[kind]["ids"]) if kind in findings else []


def test_every_oddity_is_reported_by_id(coco, make_picture):
    gray = coco.image(data=make_picture(60, 50, mode="L"))
    cmyk = coco.image(data=make_picture(60, 50, mode="CMYK"))
    bmp = coco.image(data=make_picture(60, 50, kind="BMP"), name="a.bmp")
    png = coco.image(data=make_picture(60, 50, kind="PNG"), name="b.jpg")
    cut = coco.image(data=make_picture(60, 50)[:400], name="cut.jpg")
    gone = coco.image(name="gone.jpg")
    (coco.root / "train" / "gone.jpg").unlink()
    other = coco.image(data=make_picture(71, 50))
    small = coco.image(60, 20)
    good = coco.image(name="sub/good.jpg")
    twin = coco.image(data=make_picture(60, 50), name="sub/good.jpg")
    coco.images.append(dict(coco.images[0]))
    (coco.root / "train" / "unlisted.jpg").write_bytes(b"")
    for number in (gray, cmyk, bmp, png, small, good, twin):
        coco.object(number)
    lost = coco.object(cut), coco.object(gone), coco.object(other)
    stray = coco.object(424242)
    unknown = coco.object(good, category_id=9)
    flat = coco.object(good, bbox=[5, 5, 0, 9])
    outside = coco.object(good, bbox=[500, 5, 9, 9])
    over = coco.object(good, bbox=[50, 5, 20, 9])
    parts = coco.object(good, segmentation=[[1, 1, 9, 1, 9, 9], [20, 20, 30, 20, 30, 30]])
    bad = coco.object(good, segmentation=[[1, 1, 9, 1], [20, 20, 30, 20, 30, 30]])
    rle = coco.object(good, segmentation={"size": [50, 60], "counts": [100, 50, 2850]})
    crowd = coco.object(good, iscrowd=1)
    ignored = coco.object(good, ignore=1)
    bare = coco.object(good, drop=("area", "iscrowd", "segmentation"))
    coco.annotations += [dict(coco.annotations[-1]), {**coco.annotations[-1], "category_id": 1}]

    index, out = coco.shard()
    expected = {
        "grayscale": [gray],
        "cmyk": [cmyk],
        "other_format": [bmp],
        "wrong_extension": [png],
        "unreadable": [cut],
        "missing_file": [gone],
        "size_mismatch": [other],
        "too_small": [small],
        "duplicate_file_name": [twin],
        "duplicate_image": [gray],
        "image_left_out": list(lost),
        "unknown_image": [stray],
        "unknown_category": [unknown],
        "degenerate_box": [flat],
        "outside_image": [outside],
        "box_not_mask": [outside, over, parts, bad, rle],
        "out_of_bounds": [over],
        "multi_part": [parts],
        "bad_polygon_part": [bad],
        "rle_mask": [rle],
        "crowd": [crowd],
        "ignore": [ignored],
        "missing_area": [bare],
        "missing_iscrowd": [bare],
        "duplicate_annotation": [bare],
        "renumbered": [bare],
        "no_mask": [bare, bare + 1],
    }
    report = index.splits["train"].report
    assert {kind: found(index, kind) for kind in report["findings"]} == expected
    assert report["images"]["unlisted_files"] == 1
    assert report["images"]["listed"] == 11
    assert report["images"]["stored"] == 7
    assert report["annotations"]["listed"] == len(coco.annotations)
    assert sound(out)
    trained = {
        entry["id"]
        for record in records(out).values()
        for entry in record["annotations"]
        if entry["train"] and record["train"]
    }
    assert {over, parts, bad, rle} <= trained
    assert trained.isdisjoint({unknown, flat, outside, crowd, ignored, bare})


def test_exif_orientation_is_recorded(coco):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((60, 50, 3), np.uint8)
    stored[:10] = 255  # on top as stored, on the right once upright
    data = io.BytesIO()
    Image.fromarray(stored).save(data, "JPEG", exif=exif)
    upright = coco.image(60, 50, data=data.getvalue())
    as_stored = coco.image(50, 60, data=data.getvalue())
    coco.object(upright)
    coco.object(as_stored)
    index, out = coco.shard()
    assert found(index, "exif_applied") == [upright]
    assert found(index, "exif_ignored") == [as_stored]
    samples = {}
    for shard in index.splits["train"].shards:
        for _, image, text in iter_tar(out / shard.name):
            assert image == data.getvalue()
            sample = read_sample(image, text)
            samples[sample.image_id] = sample.image
    assert samples[upright].shape == (50, 60, 3)
    assert samples[upright][:, 55:].min() > 200 > 50 > samples[upright][:, :45].max()
    assert samples[as_stored].shape == (60, 50, 3)
    assert samples[as_stored][:5].min() > 200


def test_large_images_are_reduced_by_flag(varied):
    index, out = varied.shard(max_size=32)
    assert len(found(index, "reduced")) == 12
    assert all(max(bucket.width, bucket.height) <= 32 for bucket in index.splits["train"].buckets)
    assert sound(out)
    record = records(out)[12]
    assert (record["width"], record["height"]) == (27, 32)
    box = [10 * 27 / 50, 10 * 32 / 60, 20 * 27 / 50, 10 * 32 / 60]
    assert record["annotations"][0]["bbox"] == pytest.approx(box)


def test_rle_masks_are_traced(coco):
    number = coco.image()
    mask = np.zeros((50, 60), bool)
    mask[5:40, 5:50] = True
    mask[15:25, 15:35] = False
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    coco.object(number, segmentation={"size": [50, 60], "counts": counts})
    _, out = coco.shard()
    entry = records(out)[number]["annotations"][0]
    assert entry["train"] is True
    assert entry["mask_iou"] == 1
    assert sorted(len(ring) for ring in entry["rings"]) == [8, 8]
    assert len(annotation_edges(entry)) == 8


def test_nothing_to_train_on_is_no_error(coco):
    coco.image()
    index, out = coco.shard()
    assert index.splits["train"].train_samples == 0
    assert sound(out)


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_folders_are_refused(coco, tmp_path: Path, settings, quiet_run):
    coco.object(coco.image())
    coco.write()

    def run(root: Path, out: Path = tmp_path / "o", splits: list[str] | None = None):
        return lambda: shard_dataset(root, out, splits, settings, quiet_run())

    assert "no such folder" in refusal(run(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "is it the root" in refusal(run(tmp_path / "empty")).replace(
        str(tmp_path / "empty"), "it"
    )
    assert "--splits" in refusal(run(coco.root, splits=["../x"]))
    assert "--splits" in refusal(run(coco.root, splits=[]))
    assert "instances_val.json: not found" in refusal(run(coco.root, splits=["val"]))
    assert "shards would lie among the images" in refusal(run(coco.root, out=coco.root))
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refusal(run(coco.root, out=tmp_path / "file"))
    coco.file.rename(coco.file.with_name("instances_b.json"))
    assert "there is no" in refusal(run(coco.root))
    assert "b: no such folder" in refusal(run(coco.root, splits=["b"]))


def test_a_folder_without_any_of_the_images_is_refused(coco, settings, quiet_run, tmp_path: Path):
    for name in ("a.jpg", "b.jpg"):
        coco.image(name=name)
        (coco.root / "train" / name).unlink()
    coco.write()
    message = refusal(lambda: shard_dataset(coco.root, tmp_path / "o", None, settings, quiet_run()))
    assert "none of the 2 images" in message
    assert "a.jpg: no such file" in message


def test_two_runs_do_not_write_to_one_folder(varied, settings, quiet_run, tmp_path: Path):
    fcntl = pytest.importorskip("fcntl")
    varied.write()
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        message = refusal(lambda: shard_dataset(varied.root, out, None, settings, quiet_run()))
        assert "another data_tools shard" in message
    finally:
        os.close(descriptor)
    shard_dataset(varied.root, out, None, settings, quiet_run())


def test_real_photographs(tmp_path: Path, quiet_run):
    default = Path(__file__).resolve().parents[2].parent / "shared" / "coco_mini"
    root = Path(os.environ.get("CASC_COCO_MINI", default))
    if not root.is_dir():
        pytest.skip("no real photographs: set CASC_COCO_MINI to a folder in COCO's layout")
    settings = Settings((1 / 1.52, 1 / 1.36, 1.0, 1.36, 1.52), None, 64, 256.0, 0.0)
    index = shard_dataset(root, tmp_path, ["val2017"], settings, quiet_run())
    assert sound(tmp_path)
    listed = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    report = index.splits["val2017"].report
    assert report["images"]["stored"] == len(listed["images"])
    assert report["annotations"]["stored"] == len(listed["annotations"])
    crowds = [entry["id"] for entry in listed["annotations"] if entry["iscrowd"]]
    assert parse_ids(report["findings"]["crowd"]["ids"]) == sorted(crowds)
    stored = records(tmp_path, "val2017")
    for entry in listed["annotations"]:
        record = stored[entry["image_id"]]
        copy = next(other for other in record["annotations"] if other["id"] == entry["id"])
        assert copy["segmentation"] == entry["segmentation"]
        assert order_key(record["image_id"])[1] == record["image_id"]


def test_shards_are_on_the_disk_before_the_index_names_them(varied, monkeypatch):
    """As the system sees it: each file and each name is synchronised in this order."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        calls.append(("name", os.path.realpath(path)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    index, out = varied.shard()
    position = calls.index(("name", os.path.realpath(out / ".index.json.tmp")))
    for shard in index.splits["train"].shards:
        path = os.path.realpath(out / shard.name)
        content, name = calls.index(("sync", f"{path}.tmp")), calls.index(("name", f"{path}.tmp"))
        folder = calls.index(("sync", os.path.dirname(path)), name)  # noqa: PTH120
        assert content < name < folder < position
    assert ("sync", os.path.realpath(out)) in calls[position:]


def test_archives_are_those_of_webdatasets_writer(tmp_path: Path):
    from webdataset.writer import TarWriter

    rng = np.random.default_rng(0)
    members = [(f"{i:012d}", "jpg", rng.bytes(n)) for i, n in enumerate((0, 1, 511, 512, 20_000))]
    members += [("123456789012345678", "json", b"{}")]
    with (
        (tmp_path / "theirs.tar").open("wb") as stream,
        TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as archive,
    ):
        for key, extension, data in members:
            archive.write({"__key__": key, extension: data})
    written = write_tar(tmp_path / "ours.tar", members)
    data = (tmp_path / "ours.tar").read_bytes()
    assert data == (tmp_path / "theirs.tar").read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
