import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casc.data.index import Category
from casc.errors import UserError
from data_tools.coco import Annotations, ImageEntry
from data_tools.images import MISSING, Probe
from data_tools.plan import (
    Settings,
    check_categories,
    check_settings,
    find_bucket,
    order_key,
    plan_buckets,
    plan_items,
    plan_shards,
)
from data_tools.store import Store

ENTRY: dict[str, Any] = {
    "id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9],
    "segmentation": [[0, 0, 9, 0, 9, 9]],
}  # fmt: skip
DEFAULT = (1 / 1.52, 1 / 1.36, 1.0, 1.36, 1.52)


def plan(
    probe: Probe,
    annotated: tuple[int, int] = (60, 50),
    max_size: int | None = None,
    objects: tuple[int, ...] = (3,),
):
    """The item and the kinds of findings of a single image with objects of these categories."""
    entries = [{**ENTRY, "id": i, "category_id": category} for i, category in enumerate(objects)]
    annotations = Annotations(
        images=[ImageEntry(1, "a.jpg", *annotated)],
        by_image=Store.of({1: entries}),
        categories=(Category(3, "cat"),),
        listed_images=1,
        listed_annotations=0,
        findings=[],
    )
    items, findings = plan_items(annotations, [probe], max_size)
    return (items[0] if items else None), [finding.kind for finding in findings]


def probe(width: int = 60, height: int = 50, orientation: int = 1, **fields: Any) -> Probe:
    return Probe(width=width, height=height, orientation=orientation, **fields)


def test_a_sound_image_is_trained_on():
    item, kinds = plan(probe())
    assert item is not None
    assert item.train
    assert (item.orientation, item.width, item.height) == (1, 60, 50)
    assert kinds == []


@pytest.mark.parametrize(
    ("stored", "orientation", "annotated", "applied", "size", "kinds"),
    [
        ((50, 60), 6, (60, 50), 6, (60, 50), ["exif_applied"]),
        ((50, 60), 8, (60, 50), 8, (60, 50), ["exif_applied"]),
        ((60, 50), 6, (60, 50), 1, (60, 50), ["exif_ignored"]),
        ((60, 50), 3, (60, 50), 3, (60, 50), ["exif_assumed"]),
        ((50, 50), 6, (50, 50), 6, (50, 50), ["exif_assumed"]),
    ],
)
def test_orientation_follows_the_annotated_size(
    stored: tuple[int, int],
    orientation: int,
    annotated: tuple[int, int],
    applied: int,
    size: tuple[int, int],
    kinds: list[str],
):
    item, found = plan(probe(*stored, orientation), annotated)
    assert item is not None
    assert (item.orientation, (item.width, item.height), item.train) == (applied, size, True)
    assert found == kinds


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_of_another_size_is_not_trained_on(orientation: int):
    item, kinds = plan(probe(70, 50, orientation), objects=(3, 3))
    assert item is None
    assert kinds == ["size_mismatch", "image_left_out", "image_left_out"]


@pytest.mark.parametrize(
    ("stored", "orientation", "annotated"),
    [((48, 40), 1, (60, 50)), ((120, 100), 1, (60, 50)), ((100, 120), 6, (60, 50)),
     ((427, 640), 1, (683, 1024))],
)  # fmt: skip
def test_annotations_follow_a_copy_of_another_size(
    stored: tuple[int, int], orientation: int, annotated: tuple[int, int]
):
    item, kinds = plan(probe(*stored, orientation), annotated)
    assert item is not None
    assert item.train
    upright = stored[::-1] if orientation == 6 else stored
    assert (item.width, item.height) == upright
    assert kinds == ["rescaled"]


def test_a_transposed_size_without_exif_is_a_mismatch():
    item, kinds = plan(probe(50, 60))
    assert item is None
    assert kinds == ["size_mismatch", "image_left_out"]


def test_what_the_reference_does_not_train_on():
    item, kinds = plan(probe(), objects=())
    assert item is not None
    assert (item.train, kinds) == (False, ["no_annotations"])
    item, kinds = plan(probe(), objects=(99,))
    assert item is not None
    assert (item.train, kinds) == (False, ["no_annotations"])
    item, kinds = plan(probe(100, 31), (100, 31))
    assert item is not None
    assert (item.train, kinds) == (False, ["too_small"])
    item, kinds = plan(probe(100, 32), (100, 32))
    assert item is not None
    assert (item.train, kinds) == (True, [])


def test_what_can_not_be_read_is_left_out_with_its_annotations():
    item, kinds = plan(Probe(fault="no such file", sha256=MISSING), objects=(3, 3))
    assert item is None
    assert kinds == ["missing_file", "image_left_out", "image_left_out"]
    item, kinds = plan(Probe(fault="truncated", sha256="ab"))
    assert item is None
    assert kinds == ["unreadable", "image_left_out"]


