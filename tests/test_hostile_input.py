"""Input that was made to do harm: one line that names file and field, at once, in little memory."""

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import judged
from PIL import Image

from casc.checkpoints.pickles import load_pickle, load_torch
from casc.checkpoints.read import read_weights
from casc.data.index import INDEX_NAME, read_index
from casc.data.loader_config import TrainLoaderConfig
from casc.data.reader import read_shard
from casc.data.record import parse_record
from casc.data.sample import iter_tar, read_sample
from casc.errors import UserError
from casc.json_files import read_json
from casc.train.loop import train
from data_tools.coco import read_annotations


def refused(call, *words) -> None:
    line = judged(call)
    assert line is not None, "it was taken"
    for word in words:
        assert str(word) in line, line


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def image(size=(8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()


def record(**changes: Any) -> dict[str, Any]:
    return {
        "image_id": 1, "file_name": "a.png", "width": 8, "height": 8, "orientation": 1,
        "train": True, "annotations": [annotation()], **changes,
    }  # fmt: skip


def annotation(**changes: Any) -> dict[str, Any]:
    return {
        "id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0, "label": 0,
        "train": True, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "box": [1, 1, 5, 5], **changes,
    }  # fmt: skip


def sparse(folder: Path) -> Path:
    """A GNU-sparse member of eight gigabytes of holes."""
    block = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[386:410] = b"%011o\0%011o\0" % (8 * 2**30 - 1, 0)
    block[483:495] = b"%011o\0" % (8 * 2**30)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (folder / "a.tar").write_bytes(bytes(block) + bytes(10240))
    return folder / "a.tar"


def sparse_pax(folder: Path) -> Path:
    """The same in the attributes of newer archives."""
    member = tarfile.TarInfo("1.png")
    member.pax_headers = {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(8 * 2**30),
        "GNU.sparse.map": f"0,1,{8 * 2**30 - 1},0",
    }  # fmt: skip
    member.size = 1
    data = member.tobuf(tarfile.PAX_FORMAT) + b"x" + bytes(511) + bytes(1024)
    (folder / "a.tar").write_bytes(data)
    return folder / "a.tar"


def long_name(folder: Path) -> Path:
    (folder / "a.tar").write_bytes(tar((tarfile.TarInfo("a" * 20_000_000), b"x")))
    return folder / "a.tar"


def long_attribute(folder: Path) -> Path:
    member = tarfile.TarInfo("1.png")
    member.pax_headers = {"comment": "x" * 20_000_000}
    (folder / "a.tar").write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    return folder / "a.tar"


def endless_member(folder: Path) -> Path:
    member = tarfile.TarInfo("1.png")
    member.size = 2**40
    (folder / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    return folder / "a.tar"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.tar")
    return folder / "a.tar"


def device(folder: Path) -> Path:
    (folder / "a.tar").symlink_to("/dev/zero")
    return folder / "a.tar"


@pytest.mark.parametrize(
    "make", [sparse, sparse_pax, long_name, long_attribute, endless_member, pipe, device]
)
def test_shards(make, tmp_path):
    path = make(tmp_path)
    refused(lambda: list(iter_tar(path)), path)


@pytest.mark.parametrize("make", [pipe, device])
def test_what_is_no_file(make, tmp_path, tiny_recipe):
    path = make(tmp_path)
    index = read_index(tiny_recipe.data)
    shard = index.splits["train"].shards[0]
    (tiny_recipe.data / shard.name).unlink()
    (tiny_recipe.data / shard.name).symlink_to(path)
    refused(lambda: list(read_shard(tiny_recipe.data, shard)), shard.name, "not a plain file")
    refused(lambda: read_json(path), path, "not a plain file")
    refused(lambda: read_annotations(path), path, "not a plain file")
    refused(lambda: read_index(path), path, "not a plain file")
    for ending in ("safetensors", "pth"):
        link = tmp_path / f"a.{ending}"
        link.symlink_to(path)
        refused(lambda link=link: read_weights(str(link)), link)


def laughs(depth: int = 40) -> list:
    value: list = ["lol"]
    for _ in range(depth):
        value = [value] * 10
    return value


def test_pickles(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": laughs()}))
    refused(lambda: load_pickle(path), path, "lists in lists")
    round_: list = []
    round_.append(round_)
    path.write_bytes(pickle.dumps(round_))
    refused(lambda: load_pickle(path), path, "lists in lists")
    torch.save({"state_dict": {}, "meta": laughs()}, tmp_path / "a.pth")
    refused(lambda: load_torch(tmp_path / "a.pth"), "lists in lists")
    torch.save({"state_dict": {"a": torch.zeros(1).expand(2**40)}}, tmp_path / "a.pth")
    refused(lambda: load_torch(tmp_path / "a.pth"), "a tensor of shape (1099511627776,)")
    # Sharing alone is no harm.
    path.write_bytes(pickle.dumps([[np.zeros(3)] * 5] * 5))
    assert len(load_pickle(path)) == 5


def test_compressed_checkpoint(tmp_path):
    import zipfile

    torch.save({"state_dict": {"a": torch.zeros(10)}}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.writestr("archive/data/9", bytes(200 * 2**20))
    refused(lambda: load_torch(tmp_path / "b.pth"), "unpacks to")


def test_many_tensors(tmp_path):
    about = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{i}":{about}' for i in range(300_000)) + "}").encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(lambda: read_weights(str(path)), path, "has 300,000 tensors")


DEEP = "[" * 100_000 + "]" * 100_000
RECORDS = {
    "deep": DEEP,
    "deep inside": json.dumps(record(annotations=[])).replace("[]", DEEP),
    "image_id of 2^70": json.dumps(record(image_id=2**70)),
    "a number of 100,000 digits": json.dumps(record()).replace('"id": 1', '"id": ' + "9" * 100_000),
    "width": json.dumps(record(width=0)),
    "orientation": json.dumps(record(orientation=9)),
    "NaN box": json.dumps(record(annotations=[annotation(box=[float("nan"), 0, 1, 1])])),
    "infinite box": json.dumps(record(annotations=[annotation(box=[0, 0, 1, 1])])).replace(
        '"box": [0', '"box": [1e999'
    ),
    "NaN polygon": json.dumps(record(annotations=[annotation(segmentation=[[float("nan")] * 6])])),
    "far polygon": json.dumps(record(annotations=[annotation(segmentation=[[1e300] * 6])])),
    "text in a polygon": json.dumps(record(annotations=[annotation(segmentation=[["a"] * 6])])),
    "rings": json.dumps(record(annotations=[annotation(rings=[[[1]] * 6])])),
    "huge RLE": json.dumps(
        record(annotations=[annotation(segmentation={"size": [2**31, 2**31], "counts": "1"})])
    ),
    "label": json.dumps(record(annotations=[annotation(label=2**40)])),
    "negative label": json.dumps(record(annotations=[annotation(label=-1)])),
    "list": "[]",
    "null": "null",
    "no field": "{}",
    "annotations": json.dumps(record(annotations=[None])),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    refused(lambda: parse_record(RECORDS[name], "a.tar: 1"), "a.tar: 1: ")
    refused(lambda: read_sample(image(), RECORDS[name].encode()))


def test_a_good_record_is_taken():
    assert judged(lambda: read_sample(image(), json.dumps(record()).encode())) is None


def test_image_bomb():
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    side = 11_600  # 134 megapixels
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    text = json.dumps(record(width=side, height=side, annotations=[])).encode()
    refused(lambda: read_sample(data, text), "11600 x 11600", "CASC_MAX_MEGAPIXELS")


INDEXES = {
    "instances": ("splits.train.buckets[0].instances", {"instances": 10**30}),
    "capacity": ("splits.train.buckets[0].instances x edges", {"instances": 10**6, "edges": 10**6}),
    "aspect": ("splits.train.buckets[0].max_aspect", {"max_aspect": 10**400}),
    "area": ("splits.train.buckets[0].height x width", {"height": 10**6, "width": 10**6}),
    "regions": ("splits.train.buckets[0].regions", {"regions": 10**9}),
    "boxes": ("splits.train.buckets[0].boxes", {"boxes": 10**9}),
    "many": ("splits.train.shards[0].samples", {"samples": 10**9}),
    "canvas": ("splits.train.buckets[0].height or width", {"height": 10**9}),
    "sha256": ("splits.train.shards[0].sha256", {"sha256": ""}),
    "not hex": ("splits.train.shards[0].sha256", {"sha256": "x" * 64}),
    "NUL": ("splits.train.shards[0].name", {"name": "a\0.tar"}),
    "half": ("splits.train.shards[0].name", {"name": "a\ud800.tar"}),
    "control": ("splits.train.shards[0].name", {"name": "a\x1b[2J.tar"}),
    "outside": ("splits.train.shards[0].name", {"name": "../a.tar"}),
    "samples": ("splits.train.shards[0].samples", {"samples": 10**400}),
    "bytes": ("splits.train.shards[0].bytes", {"bytes": 2**70}),
    "class": ("categories[0].name", {"name": "\ud800"}),
    "class id": ("categories[0].id", {"id": 2**70}),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name, tiny_recipe):
    path = tiny_recipe.data / INDEX_NAME
    data = json.loads(path.read_text())
    field, changes = INDEXES[name]
    place = data["categories"] if field[0] == "c" else data["splits"]["train"]
    place = place if field[0] == "c" else place["buckets" if "buckets" in field else "shards"]
    place[0] |= changes
    path.write_text(json.dumps(data))
    refused(lambda: read_index(tiny_recipe.data), path, f": {field}: expected")


def test_deep_and_large_indexes(tiny_recipe):
    path = tiny_recipe.data / INDEX_NAME
    path.write_text(DEEP)
    refused(lambda: read_index(tiny_recipe.data), path, "nested too deeply")
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    refused(lambda: read_index(tiny_recipe.data), path, "is larger than")


def test_annotation_files(tmp_path):
    path = tmp_path / "a.json"
    good = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    path.write_text(json.dumps(good))
    assert judged(lambda: read_annotations(path)) is None
    large = {**good["images"][0], "width": 10**6, "height": 10**6}
    for text in (
        DEEP,
        json.dumps({**good, "images": [large]}),
        json.dumps({**good, "images": [{**large, "id": 2**70}]}),
        json.dumps({**good, "categories": [{"id": 1, "name": 3}]}),
    ):
        path.write_text(text)
        refused(lambda: read_annotations(path), path)


def test_labels_that_no_class_has(tiny_recipe, tmp_path):
    """A shard whose own JSON says another class than there is, with a hash that fits."""
    recipe = replace(tiny_recipe, max_steps=1, loading=TrainLoaderConfig(workers=0))
    index = json.loads((recipe.data / INDEX_NAME).read_text())
    for shard in index["splits"]["train"]["shards"]:
        path = recipe.data / shard["name"]
        data = path.read_bytes().replace(b'"label": 0', b'"label": 7')
        data = data.replace(b'"label": 1', b'"label": 7')
        path.write_bytes(data)
        shard["sha256"] = hashlib.sha256(data).hexdigest()
    (recipe.data / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"image \d+: label: 7, there are 2 classes"):
        train(recipe)


def test_the_oracle_sees_harm(monkeypatch):
    with pytest.raises(MemoryError):
        judged(lambda: bytearray(2**30))
    with pytest.raises(ZeroDivisionError):
        judged(lambda: 1 / 0)
    monkeypatch.setattr("oracle.SECONDS", 0.01)
    with pytest.raises(AssertionError, match="processor time"):
        judged(lambda: sum(range(10**7)))
