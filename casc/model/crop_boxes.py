"""What shows of an object through a window: the bounds of a polygon that is cut.

Legend: B images, G ground-truth capacity, E edge capacity of an image.
"""

import math

import torch
from torch import Tensor


def visible_boxes(boxes: Tensor, edges: Tensor, edge_gt: Tensor, size: Tensor) -> Tensor:
    """The boxes of what of each object lies within its image's window.

    These are the bounds of what is left of the polygon, as Detectron2's recompute_boxes has them:
    also of objects that the window doesn't cut, whose annotated box may be another.

    Args:
        boxes: [B, G, 4] float32 xyxy from the window's top left corner; may reach out of it.
        edges: [B, E, 4] float32 (x0, y0, x1, y1), likewise; padding has zero length. An
            object that has padding only is its box, cut by the window.
        edge_gt: [B, E] int64 in [0, G), the object whose edge it is.
        size: [B, 2] float32, the windows' height and width.

    Returns:
        [B, G, 4] float32 xyxy within the window; of no area where nothing shows.
    """
    limit = size.flip(-1).repeat(1, 2)[:, None]
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    low, high = _bounds(edges, edge_gt, size, boxes.shape[1])
    # Where nothing shows, both are infinite.
    left = torch.where(low <= high, torch.stack([low, high]), 0.0)
    long = (edges[..., :2] != edges[..., 2:]).any(dim=-1)
    outlined = _sums(long[..., None].long(), edge_gt, boxes.shape[1]) > 0
    return torch.where(outlined, torch.cat([left[0], left[1]], dim=-1), clipped)


def _bounds(edges: Tensor, edge_gt: Tensor, size: Tensor, objects: int) -> tuple[Tensor, Tensor]:
    """Least and greatest (x, y) of each polygon's part in its window: both [B, G, 2].

    The extremes of that part are ends of edges, places where an edge crosses the window's
    border, or corners of the window that lie inside the polygon. Infinite if there are none.
    """
    points, seen = _ends_inside(edges, size)
    corners = _window_corners(size)
    turns = _winding(edges, corners[..., 0], corners[..., 1])
    covered = _sums(turns, edge_gt, objects) != 0
    corners = corners[:, None].expand(*covered.shape, 2)

    def least(sign: int) -> Tensor:
        ends = torch.where(seen[..., None], sign * points, math.inf).amin(dim=2)
        far = torch.full((ends.shape[0], objects, 2), math.inf, device=ends.device)
        ends = far.scatter_reduce(1, edge_gt[..., None].expand_as(ends), ends, "amin")
        inner = torch.where(covered[..., None], sign * corners, math.inf).amin(dim=2)
        return torch.minimum(ends, inner)

    return least(1), -least(-1)


def _sums(values: Tensor, edge_gt: Tensor, objects: int) -> Tensor:
    """The sums over each object's edges of [B, E, N] int64: [B, G, N]."""
    total = values.new_zeros((values.shape[0], objects, values.shape[2]))
    return total.scatter_add(1, edge_gt[..., None].expand_as(values), values)


def _ends_inside(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of each edge's stretch inside the window, by Liang and Barsky (1984).

    Returns:
        points [B, E, 2, 2], and whether there is such a stretch [B, E, 1] bool.
    """
    start, step = edges[..., :2], edges[..., 2:] - edges[..., :2]
    limit = size.flip(-1)[:, None]
    enter, leave = _inside(start, step, limit)
    first = enter.amax(dim=-1).clamp(min=0)
    last = leave.amin(dim=-1).clamp(max=1)
    seen = (first <= last) & (edges[..., :2] != edges[..., 2:]).any(dim=-1)
    points = torch.stack([start + t[..., None] * step for t in (first, last)], dim=2)
    # A crossing may be rounded to just outside.
    points = torch.minimum(points.clamp(min=0), limit[:, None])
    return points, seen[..., None]


def _window_corners(size: Tensor) -> Tensor:
    """[B, 4, 2] (x, y)."""
    zero = torch.zeros_like(size[:, 0])
    height, width = size.unbind(-1)
    x = torch.stack([zero, width, zero, width], dim=-1)
    y = torch.stack([zero, zero, height, height], dim=-1)
    return torch.stack([x, y], dim=-1)


def _inside(start: Tensor, step: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters between which start + t * step is in [0, limit]; the first is larger if never."""
    still = step == 0
    safe = torch.where(still, 1.0, step)
    a, b = -start / safe, (limit - start) / safe
    never = (start < 0) | (start > limit)
    enter = torch.where(still, torch.where(never, math.inf, -math.inf), torch.minimum(a, b))
    leave = torch.where(still, torch.where(never, -math.inf, math.inf), torch.maximum(a, b))
    return enter, leave


def _winding(edges: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What each edge adds to the winding number of the points x, y [B, N]: [B, E, N] int64."""
    x0, y0, x1, y1 = (v[..., None] for v in edges.unbind(-1))
    x, y = x[:, None], y[:, None]
    direction = ((y0 <= y) & (y1 > y)).long() - ((y0 > y) & (y1 <= y)).long()
    crossing = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    return direction * (crossing > x)
