"""Masks to polygons and back, exactly: boundaries are followed along the edges of pixels.

A ring is a closed polygon `[n, 2]` of (x, y) corners; pixel (row, column) covers the square
from (column, row) to (column + 1, row + 1), COCO's convention. Rings that bound the mask
have positive area (clockwise on the screen), holes have negative area. The winding number is
then 1 on the mask and 0 off it, whatever the nesting.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from casc.data.sample import signed_area

_TOLERANCES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Pixels by which a ragged outline may be simplified."""


def trace_mask(mask: np.ndarray, tolerance: float = 0.0) -> list[np.ndarray]:
    """Trace a mask's boundary.

    Args:
        mask: `[h, w]`, bool or 0 and 1.
        tolerance: 0 gives the exact outline of the pixels. More gives fewer points: the
            outline through the middle of the pixels' edges, smoothed a little, and
            simplified to stay within this many pixels of that (Douglas and Peucker, 1973).

    Returns:
        Rings `[n, 2]` float64, the mask's parts and its holes; none for an empty mask.
    """
    rings = _exact_rings(np.asarray(mask).astype(bool))
    if tolerance <= 0:
        return rings
    smooth = [_simplify(_smooth(_edge_middles(ring)), tolerance) for ring in rings]
    # What is too small to survive is kept exactly: losing a part is worse than a few points.
    return [
        ring if len(ring) >= 3 and signed_area(ring) * signed_area(exact) > 0 else exact
        for ring, exact in zip(smooth, rings, strict=True)
    ]


def trace_within(mask: np.ndarray, least_iou: float) -> tuple[list[np.ndarray], float]:
    """Trace a ragged mask with few points.

    Args:
        mask: `[h, w]`, bool or 0 and 1.
        least_iou: how well the rings have to agree with the mask, as pycocotools fills them.

    Returns:
        The rings of the largest tolerance that keeps to that, without the smallest specks and
        holes, and their IoU with the mask.
    """
    mask = np.asarray(mask).astype(bool)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [], 1.0
    corner = np.array([columns[0], rows[0]], np.float64)
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    exact = sorted(_exact_rings(mask), key=lambda ring: abs(signed_area(ring)))
    areas = [signed_area(ring) for ring in exact]
    # Specks may cost a quarter of what the outline may.
    lost = np.cumsum(np.abs(areas))
    kept = int((lost <= (1 - least_iou) / 4 * mask.sum()).sum())
    exact, areas = exact[kept:], areas[kept:]
    smooth = [_smooth(_edge_middles(ring)) for ring in exact]
    weights = [_weights(ring, _TOLERANCES[0]) for ring in smooth]
    best, iou = exact, mask_iou(mask, fill_rings(exact, *mask.shape))
    for tolerance in _TOLERANCES:
        fewer = (ring[weight > tolerance] for ring, weight in zip(smooth, weights, strict=True))
        rings = [
            ring if len(ring) >= 3 and signed_area(ring) * area > 0 else old
            for ring, old, area in zip(fewer, exact, areas, strict=True)
        ]
        agreement = mask_iou(mask, fill_rings(rings, *mask.shape))
        if agreement < least_iou:
            break
        best, iou = rings, agreement
    return [ring + corner for ring in best], iou


