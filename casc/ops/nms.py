"""Non-maximum suppression with an output of fixed size.

torchvision's operator returns as many boxes as survive, so its result's shape depends
on the data. Here it is wrapped in an operator of our own whose result is padded: the
compiler sees fixed shapes, and the host reads nothing on the CPU. On an accelerator it
would read per image, so there `fixed_nms` does the same by a fixed number of launches, and
`nms_triton`, where there is Triton, by two.

Legend: B images, N boxes, K kept.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from casc.ops.fixed_nms import fixed_nms

NmsKernel = Literal["auto", "greedy", "fixed", "triton"]

# On the CPU each survivor meets all boxes in turn: from so many on, one group at a time is faster.
MANY = 1000


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    group: Tensor,
    valid: Tensor,
    *,
    iou: float,
    count: int,
    groups: int = 1,
    largest: int | None = None,
    lengths: Sequence[int] | None = None,
    kernel: NmsKernel = "auto",
) -> tuple[Tensor, Tensor]:
    """Suppress within groups (levels or classes), best score first.

    Groups are kept apart by shifting each by (largest coordinate + 1) pixels, as mmcv
    does; the shifted coordinates' rounding is part of the reference's numbers.

    Args:
        boxes: [B, N, 4] float32 xyxy.
        scores: [B, N] float32.
        group: [N] or [B, N] int64.
        valid: [B, N] bool; invalid boxes neither survive nor suppress.
        iou: a box goes if it overlaps a better one by more than this.
        count: K.
        groups: how many groups there can be, and `largest` of how many boxes each; without
            them all boxes are compared with all, which comes to the same.
        largest: most boxes of a group, valid or not.
        lengths: boxes of each group, where they come group by group, each by falling score: they
            needn't be sorted then. In place of `groups` and `largest`.
        kernel: greedy walks from survivor to survivor, which is fast on the CPU. fixed takes
            a fixed number of launches of plain ATen, triton two of its kernels. auto is greedy
            on the CPU and else fixed; `casc.model.choose_compute` puts triton in its place
            where that proves right.

    Returns:
        index [B, K] int64 into N, by falling score (0 where padded), and
        kept [B, K] bool.
    """
    boxes, scores = boxes.detach(), scores.detach()
    extent = torch.where(valid[..., None], boxes, 0.0).amax(dim=(1, 2), keepdim=True)
    group = group.expand_as(scores)
    shifted = boxes + group.to(boxes.dtype)[..., None] * (extent + 1)
    if kernel == "greedy" or (kernel == "auto" and boxes.is_cpu):
        index, survivors = nms(shifted, scores, group, valid, iou, count)
    else:
        suppress = _triton_nms() if kernel == "triton" else fixed_nms
        if lengths is not None:
            sizes = (len(lengths), max(lengths), list(lengths))
        elif largest is not None:
            sizes = (groups, min(largest, boxes.shape[1]), None)
        else:
            # Groups are apart already: all as one is right too where their sizes aren't known.
            group, sizes = torch.zeros_like(group), (1, boxes.shape[1], None)
        index, survivors = suppress(shifted, scores, group, valid, iou, count, *sizes)
    slot = torch.arange(count, device=boxes.device)
    return index, slot < survivors[:, None]


def _triton_nms() -> Callable[..., tuple[Tensor, Tensor]]:
    from casc.ops.nms_triton import triton_nms  # there isn't Triton for every device

    return triton_nms


# It reads how many there are, so no graph of a device's may hold it.
@torch.library.custom_op("casc::nms", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def nms(
    boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, iou: float, count: int
) -> tuple[Tensor, Tensor]:
    """Greedy suppression per image by torchvision's kernel.

    Args:
        boxes: [B, N, 4] float32 xyxy; those of different groups don't overlap.
        scores: [B, N] float32.
        group: [B, N] int64.
        valid: [B, N] bool.
        iou: suppress above this overlap.
        count: K.

    Returns:
        index [B, K] int64 and number of survivors [B] int64, at most K.
    """
    index = boxes.new_zeros((boxes.shape[0], count), dtype=torch.long)
    survivors = boxes.new_zeros((boxes.shape[0],), dtype=torch.long)
    for image in range(boxes.shape[0]):
        candidates = valid[image].nonzero()[:, 0]
        box, score, one = (t[image, candidates] for t in (boxes, scores, group))
        keep = _greedy(box, score, one, iou)[:count]
        index[image, : keep.shape[0]] = candidates[keep]
        survivors[image] = keep.shape[0]
    return index, survivors


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, group: Tensor, valid: Tensor, iou: float, count: int):
    shape = (boxes.shape[0], count)
    return boxes.new_empty(shape, dtype=torch.long), boxes.new_empty(shape[:1], dtype=torch.long)


def _greedy(boxes: Tensor, scores: Tensor, group: Tensor, iou: float) -> Tensor:
    """Survivors of one image, best first, equal scores in the boxes' order."""
    from torchvision.ops import nms as torchvision_nms

    if not boxes.is_cpu or len(boxes) < MANY:
        return torchvision_nms(boxes, scores, iou)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for one in group.unique():
        rows = (group == one).nonzero()[:, 0]
        kept[rows[torchvision_nms(boxes[rows], scores[rows], iou)]] = True
    survivors = kept.nonzero()[:, 0]
    return survivors[scores[survivors].argsort(descending=True, stable=True)]
