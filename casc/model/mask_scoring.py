"""How well a mask fits: the mask IoU head of Mask Scoring R-CNN (Huang et al., 2019).

A box's score says nothing of its mask. A small network sees a RoI's features beside its mask and
tells, for each class, the IoU that the mask has with the whole object's. That times the box's score
ranks masks; boxes keep their own.

In a cascade one head scores the masks that detections have: in training those of the last stage
with a mask head, at inference the mean of all stages'.

Legend: R RoIs, K classes, C channels, M mask cells per side, twice those of RoIAlign.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model.layers import (
    Params,
    conv,
    kaiming_normal,
    linear,
    new_weight,
    normal_001,
    xavier_uniform,
)
from casc.model.mask_head import MaskHeadConfig

PREFIX = "roi_head.mask_iou_head"
CONVS = 4
"""3x3 convolutions; the last one halves the sides."""
FCS = 2
WIDER = 4
"""Channels of the fully connected layers, in those of the convolutions."""
WEIGHT = 0.5
"""Of the loss, as in MMDetection."""


def mask_iou_head(params: Params, features: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """The IoU of each mask with its object, as far as the network can tell.

    Args:
        params: weights by name.
        features: [R, C, M / 2, M / 2], what the mask head saw.
        masks: [R, M, M] float32, probabilities.
        labels: [R] int64, whose class's prediction counts.

    Returns:
        [R] float32, which nothing keeps within 0 and 1.
    """
    # The greatest of 2x2 cells.
    cells = masks.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax(dim=(2, 4))
    x = torch.cat([features, cells[:, None].to(features.dtype)], dim=1)
    for i in range(CONVS):
        x = F.relu(conv(params, f"{PREFIX}.convs.{i}", x, 2 if i + 1 == CONVS else 1, padding=1))
    x = x.flatten(1)
    for i in range(FCS):
        x = F.relu(linear(params, f"{PREFIX}.fcs.{i}", x))
    every = linear(params, f"{PREFIX}.fc_mask_iou", x).float()
    # By a product, as in `mask_heads`: an index's gradient can't be repeated.
    chosen = labels[:, None] == torch.arange(every.shape[1], device=labels.device)
    return (every * chosen).sum(dim=1)


def mask_ious(logits: Tensor, goals: Tensor, whole: Tensor) -> Tensor:
    """The IoU of each mask, on where it is likelier than not, with the whole object's.

    A RoI may cut its object off, and what lies outside counts as well.

    Args:
        logits: [R, M, M] float32.
        goals: [R, M, M] bool, where the object is within the RoI.
        whole: [R] float32, the object's area, in cells of the RoI.

    Returns:
        [R] float32; 0 where both are empty.
    """
    on = logits > 0
    shared, inside = ((t & goals).sum(dim=(1, 2)) for t in (on, goals))
    union = on.sum(dim=(1, 2)) + torch.maximum(whole, inside) - shared
    return shared / union.clamp(min=1)


def mask_iou_loss(predicted: Tensor, ious: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error over valid RoIs whose mask meets its object, and over how many.

    Args:
        predicted: [R] float32.
        ious: [R] float32.
        valid: [R] bool.
    """
    counts = valid & (ious > 0)
    error = (predicted - ious).square() * counts
    return WEIGHT * error.sum(), counts.sum(dtype=torch.float32)


def init_mask_iou_head(
    config: MaskHeadConfig,
    classes: int,
    in_channels: int,
    params: Params,
    generator: torch.Generator,
) -> None:
    """Add fresh parameters: He normal convolutions, Glorot uniform layers, small last weights."""
    channels = in_channels + 1
    for i in range(CONVS):
        shape = (config.channels, channels, 3, 3)
        name = f"{PREFIX}.convs.{i}"
        new_weight(params, name, shape, kaiming_normal, generator, bias=config.channels)
        channels = config.channels
    side, wide = -(-config.cells // 2), WIDER * config.channels
    sides = [channels * side**2, *[wide] * FCS]
    for i in range(FCS):
        name, shape = f"{PREFIX}.fcs.{i}", (sides[i + 1], sides[i])
        new_weight(params, name, shape, xavier_uniform, generator, bias=wide)
    new_weight(
        params, f"{PREFIX}.fc_mask_iou", (classes, wide), normal_001, generator, bias=classes
    )
