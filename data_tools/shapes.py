"""Drawing textured shapes on textured grounds, for `data_tools synth`.

Shapes are given by their distance to the outline, so edges are smooth at any size and angle.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

CLASSES = ("disc", "triangle", "square", "star", "cross", "crescent", "arrow", "ring")
FAMILIES = ("polygon", "spiked", "flower", "gear", "frame")
"""Outlines that are told apart by how often they repeat: 3 to 8 corners, spikes, petals, teeth,
or the corners of a polygon with a round hole."""
SIMILAR_CLASSES = tuple(f"{family}-{n}" for n in range(3, 9) for family in FAMILIES)
SHAPES = CLASSES + SIMILAR_CLASSES

_TEXTURES = 5


class Shape(NamedTuple):
    """A shape, its centre and size in pixels."""

    kind: int
    """Position in `SHAPES`."""
    x: float
    y: float
    radius: float
    angle: float
    """Radians."""
    stretch: float
    """Width over what it would be; the height makes up for it."""


def coverage(shape: Shape, height: int, width: int) -> np.ndarray:
    """How much of each pixel `[h, w]` a shape covers, from its distance to the outline."""
    cover = np.zeros((height, width))
    reach = 1.5 * shape.radius + 2
    x0, x1 = max(0, int(shape.x - reach)), min(width, int(shape.x + reach) + 1)
    y0, y1 = max(0, int(shape.y - reach)), min(height, int(shape.y + reach) + 1)
    if x1 > x0 and y1 > y0:
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        cover[y0:y1, x0:x1] = np.clip(0.5 - _distance(shape, x, y) * shape.radius, 0, 1)
    return cover


@functools.cache
def unit_area(kind: int) -> float:
    """Area of a shape in units of its radius squared; stretching doesn't change it."""
    return float(coverage(Shape(kind, 100, 100, 64, 0, 1), 200, 200).sum()) / 64**2


