"""Soft-NMS: what a better box overlaps loses score instead of going (Bodla et al., 2017).

Legend: B images, N boxes, K kept.
"""

from typing import Literal

import torch
from torch import Tensor

SoftNms = Literal["off", "linear", "gaussian"]


@torch.library.custom_op("casc::soft_nms", mutates_args=())
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    group: Tensor,
    valid: Tensor,
    iou: float,
    sigma: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Take the best box, lower the scores of the others of its group, and so on.

    K rounds of a fixed number of launches, whatever the boxes. Scores only fall, so that what is
    taken first is best, and groups may be taken from in turn.

    Args:
        boxes: [B, N, 4] float32 xyxy.
        scores: [B, N] float32, above 0.
        group: [B, N] int64; boxes of other groups leave a score as it is.
        valid: [B, N] bool.
        iou: the linear way, where `sigma` is 0: an overlap above this multiplies a score by
            1 - overlap.
        sigma: the Gaussian way: an overlap multiplies a score by exp(-overlap**2 / sigma).
        count: K.

    Returns:
        index [B, K] int64, in the order in which they were taken, 0 where none was left; and
        their scores [B, K] float32 when they were taken, 0 there.
    """
    left = torch.where(valid, scores, 0.0)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    index, kept = [], []
    for _ in range(count):
        score, best = left.max(dim=1, keepdim=True)
        box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        corner = torch.minimum(boxes[..., 2:], box[..., 2:])
        inter = (corner - torch.maximum(boxes[..., :2], box[..., :2])).clamp(min=0).prod(dim=-1)
        overlap = inter / (area + area.gather(1, best) - inter).clamp(min=1e-9)
        if sigma:
            factor = torch.exp(-(overlap**2) / sigma)
        else:
            factor = torch.where(overlap > iou, 1 - overlap, 1.0)
        left = torch.where(group == group.gather(1, best), left * factor, left)
        left = left.scatter(1, best, 0.0)
        index.append(torch.where(score > 0, best, 0))
        kept.append(score)
    return torch.cat(index, dim=1), torch.cat(kept, dim=1)


@soft_nms.register_fake
def _(boxes, scores, group, valid, iou, sigma, count):
    shape = (boxes.shape[0], count)
    return boxes.new_empty(shape, dtype=torch.long), scores.new_empty(shape)
