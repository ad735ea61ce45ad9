from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor

from casc.data.sample import edge_room
from casc.model.mask_targets import (
    SUPERSAMPLES,
    bitmap_targets,
    crossings_all,
    crossings_present,
    polygon_targets,
)

CELLS = 28
Points = np.ndarray  # [n, 2] x, y


def edges_of(parts: Sequence[Points], capacity: int | None = None) -> Tensor:
    """[1, E, 4] edges of closed polygons, padded."""
    rows = [np.concatenate([p, np.roll(p, -1, axis=0)], axis=1) for p in parts]
    edges = np.concatenate(rows)
    if capacity is not None:
        edges = np.concatenate([edges, np.zeros((capacity - len(edges), 4))])
    return torch.from_numpy(edges.astype(np.float32))[None]


def alone(edges: Tensor, boxes: Tensor, cells: int = CELLS) -> Tensor:
    """Targets where each RoI has an image of its own, with one object: edges [R, E, 4]."""
    room = max(edge_room([each.numpy()]) for each in edges)
    edges = torch.cat([edges, torch.zeros(len(edges), max(0, room - edges.shape[1]), 4)], dim=1)
    image = torch.arange(len(edges))
    owner = torch.zeros(edges.shape[:2], dtype=torch.long)
    inputs = edges, owner, boxes, image, torch.zeros_like(image)
    lines = cells * SUPERSAMPLES
    assert torch.equal(crossings_present(*inputs, lines), crossings_all(*inputs, lines))
    return polygon_targets(*inputs, cells)


def ellipse(cx, cy, a, b, turn=0.0, points=60) -> Points:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = a * np.cos(angle), b * np.sin(angle)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1)


def rectangle(x0, y0, x1, y1) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def bounds(parts: Sequence[Points]) -> list[float]:
    points = np.concatenate(parts)
    return [*points.min(0), *points.max(0)]


def rasterise(parts: Sequence[Points], box: Sequence[float], capacity: int | None = None) -> Tensor:
    boxes = torch.tensor([box], dtype=torch.float32)
    return alone(edges_of(parts, capacity), boxes)[0]


def coverage(parts: Sequence[Points], box: Sequence[float], zoom: int = 20) -> Tensor:
    """Share of each cell that lies on the union, by pycocotools at `zoom` times the grid."""
    x0, y0, x1, y1 = box
    side = CELLS * zoom
    scale = np.array([side / (x1 - x0), side / (y1 - y0)])
    # pycocotools cuts what leaves the image to its border: shift the shape well inside.
    polygons: Any = [((p - [x0, y0]) * scale + side).ravel().tolist() for p in parts]
    rles = coco_mask.frPyObjects(polygons, 3 * side, 3 * side)
    bitmap = coco_mask.decode(coco_mask.merge(rles))[side : 2 * side, side : 2 * side]
    shares = bitmap.reshape(CELLS, zoom, CELLS, zoom).mean(axis=(1, 3))
    return torch.from_numpy(shares)


def iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


SMOOTH = {
    "disc": [ellipse(50, 60, 30, 30)],
    "ellipse": [ellipse(50, 60, 40, 15, 0.6)],
    "far from the origin": [ellipse(1200, 700, 90, 60, 2.0)],
    "small": [ellipse(10.3, 12.7, 4, 3)],
    "two parts": [ellipse(30, 40, 20, 25), ellipse(90, 50, 15, 30, 0.3)],
    "overlapping parts": [ellipse(40, 40, 30, 20), ellipse(60, 50, 30, 20, 1.0)],
    "touching corners": [rectangle(0, 0, 20, 30), rectangle(20, 30, 50, 50)],
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "grow", [(0, 0, 0, 0), (-9, -5, 8, 3), (7, 4, -2, -6)], ids=["tight", "larger", "smaller"]
)
def test_smooth_shapes_agree_with_area_coverage(name, grow):
    parts = SMOOTH[name]
    scale = 0.2 if name == "small" else 1.0
    box = [b + scale * g for b, g in zip(bounds(parts), grow, strict=True)]
    exact = coverage(parts, box) > 0.5
    made = rasterise(parts, box)
    assert exact.any()
    assert iou(made, exact) >= 0.99


