import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from casc.data.sample import signed_area
from data_tools.rings import fill_rings, mask_iou, measure_outlines, trace_mask

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(bool, shape))


def winding_numbers(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Of every pixel's centre, by the crossings of a ray to the left."""
    number = np.zeros((height, width), int)
    y, x = np.mgrid[:height, :width] + 0.5
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            crosses = (y0 <= y) != (y1 <= y)
            at = x0 + (y - y0) / (y1 - y0) * (x1 - x0) if y0 != y1 else np.inf
            number += (crosses & (at < x)) * (-1 if y1 > y0 else 1)
    return number


@given(masks)
def test_rings_wind_once_round_the_mask_and_nothing_else(mask: np.ndarray):
    rings = trace_mask(mask)
    np.testing.assert_array_equal(winding_numbers(rings, *mask.shape), mask.astype(int))


@given(masks)
def test_cocos_rasteriser_gives_the_mask_back(mask: np.ndarray):
    rings = trace_mask(mask)
    filled = np.zeros(mask.shape, int)
    for ring in rings:
        rle = coco_mask.frPyObjects([ring.reshape(-1).tolist()], *mask.shape)
        filled += np.sign(signed_area(ring)).astype(int) * coco_mask.decode(rle[0])
    np.testing.assert_array_equal(filled, mask)
    np.testing.assert_array_equal(fill_rings(rings, *mask.shape), mask)


@given(masks)
def test_rings_turn_at_every_point_and_measure_the_mask(mask: np.ndarray):
    rings = trace_mask(mask)
    assert sum(signed_area(ring) for ring in rings) == mask.sum()
    for ring in rings:
        horizontal = (np.roll(ring, -1, axis=0) - ring)[:, 1] == 0
        assert (horizontal != np.roll(horizontal, 1)).all()


def test_nested_parts_and_holes():
    mask = np.ones((9, 9), bool)
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    areas = sorted(signed_area(ring) for ring in trace_mask(mask))
    assert areas == [-25, 1, 81]


def test_pixels_that_meet_at_a_point_are_parts_of_their_own():
    assert len(trace_mask(np.eye(3, dtype=bool))) == 3
    assert len(trace_mask(~np.eye(2, dtype=bool))) == 2


def test_an_empty_mask_has_no_rings():
    assert trace_mask(np.zeros((4, 4), bool)) == []
    assert trace_mask(np.zeros((0, 4), bool)) == []
    assert not fill_rings([], 4, 4).any()


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0])
def test_a_tolerance_saves_points_for_little_of_the_mask(tolerance: float):
    y, x = np.mgrid[:200, :240]
    mask = (np.hypot(x - 120, y - 100) < 90) & (np.hypot(x - 100, y - 90) > 30)
    exact, rough = trace_mask(mask), trace_mask(mask, tolerance)
    assert sum(map(len, rough)) < sum(map(len, exact)) / 6
    assert mask_iou(fill_rings(rough, 200, 240), mask) > 1 - 0.02 * tolerance
    assert [np.sign(signed_area(ring)) for ring in rough] == [
        np.sign(signed_area(ring)) for ring in exact
    ]


@given(masks)
def test_no_part_or_hole_is_lost_to_a_tolerance(mask: np.ndarray):
    exact, rough = trace_mask(mask), trace_mask(mask, 3.0)
    assert len(rough) == len(exact)
    for ring in rough:
        assert len(ring) >= 3
        assert signed_area(ring) != 0


def test_iou_of_masks():
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    assert mask_iou(a, b) == 1
    a[:, :3], b[:, 1:] = True, True
    assert mask_iou(a, b) == 0.5


points = st.tuples(*[st.floats(-5, 15, width=32)] * 2)


@given(st.lists(st.lists(points, min_size=3, max_size=9), min_size=1, max_size=5), st.booleans())
def test_outlines_that_overlap_themselves_wind_round_a_pixel_more_than_once(polygons, whole: bool):
    height, width = 11, 10
    rings = [np.round(ring, 0 if whole else 2) for ring in map(np.array, polygons)]
    found = measure_outlines([ring.reshape(-1).tolist() for ring in rings], height, width)
    for i, ring in enumerate(rings):
        assert found.low[i].tolist() == ring.min(axis=0).tolist()
        assert found.high[i].tolist() == ring.max(axis=0).tolist()
        area = signed_area(ring)
        if abs(area) < 1e-6:
            continue  # the sign of nothing is a matter of rounding
        assert found.backward[i] == (area < 0)
        # A hair to both sides: where an edge passes through a centre, rounding decides.
        hair = np.array([1e-7, 0])
        left, right = (winding_numbers([ring + h], height, width) for h in (-hair, hair))
        if (left != right).any():
            continue
        winding = left * np.sign(area)
        assert found.overlapping[i] == bool(((winding < 0) | (winding > 1)).any())