def _distance(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in units of the radius, negative inside (about)."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = (x - shape.x) / shape.radius, (y - shape.y) / shape.radius
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # Stretching keeps the area; a ring or a star that is stretched is one still.
    u, v = u / shape.stretch, v * shape.stretch
    r = np.hypot(u, v)
    name = SHAPES[shape.kind]
    if shape.kind >= len(CLASSES):
        family, _, count = name.partition("-")
        return _repeated(family, int(count), r, np.arctan2(v, u))
    if name == "disc":
        return r - 0.9
    if name == "triangle":
        return np.maximum.reduce([-v - 0.5, *(_half_plane(u, v, a, 0.5) for a in (30, 150))])
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.75
    if name == "star":
        return _star(r, np.arctan2(v, u), 5, 1.1, 0.48)
    if name == "cross":
        bar, arm = 0.3, 1.0
        first = np.maximum(np.abs(u) - arm, np.abs(v) - bar)
        return np.minimum(first, np.maximum(np.abs(u) - bar, np.abs(v) - arm))
    if name == "crescent":
        return np.maximum(r - 1, 0.8 - np.hypot(u - 0.55, v))
    if name == "ring":
        return np.abs(r - 0.72) - 0.24
    shaft = np.maximum(np.abs(v) - 0.24, np.abs(u + 0.35) - 0.75)
    head = np.maximum(-u, (u + np.abs(v) - 1.1) / math.sqrt(2))
    return np.minimum(shaft, head)


def _star(r: np.ndarray, angle: np.ndarray, spikes: int, outer: float, inner: float) -> np.ndarray:
    """Distance to a star's outline; its corners are so far from the centre, in turns."""
    turn = 2 * math.pi / spikes
    sector = np.abs((angle + turn / 2) % turn - turn / 2)
    # A line from an outer corner (outer, 0) to the next inner corner.
    ex, ey = inner * math.cos(turn / 2) - outer, inner * math.sin(turn / 2)
    px, py = r * np.cos(sector) - outer, r * np.sin(sector)
    return (px * ey - py * ex) / math.hypot(ex, ey)


def _repeated(family: str, count: int, r: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Distance to the outlines of `FAMILIES`, about; all reach some 0.95 of the radius."""
    if family in ("polygon", "frame"):
        turn = 2 * math.pi / count
        sector = (angle + turn / 2) % turn - turn / 2
        outline = r * np.cos(sector) - 0.95 * math.cos(turn / 2)
        return outline if family == "polygon" else np.maximum(outline, 0.28 - r)
    if family == "spiked":
        return _star(r, angle, count, 1.0, 0.62 * math.cos(math.pi / count))
    wave = np.cos(count * angle)
    if family == "gear":
        return r - (0.8 + 0.15 * np.clip(4 * wave, -1, 1))
    slope = 0.17 * count * np.sin(count * angle) / np.maximum(r, 0.3)
    return (r - 0.78 - 0.17 * wave) / np.hypot(1, slope)


def _half_plane(u: np.ndarray, v: np.ndarray, degrees: float, offset: float) -> np.ndarray:
    angle = math.radians(degrees)
    return u * math.cos(angle) + v * math.sin(angle) - offset


def draw_ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A ground `[h, w, 3]` of dull colours: clouds, a gradient, stripes or patches."""
    base, other = _colour(rng.random(), 0.25, rng.uniform(60, 190)), None
    other = _colour(rng.random(), 0.3, float(base.mean()) + rng.uniform(-45, 45))
    style = int(rng.integers(4))
    if style == 0:
        blend = _clouds(rng, height, width, int(rng.integers(3, 9)))
    elif style == 1:
        y, x = np.mgrid[:height, :width]
        a = rng.uniform(-math.pi, math.pi)
        blend = 0.5 + (math.cos(a) * (x / width - 0.5) + math.sin(a) * (y / height - 0.5)) / 1.5
    elif style == 2:
        blend = 0.5 + 0.35 * _stripes(rng, height, width, rng.uniform(8, 30))
    else:
        blend = (_clouds(rng, height, width, int(rng.integers(6, 14))) > 0.5) * 0.8 + 0.1
    blend = 0.8 * blend + 0.2 * _clouds(rng, height, width, 24)
    return base + (other - base) * blend[..., None]


def paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    cover: np.ndarray,
    shape: Shape,
    hinted: float = 0.65,
) -> None:
    """Paint a shape in place, in a colour that stands out from what it is painted on.

    Args:
        rng: all that is random.
        canvas: `[h, w, 3]`.
        cover: `[h, w]`, how much of each pixel the shape covers.
        shape: which.
        hinted: probability that the colour is the class's own, and likewise the texture.
    """
    ys, xs = np.nonzero(cover)
    if not len(ys):
        return
    window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    alpha, below = cover[window][..., None], canvas[window]
    ground = (below * alpha).sum(axis=(0, 1)) / alpha.sum()
    typical = rng.random() < hinted
    hue = shape.kind / len(CLASSES) + rng.normal(0, 0.03) if typical else rng.random()
    texture = shape.kind % _TEXTURES if rng.random() < hinted else int(rng.integers(_TEXTURES))
    colours = [_colour(hue, rng.uniform(0.5, 0.9), rng.uniform(50, 210)) for _ in range(4)]
    colour = max(colours, key=lambda c: float(np.abs(c - ground).sum()))
    pattern = _pattern(rng, texture, len(alpha), alpha.shape[1], max(3.0, shape.radius / 4))
    shade = 1 + 0.28 * (pattern - 0.5)
    canvas[window] = below + alpha * (np.clip(colour * shade[..., None], 0, 255) - below)


def _pattern(
    rng: np.random.Generator, texture: int, height: int, width: int, period: float
) -> np.ndarray:
    if texture == 0:
        return np.full((height, width), 0.5)
    if texture == 1:
        return 0.5 + 0.8 * _stripes(rng, height, width, period)
    y, x = np.mgrid[:height, :width] / period * math.pi
    if texture == 2:
        return (np.sin(x) * np.sin(y) > 0) * 1.2 - 0.1
    if texture == 3:
        return (np.sin(x) * np.sin(y)) ** 2 * 1.6 - 0.2
    return 1.8 * _clouds(rng, height, width, 6) - 0.4


def _stripes(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    a, phase = rng.uniform(-math.pi, math.pi), rng.uniform(0, 2 * math.pi)
    return np.sin((math.cos(a) * x + math.sin(a) * y) * (2 * math.pi / period) + phase)


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise `[h, w]` in [0, 1], of about so many blobs a side."""
    grid = rng.random((cells + 1, cells + 1))
    y, x = np.linspace(0, cells, height), np.linspace(0, cells, width)
    j, i = np.minimum(y.astype(int), cells - 1), np.minimum(x.astype(int), cells - 1)
    fy, fx = y - j, x - i
    fy, fx = (fy * fy * (3 - 2 * fy))[:, None], fx * fx * (3 - 2 * fx)
    j = j[:, None]
    top = grid[j, i] * (1 - fx) + grid[j, i + 1] * fx
    bottom = grid[j + 1, i] * (1 - fx) + grid[j + 1, i + 1] * fx
    return top * (1 - fy) + bottom * fy


def _colour(hue: float, saturation: float, brightness: float) -> np.ndarray:
    """An RGB colour `[3]` of about that mean; hue and saturation in [0, 1]."""
    wave = np.cos(2 * math.pi * (hue - np.array([0, 1, 2]) / 3))
    return np.clip(brightness * (1 + saturation * wave), 5, 250)