def test_mean_agreement_with_area_coverage():
    rng = np.random.default_rng(0)
    ours, bitmaps = [], []
    for _ in range(60):
        a, b = rng.uniform(8, 60, 2)
        cx, cy = rng.uniform(70, 130, 2)
        parts = [ellipse(cx, cy, a, b, rng.uniform(0, 3))]
        box = [v + g for v, g in zip(bounds(parts), rng.normal(0, 3, 4), strict=True)]
        exact = coverage(parts, box) > 0.5
        ours.append(iou(rasterise(parts, box), exact))
        polygons: Any = [parts[0].ravel().tolist()]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, 200, 200))
        bitmap = torch.from_numpy(coco_mask.decode(rle))[None, None]
        zero = torch.zeros(1, dtype=torch.long)
        reference = bitmap_targets(bitmap, torch.tensor([box], dtype=torch.float), zero, zero, 28)
        bitmaps.append(iou(reference[0], exact))
    assert np.mean(ours) >= 0.998
    assert np.min(ours) >= 0.99
    # The reference's route through a bitmap at image size is the coarser one.
    assert np.mean(bitmaps) >= 0.99
    assert np.mean(ours) > np.mean(bitmaps)


def test_a_hole_is_a_part_of_the_other_orientation():
    outer, inner = ellipse(50, 50, 40, 40), ellipse(50, 50, 20, 20)
    box = bounds([outer])
    ring = (coverage([outer], box) - coverage([inner], box)) > 0.5
    assert iou(rasterise([outer, inner[::-1]], box), ring) >= 0.99
    assert torch.equal(rasterise([outer, inner], box), rasterise([outer], box))


def test_orientation_of_a_lone_part_does_not_matter():
    shape = ellipse(40, 30, 25, 12, 0.4)
    box = bounds([shape])
    # The two senses differ by the sign of the winding only.
    assert torch.equal(rasterise([shape], box), rasterise([shape[::-1]], box))


def test_starting_point_and_order_of_parts_do_not_matter():
    a, b = ellipse(40, 30, 25, 12, 0.4), ellipse(60, 40, 10, 30)
    box = bounds([a, b])
    made = rasterise([a, b], box)
    assert torch.equal(made, rasterise([np.roll(b, 7, axis=0), np.roll(a, 3, axis=0)], box))


def test_padding_edges_cross_nothing():
    shape = [ellipse(40, 30, 25, 12, 0.4)]
    for box in (bounds(shape), [-20.0, -10, 30, 40], [0.0, 0, 1, 1]):
        assert torch.equal(rasterise(shape, box), rasterise(shape, box, capacity=100))
    only_padding = torch.zeros(1, 8, 4)
    assert not alone(only_padding, torch.tensor([[-5.0, -5, 5, 5]])).any()


def test_box_outside_within_and_around():
    shape = [rectangle(20, 20, 60, 80)]
    assert not rasterise(shape, [100, 0, 140, 40]).any()
    assert not rasterise(shape, [0, 100, 140, 140]).any()
    # To the left of the shape: every scan line meets it, every sample lies before it.
    assert not rasterise(shape, [0, 20, 19, 80]).any()
    assert not rasterise(shape, [61, 20, 90, 80]).any()
    assert rasterise(shape, [25, 25, 50, 70]).all()
    assert rasterise(shape, [20, 20, 60, 80]).all()
    half = rasterise(shape, [20, 20, 100, 80])
    assert half[:, :14].all()
    assert not half[:, 14:].any()


def test_degenerate_boxes_and_polygons_are_finite_work():
    shape = edges_of([rectangle(0, 0, 10, 10)])
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 0], [12, 12, 12, 12]])
    inside, _, outside = alone(shape.expand(3, -1, -1), boxes)
    assert inside.all()
    assert not outside.any()
    flat = [np.array([[0, 0], [10, 10], [5, 5]], float)]
    assert not rasterise(flat, [0, 0, 10, 10]).any()


