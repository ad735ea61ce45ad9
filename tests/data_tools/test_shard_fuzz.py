"""500 damaged data sets: each is refused with a clear line, or stored with a full account.

The long form: just fuzz --cases 10000
"""

import copy
import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import NUMBERS, SPECIAL, STRANGE, places
from PIL import Image

from casc.data.index import Index, read_index
from casc.data.sample import iter_tar, read_sample
from casc.errors import UserError
from data_tools.check import check_shards, fault_lines
from data_tools.report import parse_ids
from data_tools.shard import shard_dataset

PER_BATCH = 50
# How a refusal of a file begins that names none of its fields.
AS_A_WHOLE = ("not ", "expected an object", "is UTF-16; save it", "is UTF-32; save it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases, seed = int(option("--cases") or 0), int(option("--seed") or 0)
        count = max(cases, 500) // PER_BATCH
        metafunc.parametrize("batch", range(seed * count, (seed + 1) * count))


def make_sound(rng: random.Random) -> dict[str, Any]:
    """Annotations of six images, a, b, ... with polygons, an RLE, a crowd."""
    sizes = [(40, 36), (36, 40), (48, 33), (33, 48), (36, 36), (40, 36)]
    images = [
        {"id": 10 + i, "file_name": f"{'abcdef'[i]}.jpg", "width": w, "height": h}
        for i, (w, h) in enumerate(sizes)
    ]
    entries = []
    for i in range(14):
        w, h = sizes[i % 6]
        x, y = rng.randint(0, 10), rng.randint(0, 10)
        box = [x, y, rng.randint(5, 20), rng.randint(5, 20)]
        polygon = [x, y, x + box[2], y, x + box[2], y + box[3], x, y + box[3]]
        rle = {"size": [h, w], "counts": [30, 50, w * h - 80]}
        entry = {
            "id": 500 + i,
            "image_id": 10 + i % 6,
            "category_id": 1 + i % 2,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(i == 7),
            "segmentation": rle if i in (7, 8) else [polygon],
        }
        entries.append(entry)
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}]
    return {"images": images, "annotations": entries, "categories": categories}


def delete(data: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(data))
    del container[key]


def replace(data: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(data))
    container[key] = copy.deepcopy(rng.choice(STRANGE))


def swap(data: Any, rng: random.Random) -> None:
    (one, a), (two, b) = rng.choice(places(data)), rng.choice(places(data))
    one[a], two[b] = copy.deepcopy(two[b]), copy.deepcopy(one[a])


def repeat(data: Any, rng: random.Random) -> None:
    entries = data[rng.choice(["images", "annotations", "categories"])]
    entries.append(copy.deepcopy(rng.choice(entries)))


def clash(data: Any, rng: random.Random) -> None:
    entries = data[rng.choice(["images", "annotations", "annotations", "categories"])]
    rng.choice(entries)["id"] = rng.choice(entries)["id"]


def nudge(data: Any, rng: random.Random) -> None:
    numbers = [(c, k) for c, k in places(data) if type(c[k]) in (int, float)]
    container, key = rng.choice(numbers)
    container[key] = rng.choice([-1, 0, 0.1, 3, 1000]) * container[key] + rng.choice([0, 0, -1, 1])


def strange_number(data: Any, rng: random.Random) -> None:
    numbers = [(c, k) for c, k in places(data) if type(c[k]) in (int, float)]
    container, key = rng.choice(numbers)
    container[key] = rng.choice(NUMBERS + SPECIAL)


def damage_polygon(data: Any, rng: random.Random) -> None:
    entry = rng.choice(data["annotations"])
    if isinstance(entry["segmentation"], dict):
        texts = ["", "0", "oooo", "zzzzzzzzzzzzzzzz", "\x7f", "é", [], [-1, 5], [10**9], [0] * 99]
        entry["segmentation"]["counts"] = rng.choice(texts)
    else:
        part = entry["segmentation"][0]
        for _ in range(rng.randint(1, 5)):
            part.insert(rng.randrange(len(part) + 1), rng.choice([*NUMBERS, *SPECIAL, 5, 7]))