def test_large_images_are_reduced_on_demand():
    item, kinds = plan(probe(600, 400), (600, 400), max_size=300)
    assert item is not None
    assert (item.width, item.height) == (300, 200)
    assert kinds == ["reduced"]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_an_image_is_in_the_bucket_whose_range_has_its_aspect(width: int, height: int):
    buckets = plan_buckets(DEFAULT)
    bucket = buckets[find_bucket(buckets, width, height)]
    assert bucket.min_aspect < width / height
    assert bucket.max_aspect is None or width / height <= bucket.max_aspect


def test_buckets_are_named_by_their_limits():
    names = [bucket.name for bucket in plan_buckets(DEFAULT)]
    assert names == ["tall", "h1.52", "h1.36", "w1.36", "w1.52", "wide"]
    assert [bucket.name for bucket in plan_buckets(())] == ["all"]
    assert [bucket.name for bucket in plan_buckets((0.8, 1.25))] == ["tall", "h1.25-w1.25", "wide"]
    crowded = [bucket.name for bucket in plan_buckets((1.001, 1.002, 1.003))]
    assert len(set(crowded)) == 4


@given(
    sizes=st.lists(
        st.tuples(st.integers(20, 90), st.integers(20, 90), st.booleans()), min_size=1, max_size=60
    ),
    most=st.integers(1, 9),
)
def test_shards_hold_every_image_once(sizes: list[tuple[int, int, bool]], most: int):
    images = [ImageEntry(5 * i, f"{i}.jpg", w, h) for i, (w, h, _) in enumerate(sizes)]
    annotations = Annotations(
        images,
        Store.of({image.id: [ENTRY] * sizes[image.id // 5][2] for image in images}),
        (Category(3, "cat"),),
        len(images),
        0,
        [],
    )
    probes = [Probe(width=w, height=h, size=1000) for w, h, _ in sizes]
    items, _ = plan_items(annotations, probes, None)
    settings = Settings(DEFAULT, None, most, 256.0, 0.0)
    buckets, shards = plan_shards("train", items, settings)

    stored = [item.image.id for shard in shards for item in shard.items]
    assert sorted(stored) == [image.id for image in images]
    assert len({shard.name for shard in shards}) == len(shards)
    assert {shard.bucket for shard in shards} == set(range(len(buckets)))
    for shard in shards:
        assert 1 <= len(shard.items) <= most
        bucket = buckets[shard.bucket]
        assert shard.name.startswith(f"train/{bucket.name}-")
        assert shard.items == sorted(shard.items, key=lambda item: order_key(item.image.id))
        for item in shard.items:
            assert item.train == shard.train
            assert bucket.min_aspect < item.width / item.height <= (bucket.max_aspect or math.inf)
    sizes_by_group: dict[tuple[int, bool], list[int]] = {}
    for shard in shards:
        sizes_by_group.setdefault((shard.bucket, shard.train), []).append(len(shard.items))
    assert all(max(group) - min(group) <= 1 for group in sizes_by_group.values())


def test_heavy_images_make_more_shards():
    images = [ImageEntry(i, f"{i}.jpg", 60, 50) for i in range(10)]
    annotations = Annotations(
        images, Store.of({i: [] for i in range(10)}), (Category(3, "cat"),), 10, 0, []
    )
    probes = [probe(size=2**20)] * 10
    items, _ = plan_items(annotations, probes, None)
    _, shards = plan_shards("val", items, Settings((), None, 64, 3.0, 0.0))
    assert [len(shard.items) for shard in shards] == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"aspects": (1.0, 0.5)}, "--aspects"),
        ({"aspects": (0.0, 0.5)}, "--aspects"),
        ({"aspects": (1.0, 1.0)}, "--aspects"),
        ({"aspects": (math.nan,)}, "--aspects"),
        ({"aspects": (math.inf,)}, "--aspects"),
        ({"max_size": 31}, "--max-size"),
        ({"samples_per_shard": 0}, "--samples-per-shard"),
        ({"shard_mib": 0.0}, "--shard-mib"),
        ({"shard_mib": math.nan}, "--shard-mib"),
        ({"trace_tolerance": -0.1}, "--trace-tolerance"),
    ],
)
def test_senseless_settings_are_refused(settings: Settings, change: dict[str, Any], flag: str):
    check_settings(settings)
    with pytest.raises(UserError, match=flag):
        check_settings(settings._replace(**change))


def test_splits_must_share_their_categories():
    cats, dogs = (Category(1, "cat"), Category(2, "dog")), (Category(1, "cat"), Category(2, "dgo"))
    check_categories({"a": cats, "b": cats})
    with pytest.raises(UserError, match="b: categories: id 2 is 'dgo', in a it is 'dog'"):
        check_categories({"a": cats, "b": dogs})
    with pytest.raises(UserError, match=r"b: categories: id 2 is missing.*write the same one into"):
        check_categories({"a": cats, "b": cats[:1]})
