import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casc.data.index import Index, read_index, write_index
from casc.data.sample import iter_tar
from casc.errors import UserError
from data_tools.check import check_shards, fault_lines

Edit = Callable[[str, bytes, dict[str, Any]], tuple[str, bytes, dict[str, Any]] | None]


@pytest.fixture
def shards(varied) -> Path:
    _, out = varied.shard()
    return out


def faults(folder: Path) -> list[str]:
    return list(fault_lines(check_shards(folder)))


def change(folder: Path, **fields: Any) -> None:
    """Change fields of the split in the index."""
    index = read_index(folder)
    split = dataclasses.replace(index.splits["train"], **fields)
    write_index(folder, Index(index.categories, {"train": split}))


def largest(folder: Path) -> int:
    """The shard to train on that holds most samples."""
    shards = read_index(folder).splits["train"].shards
    return max(range(len(shards)), key=lambda i: (shards[i].train, shards[i].samples))


def rewrite(folder: Path, edit: Edit) -> str:
    """Edit the largest shard's samples, and enter its new size and hash into the index."""
    split, shard = read_index(folder).splits["train"], largest(folder)
    entry = split.shards[shard]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for key, image, text in iter_tar(folder / entry.name):
            edited = edit(key, image, json.loads(text))
            if edited is None:
                continue
            key, image, record = edited
            for name, data in ((f"{key}.jpg", image), (f"{key}.json", json.dumps(record).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    data = out.getvalue()
    (folder / entry.name).write_bytes(data)
    new = dataclasses.replace(entry, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    entries = [new if i == shard else other for i, other in enumerate(split.shards)]
    change(folder, shards=tuple(entries))
    return entry.name


def test_sound_shards_have_no_faults(shards: Path):
    checks = check_shards(shards)
    assert fault_lines(checks) == []
    assert checks["train"].samples == 12
    assert checks["train"].annotations == 19


def test_workers_make_no_difference(shards: Path):
    (shards / read_index(shards).splits["train"].shards[2].name).unlink()
    assert check_shards(shards, workers=2) == check_shards(shards)


def test_a_flipped_bit_is_found(shards: Path):
    name = read_index(shards).splits["train"].shards[0].name
    data = bytearray((shards / name).read_bytes())
    data[-1] ^= 1  # in the padding, where no reader looks
    (shards / name).write_bytes(data)
    assert faults(shards) == [f"{name}: its content has changed (SHA-256 differs)"]


def test_a_cut_shard_is_found(shards: Path):
    name = read_index(shards).splits["train"].shards[0].name
    data = (shards / name).read_bytes()
    (shards / name).write_bytes(data[:1500])
    found = faults(shards)
    assert found[0] == f"{name}: 1500 bytes, index says {len(data)}"
    assert any("not a complete tar" in fault for fault in found)
    assert any("0 samples, index says" in fault for fault in found)


def test_a_missing_shard_is_found(shards: Path):
    name = read_index(shards).splits["train"].shards[0].name
    (shards / name).unlink()
    assert faults(shards) == [f"{name}: missing"]
    (shards / name).mkdir()
    assert "can't be read" in faults(shards)[0]


def test_a_missing_sample_is_found(shards: Path):
    first: list[str] = []

    def drop(key: str, image: bytes, record: dict[str, Any]):
        first.append(key)
        return None if len(first) == 1 else (key, image, record)

    name = rewrite(shards, drop)
    assert f"{name}: {len(first) - 1} samples, index says {len(first)}" in faults(shards)


def test_wrong_counts_are_found(shards: Path):
    split = read_index(shards).splits["train"]
    buckets = [dataclasses.replace(split.buckets[0], samples=99), *split.buckets[1:]]
    change(shards, buckets=tuple(buckets))
    assert "buckets[0].samples: 99" in faults(shards)[0]
    report = {**split.report, "images": {**split.report["images"], "stored": 13}}
    change(shards, buckets=split.buckets, report=report)
    assert "report.images.stored: 13, the shards hold 12" in faults(shards)[0]


def test_a_sample_that_is_there_twice_is_found(shards: Path):
    split = read_index(shards).splits["train"]
    again = dataclasses.replace(split.shards[0], name="train/again-000000.tar")
    (shards / again.name).write_bytes((shards / split.shards[0].name).read_bytes())
    extra = again.samples
    change(
        shards,
        shards=(*split.shards, again),
        samples=split.samples + extra,
        train_samples=split.train_samples + extra,
    )
    assert any("is in an earlier shard too" in fault for fault in faults(shards))


def edited(**fields: Any) -> Edit:
    return lambda key, image, record: (key, image, {**record, **fields})


def with_objects(**fields: Any) -> Edit:
    def edit(key: str, image: bytes, record: dict[str, Any]):
        entries = [{**entry, **fields} for entry in record["annotations"]]
        return key, image, {**record, "annotations": entries}

    return edit


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    entries = [{k: v for k, v in entry.items() if k != name} for entry in record["annotations"]]
    return {**record, "annotations": entries}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edited(width=61), "its JSON says 61 x"),
        (edited(width=True), "its JSON: width: expected a whole number"),
        (edited(file_name=None), "its JSON: file_name: expected a str, got None"),
        (edited(annotations={}), "its JSON: annotations: expected a list"),
        (edited(annotations=[{}]), "its JSON: annotations[0].label: expected"),
        (edited(annotations=[3]), "its JSON: annotations[0]: isn't an object"),
        (edited(train=False), "its `train` isn't its shard's"),
        (edited(orientation=6), "its JSON says"),
        (edited(orientation=11), "its JSON: orientation: expected a whole number from 1 to 8"),
        (edited(image_id=1), "keys are not the image ids"),
        (edited(width=6, height=1), "its aspect 6.0000 isn't its bucket's"),
        (edited(width=5000, height=5000), "is larger than its bucket's canvas"),
        (edited(height=0), "its JSON: height: expected"),
        (with_objects(label=7), "its label isn't its category's"),
        (
            with_objects(segmentation=[list(range(900))]),
            "edges need a room of 450, its bucket has",
        ),
        (with_objects(segmentation=[]), "it has no edges"),
        (with_objects(segmentation={"size": [1, 1], "counts": "1"}), "polygons to train on"),
        (with_objects(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "expected pairs of numbers, got 7"),
        (lambda k, i, r: (k, i, without(r, "bbox")), "annotations[0].bbox is missing"),
        (lambda k, i, r: (k, i, {**r, "annotations": r["annotations"] * 9}), "room for"),
        (lambda k, i, r: (k, i[:-90], r), "image: can't be decoded"),
        (lambda k, i, r: (k, b"", r), "image: the file is empty"),
        (lambda k, i, r: ("1" + k, i, r), "keys are not the image ids"),
    ],
)
def test_samples_that_are_wrong_are_found(shards: Path, edit: Edit, expected: str):
    name = rewrite(shards, edit)
    found = faults(shards)
    assert any(expected in fault for fault in found), found
    assert all(fault.startswith(name) for fault in found)


def test_samples_in_another_order_are_found(shards: Path):
    split = read_index(shards).splits["train"]
    path = shards / split.shards[largest(shards)].name
    samples = [(k, i, json.loads(r)) for k, i, r in iter_tar(path)]
    assert len(samples) > 1
    backwards = iter(samples[::-1])
    rewrite(shards, lambda *_: next(backwards))
    assert "keys are not the image ids in the order of shards" in faults(shards)[0]


def test_json_that_is_none_is_found(shards: Path):
    split = read_index(shards).splits["train"]
    path = shards / split.shards[0].name
    path.write_bytes(path.read_bytes().replace(b'{"image_id"', b'["image_id"'))
    assert any("its JSON: not valid JSON" in fault for fault in faults(shards))


def test_an_absent_index_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not found"):
        check_shards(tmp_path)
