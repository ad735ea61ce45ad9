"""One cascade stage for masks: a small fully convolutional network on each positive RoI.

The stages' masks are independent of each other: no stage feeds the next, so they need not
sit in the same graph as the boxes, and their RoIs can be packed over the whole batch.

Legend: B images, S sampled boxes per image, R mask RoIs over the batch, K classes, M mask
cells per side, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model import losses
from casc.model.box_head import RoiSample
from casc.model.layers import (
    Norm,
    Params,
    conv_module,
    kaiming_normal,
    new_conv_module,
    new_weight,
    torch_default,
)
from casc.model.mask_targets import bitmap_targets, polygon_targets
from casc.model.targets import Targets
from casc.ops.linear import linear

PREFIX = "roi_head.mask_head"


@dataclass(frozen=True)
class MaskHeadConfig:
    """The mask heads; all stages are alike."""

    cells: int = 14
    """RoIAlign cells per side; the mask has twice as many."""
    convs: int = 4
    """3x3 convolutions before the upsampling."""
    channels: int = 256
    """Their channels."""
    norm: Norm = "none"
    """After each convolution. gn: group norm, for training from scratch. ln: layer norm over
    channels, as in ViTDet."""
    stages: Literal["every", "first"] = "every"
    """Which cascade stages have a mask head. every: each its own, and masks are their mean. first:
    one alone, on the first stage's RoIs in training and on the final boxes at inference, as in
    Detectron2's cascade."""
    target: Literal["polygon", "bitmap"] = "polygon"
    """polygon: rasterised on the device from polygon edges.
    bitmap: the reference's way, from full-size bitmaps made by the loader."""
    capacity: Literal["auto", "counted", "full"] = "auto"
    """How many RoIs the mask heads run on. counted: the positives that the step really has,
    rounded up, for one device-to-host read per step. full: the most that there can be, no
    read. auto: full on accelerators, which needn't wait then, counted on a CPU."""


class MaskRois(NamedTuple):
    """Positive boxes of one stage, over the whole batch."""

    boxes: Tensor
    """[R, 4] xyxy."""
    image: Tensor
    """[R] int64 into B."""
    gt: Tensor
    """[R] int64 into the image's ground truth."""
    labels: Tensor
    """[R] int64 in [0, K)."""
    valid: Tensor
    """[R] bool."""


def mask_rois(rois: RoiSample, max_positive: int) -> MaskRois:
    """The slots of a stage's sample that can hold positives: R = B * max_positive."""
    boxes, gt, labels, positive = (
        t[:, :max_positive] for t in (rois.boxes, rois.gt, rois.labels, rois.positive)
    )
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(gt.shape)
    labels = torch.where(positive, labels, 0)
    flat = [t.flatten(0, 1) for t in (boxes, image, gt, labels, positive)]
    return MaskRois(*flat)


def pack(rois: MaskRois, capacity: int) -> MaskRois:
    """The first `capacity` RoIs once all valid ones are moved to the front, in order.

    The caller makes sure that no more than `capacity` are valid.
    """
    slots = rois.valid.shape[0]
    falling = torch.arange(slots, 0, -1, device=rois.valid.device)
    index = torch.where(rois.valid, falling, 0).topk(capacity).indices
    return MaskRois(*(t[index] for t in rois))


def stage_params(params: Params, stage: int) -> Params:
    """The parameters of one stage's head, named as if it were the first's.

    One compiled function then serves all stages.
    """
    own, first = f"{PREFIX}.{stage}.", f"{PREFIX}.0."
    return {first + k.removeprefix(own): v for k, v in params.items() if k.startswith(own)}


def mask_targets(config: MaskHeadConfig, rois: MaskRois, targets: Targets) -> Tensor:
    """Where each RoI's object is: [R, M, M] bool."""
    cells = 2 * config.cells
    if config.target == "bitmap":
        if targets.bitmaps is None:
            raise ValueError('mask_target "bitmap" needs Targets.bitmaps')
        return bitmap_targets(targets.bitmaps, rois.boxes, rois.image, rois.gt, cells)
    return polygon_targets(targets.edges, targets.edge_gt, rois.boxes, rois.image, rois.gt, cells)


