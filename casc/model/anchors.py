"""Anchors: the RPN's reference boxes, constants of a canvas.

Legend: L pyramid levels, A anchors of all levels, R ratios.
Order within a level is (y, x, ratio); levels follow each other from fine to coarse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """One anchor scale per level and a few aspect ratios (Lin et al., FPN, 2017)."""

    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Pixels per cell of each level, fine to coarse."""
    scale: float = 8.0
    """Side of the square anchor, in strides."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""


def base_anchors(config: AnchorConfig, level: int, device: torch.device) -> Tensor:
    """Anchors of the cell at the origin: centred on (0, 0), not on the cell's centre.

    Returns:
        [R, 4] float32 xyxy in pixels.
    """
    side = config.strides[level] * config.scale
    # One number per ratio, filled in rather than copied from the host: a copy would be
    # a transfer in every step.
    halves = [(0.5 * side / math.sqrt(r), 0.5 * side * math.sqrt(r)) for r in config.ratios]
    rows = [
        torch.stack([torch.full((), v, device=device) for v in (-w, -h, w, h)]) for w, h in halves
    ]
    return torch.stack(rows)


def grid_anchors(
    config: AnchorConfig, sizes: list[tuple[int, int]], device: torch.device
) -> list[Tensor]:
    """Anchors of every cell of every level.

    Args:
        config: strides, scale and ratios.
        sizes: height and width of each level, in cells.
        device: where to make them.

    Returns:
        L tensors [H_l * W_l * R, 4] float32 xyxy in pixels.
    """
    levels = []
    for level, ((height, width), stride) in enumerate(zip(sizes, config.strides, strict=True)):
        x = torch.arange(width, device=device, dtype=torch.float32) * stride
        y = torch.arange(height, device=device, dtype=torch.float32) * stride
        corner = torch.stack(
            [x.expand(height, width), y[:, None].expand(height, width)] * 2, dim=-1
        )
        anchors = corner[:, :, None] + base_anchors(config, level, device)
        levels.append(anchors.reshape(-1, 4))
    return levels


def inside(anchors: Tensor, size: Tensor) -> Tensor:
    """Which anchors lie strictly inside their image (`allowed_border=0`).

    Only these take part in the RPN's loss; proposals come from all.

    Args:
        anchors: [A, 4] xyxy.
        size: [B, 2] image height and width in pixels, without padding.

    Returns:
        [B, A] bool.
    """
    x1, y1, x2, y2 = anchors.unbind(-1)
    height, width = size[:, 0:1], size[:, 1:2]
    return (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)
