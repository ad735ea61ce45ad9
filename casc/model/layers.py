"""Layers as functions: parameters by name in, tensors out.

A layer takes the flat dict of parameters and its own name; `name + ".weight"` is then a
key of the reference's state_dict. Parameters are stored in float32 and cast to the
activations' dtype where they are used, so the dtype of the input decides the precision.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from casc.ops.linear import linear as linear_product

Params = dict[str, Tensor]
Norm = Literal["none", "gn", "ln"]

BN_EPS = 1e-5
GN_GROUPS = 32
LN_EPS = 1e-6


def conv(params: Params, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution with an optional bias: [B, C, H, W] to [B, C', H', W']."""
    bias = params.get(f"{name}.bias")
    weight = cast(params[f"{name}.weight"], x.dtype)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Affine map: [N, C] to [N, C']."""
    weight = cast(params[f"{name}.weight"], x.dtype)
    return linear_product(x, weight, params[f"{name}.bias"].to(x.dtype))


def conv_frozen_bn(
    params: Params,
    buffers: Params,
    name: str,
    bn: str,
    x: Tensor,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Convolution and batch norm with fixed statistics, as one convolution.

    The norm's scale is folded into the weight: the same function and gradients (gamma and
    beta still train), without a pass over the activations.
    """
    scale = params[f"{bn}.weight"] * torch.rsqrt(buffers[f"{bn}.running_var"] + BN_EPS)
    weight = _rematerialised(_scaled, params[f"{name}.weight"], scale, x.dtype)
    bias = params[f"{bn}.bias"] - buffers[f"{bn}.running_mean"] * scale
    return F.conv2d(x, weight, bias.to(x.dtype), stride, padding)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the activations' dtype."""
    return weight if weight.dtype == dtype else _rematerialised(Tensor.to, weight, dtype)


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale[:, None, None, None]).to(dtype)


def _rematerialised(function: Callable[..., Tensor], *args: object) -> Tensor:
    """A weight made of parameters, which a compiler makes again for the backward pass.

    That is quicker than keeping it is dear. Eager, the layer that uses it keeps it anyway.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return recomputed(function, *args)
    return function(*args)


def recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function and keep nothing of its inside for the backward pass but its arguments.

    What the gradient needs is computed again there (Chen et al., 2016). Compiled, that is just
    what is needed; eager, it is all of the function.
    """
    result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def group_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Group normalisation (Wu & He, 2018) over at most 32 groups: [B, C, H, W], same shape."""
    channels = x.shape[1]
    weight, bias = params[f"{name}.weight"].to(x.dtype), params[f"{name}.bias"].to(x.dtype)
    return F.group_norm(x, math.gcd(GN_GROUPS, channels), weight, bias)


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Layer normalisation (Ba et al., 2016) over the channels of each cell: [B, C, H, W]."""
    weight, bias = params[f"{name}.weight"].to(x.dtype), params[f"{name}.bias"].to(x.dtype)
    x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, LN_EPS)
    return x.permute(0, 3, 1, 2)


def conv_module(params: Params, name: str, x: Tensor, padding: int, norm: Norm) -> Tensor:
    """A ConvModule of mmcv without its activation: `name.conv`, then `name.gn` or `name.ln`."""
    x = conv(params, f"{name}.conv", x, padding=padding)
    if norm == "gn":
        return group_norm(params, f"{name}.gn", x)
    return layer_norm(params, f"{name}.ln", x) if norm == "ln" else x


# What follows makes initial parameters: `fill` is one of torch.nn.init's functions with
# its options bound, and gets the run's generator.

Fill = Callable[[Tensor, torch.Generator], object]


def kaiming_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """He normal over fan-out, for layers that a ReLU follows."""
    nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)


def xavier_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Glorot uniform."""
    nn.init.xavier_uniform_(tensor, generator=generator)


def xavier_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """Glorot normal."""
    nn.init.xavier_normal_(tensor, generator=generator)


def normal_001(tensor: Tensor, generator: torch.Generator) -> None:
    """Normal with standard deviation 0.01."""
    nn.init.normal_(tensor, std=0.01, generator=generator)


def torch_default(tensor: Tensor, generator: torch.Generator) -> None:
    """What torch gives a new convolution: uniform in +-1/sqrt(fan-in)."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def new_weight(
    params: Params,
    name: str,
    shape: tuple[int, ...],
    fill: Fill,
    generator: torch.Generator,
    *,
    bias: int | None = None,
) -> None:
    """Add `name.weight` of `shape`, and `name.bias` of `bias` zeros unless None."""
    weight = torch.empty(shape)
    fill(weight, generator)
    params[f"{name}.weight"] = weight
    if bias is not None:
        params[f"{name}.bias"] = torch.zeros(bias)


def new_norm(params: Params, name: str, channels: int) -> None:
    """Add a norm's `name.weight` of ones and `name.bias` of zeros."""
    params[f"{name}.weight"] = torch.ones(channels)
    params[f"{name}.bias"] = torch.zeros(channels)


def new_conv_module(
    params: Params,
    name: str,
    shape: tuple[int, ...],
    fill: Fill,
    generator: torch.Generator,
    norm: Norm,
) -> None:
    """Add the parameters that `conv_module` reads; a norm takes the bias's place."""
    bias = shape[0] if norm == "none" else None
    new_weight(params, f"{name}.conv", shape, fill, generator, bias=bias)
    if norm != "none":
        new_norm(params, f"{name}.{norm}", shape[0])
