"""The backbones: each is a config and functions in a file of its own, chosen by the config's type.

Legend: B images, D places where paths are dropped.
"""

import torch
from torch import Tensor

from casc.model.layers import Cells, Params
from casc.model.resnet import (
    PREFIX,
    ResNetConfig,
    init_resnet,
    out_channels,
    resnet,
    resnet_layer,
    resnet_stage,
)
from casc.model.timm_backbone import (
    MOST_DROPS,
    TimmConfig,
    init_timm,
    timm_channels,
    timm_features,
    timm_layer,
    timm_stage,
)
from casc.model.vit import ViTConfig, init_vit, vit, vit_stage

Backbone = ResNetConfig | TimmConfig | ViTConfig


def feature_maps(
    params: Params,
    buffers: Params,
    config: Backbone,
    image: Tensor,
    drop: Tensor | None = None,
    cells: Cells | None = None,
) -> list[Tensor]:
    """What the neck reads: maps of strides 4, 8, 16 and 32, or a plain network's one of 16.

    Args:
        params: weights by name.
        buffers: statistics and tables by name.
        config: which network.
        image: [B, 3, H, W] normalised, H and W divisible by 32.
        drop: [B, D] float32, uniform noise that decides which paths are dropped; None drops none.
        cells: as for `group_norm`, of ResNets' norms.

    Returns:
        4 or 1 tensors [B, C_l, H / stride, W / stride].
    """
    match config:
        case ResNetConfig():
            return resnet(params, buffers, config, image, cells)
        case TimmConfig():
            return timm_features(params, buffers, config, image, drop)
        case ViTConfig():
            return [vit(params, config, image, drop)]


def init_backbone(
    config: Backbone,
    params: Params,
    buffers: Params,
    generator: torch.Generator,
    channels: int = 3,
) -> None:
    """Add fresh backbone parameters and buffers; `channels`, of images, are ResNets' choice."""
    match config:
        case ResNetConfig():
            init_resnet(config, params, buffers, generator, channels)
        case TimmConfig():
            init_timm(config, params, buffers, generator)
        case ViTConfig():
            init_vit(config, params, generator)


def map_channels(config: Backbone) -> list[int]:
    """Channels of each map.

    Raises:
        UserError: timm has no such network, or none that fits a detector.
    """
    match config:
        case ResNetConfig():
            return out_channels(config)
        case TimmConfig():
            return timm_channels(config)
        case ViTConfig():
            return [config.channels]


def drop_places(config: Backbone) -> int:
    """D, how many numbers per image decide which paths are dropped; there may be fewer paths."""
    match config:
        case TimmConfig() if config.drop_path:
            return MOST_DROPS
        case ViTConfig() if config.drop_path:
            return 2 * config.depth
        case _:
            return 0


def is_frozen(config: Backbone, name: str) -> bool:
    """Whether `frozen_stages` keeps this parameter from training."""
    if not name.startswith(f"{PREFIX}.") or config.frozen_stages < 0:
        return False
    match config:
        case ResNetConfig():
            stage = resnet_stage(name)
        case TimmConfig():
            stage = timm_stage(config, name)
        case ViTConfig():
            stage = vit_stage(name)
    return stage <= config.frozen_stages


def stage_count(config: Backbone) -> int:
    """How many stages there are to freeze, the stem not counted."""
    return config.depth if isinstance(config, ViTConfig) else 4


def layers_above(config: Backbone, names: list[str]) -> dict[str, int]:
    """How many layers of the backbone each of its parameters lies below the neck, from 1.

    A ViT's block is a layer; of other networks, so are three blocks of a stage. The stem is one.

    Args:
        config: which network.
        names: of parameters, among them all of the backbone's.
    """
    layers = {}
    for name in (name for name in names if name.startswith(f"{PREFIX}.")):
        match config:
            case ResNetConfig():
                layers[name] = resnet_layer(config, name)
            case TimmConfig():
                layers[name] = timm_layer(config, name)
            case ViTConfig():
                layers[name] = vit_stage(name)
    top = max(layers.values(), default=0)
    return {name: top + 1 - layer for name, layer in layers.items()}
