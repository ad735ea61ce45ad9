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
    scoring: bool = False
    """Tell each mask's IoU with its object as well, by a head of its own (Mask Scoring R-CNN):
    masks are ranked by the box's score times that, boxes as without it. In training mask heads then
    run on as many RoIs as there can be."""
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


def mask_rois(samples: Sequence[RoiSample], max_positive: int) -> list[MaskRois]:
    """The slots of stages' samples that can hold positives: R = B * max_positive of each."""
    boxes, gt, labels, positive = (
        torch.stack([getattr(rois, name)[:, :max_positive] for rois in samples])
        for name in ("boxes", "gt", "labels", "positive")
    )
    image = torch.arange(gt.shape[1], device=boxes.device)[:, None].expand(gt.shape[1:])
    columns = [t.flatten(1, 2) for t in (boxes, gt, labels * positive, positive)]
    image = image.flatten()
    return [MaskRois(each[0], image, *each[1:]) for each in zip(*columns, strict=True)]


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
    return polygon_targets(
        targets.edges, targets.edge_gt, rois.boxes, rois.image, rois.gt, cells, targets.pasted,
        targets.boxes.shape[1] // 2,
    )  # fmt: skip


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
    if labels is not None:
        return mask_heads(params, config, [stage], [features], [labels])[0]
    x = _upsampled(params, config, [stage], [features])[0]
    name = f"{PREFIX}.{stage}.conv_logits"
    weight, bias = params[f"{name}.weight"].flatten(1), params[f"{name}.bias"]
    logits = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float()
    height, width = features.shape[2:]
    logits = logits.reshape(-1, height, width, 2, 2, len(bias)).permute(0, 5, 1, 3, 2, 4)
    return logits.reshape(-1, len(bias), 2 * height, 2 * width)


def mask_heads(
    params: Params,
    config: MaskHeadConfig,
    stages: Sequence[int],
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> Tensor:
    """What `mask_head` gives of some stages, each with as many RoIs, in one pass.

    What follows the convolutions is launched for all heads at once.

    Args:
        params: weights by name.
        config: layers and norm.
        stages: which heads.
        features: [R, C, cells, cells] of each.
        labels: [R] int64 of each.

    Returns:
        [stages, R, M, M] float32.
    """
    x = _upsampled(params, config, stages, features)
    names = [f"{PREFIX}.{stage}.conv_logits" for stage in stages]
    table = _stack(
        [
            torch.cat([params[f"{n}.weight"].flatten(1), params[f"{n}.bias"][:, None]], dim=1)
            for n in names
        ]
    )
    # Picked by a product with ones and zeros, which is exact: the backward of an index would
    # add up RoIs of one class in whatever order threads come, and no run could be repeated.
    every = torch.arange(table.shape[1], device=table.device)
    chosen = (_stack(labels)[..., None] == every).to(table.dtype)
    weight, bias = torch.bmm(chosen, table).split([table.shape[2] - 1, 1], dim=2)
    logits = (x * weight[:, :, None].to(x.dtype)).sum(-1, dtype=torch.float32) + bias
    height, width = features[0].shape[2:]
    logits = logits.unflatten(2, (height, width, 2, 2)).transpose(3, 4)
    return logits.reshape(*logits.shape[:2], 2 * height, 2 * width)


def _upsampled(
    params: Params, config: MaskHeadConfig, stages: Sequence[int], features: Sequence[Tensor]
) -> Tensor:
    """[stages, R, cells * cells * 4, C']: all but the last layer, four new cells from each."""
    found = []
    for stage, x in zip(stages, features, strict=True):
        for i in range(config.convs):
            name = f"{PREFIX}.{stage}.convs.{i}"
            x = F.relu(conv_module(params, name, x, padding=1, norm=config.norm))
        found.append(x.permute(0, 2, 3, 1).flatten(0, 2))
    # The 2x2 transposed convolution of stride 2 is a matrix product: each cell becomes
    # four. As one, its bias gradient doesn't cost more than all the rest (on the CPU).
    x, names = _stack(found), [f"{PREFIX}.{stage}.upsample" for stage in stages]
    weight = _stack([params[f"{n}.weight"].permute(0, 2, 3, 1).flatten(1) for n in names])
    weight, bias = weight.to(x.dtype), _stack([params[f"{n}.bias"] for n in names]).to(x.dtype)
    # A layer by itself may have a better kernel than a batch of one.
    x = torch.bmm(x, weight) if stages[1:] else linear(x[0], weight[0].t(), None)[None]
    x = x.reshape(len(stages), len(features[0]), -1, bias.shape[1])
    return F.relu(x + bias[:, None, None])


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy of a single one."""
    return torch.stack(list(parts)) if parts[1:] else parts[0][None]


def mask_losses(logits: Tensor, targets: Tensor, valid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sigmoid cross-entropy over the cells of the valid RoIs of each of some stages.

    Args:
        logits: [stages, R, M, M] float32.
        targets: [stages, R, M, M] bool.
        valid: [stages, R] bool.

    Returns:
        For each the sum, and the number of cells that it is over: scalars float32.
    """
    loss = losses.binary_cross_entropies(logits, targets, valid[..., None, None])
    cells = valid.sum(dim=1) * (logits.shape[2] * logits.shape[3])
    sums = loss.sum(dim=(1, 2, 3))
    return list(zip(sums.unbind(), cells.to(torch.float32).unbind(), strict=True))


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
