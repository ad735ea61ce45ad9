"""ResNet (He et al., 2016).

Names are mmdet's and torchvision's with a prefix: `backbone.layer1.0.conv1.weight`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model.layers import (
    Affine,
    Cells,
    Params,
    conv,
    conv_affine,
    fold_rows,
    fold_together,
    folds_rows,
    frozen_norms,
    gathers_gradients,
    group_norm,
    kaiming_normal,
    new_norm,
    new_weight,
    recomputed,
)

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BOTTLENECK_EXPANSION = 4
PREFIX = "backbone"
LAYER_BLOCKS = 3
"""Blocks of a stage that share a layer's learning rate, as ConvNeXt's authors (Liu et al., 2022)
have it for detection."""


@dataclass(frozen=True)
class ResNetConfig:
    """The backbone."""

    depth: Literal[18, 34, 50, 101, 152] = 50
    """Layers. 18 and 34 have basic blocks, the others bottlenecks."""
    norm: Literal["frozen_bn", "gn"] = "frozen_bn"
    """frozen_bn: batch norm with fixed statistics, for pretrained weights.
    gn: group norm, for training from scratch."""
    frozen_stages: int = 1
    """-1 trains everything, 0 freezes the stem, n the stem and the first n stages."""
    width: int = 64
    """Channels of the stem; 64 is the published network."""
    stride_in_1x1: bool = False
    """Where a bottleneck's stride sits. False: in the 3x3 convolution, as in torchvision's weights
    (the "pytorch" style). True: in the first 1x1, as in the paper and in weights made with Caffe
    and Detectron (the "caffe" style)."""
    recompute: bool = False
    """Keep only the input of each block that trains, and compute the rest again in the backward
    pass: less memory for larger batches, and slower. Changes no number."""


def out_channels(config: ResNetConfig) -> list[int]:
    """Channels of C2 to C5."""
    expansion = BOTTLENECK_EXPANSION if _is_bottleneck(config) else 1
    return [config.width * 2**stage * expansion for stage in range(4)]


def resnet(
    params: Params,
    buffers: Params,
    config: ResNetConfig,
    image: Tensor,
    cells: Cells | None = None,
) -> list[Tensor]:
    """Feature maps C2 to C5.

    Args:
        params: weights by name.
        buffers: batch norm statistics by name.
        config: which network.
        image: [B, C, H, W] normalised, H and W divisible by 32.
        cells: as for `group_norm`.

    Returns:
        4 tensors [B, C_l, H / 2**l, W / 2**l] for l = 2..5.

    Raises:
        ValueError: `stride_in_1x1` for basic blocks, which have no such convolution.
    """
    if config.stride_in_1x1 and not _is_bottleneck(config):
        raise ValueError(f"stride_in_1x1: the blocks of ResNet-{config.depth} have no 1x1")
    norms: Affine = {}
    if config.norm == "frozen_bn" and gathers_gradients(image):
        params, norms = fold_together(params, buffers, _convs(buffers), image.dtype)
    elif config.norm == "frozen_bn" and folds_rows(image):
        params, norms = fold_rows(params, buffers, _convs(buffers), image.dtype)
    elif config.norm == "frozen_bn":
        norms = frozen_norms(params, buffers, image.dtype)
    x = _conv_norm(params, norms, config, cells, PREFIX, "conv1", 1, image, stride=2, padding=3)
    x = F.max_pool2d(F.relu(x), kernel_size=3, stride=2, padding=1)
    block = _bottleneck if _is_bottleneck(config) else _basic_block
    maps = []
    for stage, count in enumerate(BLOCKS[config.depth]):
        for index in range(count):
            stride = 2 if index == 0 and stage > 0 else 1
            name = f"{PREFIX}.layer{stage + 1}.{index}"
            if config.recompute and torch.is_grad_enabled() and stage >= config.frozen_stages:
                x = recomputed(block, params, norms, config, cells, name, x, stride)
            else:
                x = block(params, norms, config, cells, name, x, stride)
        maps.append(x)
    return maps


def resnet_stage(name: str) -> int:
    """The stage of a parameter of the backbone, 0 being the stem."""
    if not name.startswith(f"{PREFIX}.layer"):
        return 0
    return int(name.removeprefix(f"{PREFIX}.layer")[0])


def resnet_layer(config: ResNetConfig, name: str) -> int:
    """The layer of a parameter of the backbone, 0 being the stem: three blocks of a stage each."""
    stage = resnet_stage(name)
    if stage == 0:
        return 0
    below = sum(-(-count // LAYER_BLOCKS) for count in BLOCKS[config.depth][: stage - 1])
    return below + 1 + int(name.split(".")[2]) // LAYER_BLOCKS


def init_resnet(
    config: ResNetConfig,
    params: Params,
    buffers: Params,
    generator: torch.Generator,
    image_channels: int = 3,
) -> None:
    """Add fresh backbone parameters: He normal convolutions, identity norms."""
    expansion = BOTTLENECK_EXPANSION if _is_bottleneck(config) else 1

    def add(name: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        new_weight(params, name, shape, kaiming_normal, generator)
        new_norm(params, norm, shape[0])
        if config.norm == "frozen_bn":
            buffers[f"{norm}.running_mean"] = torch.zeros(shape[0])
            buffers[f"{norm}.running_var"] = torch.ones(shape[0])
            buffers[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.long)

    tag = _norm_tag(config)
    add(f"{PREFIX}.conv1", f"{PREFIX}.{tag}1", (config.width, image_channels, 7, 7))
    channels = config.width
    for stage, count in enumerate(BLOCKS[config.depth]):
        width = config.width * 2**stage
        for index in range(count):
            name = f"{PREFIX}.layer{stage + 1}.{index}"
            if _is_bottleneck(config):
                shapes = [(width, channels, 1, 1), (width, width, 3, 3), (width * 4, width, 1, 1)]
            else:
                shapes = [(width, channels, 3, 3), (width, width, 3, 3)]
            for i, shape in enumerate(shapes, start=1):
                add(f"{name}.conv{i}", f"{name}.{tag}{i}", shape)
            if index == 0 and (stage > 0 or channels != width * expansion):
                shape = (width * expansion, channels, 1, 1)
                add(f"{name}.downsample.0", f"{name}.downsample.1", shape)
            channels = width * expansion


def _bottleneck(
    params: Params,
    norms: Affine,
    config: ResNetConfig,
    cells: Cells | None,
    name: str,
    x: Tensor,
    stride: int,
) -> Tensor:
    first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
    y = F.relu(_conv_norm(params, norms, config, cells, name, "conv1", 1, x, first))
    y = F.relu(_conv_norm(params, norms, config, cells, name, "conv2", 2, y, second, padding=1))
    y = _conv_norm(params, norms, config, cells, name, "conv3", 3, y)
    return F.relu(y + _shortcut(params, norms, config, cells, name, x, stride))


def _basic_block(
    params: Params,
    norms: Affine,
    config: ResNetConfig,
    cells: Cells | None,
    name: str,
    x: Tensor,
    stride: int,
) -> Tensor:
    y = F.relu(_conv_norm(params, norms, config, cells, name, "conv1", 1, x, stride, padding=1))
    y = _conv_norm(params, norms, config, cells, name, "conv2", 2, y, padding=1)
    return F.relu(y + _shortcut(params, norms, config, cells, name, x, stride))


def _shortcut(
    params: Params,
    norms: Affine,
    config: ResNetConfig,
    cells: Cells | None,
    name: str,
    x: Tensor,
    stride: int,
) -> Tensor:
    if f"{name}.downsample.0.weight" not in params:
        return x
    if config.norm == "gn":
        y = conv(params, f"{name}.downsample.0", x, stride)
        return group_norm(params, f"{name}.downsample.1", y, cells)
    affine = norms[f"{name}.downsample.1"]
    return conv_affine(params, f"{name}.downsample.0", affine, x, stride)


def _conv_norm(
    params: Params,
    norms: Affine,
    config: ResNetConfig,
    cells: Cells | None,
    name: str,
    conv_name: str,
    norm_index: int,
    x: Tensor,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    norm = f"{name}.{_norm_tag(config)}{norm_index}"
    if config.norm == "gn":
        x = conv(params, f"{name}.{conv_name}", x, stride, padding)
        return group_norm(params, norm, x, cells)
    return conv_affine(params, f"{name}.{conv_name}", norms[norm], x, stride, padding)


def _convs(buffers: Params) -> dict[str, str]:
    """The convolution in front of each norm."""
    norms = [name.rpartition(".")[0] for name in buffers if name.endswith(".running_var")]
    shortcut = ".downsample.1"
    return {
        n: n.removesuffix("1") + "0" if n.endswith(shortcut) else "conv".join(n.rsplit("bn", 1))
        for n in norms
    }


def _norm_tag(config: ResNetConfig) -> str:
    return "gn" if config.norm == "gn" else "bn"


def _is_bottleneck(config: ResNetConfig) -> bool:
    return config.depth >= 50