def test_corners_and_edges_on_a_scan_line_count_once():
    # 84 samples on 84 pixels: the scan lines lie at k + 0.5, and so do these corners.
    box = [0.0, 0, 84, 84]
    # A corner on every line along one side: a line that counts them twice stays on.
    steps = np.arange(10.5, 61)
    comb = np.stack([np.full_like(steps, 60), steps], axis=1)
    shapes = [
        [np.concatenate([[[20, 10.5]], comb, [[20, 60.5]]])],
        [np.concatenate([[[70, 10.5]], comb, [[70, 60.5]]])],
        [rectangle(20.5, 10.5, 60.5, 50.5)],
        [np.array([[40.0, 10.5], [70, 40.5], [40, 70.5], [10, 40.5]])],
        [np.array([[20, 10.5], [40, 30.5], [60, 10.5], [60, 60.5], [20, 60.5]], float)],
    ]
    for parts in shapes:
        share = coverage(parts, box)
        sure = (share - 0.5).abs() > 0.2
        assert torch.equal(rasterise(parts, box)[sure], (share > 0.5)[sure])


def winding(parts: Sequence[Points], points: np.ndarray) -> np.ndarray:
    """Turns of each part around each point, by summing angles: no scan line involved."""
    total = np.zeros(len(points))
    for part in parts:
        a = part[:, None] - points
        b = np.roll(part, -1, axis=0)[:, None] - points
        cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
        total += np.arctan2(cross, (a * b).sum(-1)).sum(0)
    return np.rint(total / (2 * np.pi))


def near_an_edge(parts: Sequence[Points], points: np.ndarray, margin: float) -> np.ndarray:
    result = np.zeros(len(points), bool)
    for part in parts:
        for a, b in zip(part, np.roll(part, -1, axis=0), strict=True):
            along = b - a
            t = ((points - a) @ along / max(along @ along, 1e-9)).clip(0, 1)
            result |= np.linalg.norm(points - a - t[:, None] * along, axis=1) < margin
    return result


point = st.tuples(st.floats(-10, 40, width=32), st.floats(-10, 40, width=32))
part = st.lists(point, min_size=3, max_size=7).map(np.array)


@settings(max_examples=40)
@given(
    st.lists(part, min_size=1, max_size=3),
    st.tuples(st.floats(-12, 30), st.floats(-12, 30), st.floats(2, 40), st.floats(2, 40)),
)
def test_any_polygon_follows_the_winding_rule(parts, corner_and_side):
    """Self-crossing, spiky, multi-part: each sample is on where something winds around it."""
    x, y, w, h = (float(np.float32(v)) for v in corner_and_side)
    made = rasterise(parts, [x, y, x + w, y + h])
    count = CELLS * SUPERSAMPLES
    steps = (np.arange(count) + 0.5) / count
    grid = np.stack(np.meshgrid(x + steps * w, y + steps * h), axis=-1).reshape(-1, 2)
    shape = (CELLS, SUPERSAMPLES, CELLS, SUPERSAMPLES)
    on = (winding(parts, grid) != 0).reshape(shape).sum(axis=(1, 3)) * 2 > SUPERSAMPLES**2
    unsure = near_an_edge(parts, grid, 1e-3).reshape(shape).any(axis=(1, 3))
    differ = (made.numpy() != on) & ~unsure
    assert not differ.any()


