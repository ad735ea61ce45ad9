"""What shows of an object through a window: the bounds of a polygon that is cut.

Legend: B images, G ground-truth capacity, E edge capacity.
"""

import math

import torch
from torch import Tensor


def visible_boxes(boxes: Tensor, edges: Tensor, size: Tensor) -> Tensor:
    """The boxes of what of each object lies within its image's window.

    A box that the window cuts shrinks to the bounds of the part of its polygon that is left,
    as bounds of cropped masks do; others stay as they were annotated.

    Args:
        boxes: [B, G, 4] float32 xyxy from the window's top left corner; may reach out of it.
        edges: [B, G, E, 4] float32 (x0, y0, x1, y1), likewise; padding has zero length. An
            object that has padding only is its box.
        size: [B, 2] float32, the windows' height and width.

    Returns:
        [B, G, 4] float32 xyxy within the window; of no area where nothing shows.
    """
    limit = size.flip(-1).repeat(1, 2)[:, None]
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    low, high = _bounds(edges, size)
    # Polygons may reach out of the box that was annotated; it limits what can show.
    least, most = clipped[..., :2], clipped[..., 2:]
    low = torch.minimum(torch.maximum(low, least), most)
    high = torch.maximum(torch.minimum(high, most), low)
    left = torch.cat([low, high], dim=-1)
    outlined = (edges[..., :2] != edges[..., 2:]).any(dim=-1).any(dim=-1)
    cut = (clipped != boxes).any(dim=-1) & outlined
    return torch.where(cut[..., None], left, clipped)


def _bounds(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest (x, y) of each polygon's part in its window: both [B, G, 2].

    The extremes of that part are ends of edges, places where an edge crosses the window's
    border, or corners of the window that lie inside the polygon. Infinite if there are none.
    """
    width, height = size[:, 1, None, None], size[:, 0, None, None]
    x0, y0, x1, y1 = edges.unbind(-1)
    # Liang and Barsky (1984): the stretch of an edge's parameter that is inside.
    enter_x, leave_x = _inside(x0, x1 - x0, width)
    enter_y, leave_y = _inside(y0, y1 - y0, height)
    first = torch.maximum(enter_x, enter_y).clamp(min=0)
    last = torch.minimum(leave_x, leave_y).clamp(max=1)
    seen = (first <= last) & ((x0 != x1) | (y0 != y1))
    t = torch.stack([first, last], dim=-1)
    points_x = x0[..., None] + t * (x1 - x0)[..., None]
    points_y = y0[..., None] + t * (y1 - y0)[..., None]
    corners_x = torch.stack([torch.zeros_like(size[:, 1]), size[:, 1]] * 2, dim=-1)
    corners_y = torch.stack([torch.zeros_like(size[:, 0])] * 2 + [size[:, 0]] * 2, dim=-1)
    covered = _winding(edges, corners_x, corners_y) != 0

    def extremes(points: Tensor, corners: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        # A crossing may be rounded to just outside.
        points = torch.minimum(points.clamp(min=0), limit[..., None])
        corners = corners[:, None].expand_as(covered)
        found = []
        for empty, reduce in ((math.inf, torch.amin), (-math.inf, torch.amax)):
            of_edges = reduce(torch.where(seen[..., None], points, empty), dim=(-1, -2))
            of_corners = reduce(torch.where(covered, corners, empty), dim=-1)
            found.append(reduce(torch.stack([of_edges, of_corners]), dim=0))
        return found[0], found[1]

    low_x, high_x = extremes(points_x, corners_x, width)
    low_y, high_y = extremes(points_y, corners_y, height)
    return torch.stack([low_x, low_y], dim=-1), torch.stack([high_x, high_y], dim=-1)


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
    """How often polygons wind round the points x, y [B, N]: [B, G, N] int64."""
    x0, y0, x1, y1 = (v[..., None] for v in edges.unbind(-1))
    x, y = x[:, None, None], y[:, None, None]
    direction = ((y0 <= y) & (y1 > y)).long() - ((y0 > y) & (y1 <= y)).long()
    crossing = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    return (direction * (crossing > x)).sum(dim=2)
