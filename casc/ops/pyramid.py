"""A feature pyramid as rows of channels, and reading from it at chosen places.

Legend: B images, C channels, L levels, P pixels of all levels of an image.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from casc.ops.row_sums import chained_bags


class Pyramid(NamedTuple):
    """A feature pyramid in the form that RoIAlign reads."""

    levels: list[Tensor]
    """L tensors [B, C, H_l, W_l], float32 where the device's own operator reads them."""
    pixels: Tensor
    """[B * P, C], the same values flattened (image, level, y, x), of the features' dtype."""
    strides: tuple[int, ...]
    """Pixels per cell of each level."""

    def with_levels(self, levels: list[Tensor]) -> "Pyramid":
        """The same with other levels."""
        return Pyramid(levels, self.pixels, self.strides)

    def with_pixels(self, pixels: Tensor) -> "Pyramid":
        """The same for the next reader."""
        return Pyramid(self.levels, pixels, self.strides)


def flatten_pyramid(levels: list[Tensor], strides: tuple[int, ...]) -> Pyramid:
    """Lay all levels out as rows of channels, once for every RoIAlign of the step."""
    batch, channels = levels[0].shape[:2]
    rows = [level.permute(0, 2, 3, 1).reshape(batch, -1, channels) for level in levels]
    return Pyramid(levels, torch.cat(rows, dim=1).reshape(-1, channels), strides)


class Neighbours(NamedTuple):
    """The square neighbourhoods of some cells of a pyramid."""

    rows: Tensor
    """[..., side * side] int64: the row of each neighbour among its image's pixels; 0 if there is
    none."""
    within: Tensor
    """[..., side * side] bool: whether the neighbour lies on the level."""


def neighbours(
    stored: list[tuple[int, int]], sizes: list[tuple[int, int]], cell: Tensor, side: int
) -> Neighbours:
    """Where the neighbourhoods of cells [...] lie.

    Args:
        stored: (H_l, W_l) of each level of the pyramid.
        sizes: of each level that a cell may lie on, as for `patches`.
        cell: int64, counted (level, y, x).
        side: of the neighbourhood in cells, odd.
    """
    last = len(stored) - 1
    firsts = [_first(sizes, i) for i in range(len(sizes))]
    level = Level(cell, [cell >= first for first in firsts[1:]])
    at = cell - by_level(level, firsts)
    height = by_level(level, [h for h, _ in sizes])[..., None]
    width = by_level(level, [w for _, w in sizes])[..., None]
    reach = torch.arange(side, device=cell.device) - side // 2
    y, x = at[..., None] // width + reach, at[..., None] % width + reach
    within = ((y >= 0) & (y < height))[..., :, None] & ((x >= 0) & (x < width))[..., None, :]
    # From the level's own cells to the rows where they are stored.
    skip = by_level(level, [2 ** max(i - last, 0) for i in range(len(sizes))])[..., None]
    row_length = by_level(level, [stored[min(i, last)][1] for i in range(len(sizes))])
    start = by_level(level, [_first(stored, min(i, last)) for i in range(len(sizes))])
    rows = (y * skip)[..., :, None] * row_length[..., None, None] + (x * skip)[..., None, :]
    rows = (rows + start[..., None, None]) * within
    return Neighbours(rows.flatten(-2), within.flatten(-2))


def patches(
    pyramid: Pyramid,
    sizes: list[tuple[int, int]],
    cell: Tensor,
    side: int,
    table: Neighbours | None = None,
) -> tuple[Tensor, Tensor, Pyramid]:
    """The square neighbourhood of chosen cells, as a convolution with zero padding sees it.

    Args:
        pyramid: from `flatten_pyramid`.
        sizes: (H_l, W_l) of each level that a cell may lie on. Levels beyond the pyramid's
            are every 2nd, 4th, ... cell of its coarsest, as the FPN's P6 is.
        cell: [B, S] int64, counted (level, y, x).
        side: of the neighbourhood in cells, odd.
        table: `neighbours` of all cells in turn; of these cells they are computed if None.

    Returns:
        [B * S, side * side * C] of the features' dtype, in the order (y, x, channel); [B, S, side,
        side] bool, which cells lie on the level; and the pyramid for the next reader (see
        `chained_bags`).
    """
    stored = [(f.shape[2], f.shape[3]) for f in pyramid.levels]
    if table is None:
        rows, within = neighbours(stored, sizes, cell, side)
    else:
        rows, within = (column[cell] for column in table)
    first = torch.arange(cell.shape[0], device=cell.device) * _first(stored, len(stored))
    rows = (rows + first[:, None, None]).reshape(-1, 1)
    weight = within.reshape(-1, 1).to(pyramid.pixels.dtype)
    read, pixels = chained_bags(pyramid.pixels, rows, weight)
    within = within.unflatten(-1, (side, side))
    return read.reshape(cell.numel(), -1), within, pyramid.with_pixels(pixels)


class Level(NamedTuple):
    """Which of L levels things belong to, as it serves `by_level`."""

    like: Tensor
    """int64 of their shape."""
    beyond: list[Tensor]
    """L - 1 bool of it: whether the level is above the first, the second, ..."""


def by_level(level: Level, values: list[int]) -> Tensor:
    """values[level] without a table on the device: int64 of the level's shape."""
    result = torch.full_like(level.like, values[0])
    for mask, (before, after) in zip(level.beyond, pairwise(values), strict=True):
        if before != after:
            result = torch.add(result, mask, alpha=after - before)
    return result


def _first(sizes: list[tuple[int, int]], level: int) -> int:
    """Cells of all levels before this one."""
    return sum(h * w for h, w in sizes[:level])
