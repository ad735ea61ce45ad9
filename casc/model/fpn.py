"""The neck: a feature pyramid network (Lin et al., 2017), or ViTDet's simple pyramid (Li et al.,
2022) where the backbone has one map only.

Names of the simple pyramid are those of MMDetection's SimpleFPN: `neck.fpn1.0.weight`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model.layers import (
    Cells,
    Norm,
    Params,
    conv_module,
    layer_norm,
    new_conv_module,
    new_norm,
    new_weight,
    torch_default,
    xavier_uniform,
)
from casc.ops.linear import linear as linear_product

PREFIX = "neck"


@dataclass(frozen=True)
class FPNConfig:
    """The neck."""

    channels: int = 256
    """Channels of every level."""
    norm: Norm = "none"
    """After each convolution. gn: group norm, for training from scratch. ln: layer norm."""


def fpn(
    params: Params, config: FPNConfig, maps: list[Tensor], cells: Cells | None = None
) -> list[Tensor]:
    """P2 to P6 from C2 to C5, or from a plain network's one map by `simple_pyramid`.

    Laterals are added top down with nearest upsampling to the exact size; no activation.
    P6 is every second cell of P5 and only serves the RPN.

    Args:
        params: weights by name.
        config: channels and norm.
        maps: 4 tensors [B, C_l, H_l, W_l], fine to coarse; or one [B, C, H / 16, W / 16].
        cells: as for `group_norm`.

    Returns:
        5 tensors [B, channels, H_l, W_l], fine to coarse.
    """
    plain = len(maps) == 1
    if plain:
        maps = simple_pyramid(params, maps[0])
    laterals = [
        conv_module(
            params, f"{PREFIX}.lateral_convs.{i}", x, padding=0, norm=config.norm, cells=cells
        )
        for i, x in enumerate(maps)
    ]
    for i in range(0 if plain else len(laterals) - 1, 0, -1):
        laterals[i - 1] = add_upsampled(laterals[i - 1], laterals[i])
    levels = [
        conv_module(params, f"{PREFIX}.fpn_convs.{i}", x, padding=1, norm=config.norm, cells=cells)
        for i, x in enumerate(laterals)
    ]
    return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


def simple_pyramid(params: Params, x: Tensor) -> list[Tensor]:
    """Maps of strides 4, 8, 16 and 32 from one of stride 16: [B, C, H / 16, W / 16].

    Transposed convolutions make the finer ones, with C / 4 and C / 2 channels, and pooling the
    coarser one.
    """
    half = layer_norm(params, f"{PREFIX}.fpn1.1", _doubled(params, f"{PREFIX}.fpn1.0", x))
    # By rows, as they lie: for a view with its channels last torch would make a result of that
    # memory format, which NPUs refuse.
    half = F.gelu(half.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return [
        _doubled(params, f"{PREFIX}.fpn1.3", half),
        _doubled(params, f"{PREFIX}.fpn2.0", x),
        x,
        F.max_pool2d(x, kernel_size=2, stride=2),
    ]


def _doubled(params: Params, name: str, x: Tensor) -> Tensor:
    """A 2x2 transposed convolution of stride 2, which is a matrix product: [B, C', 2 H, 2 W]."""
    batch, channels, height, width = x.shape
    weight = params[f"{name}.weight"].permute(0, 2, 3, 1).reshape(channels, -1)
    x = linear_product(x.permute(0, 2, 3, 1).reshape(-1, channels), weight.t().to(x.dtype), None)
    x = x.view(batch, height, width, 2, 2, -1) + params[f"{name}.bias"].to(x.dtype)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """The coarse level by nearest upsampling on top of the finer one: [B, C, H, W] as `fine`.

    Where sides are doubled, as on every canvas, one sum repeats each cell, and its gradient has a
    fixed order; interpolate's backward on CUDA adds in whatever order threads come.
    """
    height, width = coarse.shape[2:]
    if fine.shape[2:] != (2 * height, 2 * width):
        return fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest")
    blocks = fine.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    return (blocks + coarse[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)


def init_fpn(
    config: FPNConfig, in_channels: list[int], params: Params, generator: torch.Generator
) -> None:
    """Add fresh neck parameters: Xavier uniform, zero biases; one map gets a simple pyramid."""
    if len(in_channels) == 1:
        width = in_channels[0]
        for part, given, made in (
            ("fpn1.0", width, width // 2), ("fpn1.3", width // 2, width // 4),
            ("fpn2.0", width, width // 2),
        ):  # fmt: skip
            shape = (given, made, 2, 2)
            new_weight(params, f"{PREFIX}.{part}", shape, torch_default, generator, bias=made)
        new_norm(params, f"{PREFIX}.fpn1.1", width // 2)
        in_channels = [width // 4, width // 2, width, width]
    for i, channels in enumerate(in_channels):
        shape = (config.channels, channels, 1, 1)
        name = f"{PREFIX}.lateral_convs.{i}"
        new_conv_module(params, name, shape, xavier_uniform, generator, config.norm)
    for i in range(len(in_channels)):
        shape = (config.channels, config.channels, 3, 3)
        name = f"{PREFIX}.fpn_convs.{i}"
        new_conv_module(params, name, shape, xavier_uniform, generator, config.norm)
