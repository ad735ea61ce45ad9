"""Masked losses: of the entries that count; the caller sums up and divides.

Entries that don't count give exactly zero loss and gradient, whatever finite numbers they
hold, so a batch without a single object trains like any other.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model.boxes import area

BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]


class LossSums(NamedTuple):
    """A batch's losses before any division, and what else is measured of it.

    What the sums are divided by is the caller's to choose: this batch's counts, or those of
    several batches (see `mean_losses`).
    """

    sums: dict[str, Tensor]
    """Scalar float32 by name, over all samples of the batch, weighted, with gradient."""
    counts: dict[str, Tensor]
    """Scalar float32 under the same names: how many samples each sum has, 0 if none."""
    measures: dict[str, Tensor]
    """Scalar float32 by name: what isn't learnt from."""


def join(*parts: LossSums) -> LossSums:
    """The losses and measures of several parts, in their order."""
    columns = zip(*parts, strict=True)
    return LossSums(*({k: v for part in column for k, v in part.items()} for column in columns))


def add_prefix(prefix: str, found: LossSums) -> LossSums:
    """The same losses and measures under names that begin with `prefix`."""
    return LossSums(*({prefix + name: v for name, v in column.items()} for column in found))


def loss_counts(found: LossSums) -> Tensor:
    """The number of samples of each loss, `[losses]` float32."""
    return torch.stack(list(found.counts.values())).detach()


def mean_losses(found: LossSums, counts: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Divide the losses of a batch; their sum is what training lowers.

    Args:
        found: of the batch.
        counts: `[losses]` float32, what to divide by, positive; by default the batch's own,
            or 1 where it has no sample.

    Returns:
        The scalar to differentiate, and all losses and measures by name, detached.
    """
    if counts is None:
        counts = loss_counts(found).clamp(min=1)
    means = torch.stack(list(found.sums.values())) / counts
    shown = dict(zip(found.sums, means.detach().unbind(), strict=True))
    return means.sum(), shown | {name: v.detach() for name, v in found.measures.items()}


def binary_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of sigmoid cross-entropies where `mask` holds.

    Args:
        logits: [...] float32.
        targets: [...] bool or float32 in [0, 1].
        mask: broadcastable to [...], bool.

    Returns:
        Scalar float32.
    """
    return binary_cross_entropies(logits, targets, mask).sum()


def binary_cross_entropies(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """What `binary_cross_entropy` sums: [...] float32, 0 where `mask` doesn't hold."""
    return _BinaryCrossEntropy.apply(logits, targets.to(logits.dtype)) * mask


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


def cross_entropies(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Softmax cross-entropies, 0 where `mask` doesn't hold.

    Args:
        logits: [N, C] float32.
        labels: [N] int64.
        mask: [N] bool.

    Returns:
        [N] float32.
    """
    return F.cross_entropy(logits, labels, reduction="none") * mask


def smooth_l1(prediction: Tensor, target: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The smooth L1 loss of each coordinate (Fast R-CNN, eq. 3), 0 where `mask` doesn't hold.

    Args:
        prediction: [..., 4] float32.
        target: [..., 4] float32.
        mask: [...] bool.
        beta: where the square turns into a line.

    Returns:
        [..., 4] float32.
    """
    loss = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    return loss * mask[..., None]


def iou_loss(
    kind: BoxLoss, prediction: Tensor, target: Tensor, mask: Tensor, eps: float = 1e-7
) -> Tensor:
    """1 - GIoU, DIoU or CIoU of each box, 0 where `mask` doesn't hold.

    Generalized IoU (Rezatofighi et al., 2019) subtracts the share of the enclosing box that is
    in neither; Distance-IoU (Zheng et al., 2020) the squared distance of the centres over the
    squared diagonal of the enclosing box; Complete-IoU, of the same paper, a penalty on the
    aspect ratio as well, whose weight has no gradient.

    Args:
        kind: giou, diou or ciou.
        prediction: [..., 4] float32 xyxy in pixels.
        target: [..., 4] float32 xyxy in pixels.
        mask: [...] bool.
        eps: added to what is divided by.

    Returns:
        [...] float32.
    """
    # Padded rows become the unit square, whose loss and gradient are finite. It is computed: a
    # list would be copied to the device at every step.
    unit = (torch.arange(4, device=target.device) >= 2).to(target.dtype)
    a, b = (torch.where(mask[..., None], boxes, unit) for boxes in (prediction, target))
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    union = area(a) + area(b) - intersection
    iou = intersection / (union + eps)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    if kind == "giou":
        enclosing = around.prod(dim=-1)
        loss = 1 - iou + (enclosing - union) / (enclosing + eps)
    else:
        apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) * 0.5
        loss = 1 - iou + apart.square().sum(-1) / (around.square().sum(-1) + eps)
    if kind == "ciou":
        ours, theirs = (
            torch.atan((x[..., 2] - x[..., 0]) / (x[..., 3] - x[..., 1])) for x in (a, b)
        )
        shape = 4 / math.pi**2 * (theirs - ours).square()
        loss = loss + (shape / (1 - iou + shape + eps)).detach() * shape
    return loss * mask
