"""Copy-paste (Ghiasi et al., 2021): objects of one image of a batch on top of another.

Which pixels a polygon covers is decided at their centres, by the non-zero winding rule, and one and
the same decision paints the image, hides what lies under it and shrinks the boxes of that.

Legend: B images, G ground-truth capacity, E edge capacity of an image, H x W canvas.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.model import noise as noises
from casc.model.targets import Targets


class Left(NamedTuple):
    """What is left of objects of which pixels are hidden."""

    boxes: Tensor
    """[B, G, 4] float32 xyxy, bounds of the pixels that aren't hidden; 0 if there are none."""
    pixels: Tensor
    """[B, G] int64, how many these are."""


def chosen_objects(valid: Tensor, seed: Tensor, probability: float) -> Tensor:
    """The objects that each image gets: any number up to all, and any that many, as likely.

    Args:
        valid: [B, G] bool, the objects that could be pasted.
        seed: [B] int64, of the image that gets them.
        probability: of getting any.

    Returns:
        [B, G] bool.
    """
    draws = noises.uniform(seed, noises.PASTE, 2 + valid.shape[1])
    number = (draws[:, 1] * (valid.sum(dim=1) + 1)).floor()
    keys = torch.where(valid, draws[:, 2:], -1.0)
    # Equal keys of 24 bits happen: the one that comes first is before the other.
    place = torch.arange(valid.shape[1], device=valid.device)
    before = (keys[:, None] > keys[:, :, None]) | (
        (keys[:, None] == keys[:, :, None]) & (place < place[:, None])
    )
    rank = before.sum(dim=2)
    return valid & (rank < number[:, None]) & (draws[:, 0:1] < probability)


def paste(
    image: Tensor, targets: Targets, seed: Tensor, probability: float
) -> tuple[Tensor, Targets]:
    """Paste objects of each image's next one in the batch, the last's being the first.

    Objects of which no pixel is left are no longer valid, and boxes shrink to what is left.
    Polygons stay whole: `Targets.pasted` says what of them is hidden. Pasted objects don't hide
    each other more than they did where they come from, and those that cover no pixel aren't pasted.

    Args:
        image: [B, H, W, 3] as on the canvas.
        targets: of it.
        seed: [B] int64.
        probability: of pasting on an image.

    Returns:
        The images, and targets with twice the capacities G and E, pasted objects second.
    """
    objects, canvas = targets.valid.shape[1], (image.shape[1], image.shape[2])
    columns = {name: t.roll(-1, 0) for name, t in targets._asdict().items() if t is not None}
    source = Targets(**columns)
    areas = covered_pixels(targets.edges, targets.edge_gt, objects, canvas)
    chosen = chosen_objects(source.valid & (areas.roll(-1, 0) > 0), seed, probability)
    pasted = covered(source.edges, chosen.gather(1, source.edge_gt), canvas)
    image = torch.where(pasted[..., None], image.roll(-1, 0), image)
    own = hide(targets, pasted, areas)
    bitmaps = None
    if own.bitmaps is not None and source.bitmaps is not None:
        bitmaps = torch.cat([own.bitmaps * ~pasted[:, None], source.bitmaps], dim=1)
    return image, Targets(
        boxes=torch.cat([own.boxes, source.boxes * chosen[..., None]], dim=1),
        labels=torch.cat([own.labels, source.labels * chosen], dim=1),
        valid=torch.cat([own.valid, chosen], dim=1),
        edges=torch.cat([own.edges, source.edges], dim=1),
        edge_gt=torch.cat([own.edge_gt, source.edge_gt + objects], dim=1),
        bitmaps=bitmaps,
        regions=targets.regions,
        pasted=pasted,
    )


def hide(targets: Targets, pasted: Tensor, areas: Tensor) -> Targets:
    """Targets whose boxes are those of what isn't hidden; objects that are gone aren't valid.

    Args:
        targets: G objects.
        pasted: [B, H, W] bool, the hidden pixels.
        areas: [B, G] int64, `covered_pixels` of the objects.
    """
    left = left_of(targets.edges, targets.edge_gt, ~pasted, targets.valid.shape[1])
    boxes = targets.boxes
    low = torch.maximum(boxes[..., :2], left.boxes[..., :2])
    high = torch.minimum(boxes[..., 2:], left.boxes[..., 2:])
    cut = (left.pixels < areas)[..., None]
    boxes = torch.where(cut, torch.cat([low, torch.maximum(low, high)], dim=-1), boxes)
    # An object that covers no pixel's centre is gone when the pixel is that its middle lies in.
    centre = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    x = centre[..., 0].long().clamp(0, pasted.shape[2] - 1)
    y = centre[..., 1].long().clamp(0, pasted.shape[1] - 1)
    image = torch.arange(len(pasted), device=pasted.device)[:, None]
    gone = torch.where(areas == 0, pasted[image, y, x], left.pixels == 0)
    valid = targets.valid & ~gone
    return Targets(
        boxes=boxes * valid[..., None],
        labels=targets.labels,
        valid=valid,
        edges=targets.edges,
        edge_gt=targets.edge_gt,
        bitmaps=targets.bitmaps,
        regions=targets.regions,
        pasted=targets.pasted,
    )


