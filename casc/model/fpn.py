"""Feature pyramid network (Lin et al., 2017)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model.layers import Norm, Params, conv_module, new_conv_module, xavier_uniform

PREFIX = "neck"


@dataclass(frozen=True)
class FPNConfig:
    """The neck."""

    channels: int = 256
    """Channels of every level."""
    norm: Norm = "none"
    """After each convolution. gn: group norm, for training from scratch. ln: layer norm."""


def fpn(params: Params, config: FPNConfig, maps: list[Tensor]) -> list[Tensor]:
    """P2 to P6 from C2 to C5.

    Laterals are added top down with nearest upsampling to the exact size; no activation.
    P6 is every second cell of P5 and only serves the RPN.

    Args:
        params: weights by name.
        config: channels and norm.
        maps: 4 tensors [B, C_l, H_l, W_l], fine to coarse.

    Returns:
        5 tensors [B, channels, H_l, W_l], fine to coarse.
    """
    laterals = [
        conv_module(params, f"{PREFIX}.lateral_convs.{i}", x, padding=0, norm=config.norm)
        for i, x in enumerate(maps)
    ]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = add_upsampled(laterals[i - 1], laterals[i])
    levels = [
        conv_module(params, f"{PREFIX}.fpn_convs.{i}", x, padding=1, norm=config.norm)
        for i, x in enumerate(laterals)
    ]
    return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


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
    """Add fresh neck parameters: Xavier uniform, zero biases."""
    for i, channels in enumerate(in_channels):
        shape = (config.channels, channels, 1, 1)
        name = f"{PREFIX}.lateral_convs.{i}"
        new_conv_module(params, name, shape, xavier_uniform, generator, config.norm)
    for i in range(len(in_channels)):
        shape = (config.channels, config.channels, 3, 3)
        name = f"{PREFIX}.fpn_convs.{i}"
        new_conv_module(params, name, shape, xavier_uniform, generator, config.norm)
