"""Masked losses: sums over the entries that count; the caller divides.

Entries that don't count give exactly zero loss and gradient, whatever finite numbers they
hold, so a batch without a single object trains like any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of sigmoid cross-entropies where `mask` holds.

    Args:
        logits: [...] float32.
        targets: [...] bool or float32 in [0, 1].
        mask: broadcastable to [...], bool.

    Returns:
        Scalar float32.
    """
    loss = _BinaryCrossEntropy.apply(logits, targets.to(logits.dtype))
    return torch.where(mask, loss, 0.0).sum()


# torch's own function in its own terms, to the bit. torch_npu replaces the gradient of
# F.binary_cross_entropy_with_logits by an operator that no compiler can trace.
class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        return (1 - targets) * logits - F.logsigmoid(logits)

    @staticmethod
    def backward(ctx, *grads):
        logits, targets = ctx.saved_tensors
        return (logits.sigmoid() - targets) * grads[0], None


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Sum of softmax cross-entropies where `mask` holds.

    Args:
        logits: [N, C] float32.
        labels: [N] int64.
        mask: [N] bool.

    Returns:
        Scalar float32.
    """
    return torch.where(mask, F.cross_entropy(logits, labels, reduction="none"), 0.0).sum()


def smooth_l1(prediction: Tensor, target: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Sum over coordinates of the smooth L1 loss where `mask` holds (Fast R-CNN, eq. 3).

    Args:
        prediction: [..., 4] float32.
        target: [..., 4] float32.
        mask: [...] bool.
        beta: where the square turns into a line.

    Returns:
        Scalar float32.
    """
    difference = torch.where(mask[..., None], prediction - target, 0.0).abs()
    square = 0.5 * difference * difference / beta
    return torch.where(difference < beta, square, difference - 0.5 * beta).sum()