def covered(edges: Tensor, used: Tensor, canvas: tuple[int, int]) -> Tensor:
    """The pixels that polygons cover together.

    Args:
        edges: [B, E, 4] float32 (x0, y0, x1, y1) in canvas pixels, padding of no length.
        used: [B, E] bool, whose polygons.
        canvas: (H, W).

    Returns:
        [B, H, W] bool.
    """
    height, width = canvas
    turn, before = _crossings(edges, height, width)
    turn = torch.where(used[..., None], turn, 0)
    line = torch.arange(height, device=edges.device)
    at = (line * (width + 1) + before).flatten(1)
    sums = turn.new_zeros((len(edges), height * (width + 1))).scatter_add(1, at, turn.flatten(1))
    # A pixel is before every crossing whose count exceeds its column.
    winding = sums.unflatten(1, (height, width + 1)).flip(-1).cumsum(-1).flip(-1)
    return winding[..., 1:] != 0


def left_of(edges: Tensor, edge_gt: Tensor, shown: Tensor, objects: int) -> Left:
    """What of each object's polygons lies on pixels that are shown.

    Not one mask is made: a row's pixels are counted as a row's area is, by its crossings, each of
    which counts the pixels that are shown before it.

    Args:
        edges: [B, E, 4] float32 (x0, y0, x1, y1) in canvas pixels, padding of no length.
        edge_gt: [B, E] int64 in [0, G).
        shown: [B, H, W] bool.
        objects: G.
    """
    rows = _counts(edges, edge_gt, shown, objects)
    swapped = edges.unflatten(-1, (2, 2)).flip(-1).flatten(-2)
    columns = _counts(swapped, edge_gt, shown.transpose(1, 2), objects)
    bounds = [_extent(columns != 0), _extent(rows != 0)]
    boxes = torch.stack([bounds[axis][end] for end in (0, 1) for axis in (0, 1)], dim=-1)
    return Left(boxes.to(torch.float32), rows.sum(dim=2))


def covered_pixels(edges: Tensor, edge_gt: Tensor, objects: int, canvas: tuple[int, int]) -> Tensor:
    """How many pixels each object covers, hidden or not: [B, G] int64. Arguments as above."""
    turn, before = _crossings(edges, *canvas)
    none = turn.new_zeros((len(edges), objects))
    return none.scatter_add(1, edge_gt, (turn * before).sum(dim=2))


def _counts(edges: Tensor, edge_gt: Tensor, shown: Tensor, objects: int) -> Tensor:
    """How many pixels that are shown lie on each row of each object: [B, G, H] int64.

    A pixel that is covered twice counts twice. Rows of polygons mirrored by swapping x and y are
    negative.
    """
    height, width = shown.shape[1:]
    turn, before = _crossings(edges, height, width)
    image = torch.arange(len(edges), device=edges.device)[:, None, None]
    counts = torch.nn.functional.pad(shown.long().cumsum(2), (1, 0))
    seen = counts[image, torch.arange(height, device=edges.device), before]
    owner = edge_gt[..., None].expand_as(turn)
    none = turn.new_zeros((len(edges), objects, height))
    return none.scatter_add(1, owner, turn * seen)


def _crossings(edges: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each edge crosses the rows of pixel centres.

    Returns:
        By which turn, -1, 0 or 1, and how many pixels of the row have their centre before it: both
        [B, E, H] int64.
    """
    x0, y0, x1, y1 = (v[..., None] for v in edges.unbind(-1))
    y = torch.arange(height, device=edges.device) + 0.5
    turn = ((y0 <= y) & (y1 > y)).long() - ((y0 > y) & (y1 <= y)).long()
    x = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    return turn, torch.ceil(x - 0.5).clamp(0, width).long()


def _extent(marked: Tensor) -> tuple[Tensor, Tensor]:
    """First, and one after the last, of the marked places: [B, G, N] to [B, G] int64; else 0, 0."""
    count = marked.shape[-1]
    place = torch.arange(count, device=marked.device)
    last = torch.where(marked, place + 1, 0).amax(dim=-1)
    first = count - torch.where(marked, count - place, 0).amax(dim=-1)
    return torch.where(last > 0, first, 0), last
