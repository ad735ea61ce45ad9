import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casc.data.index import (
    Bucket,
    Category,
    Index,
    Shard,
    Split,
    canvas,
    format_index,
    parse_index,
    read_index,
    write_index,
)
from casc.errors import UserError


def make_index() -> Index:
    buckets = (
        Bucket("tall", 0.0, 1.0, 64, 48, 3, 17, 5),
        Bucket("wide", 1.0, None, 48, 64, 1, 1, 2),
    )
    shards = (
        Shard("train/tall-000000.tar", 0, True, 4, 10_000, "ab" * 32),
        Shard("train/tall-eval-000000.tar", 0, False, 1, 3000, "cd" * 32),
        Shard("train/wide-000000.tar", 1, True, 2, 5000, "ef" * 32),
    )
    split = Split(7, 6, buckets, shards, {"findings": {}}, "source")
    return Index((Category(3, "cat"), Category(7, "größer")), {"train": split})


def test_reads_back_what_was_written(tmp_path: Path):
    index = make_index()
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert read_index(tmp_path / "index.json") == index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json"]


def test_text_is_stable_and_ends_with_a_newline():
    text = format_index(make_index())
    assert text.endswith("}\n")
    assert format_index(parse_index(text)) == text
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert data["format"] == "casc-shards"
    assert data["splits"]["train"]["buckets"][1]["max_aspect"] is None


def changed(path: str, value: Any) -> str:
    """The index's text with one field replaced, or removed where the value is `...`."""
    data = json.loads(format_index(make_index()))
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", "tars", "format"),
        ("version", 3, "update casc"),
        ("version", 1, "make the shards again"),
        ("version", True, "version"),
        ("categories", ..., "categories"),
        ("categories.0.name", 5, "categories[0].name"),
        ("categories.1.id", 3, "an id occurs twice"),
        ("splits", [], "splits"),
        ("splits.train", None, "splits.train"),
        ("splits.train.samples", 8, "splits.train.samples"),
        ("splits.train.train_samples", 7, "splits.train.train_samples"),
        ("splits.train.buckets.0.height", 0, "splits.train.buckets[0].height"),
        ("splits.train.buckets.0.edges", ..., "splits.train.buckets[0].edges"),
        ("splits.train.buckets.0.max_aspect", 0, "splits.train.buckets[0].max_aspect"),
        ("splits.train.buckets.0.min_aspect", float("nan"), "NaN is no number of JSON"),
        ("splits.train.shards.1", "x", "splits.train.shards[1]"),
        ("splits.train.shards.1.train", 1, "splits.train.shards[1].train"),
        ("splits.train.shards.2.bucket", 2, "splits.train.shards[2].bucket"),
        ("splits.train.shards.2.name", "../x.tar", "splits.train.shards[2].name"),
        ("splits.train.shards.2.name", "/x.tar", "splits.train.shards[2].name"),
        ("splits.train.shards.2.name", "train/tall-000000.tar", "a name occurs twice"),
    ],
)
def test_refuses_what_it_does_not_understand(path: str, value: Any, named: str):
    with pytest.raises(UserError) as error:
        parse_index(changed(path, value), "folder/index.json")
    assert str(error.value).startswith("folder/index.json: ")
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\x00"])
def test_refuses_what_is_no_index(text: str):
    with pytest.raises(UserError, match=r"index\.json"):
        parse_index(text)


def test_missing_index_says_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match="data_tools shard"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read"):
        read_index(tmp_path)


def resized(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """(h, w) that MMDetection's Resize gives, from its documentation."""
    scale = min(long / max(width, height), short / min(width, height))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@given(
    low=st.sampled_from([0.0, 0.4, 1 / 1.52, 1 / 1.36, 0.9, 1.0, 1.36, 1.52, 1.7]),
    step=st.sampled_from([0.05, 0.2, 0.5, 2.0, math.inf]),
    short=st.integers(32, 900),
    stretch=st.floats(1, 2.5),
    divisor=st.sampled_from([1, 2, 32]),
    long_side=st.integers(2000, 6000),
)
def test_canvas_holds_every_image_and_no_more(
    low: float, step: float, short: int, stretch: float, divisor: int, long_side: int
):
    high = low + step
    bucket = Bucket("b", low, None if high == math.inf else high, 1, 1, 1, 1, 0)
    long = int(short * stretch)
    height, width = canvas(bucket, short, long, divisor)

    # Images of long side 2000 to 6000 over the whole range, the range's ends among them.
    sizes = []
    for k in range(400):
        top = min(high, 40.0)
        aspect = max(low, 1 / 40) + (top - max(low, 1 / 40)) * k / 399
        for shift in (-1, 0, 1):
            w = long_side if aspect >= 1 else round(long_side * aspect) + shift
            h = round(long_side / aspect) + shift if aspect >= 1 else long_side
            if w > 0 and h > 0 and low < w / h <= high:
                sizes.append(resized(w, h, short, long))
    if not sizes:
        return
    tallest, widest = max(h for h, _ in sizes), max(w for _, w in sizes)
    assert tallest <= height
    assert widest <= width
    # The range's ends are approached to a pixel or so; bounds of `long` are reached.
    assert height < tallest + divisor + 2
    assert width < widest + divisor + 2
    assert height % divisor == width % divisor == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 1.36, (800, 1088)),
        (1.36, 1.52, (800, 1216)),
        (1.52, None, (800, 1344)),
        (1 / 1.36, 1.0, (1088, 800)),
        (0.0, 1 / 1.52, (1344, 800)),
        (0.0, None, (1344, 1344)),
    ],
)
def test_canvas_of_the_reference_sizes(low: float, high: float | None, expected: tuple[int, int]):
    assert canvas(Bucket("b", low, high, 1, 1, 1, 1, 0), 800, 1333) == expected


@pytest.mark.parametrize("bad", [(0, 10, 32), (20, 10, 32), (10, 20, 0)])
def test_canvas_refuses_senseless_sizes(bad: tuple[int, int, int]):
    with pytest.raises(UserError, match="canvas"):
        canvas(Bucket("b", 0.0, None, 1, 1, 1, 1, 0), *bad)