def mask_head(
    params: Params, config: MaskHeadConfig, stage: int, features: Tensor, labels: Tensor | None
) -> Tensor:
    """Mask logits of each RoI, of its own class only unless `labels` is None.

    Args:
        params: weights by name.
        config: layers and norm.
        stage: which head.
        features: [R, C, cells, cells].
        labels: [R] int64, or None for all classes.

    Returns:
        [R, M, M] float32, or [R, K, M, M].
    """
    name = f"{PREFIX}.{stage}"
    x = features
    for i in range(config.convs):
        x = F.relu(conv_module(params, f"{name}.convs.{i}", x, padding=1, norm=config.norm))
    # The 2x2 transposed convolution of stride 2 is a matrix product: each cell becomes
    # four. As one, its bias gradient doesn't cost more than all the rest (on the CPU).
    rois, channels, height, width = x.shape
    weight = params[f"{name}.upsample.weight"].permute(0, 2, 3, 1)
    x = x.permute(0, 2, 3, 1).reshape(-1, channels)
    x = linear(x, weight.reshape(channels, -1).t().to(x.dtype), None)
    x = x.reshape(rois, height * width * 4, -1)
    x = F.relu(x + params[f"{name}.upsample.bias"].to(x.dtype))
    class_weight = params[f"{name}.conv_logits.weight"].flatten(1)
    class_bias = params[f"{name}.conv_logits.bias"]
    if labels is None:
        logits = F.linear(x, class_weight.to(x.dtype), class_bias.to(x.dtype)).float()
        logits = logits.reshape(rois, height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        return logits.reshape(rois, -1, 2 * height, 2 * width)
    # Picked by a product with ones and zeros, which is exact: the backward of an index would
    # add up RoIs of one class in whatever order threads come, and no run could be repeated.
    chosen = (labels[:, None] == torch.arange(len(class_bias), device=labels.device)).float()
    own = chosen @ torch.cat([class_weight, class_bias[:, None]], dim=1)
    logits = (x * own[:, None, :-1].to(x.dtype)).sum(-1, dtype=torch.float32)
    logits = (logits + own[:, -1:]).reshape(rois, height, width, 2, 2)
    return logits.permute(0, 1, 3, 2, 4).reshape(rois, 2 * height, 2 * width)


def mask_losses(
    logits: Sequence[Tensor], targets: Sequence[Tensor], valid: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Sigmoid cross-entropy over the cells of the valid RoIs of each of some stages.

    Args:
        logits: [R, M, M] float32.
        targets: [R, M, M] bool.
        valid: [R] bool.

    Returns:
        For each the sum, and the number of cells that it is over: scalars float32.
    """
    counts = [each.shape[0] for each in valid]
    each_cell = losses.binary_cross_entropies(
        torch.cat(list(logits)), torch.cat(list(targets)), torch.cat(list(valid))[:, None, None]
    )
    cells = logits[0].shape[1] * logits[0].shape[2]
    return [
        (part.sum(), (each.sum() * cells).to(torch.float32))
        for part, each in zip(each_cell.split(counts), valid, strict=True)
    ]


def init_mask_head(
    config: MaskHeadConfig,
    stage: int,
    classes: int,
    in_channels: int,
    params: Params,
    generator: torch.Generator,
) -> None:
    """Add fresh parameters of one stage.

    He normal convolutions; upsampling and logits keep torch's default, since the
    reference's own initialisation never reaches its mask heads.
    """
    name = f"{PREFIX}.{stage}"
    channels = in_channels
    for i in range(config.convs):
        shape = (config.channels, channels, 3, 3)
        new_conv_module(params, f"{name}.convs.{i}", shape, kaiming_normal, generator, config.norm)
        channels = config.channels
    for layer, shape, fan_in, out in (
        # For a transposed convolution torch counts the second axis as the inputs.
        ("upsample", (channels, config.channels, 2, 2), config.channels * 4, config.channels),
        ("conv_logits", (classes, config.channels, 1, 1), config.channels, classes),
    ):
        new_weight(params, f"{name}.{layer}", shape, torch_default, generator)
        bound = fan_in**-0.5
        params[f"{name}.{layer}.bias"] = torch.empty(out).uniform_(
            -bound, bound, generator=generator
        )
