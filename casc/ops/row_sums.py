"""Weighted sums of rows: what RoIAlign and the RPN's sampled head read features with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.device.devices import traits


# An operator of our own around embedding_bag: inside a compiled graph the generated code
# would write through an output that the CPU kernel leaves empty in bfloat16.
@torch.library.custom_op("casc::bag", mutates_args=())
def weighted_row_sums(pixels: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows, differentiable in the rows only.

    Args:
        pixels: [P, C].
        index: [N, T] int64 into P.
        weight: [N, T] of the pixels' dtype.

    Returns:
        [N, C].
    """
    return F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)


@weighted_row_sums.register_fake
def _(pixels: Tensor, index: Tensor, weight: Tensor):
    return pixels.new_empty((index.shape[0], pixels.shape[1]))


@torch.library.custom_op("casc::bag_backward", mutates_args=())
def bag_backward(grad: Tensor, index: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The gradient [P, C] of the pixels, of `rows` rows, from that of the bags [N, C]."""
    taps, dtype = index.shape[1], grad.dtype
    if not traits(grad.device).sorts_taps:
        # A tap at a time: all at once would take T times the memory.
        total = grad.new_zeros((rows, grad.shape[1]), dtype=torch.float32)
        grad, weight = grad.float(), weight.float()
        for tap in range(taps):
            total.index_add_(0, index[:, tap], grad * weight[:, tap, None])
        return total.to(dtype)
    # A pixel's gradient is a weighted sum of bags' rows, too. embedding_bag's own backward pass
    # adds in the rows' dtype, which costs bfloat16 a digit, and takes two to three times as long.
    pixel, tap = index.reshape(-1).sort(stable=True)
    first = torch.searchsorted(pixel, torch.arange(rows + 1, device=grad.device))
    return F.embedding_bag(
        tap // taps,
        grad.contiguous(),
        first,
        mode="sum",
        per_sample_weights=weight.reshape(-1).index_select(0, tap),
        include_last_offset=True,
    )


@bag_backward.register_fake
def _(grad: Tensor, index: Tensor, weight: Tensor, rows: int):
    return grad.new_empty((rows, grad.shape[1]))


def _bag_setup(ctx, inputs, output) -> None:
    pixels, index, weight = inputs
    ctx.save_for_backward(index, weight)
    ctx.rows = pixels.shape[0]


def _bag_grad(ctx, grad: Tensor):
    index, weight = ctx.saved_tensors
    return bag_backward(grad, index, weight, ctx.rows), None, None


weighted_row_sums.register_autograd(_bag_grad, setup_context=_bag_setup)


def chained_bags(pixels: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weighted_row_sums`, and the pixels again for the next reader.

    Each reader of a pyramid gives a gradient as large as the pyramid, and a compiler that sums
    them in one pass holds all of them at once. When each reader takes the pixels from the
    reader before it, the sum goes back through them in turn, and there are never more than two.
    """
    return _Chained.apply(pixels, index, weight)


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, index, weight):
        ctx.save_for_backward(index, weight)
        return weighted_row_sums(pixels, index, weight), pixels.view_as(pixels)

    @staticmethod
    def backward(ctx, *grads):
        grad, later = grads
        index, weight = ctx.saved_tensors
        return bag_backward_onto(later, grad.contiguous(), index, weight), None, None


@torch.library.custom_op("casc::bag_backward_onto", mutates_args=())
def bag_backward_onto(total: Tensor, grad: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`bag_backward` plus the gradient [P, C] of the readers that come later."""
    return bag_backward(grad, index, weight, total.shape[0]).add_(total)


@bag_backward_onto.register_fake
def _(total: Tensor, grad: Tensor, index: Tensor, weight: Tensor):
    return total.new_empty(total.shape)
