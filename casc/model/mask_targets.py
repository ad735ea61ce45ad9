"""Mask targets: which cells of a RoI's grid lie on its object.

Legend: R RoIs, B images, G ground-truth capacity, E edge capacity of an image, M cells per side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.data.sample import FREE_CROSSINGS, GRID_LINES
from casc.device.devices import roi_kernels, traits

# Samples per cell and axis. Odd: with an even number, ties at one half would have to go
# one way and bias every border. 3x3 agrees with exact coverage to 0.996 IoU, 1x1 to 0.991.
SUPERSAMPLES = 3


def polygon_targets(
    edges: Tensor,
    edge_gt: Tensor,
    boxes: Tensor,
    image: Tensor,
    gt: Tensor,
    cells: int,
    pasted: Tensor | None = None,
    under: int = 0,
) -> Tensor:
    """Rasterise each RoI's polygon on its own grid: a cell is on when half covered.

    Non-zero winding rule by scan lines: a line at a sample's height crosses an edge at one
    x, and the edge's direction (+1 or -1) counts for all samples left of it. Parts of one
    orientation therefore form a union, and a part of the other one a hole.

    Each RoI looks for the lines that its object's edges cross, and lists these crossings: the
    work is that of R * E edges and as many crossings, not of every edge with every line.

    Args:
        edges: [B, E, 4] float32 (x0, y0, x1, y1) of all objects; padding has zero length and
            crosses nothing. E as `casc.data.sample.edge_room` says.
        edge_gt: [B, E] int64 in [0, G), the object whose edge it is.
        boxes: [R, 4] float32 xyxy, in the same pixels.
        image: [R] int64 into B.
        gt: [R] int64 into G.
        cells: M.
        pasted: [B, H, W] bool, pixels of the canvas in which objects from `under` on hide the ones
            before: samples there aren't on these.
        under: how many objects may be hidden.

    Returns:
        [R, M, M] bool, (y, x).
    """
    count, device = cells * SUPERSAMPLES, boxes.device
    rois = boxes.shape[0]
    if traits(device).reads_wait_for_nothing:
        crossed = crossings_present(edges, edge_gt, boxes, image, gt, count)
    else:
        crossed = crossings_all(edges, edge_gt, boxes, image, gt, count)
    # Sample i is left of every crossing whose count exceeds i.
    winding = crossed.flip(-1).cumsum(-1).flip(-1)[:, :, 1:]
    on = winding != 0
    if pasted is not None:
        steps = (torch.arange(count, device=device) + 0.5) / count
        y = _pixels(boxes[:, 1:2], boxes[:, 3:4], steps, pasted.shape[1])
        x = _pixels(boxes[:, 0:1], boxes[:, 2:3], steps, pasted.shape[2])
        hidden = pasted[image[:, None, None], y[:, :, None], x[:, None, :]]
        on = on & ~(hidden & (gt < under)[:, None, None])
    covered = on.reshape(rois, cells, SUPERSAMPLES, cells, SUPERSAMPLES)
    return covered.sum(dim=(2, 4)) * 2 > SUPERSAMPLES**2


def crossings_all(
    edges: Tensor, edge_gt: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, count: int
) -> Tensor:
    """Where the edges of each RoI's object cross its scan lines: [R, count, count + 1] int32.

    Of each line, and of how many samples lie left of the crossing, the sum of directions.
    """
    rois, capacity = boxes.shape[0], edges.shape[1]
    heights = edges[:, :, 1::2].mT.flatten(1)[image]
    grid = _Grid.of(boxes[:, None])
    begin, end = grid.lines_above(heights, count).chunk(2, dim=1)
    own = edge_gt[image] == gt[:, None]
    crossings = (end - begin).abs() * own
    stop = crossings.cumsum(1, dtype=torch.int32)
    slots = max(-(-capacity * count // GRID_LINES), count * min(capacity, FREE_CROSSINGS))
    slot = torch.arange(slots, dtype=torch.int32, device=boxes.device).repeat(rois, 1)
    edge = torch.searchsorted(stop, slot, right=True)
    used = edge < capacity
    edge = edge.clamp(max=capacity - 1)
    first = torch.minimum(begin, end) - stop + crossings
    line = (first.gather(1, edge) + slot) * used
    direction = (end - begin).sign().gather(1, edge) * used
    at = grid.crossing(edges[image[:, None], edge], line, count)
    crossed = direction.new_zeros((rois, count * (count + 1))).scatter_add(1, at, direction)
    return crossed.reshape(rois, count, count + 1)


@torch.library.custom_op("casc::crossings_present", mutates_args=())
def crossings_present(
    edges: Tensor, edge_gt: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, count: int
) -> Tensor:
    """What `crossings_all` gives, with work for the RoIs' own edges, not for the capacity."""
    owner = torch.where(edges[..., 1] == edges[..., 3], -1, edge_gt)
    roi, edge = (owner[image] == gt[:, None]).nonzero().unbind(1)
    edge, grid = edges[image[roi], edge], _Grid.of(boxes[roi])
    begin, end = (grid.lines_above(edge[:, i], count) for i in (1, 3))
    crossings = (end - begin).abs()
    each = torch.repeat_interleave(crossings)
    first = torch.minimum(begin, end) - crossings.cumsum(0, dtype=torch.int32) + crossings
    line = first[each] + torch.arange(len(each), dtype=torch.int32, device=boxes.device)
    cells, grid = count * (count + 1), _Grid(*(column[each] for column in grid))
    at = roi[each] * cells + grid.crossing(edge[each], line, count)
    direction = (end - begin).sign()[each]
    crossed = direction.new_zeros(boxes.shape[0] * cells).scatter_add(0, at, direction)
    return crossed.reshape(-1, count, count + 1)