def fill_rings(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterise rings by the non-zero winding rule, with COCO's own rasteriser.

    Returns:
        `[height, width]` bool.
    """
    winding = np.zeros((height, width), np.int32)
    for ring in rings:
        rle = coco_mask.frPyObjects([ring.reshape(-1).tolist()], height, width)
        winding += coco_mask.decode(rle[0]).astype(np.int32) * (1 if signed_area(ring) > 0 else -1)
    return winding != 0


class Outlines(NamedTuple):
    """What is to be known of closed polygons."""

    backward: np.ndarray
    """`[r]` bool: of negative area."""
    overlapping: np.ndarray
    """`[r]` bool: winds round a pixel's centre other than once, turned to positive area."""
    low: np.ndarray
    """`[r, 2]` float64: the smallest x and y."""
    high: np.ndarray
    """Likewise the largest."""


def measure_outlines(
    parts: Sequence[Sequence[float]], height: int | Sequence[int], width: int | Sequence[int]
) -> Outlines:
    """Look at polygons, those of many images at once: most have few points.

    Args:
        parts: flat lists [x0, y0, x1, y1, ...] of three points or more, in pixels.
        height: of the image, or of the one of each part.
        width: likewise.
    """
    flat: list[float] = []
    for part in parts:
        flat += part
    points = np.array(flat, np.float64).reshape(-1, 2)
    length = np.array([len(part) // 2 for part in parts], np.int64)
    start = np.cumsum(length) - length
    owner = np.repeat(np.arange(len(parts)), length)
    after = np.arange(1, len(points) + 1)
    after[start + length - 1] = start
    # From the first point of each: far from the origin products would lose their digits.
    near = points - points[start[owner]]
    following = near[after]
    twice = near[:, 0] * following[:, 1] - following[:, 0] * near[:, 1]
    backward = np.add.reduceat(twice, start) < 0
    return Outlines(
        backward=backward,
        overlapping=_overlapping(
            points,
            points[after],
            owner,
            backward,
            np.broadcast_to(np.asarray(height, np.int64), len(parts)),
            np.broadcast_to(np.asarray(width, np.int64), len(parts)),
        ),
        low=np.minimum.reduceat(points, start),
        high=np.maximum.reduceat(points, start),
    )


def _overlapping(
    points: np.ndarray,
    following: np.ndarray,
    owner: np.ndarray,
    backward: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
) -> np.ndarray:
    """From where the edges of each polygon cross the middle of each row of pixels."""
    down = following[:, 1] > points[:, 1]
    # Both directions of an edge are computed from its upper end, so that they cancel exactly.
    upper = np.where(down[:, None], points, following)
    lower = np.where(down[:, None], following, points)
    rows = height[owner]
    first = np.clip(np.ceil(upper[:, 1] - 0.5), 0, rows).astype(np.int64)
    count = np.clip(np.ceil(lower[:, 1] - 0.5), 0, rows).astype(np.int64) - first
    edge = np.repeat(np.arange(len(points)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
    span = (lower - upper)[edge]
    x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * span[:, 0] / span[:, 1]
    of = owner[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width[of]).astype(np.int64)
    key = (of * height.max() + row) * (width.max() + 1) + column
    order = np.argsort(key, kind="stable")
    # Each row of each polygon adds up to nothing, so the sum begins anew with the next.
    steps = np.where(down[edge] ^ backward[of], -1, 1)[order]
    winding, key = np.cumsum(steps), key[order]
    wrong = np.flatnonzero(((winding[:-1] < 0) | (winding[:-1] > 1)) & (key[1:] > key[:-1]))
    found = np.zeros(len(backward), bool)
    found[of[order[wrong]]] = True
    return found


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Give the IoU of two bool masks; 1 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def _exact_rings(mask: np.ndarray) -> list[np.ndarray]:
    # A ring turns at corners only. Along each grid row, corners pair up as the ends of the
    # horizontal stretches of boundary; along each grid column as those of the vertical ones.
    # So sorting gives both partners of every corner, and walking from partner to partner,
    # horizontal and vertical by turns, gives the rings.
    padded = np.pad(mask, 1)
    a, b = padded[:-1, :-1], padded[:-1, 1:]  # above the grid point: left, right
    c, d = padded[1:, :-1], padded[1:, 1:]  # below it
    odd = a ^ b ^ c ^ d
    saddle = (a == d) & (b == c) & (a != b)
    ys, xs = np.nonzero(odd | saddle)
    if not len(ys):
        return []
    # At a saddle, where two pixels meet at a point, two rings pass (or one twice): two
    # corners. Here the mask's pixels count as connected through their sides only.
    twice = saddle[ys, xs]
    repeat = 1 + twice.astype(int)
    y, x = np.repeat(ys, repeat), np.repeat(xs, repeat)
    second = np.zeros(len(y), bool)
    second[1:] = (y[1:] == y[:-1]) & (x[1:] == x[:-1])
    falling = np.repeat(a[ys, xs] & twice, repeat)  # mask at top left and bottom right

    # The first corner of a saddle takes the stretch to the left, the second the one to the
    # right. With the mask at top left the left stretch belongs to the upper one, else to the
    # lower one.
    doubled = np.repeat(twice, repeat)
    along_rows = np.lexsort((second, x, y))
    along_columns = np.lexsort((second ^ (doubled & ~falling), y, x))

    # The mask lies to the right of the direction of travel: a stretch runs rightwards where
    # the mask is below it.
    left_end = np.zeros(len(y), bool)
    left_end[along_rows[::2]] = True
    below = padded[y + 1, np.where(left_end, x + 1, x)]
    departs = np.flatnonzero(left_end == below)

    rings: list[np.ndarray] = []
    h, v = _partners(along_rows).tolist(), _partners(along_columns).tolist()
    done = [False] * len(y)
    for start in departs.tolist():
        if done[start]:
            continue
        path, here = [], start
        while not done[here]:
            there = h[here]
            done[here] = done[there] = True
            path += [here, there]
            here = v[there]
        rings.append(np.stack([x[path], y[path]], axis=1).astype(np.float64))
    return rings


def _partners(order: np.ndarray) -> np.ndarray:
    """Each corner's neighbour where corners pair up in the given order."""
    partners = np.empty_like(order)
    partners[order[::2]], partners[order[1::2]] = order[1::2], order[::2]
    return partners


def _edge_middles(ring: np.ndarray) -> np.ndarray:
    """The middle of every unit step of an exact ring: a smoother outline of like area."""
    step = np.roll(ring, -1, axis=0) - ring
    count = np.abs(step).sum(axis=1).astype(int)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    unit = step / count[:, None]
    return np.repeat(ring, count, axis=0) + np.repeat(unit, count, axis=0) * (number + 0.5)[:, None]


def _smooth(points: np.ndarray) -> np.ndarray:
    """Even out the steps of a slanted line's pixels, which would cost a point each."""
    return (np.roll(points, 1, axis=0) + 2 * points + np.roll(points, -1, axis=0)) / 4


def _simplify(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas and Peucker on a closed curve, cut at its first point and the farthest from it."""
    return points[_weights(points, tolerance) > tolerance]


def _weights(points: np.ndarray, least: float) -> np.ndarray:
    """Up to which tolerance `_simplify` keeps each point `[n]`; 0 for those of `least` or less.

    Where it cuts a stretch doesn't depend on the tolerance, only whether it does.
    """
    far = int(np.argmax(((points - points[0]) ** 2).sum(axis=1)))
    closed = np.concatenate([points, points[:1]])
    weights = np.zeros(len(closed))
    weights[[0, far]] = np.inf
    stack = [(0, far, math.inf), (far, len(closed) - 1, math.inf)]
    while stack:
        first, last, most = stack.pop()
        if last - first < 2:
            continue
        base = closed[last] - closed[first]
        between = closed[first + 1 : last] - closed[first]
        length = float(np.hypot(*base))
        if length:
            distance = np.abs(between[:, 0] * base[1] - between[:, 1] * base[0]) / length
        else:
            distance = np.hypot(between[:, 0], between[:, 1])
        worst = int(np.argmax(distance))
        most = min(most, float(distance[worst]))
        if most > least:
            middle = first + 1 + worst
            weights[middle] = most
            stack += [(first, middle, most), (middle, last, most)]
    return weights[:-1]