def move_file(data: Any, rng: random.Random) -> None:
    names = "../a.jpg /etc/hosts x/../../a.jpg sub . .. a.jpg/ a.jpg/b C:\\a.jpg A.JPG ./a.jpg ~"
    odd = ["a.jpg\n", "\udc80.jpg", "x" * 300, "a b.jpg", "b.jpg\x1b[31m"]
    rng.choice(data["images"])["file_name"] = rng.choice([*names.split(), *odd])


JSON_DAMAGE: list[Callable[[Any, random.Random], None]] = [
    delete, replace, swap, repeat, clash, nudge, strange_number, damage_polygon, move_file,
]  # fmt: skip


def damage_text(text: bytes, rng: random.Random) -> bytes:
    """Damage below the level of JSON."""
    kind = rng.randrange(5)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        changed = bytearray(text)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        at = rng.randrange(len(text))
        return text[:at] + bytes(rng.randrange(256) for _ in range(9)) + text[at:]
    if kind == 3:
        return rng.choice([b"", b"null", b"[]", b"\xef\xbb\xbf" + text, b"[" * 99_999, text * 2])
    return text.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))


def damage_image(folder: Path, rng: random.Random, pictures: dict[str, bytes]) -> None:
    path = folder / f"{rng.choice('abcdef')}.jpg"
    kind = rng.randrange(9)
    if path.is_dir():
        path.rmdir()
    data = (path.read_bytes() if path.is_file() else b"") or pictures["jpeg"]
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        data = bytes(changed)
    elif kind == 2:
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        data = data[:a] + data[a:b][::-1] + data[b:]
    elif kind == 3:
        data = rng.choice([b"", b"GIF89a", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP"])
    elif kind in (4, 5):
        data = pictures[rng.choice(sorted(pictures))]
        if kind == 5:
            changed = bytearray(data)
            changed[rng.randrange(min(80, len(changed)))] = rng.randrange(256)
            data = bytes(changed)
    elif kind == 6:
        path.unlink(missing_ok=True)
        return
    elif kind == 7:
        path.unlink(missing_ok=True)
        path.mkdir()
        return
    else:
        data = bytes(rng.randrange(256) for _ in range(300))
    path.write_bytes(data)


@pytest.fixture(scope="module")
def pictures(make_picture: Callable[..., bytes]) -> dict[str, bytes]:
    """Images of all sorts, 40 x 36."""
    found = {"jpeg": make_picture(40, 36), "wrong_size": make_picture(41, 36)}
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        found[kind] = make_picture(40, 36, kind=kind)
    for mode in ("L", "CMYK"):
        found[mode] = make_picture(40, 36, mode=mode)
    for mode in ("1", "P", "RGBA", "LA"):
        found[mode] = make_picture(40, 36, kind="PNG", mode=mode)
    deep = io.BytesIO()
    Image.fromarray(np.arange(1440, dtype=np.uint16).reshape(36, 40)).save(deep, "PNG")
    return {**found, "deep": deep.getvalue()}


def test_damaged_data_sets(batch, tmp_path: Path, make_picture, pictures, settings, quiet_run):
    rng = random.Random(batch)
    sound = make_sound(rng)
    source = tmp_path / "sound"
    (source / "annotations").mkdir(parents=True)
    (source / "train").mkdir()
    for image in sound["images"]:
        data = make_picture(image["width"], image["height"], seed=image["id"])
        (source / "train" / image["file_name"]).write_bytes(data)

    outcomes: Counter[str] = Counter()
    for number in range(PER_BATCH):
        root, out = tmp_path / "coco", tmp_path / "out"
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, root)
        data = copy.deepcopy(sound)
        kind = rng.choice(["json", "json", "json", "image", "both", "text"])
        if kind in ("json", "both"):
            for _ in range(rng.choice([1, 1, 2, 4])):
                try_damage(data, rng)
        if kind in ("image", "both"):
            for _ in range(rng.randint(1, 6)):
                damage_image(root / "train", rng, pictures)
        text = json.dumps(data).encode()
        text = damage_text(text, rng) if kind == "text" else text
        file = root / "annotations" / "instances_train.json"
        file.write_bytes(text)

        limits = settings._replace(max_size=rng.choice([None, None, 34]))
        try:
            index = shard_dataset(root, out, None, limits, quiet_run())
        except UserError as error:
            check_refusal(str(error), file)
            outcomes["refused"] += 1
            assert not (out / "index.json").exists()
        else:
            parsed = json.loads(text)
            found = check_account(index, out, parsed)
            outcomes["repaired" if found else "untouched"] += 1
        # A damage that goes unnoticed would be no test.
        assert sum(outcomes.values()) == number + 1
    assert outcomes["refused"] >= 5
    assert outcomes["repaired"] >= 5


def try_damage(data: dict[str, Any], rng: random.Random) -> None:
    """Damage once; what was damaged already may leave nothing to do."""
    try:
        rng.choice(JSON_DAMAGE)(data, rng)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        return


def check_refusal(message: str, file: Path) -> None:
    """A refusal is one line, and names the file and, below the top level, the field."""
    assert "\n" not in message
    assert message.isprintable()
    # Of ten faults at most each is short; the last one may name the way out.
    named = message.split("; ")
    assert len(named) <= 11
    assert all(len(fault) < 300 for fault in named)
    assert message.count(str(file)) <= 1
    assert message.startswith((str(file), str(file.parent.parent)))
    reason = message.removeprefix(f"{file}: ")
    if reason == message:
        assert "none of the" in message  # every image is gone
        return
    field = r"(images|annotations|categories)(\[\d+\])?[\w.\[\]]*: "
    assert re.match(field, reason) or reason.startswith(AS_A_WHOLE)


def check_account(index: Index, out: Path, listed: dict[str, Any]) -> bool:
    """Whatever is listed is stored or accounted for; gives whether anything was found."""
    assert read_index(out) == index
    assert fault_lines(check_shards(out)) == []
    report = index.splits["train"].report
    found = {kind: parse_ids(entry["ids"]) for kind, entry in report["findings"].items()}
    counts = {kind: entry["count"] for kind, entry in report["findings"].items()}

    images: Counter[int] = Counter()
    annotations: Counter[int] = Counter()
    for shard in index.splits["train"].shards:
        for _, image, text in iter_tar(out / shard.name):
            sample = read_sample(image, text)
            assert all(len(edges) for edges in sample.edges)
            record = json.loads(text)
            images[record["image_id"]] += 1
            for entry in record["annotations"]:
                annotations[entry["id"]] += 1
    assert max(images.values()) == 1
    assert max(annotations.values(), default=1) == 1

    lost = ("missing_file", "unreadable", "size_mismatch")
    left_out = sum(counts.get(kind, 0) for kind in (*lost, "duplicate_image"))
    assert len(listed["images"]) == sum(images.values()) + left_out
    for image in listed["images"]:
        gone = [key for kind in lost for key in found.get(kind, [])]
        assert (image["id"] in images) != (image["id"] in gone)

    kinds = ("image_left_out", "unknown_image", "duplicate_annotation", "other_shape")
    left_out = sum(counts.get(kind, 0) for kind in kinds)
    assert len(listed["annotations"]) == sum(annotations.values()) + left_out
    for entry in listed["annotations"]:
        accounted = any(entry["id"] in found.get(kind, []) for kind in (*kinds, "renumbered"))
        assert entry["id"] in annotations or accounted
    return bool(set(found) - {"crowd", "rle_mask"})
