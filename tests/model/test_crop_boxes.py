"""Bounds of cut polygons against masks that are rasterised and cropped."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from casc.model.crop_boxes import visible_boxes

FINE = 8
"""Pixels of the rasteriser per pixel."""


def edges_of(*rings: np.ndarray, capacity: int = 24) -> torch.Tensor:
    """[1, E, 4], padded by edges of no length."""
    made = np.zeros((1, capacity, 4), np.float32)
    at = 0
    for ring in rings:
        made[0, at : at + len(ring)] = np.concatenate([ring, np.roll(ring, -1, 0)], axis=1)
        at += len(ring)
    return torch.from_numpy(made)


def bounds(rings) -> list[float]:
    points = np.concatenate(rings)
    return [*points.min(0).tolist(), *points.max(0).tolist()]


def visible(rings, size, box=None) -> list[float]:
    boxes = torch.tensor([[box or bounds(rings)]])
    edges = edges_of(*rings)
    owner = torch.zeros(edges.shape[:2], dtype=torch.long)
    return visible_boxes(boxes, edges, owner, torch.tensor([size]))[0, 0].tolist()


def by_drawing(rings, size: tuple[float, float]) -> list[float] | None:
    """Bounds of the union of the rings within the window, from pixels FINE times as small."""
    margin = 40
    height, width = (int(side) for side in size)
    total = np.zeros(((height + 2 * margin) * FINE, (width + 2 * margin) * FINE), bool)
    for ring in rings:
        image = Image.new("1", (total.shape[1], total.shape[0]))
        ImageDraw.Draw(image).polygon([tuple(p) for p in (ring + margin) * FINE], fill=1)
        total |= np.asarray(image)
    ys, xs = np.nonzero(total[margin * FINE : -margin * FINE, margin * FINE : -margin * FINE])
    if not len(ys):
        return None
    return [xs.min() / FINE, ys.min() / FINE, (xs.max() + 1) / FINE, (ys.max() + 1) / FINE]


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_the_bounds_are_those_of_the_cropped_mask(seed):
    rng = np.random.default_rng(seed)
    rings = []
    for _ in range(rng.integers(1, 3)):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 11)))
        radius = rng.uniform(4, 34, len(angle))
        centre = rng.uniform(-15, [47, 39])
        ring = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        rings.append(np.clip(ring, -38, 68).astype(np.float32))
    size = 24.0, 32.0
    expected = by_drawing(rings, size)
    found = visible(rings, size)
    if expected is None:
        assert (found[2] - found[0]) * (found[3] - found[1]) < 0.2
    elif min(expected[2] - expected[0], expected[3] - expected[1]) > 0.5:
        # Pillow also draws every pixel that the outline touches.
        assert found == pytest.approx(expected, abs=2.5 / FINE)


def test_a_ring_shaped_hole_shows_nothing():
    """Only through the other direction of an inner ring: corners are inside neither."""
    outer = np.array([[-20, -20], [60, -20], [60, 60], [-20, 60]], np.float32)
    inner = np.array([[-5, -5], [-5, 45], [45, 45], [45, -5]], np.float32)
    assert visible([outer], (24.0, 32.0)) == [0, 0, 32, 24]
    x0, y0, x1, y1 = visible([outer, inner], (24.0, 32.0))
    assert (x1 - x0) * (y1 - y0) == 0


def test_what_is_not_cut_has_its_polygons_bounds():
    """As Detectron2's recompute_boxes, whatever box was annotated."""
    ring = np.array([[5, 5], [9, 6], [7, 11]], np.float32)
    assert visible([ring], (24.0, 32.0), [4.5, 4.0, 10.0, 12.0]) == [5.0, 5.0, 9.0, 11.0]


def test_an_object_without_an_outline_is_its_box():
    box = torch.tensor([[[-4.0, 3, 10, 60]]])
    owner = torch.zeros(1, 5, dtype=torch.long)
    found = visible_boxes(box, torch.zeros(1, 5, 4), owner, torch.tensor([[24.0, 32.0]]))
    assert found[0, 0].tolist() == [0, 3, 10, 24]


def test_an_object_elsewhere_has_no_area():
    ring = np.array([[-9, -9], [-3, -9], [-3, -2]], np.float32)
    x0, y0, x1, y1 = visible([ring], (24.0, 32.0))
    assert (x1 - x0) * (y1 - y0) == 0
    assert all(np.isfinite([x0, y0, x1, y1]))


def test_objects_of_an_image_do_not_meet(mode):
    """Packed together, padded between, in two images: each object's box is as if it were alone."""
    rng = np.random.default_rng(3)
    size = (24.0, 32.0)
    objects = [[], []]
    for i in range(7):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        ring = rng.uniform(-5, 35, 2) + 12 * np.stack([np.cos(angle), np.sin(angle)], -1)
        objects[i % 2].append(ring.astype(np.float32))
    edges, owner = torch.zeros(2, 60, 4), torch.zeros(2, 60, dtype=torch.long)
    boxes = torch.zeros(2, 4, 4)
    for i, image in enumerate(objects):
        at = 0
        for k, ring in enumerate(image):
            boxes[i, k] = torch.tensor(bounds([ring]))
            edges[i, at : at + len(ring)] = edges_of(ring)[0, : len(ring)]
            owner[i, at : at + len(ring)] = k
            at += len(ring) + i
    found = mode(visible_boxes)(boxes, edges, owner, torch.tensor([size, size]))
    for i, image in enumerate(objects):
        for k, ring in enumerate(image):
            assert found[i, k].tolist() == pytest.approx(visible([ring], size), abs=1e-5)
