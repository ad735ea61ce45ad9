"""Affine maps. On the CPU and in float32, by oneDNN.

torch multiplies float32 matrices on the CPU with MKL, which runs at half the speed of the
convolutions (oneDNN's) on processors of other makers: for [1024, 12544] x [12544, 1024] on
two Zen cores 177 against 330 GFLOP/s, forward and backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available()
# Smaller weights stay with torch. The number of rows has no say: where it differs from call
# to call, a branch on it would be compiled once for either way.
WORTH_IT = 2**16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X @ weight.T + bias.

    Args:
        x: [N, C].
        weight: [C', C] of the same dtype.
        bias: [C'] or None.

    Returns:
        [N, C'].
    """
    return _linear(x, weight, bias) if _by_onednn(x, weight) else F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without a gradient, for the inside of an operator."""
    if _by_onednn(x, weight):
        # What torch's own compiler calls for a linear layer whose weight it may prepack.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    large = weight.numel() >= WORTH_IT
    return x.is_cpu and x.dtype == torch.float32 and large and ONEDNN


@torch.library.custom_op("casc::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("casc::linear_backward", mutates_args=(), device_types="cpu")
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return product(grad, weight.t()), product(grad.t(), x.t())


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _grad(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    x_grad, weight_grad = _backward(grad.contiguous(), x, weight)
    return x_grad, weight_grad, grad.sum(dim=0) if ctx.has_bias else None


_linear.register_autograd(_grad, setup_context=_setup)