def test_compiled_equals_eager(compiled):
    rng = np.random.default_rng(1)
    edges, boxes = [], []
    for _ in range(16):
        parts = [ellipse(*rng.uniform(20, 80, 2), *rng.uniform(3, 50, 2)) for _ in range(2)]
        edges.append(edges_of(parts, capacity=130))
        x, y, w, h = rng.uniform([-20, -20, 2, 2], [80, 80, 120, 120])
        boxes.append([x, y, x + w, y + h])
    # Four images of four objects, whose edges lie one after another.
    image, gt = torch.arange(16) // 4, torch.arange(16) % 4
    owner = torch.arange(4).repeat_interleave(130).repeat(4, 1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    inputs = torch.cat(edges).reshape(4, -1, 4), owner, boxes, image, gt, CELLS
    assert torch.equal(compiled(polygon_targets)(*inputs), polygon_targets(*inputs))
    assert torch.equal(polygon_targets(*inputs), alone(torch.cat(edges), boxes))
    lines = *inputs[:5], CELLS * SUPERSAMPLES
    assert torch.equal(compiled(crossings_all)(*lines), crossings_present(*lines))
    order = torch.randperm(520, generator=torch.Generator().manual_seed(0))
    mixed = inputs[0][:, order], owner[:, order], *inputs[2:]
    assert torch.equal(polygon_targets(*mixed), polygon_targets(*inputs))


def test_a_ragged_outline_crosses_a_line_more_often_than_it_has_free_room(mode):
    """A comb: 240 edges of which a line crosses 120; nothing else of its image is lost."""
    x = np.linspace(0, 60, 121)
    teeth = np.stack([x, np.where(np.arange(121) % 2, 2.0, 80.0)], axis=1)
    comb = np.concatenate([teeth, [[60, 90], [0, 90]]])
    other = ellipse(40, 30, 25, 12, 0.4)
    outlines = [edges_of([comb])[0], edges_of([other])[0]]
    room = edge_room([each.numpy() for each in outlines])
    assert room == 84 * 120  # each tooth is an edge; the comb's sides are among them
    edges = torch.zeros(1, room, 4)
    edges[0, : len(outlines[0]) + len(outlines[1])] = torch.cat(outlines)
    owner = torch.zeros(1, room, dtype=torch.long)
    owner[0, len(outlines[0]) :] = 1
    boxes = torch.tensor([bounds([comb]), bounds([other])], dtype=torch.float32)
    both = torch.arange(2)
    made = mode(polygon_targets)(edges, owner, boxes, both * 0, both, CELLS)
    lines = edges, owner, boxes, both * 0, both, CELLS * SUPERSAMPLES
    assert torch.equal(crossings_all(*lines), crossings_present(*lines))
    for k, shape in enumerate((comb, other)):
        share = coverage([shape], boxes[k].tolist())
        sure = (share - 0.5).abs() > 0.35
        assert torch.equal(made[k][sure], (share > 0.5)[sure])


@settings(max_examples=100)
@given(st.lists(part, max_size=3), st.integers(0, 2**32 - 1))
def test_the_room_for_edges_is_what_brute_force_counts(parts, seed):
    rng = np.random.default_rng(seed)
    outlines = [edges_of([each])[0].numpy() for each in parts]
    outlines += [edges_of([rng.integers(0, 6, (40, 2)).astype(float)])[0].numpy()]
    heights = np.unique(np.concatenate([each[:, [1, 3]].reshape(-1) for each in outlines]))
    lines = np.concatenate([heights, (heights[1:] + heights[:-1]) / 2])

    def crossings(edges: np.ndarray) -> int:
        top, bottom = edges[:, [1, 3]].min(1), edges[:, [1, 3]].max(1)
        return max(int(((top <= y) & (y < bottom)).sum()) for y in lines)

    most = max(crossings(each) for each in outlines)
    room = max(sum(map(len, outlines)), 84 * most if most > 16 else 0)
    assert edge_room(outlines) == room


# ---- the reference's route ----


def test_bitmap_targets_reproduce_the_reference(unit_goldens, mode):
    boxes, inds = unit_goldens["mt.boxes"], unit_goldens["mt.inds"]
    # One image of four objects, then two images of two: the same bitmaps.
    masks = unit_goldens["mt.masks"]
    run = mode(lambda bitmaps, b, image, gt: bitmap_targets(bitmaps, b, image, gt, CELLS))
    made = run(masks[None], boxes, torch.zeros_like(inds), inds)
    assert torch.equal(made, unit_goldens["mt.targets"].bool())
    made = run(masks.reshape(2, 2, *masks.shape[1:]), boxes, inds // 2, inds % 2)
    assert torch.equal(made, unit_goldens["mt.targets"].bool())
