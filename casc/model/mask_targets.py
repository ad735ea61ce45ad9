"""Mask targets: which cells of a RoI's grid lie on its object.

Legend: R RoIs, B images, G ground-truth capacity, E edge capacity of an image, M cells per side.
"""

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
    rois, capacity = boxes.shape[0], edges.shape[1]
    top, height = boxes[:, 1:2], boxes[:, 3:4] - boxes[:, 1:2]

    def line_at(line: Tensor) -> Tensor:
        """The height of lines [R, N]."""
        return top + (line.to(boxes.dtype) + 0.5) / count * height

    def lines_above(y: Tensor) -> Tensor:
        """How many lines lie above each of the heights [R, N]."""
        found = torch.ceil((y - top) / height.clamp(min=1e-6) * count - 0.5)
        found = torch.where(found > 0, found, 0.0).clamp(max=count)
        # Rounding may be off by one: what decides is the very height of the line.
        found = torch.where((found > 0) & (line_at(found - 1) >= y), found - 1, found)
        return torch.where((found < count) & (line_at(found) < y), found + 1, found).int()

    heights = edges[:, :, 1::2].mT.flatten(1)[image]
    begin, end = lines_above(heights).chunk(2, dim=1)
    own = edge_gt[image] == gt[:, None]
    crossings = torch.where(own, (end - begin).abs(), 0)
    stop = crossings.cumsum(1, dtype=torch.int32)
    slots = max(-(-capacity * count // GRID_LINES), count * min(capacity, FREE_CROSSINGS))
    slot = torch.arange(slots, dtype=torch.int32, device=device).repeat(rois, 1)
    edge = torch.searchsorted(stop, slot, right=True)
    used = edge < capacity
    edge = edge.clamp(max=capacity - 1)
    first = torch.minimum(begin, end) - stop + crossings
    line = torch.where(used, first.gather(1, edge) + slot, 0)
    direction = torch.where(used, (end - begin).sign().gather(1, edge), 0)

    x0, y0, x1, y1 = edges[image[:, None], edge].unbind(-1)
    y = line_at(line)
    x = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    # How many of the line's samples lie left of the crossing: sample i is at (i + 0.5) steps.
    width = (boxes[:, 2:3] - boxes[:, 0:1]).clamp(min=1e-6)
    left = torch.ceil((x - boxes[:, 0:1]) / width * count - 0.5)
    left = torch.where(left > 0, left, 0.0).clamp(max=count).long()  # NaN is no index
    at = line * (count + 1) + left
    crossed = direction.new_zeros((rois, count * (count + 1))).scatter_add(1, at, direction)
    crossed = crossed.reshape(rois, count, count + 1)
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
