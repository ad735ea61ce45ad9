"""Which model a set of tensors is of, from their names and shapes."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from casc.errors import UserError
from casc.model import detector
from casc.model.box_head import PREFIX as BOX
from casc.model.box_head import BoxHeadConfig, StageConfig
from casc.model.detector_config import DetectorConfig
from casc.model.fpn import PREFIX as NECK
from casc.model.fpn import FPNConfig
from casc.model.layers import Norm
from casc.model.mask_head import PREFIX as MASK
from casc.model.mask_head import MaskHeadConfig
from casc.model.mask_scoring import PREFIX as SCORING
from casc.model.resnet import BLOCKS, PREFIX, ResNetConfig
from casc.model.rpn import PREFIX as RPN

BATCHES = "num_batches_tracked"


def backbone_of(tensors: Mapping[str, Tensor], source: str) -> ResNetConfig:
    """The ResNet of casc's (and the reference's) names.

    Raises:
        UserError: there is none, or one of another make.
    """
    blocks = tuple(_count(tensors, f"{PREFIX}.layer{stage}.") for stage in range(1, 5))
    bottleneck = f"{PREFIX}.layer1.0.conv3.weight" in tensors
    depths = [d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    stem = tensors.get(f"{PREFIX}.conv1.weight")
    if not depths or stem is None or stem.dim() != 4:
        raise UserError(f"{source}: not the weights of a Cascade Mask R-CNN with a ResNet")
    depth: Any = depths[0]
    norm = "gn" if f"{PREFIX}.gn1.weight" in tensors else "frozen_bn"
    return ResNetConfig(depth=depth, norm=norm, width=stem.shape[0])


def model_of(tensors: Mapping[str, Tensor], source: str) -> DetectorConfig:
    """The detector of casc's names; what shapes don't tell is as in the reference.

    Raises:
        UserError: it isn't a Cascade Mask R-CNN that casc has.
    """
    for name, value in tensors.items():
        if not value.numel() or value.layout != torch.strided:
            raise UserError(f"{source}: {name!r} is empty or sparse, which no weight is")
    backbone = backbone_of(tensors, source)
    try:
        config = _heads(tensors, backbone)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"{source}: not the weights of a Cascade Mask R-CNN with a ResNet"
        ) from None
    for name, shape in expected(config, image_channels(tensors)).items():
        found = tensors.get(name)
        if found is None and not name.endswith(BATCHES):
            raise UserError(f"{source}: {name!r} is missing")
        if found is not None and found.shape != shape:
            raise UserError(
                f"{source}: {name!r} is {list(found.shape)}, casc's model has {list(shape)} there"
                + _hint(name, found.shape)
            )
    return config


def image_channels(tensors: Mapping[str, Tensor]) -> int:
    """How many channels the images have that a detector of casc's names was made for."""
    stem = tensors.get(f"{PREFIX}.conv1.weight")
    return 3 if stem is None or stem.dim() != 4 else stem.shape[1]


@cache
def expected(config: DetectorConfig, channels: int = 3) -> Mapping[str, torch.Size]:
    """The shape of every tensor of a model, parameters and buffers, by name."""
    with torch.device("meta"):
        params, buffers = detector.init(config, None, channels)  # type: ignore[arg-type]
    return {name: value.shape for name, value in (params | buffers).items()}


def _heads(tensors: Mapping[str, Tensor], backbone: ResNetConfig) -> DetectorConfig:
    reference = DetectorConfig()
    channels = tensors[f"{NECK}.fpn_convs.0.conv.weight"].shape[0]
    fc = tensors[f"{BOX}.0.shared_fcs.0.weight"]
    anchors = tensors[f"{RPN}.rpn_cls.weight"].shape[0]
    classes = tensors[f"{BOX}.0.fc_cls.weight"].shape[0] - 1
    if anchors != len(reference.anchors.ratios) or classes < 1:
        raise ValueError(f"{anchors} anchors in each cell, {classes} classes")
    if not any(name.startswith(f"{MASK}.") for name in tensors):
        reference = replace(reference, masks="none")
    else:
        mask_head = MaskHeadConfig(
            convs=_count(tensors, f"{MASK}.0.convs."),
            channels=tensors[f"{MASK}.0.upsample.weight"].shape[1],
            norm=_norm(tensors, f"{MASK}.0.convs.0"),
            scoring=f"{SCORING}.fc_mask_iou.weight" in tensors,
        )
        reference = replace(reference, mask_head=mask_head)
    return replace(
        reference,
        classes=classes,
        backbone=backbone,
        fpn=FPNConfig(channels, _norm(tensors, f"{NECK}.fpn_convs.0")),
        rpn=replace(reference.rpn, channels=tensors[f"{RPN}.rpn_conv.weight"].shape[0]),
        stages=_stages(reference.stages, _count(tensors, f"{BOX}.")),
        box_head=BoxHeadConfig(channels=fc.shape[0], cells=isqrt(fc.shape[1] // channels)),
    )


def _stages(known: tuple[StageConfig, ...], count: int) -> tuple[StageConfig, ...]:
    if not 1 <= count <= len(known):
        raise ValueError(f"{count} stages")
    return known[:count]


def _norm(tensors: Mapping[str, Tensor], module: str) -> Norm:
    return "gn" if f"{module}.gn.weight" in tensors else "none"


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different parts follow a prefix."""
    return len({n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)})


def _hint(name: str, shape: torch.Size) -> str:
    if name.endswith(("fc_reg.weight", "fc_reg.bias")) and shape[0] > 4:
        return "; it regresses a box per class, where casc's heads share one over all classes"
    if ".layer" in name and ".conv2." in name:
        return "; grouped (ResNeXt) convolutions aren't there"
    return ""
