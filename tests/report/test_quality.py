from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from casc.data.index import Shard, Split
from casc.report.error_analysis import extremes, part_of
from casc.report.quality import Quality, image_quality

SIZE = (40, 60)


def rle(box: tuple[int, int, int, int]) -> Any:
    mask = np.zeros(SIZE, np.uint8, order="F")
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = 1
    return coco_mask.encode(mask)


def thing(box: tuple[int, int, int, int], category: int = 1, *, crowd: int = 0) -> dict[str, Any]:
    return {"category_id": category, "iscrowd": crowd, "segmentation": rle(box)}


def found(box: tuple[int, int, int, int], score: float = 0.9, category: int = 1) -> dict[str, Any]:
    return {"category_id": category, "score": score, "segmentation": rle(box)}


BOX = (0, 0, 20, 10)
NEAR = (0, 0, 15, 10)  # IoU .75 with BOX
FAR = (30, 20, 50, 30)


@pytest.mark.parametrize(
    ("objects", "results", "expected"),
    [
        ([], [], Quality(None, 0, 0, 0)),
        ([thing(BOX)], [found(BOX)], Quality(1, 1, 0, 0)),
        ([thing(BOX)], [found(NEAR)], Quality(0.75, 1, 0, 0)),
        ([thing(BOX)], [], Quality(0, 0, 1, 0)),
        ([], [found(BOX)], Quality(0, 0, 0, 1)),
        ([thing(BOX)], [found(BOX, category=2)], Quality(0, 0, 1, 1)),
        ([thing(BOX), thing(FAR)], [found(BOX)], Quality(1 / 1.5, 1, 1, 0)),
        # The surer one takes the object, the better one comes too late.
        ([thing(BOX)], [found(BOX, 0.6), found(NEAR, 0.9)], Quality(0.75 / 1.5, 1, 0, 1)),
        # What is in a crowd of its class isn't wrong; in one of another class it is.
        ([thing(BOX, crowd=1)], [found(NEAR)], Quality(None, 0, 0, 0)),
        ([thing(BOX, 2, crowd=1)], [found(NEAR)], Quality(0, 0, 0, 1)),
    ],
)
def test_by_hand(objects: list, results: list, expected: Quality):
    assert image_quality(objects, results, SIZE)[1:] == expected[1:]
    assert image_quality(objects, results, SIZE).value == pytest.approx(expected.value)


def test_polygons_and_run_lengths_are_masks_too():
    polygon = {**thing(BOX), "segmentation": [[0, 0, 20, 0, 20, 10, 0, 10]]}
    counts = np.zeros(SIZE, int)
    counts[:10, :20] = 1
    flat = counts.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    listed = {**thing(BOX), "segmentation": {"size": list(SIZE), "counts": [0, *runs]}}
    for entry in (polygon, listed):
        assert image_quality([entry], [found(BOX)], SIZE).value == pytest.approx(1)


@given(
    st.dictionaries(st.integers(1, 99), st.one_of(st.none(), st.floats(0, 1)), max_size=12),
    st.integers(1, 6),
)
def test_extremes_are_the_ends_and_never_the_same(values: dict, count: int):
    qualities = {key: Quality(value, 1, 1, 1) for key, value in values.items()}
    worst, best = extremes(qualities, count)
    known = sorted(value for value in values.values() if value is not None)
    assert [values[key] for key in worst] == known[: len(worst)]
    assert [values[key] for key in best] == known[::-1][: len(best)]
    assert not set(worst) & set(best)
    assert len(worst) == len(best) == min(count, len(known) // 2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 120))
def test_a_part_is_whole_shards_from_all_over(sizes: list[int], limit: int):
    shards = tuple(Shard(str(i), 0, True, n, 1, "") for i, n in enumerate(sizes))
    whole = Split(sum(sizes), sum(sizes), (), shards)
    part = part_of(whole, limit)
    assert part.samples == sum(shard.samples for shard in part.shards)
    assert part.samples >= min(limit, whole.samples)
    places = [int(shard.name) for shard in part.shards]
    assert places == sorted(set(places))
    gaps = np.diff([-1, *places, len(sizes)])
    assert gaps.max() <= 2 * len(sizes) / len(places) + 1
    # No more than is needed: without the last shard of each size it wouldn't do.
    if len(places) > 1:
        fewest = sum(sorted(sizes)[: len(places) - 1])
        assert fewest < limit
    assert part_of(whole, None) == whole
