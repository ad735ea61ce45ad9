"""Made-up inputs for timing operators: as large as a real step's, the same in each run.

Legend: B images, G ground-truth capacity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from casc.model.anchors import AnchorConfig, grid_anchors, inside
from casc.model.detector_config import ROI_LEVELS
from casc.model.mask_head import MaskRois
from casc.model.targets import Targets


@dataclass(frozen=True)
class Sizes:
    """How large the operators' inputs are; the defaults are a real training step's."""

    canvas: tuple[int, int] = (800, 1088)
    """Height and width in pixels."""
    batch: int = 2
    """Images."""
    objects: int = 8
    """Objects per image."""
    capacity: int = 93
    """Slots for them."""
    edges: int = 120
    """Polygon edges of an object."""
    channels: int = 256
    """Of the features."""
    box_rois: int = 1024
    """RoIs of a box stage, over the batch."""
    mask_rois: int = 256
    """RoIs of a mask stage when padded to the maximum, over the batch."""
    proposals: int = 2000
    """Per image and, before suppression, per level."""
    detections: int = 100
    """Masks to paste."""
    image: tuple[int, int] = (480, 640)
    """Height and width in pixels of the image that they are pasted into."""


def level_sizes(sizes: Sizes) -> list[tuple[int, int]]:
    """Height and width of P2 to P6."""
    height, width = sizes.canvas
    return [(-(-height // s), -(-width // s)) for s in AnchorConfig().strides]


def some_features(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """P2 to P5, [B, C, H_l, W_l] of `dtype`."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(sizes.batch, sizes.channels, h, w) for h, w in level_sizes(sizes)[:ROI_LEVELS]]
    made = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    # As convolutions leave them on CPU and CUDA.
    return [level.contiguous(memory_format=torch.channels_last) for level in made]


def some_boxes(sizes: Sizes, count: int, device: torch.device) -> Tensor:
    """[B, count, 4] of all sizes, log-uniform, within the canvas."""
    generator = torch.Generator().manual_seed(2)
    canvas = torch.tensor(sizes.canvas[::-1], dtype=torch.float32)
    share = torch.exp(torch.rand(sizes.batch, count, 2, generator=generator) * 3 - 3) * 0.6
    side = share * canvas
    corner = torch.rand(sizes.batch, count, 2, generator=generator) * (canvas - side)
    return torch.cat([corner, corner + side], dim=-1).to(device)


def distinct_scores(batch: int, count: int, device: torch.device) -> Tensor:
    """[batch, count] scores without ties."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(count, generator=generator) for _ in range(batch)]
    return ((torch.stack(rows) + 1) / (count + 1)).to(device)


def all_anchors(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """[A, 4] of all levels, and [B, A] bool, which lie inside."""
    anchors = torch.cat(grid_anchors(AnchorConfig(), level_sizes(sizes), device))
    size = torch.tensor([sizes.canvas] * sizes.batch, dtype=torch.float32, device=device)
    return anchors, inside(anchors, size)


def some_targets(sizes: Sizes, device: torch.device) -> Targets:
    """Stars with dented sides, in the boxes' order."""
    generator = torch.Generator().manual_seed(6)
    valid = torch.arange(sizes.capacity).expand(sizes.batch, -1) < sizes.objects
    boxes = some_boxes(sizes, sizes.capacity, torch.device("cpu")) * valid[..., None]
    angle = torch.arange(sizes.edges) * (2 * math.pi / sizes.edges)
    phase = torch.rand(sizes.batch, sizes.capacity, 1, generator=generator) * 6
    radius = 0.85 + 0.15 * torch.sin(5 * angle + phase)
    unit = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1) * 0.5 + 0.5
    points = boxes[:, :, None, :2] + unit * (boxes[:, :, None, 2:] - boxes[:, :, None, :2])
    edges = torch.cat([points, points.roll(-1, dims=2)], dim=-1)
    labels = torch.randint(80, valid.shape, generator=generator) * valid
    owner = torch.arange(sizes.capacity).repeat_interleave(sizes.edges).repeat(sizes.batch, 1)
    columns = boxes, labels, valid, edges.flatten(1, 2), owner
    return Targets(*(t.to(device) for t in columns))


def positive_rois(sizes: Sizes, count: int, device: torch.device) -> tuple[MaskRois, Targets, int]:
    """`count` of the mask RoIs are positive, spread over them, near their objects."""
    targets = some_targets(sizes, device)
    generator = torch.Generator().manual_seed(7)
    slots = sizes.mask_rois
    image = torch.arange(slots, device=device) // (slots // sizes.batch)
    gt = torch.randint(sizes.objects, (slots,), generator=generator).to(device)
    boxes = targets.boxes[image, gt]
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.1 * side * torch.randn(slots, 4, generator=generator).to(device)
    limit = torch.tensor(sizes.canvas[::-1], dtype=torch.float32, device=device).repeat(2)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    valid = (torch.randperm(slots, generator=generator) < count).to(device)
    return MaskRois(boxes, image, gt, targets.labels[image, gt], valid), targets, 80


def soft_masks(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Smooth probabilities [D, 28, 28], and boxes [D, 4] in pixels of the image."""
    generator = torch.Generator().manual_seed(8)
    coarse = torch.randn(sizes.detections, 1, 7, 7, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")[:, 0]
    image = Sizes(canvas=sizes.image, batch=1)
    return (masks * 3).sigmoid(), some_boxes(image, sizes.detections, torch.device("cpu"))[0]