@crossings_present.register_fake
def _(edges: Tensor, edge_gt: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, count: int):
    return boxes.new_empty((boxes.shape[0], count, count + 1), dtype=torch.int32)


class _Grid(NamedTuple):
    """Where boxes lie, [...] each."""

    left: Tensor
    top: Tensor
    width: Tensor
    height: Tensor

    @classmethod
    def of(cls, boxes: Tensor) -> "_Grid":
        """Those of [..., 4]."""
        return cls(*boxes[..., :2].unbind(-1), *(boxes[..., 2:] - boxes[..., :2]).unbind(-1))

    def line_at(self, line: Tensor, count: int) -> Tensor:
        """The height of lines [...]."""
        return self.top + (line.to(self.top.dtype) + 0.5) / count * self.height

    def lines_above(self, y: Tensor, count: int) -> Tensor:
        """How many lines lie above each of the heights [...]: int32."""
        found = torch.ceil((y - self.top) / self.height.clamp(min=1e-6) * count - 0.5)
        found = torch.where(found > 0, found, 0.0).clamp(max=count)
        # Rounding may be off by one: what decides is the very height of the line.
        found = torch.where((found > 0) & (self.line_at(found - 1, count) >= y), found - 1, found)
        more = (found < count) & (self.line_at(found, count) < y)
        return torch.where(more, found + 1, found).int()

    def crossing(self, edges: Tensor, line: Tensor, count: int) -> Tensor:
        """Where edges [..., 4] cross lines: line * (count + 1) + how many samples lie left."""
        x0, y0, x1, y1 = edges.unbind(-1)
        y = self.line_at(line, count)
        x = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
        # Sample i is at (i + 0.5) steps.
        before = torch.ceil((x - self.left) / self.width.clamp(min=1e-6) * count - 0.5)
        before = torch.where(before > 0, before, 0.0).clamp(max=count).long()  # NaN is no index
        return line * (count + 1) + before


def _pixels(low: Tensor, high: Tensor, steps: Tensor, side: int) -> Tensor:
    """The pixels [R, N] in which the samples at `steps` from `low` to `high` [R, 1] lie."""
    return (low + steps * (high - low)).floor().clamp(0, side - 1).long()


def bitmap_targets(bitmaps: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, cells: int) -> Tensor:
    """The reference's targets: RoIAlign of the object's bitmap, on from one half.

    Args:
        bitmaps: [B, G, H, W] uint8, in pixels of the canvas.
        boxes: [R, 4] float32 xyxy.
        image: [R] int64 into B.
        gt: [R] int64 into G.
        cells: M.

    Returns:
        [R, M, M] bool, (y, x).
    """
    return bitmap_coverage(bitmaps, boxes, image, gt, cells) >= 0.5


# It reads how many there are, so no graph of a device's may hold it.
@torch.library.custom_op(
    "casc::bitmap_coverage", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def bitmap_coverage(
    bitmaps: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, cells: int
) -> Tensor:
    """How much of each cell the bitmap covers: [R, M, M] float32 in [0, 1]."""
    if traits(boxes.device).select_rois:
        # Many RoIs share one object: only its bitmap, once, becomes float.
        pairs = torch.stack([image, gt], dim=1)
        pairs, source = pairs.unique(dim=0, return_inverse=True)
        image, gt = pairs.unbind(dim=1)
    else:
        source = torch.arange(boxes.shape[0], device=boxes.device)
    maps = bitmaps[image, gt].to(boxes.dtype)[:, None]
    rois = torch.cat([source[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_kernels(boxes.device).forward(maps, rois, 1.0, cells, 0)[:, 0]


@bitmap_coverage.register_fake
def _(bitmaps: Tensor, boxes: Tensor, image: Tensor, gt: Tensor, cells: int):
    return boxes.new_empty((boxes.shape[0], cells, cells))
