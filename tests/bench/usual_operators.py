"""The straightforward ways that our operators are compared with: libraries and plain loops.

They take variable numbers of objects, copy to the host where it's handy and know nothing of
padding, as detectors usually do.

Legend: B images, G objects, A anchors, N boxes, R RoIs, D detections.
"""

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from casc.evaluate.mask_rle import Rle
from casc.model.detector_config import InferenceConfig
from casc.ops.roi_align import roi_levels


def roi_align(
    levels: tuple[Tensor, ...], strides: tuple[int, ...], boxes: Tensor, image: Tensor, cells: int
) -> Tensor:
    """Torchvision's operator on the RoIs of each level, float32 inside (as under autocast)."""
    from torchvision.ops import roi_align

    level = roi_levels(boxes, len(levels))
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    result = levels[0].new_zeros((len(boxes), levels[0].shape[1], cells, cells))
    for i, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (level == i).nonzero()[:, 0]
        aligned = roi_align(features.float(), rois[rows], (cells, cells), 1 / stride, 2, True)
        result = result.index_put((rows,), aligned.to(result.dtype))
    return result


def mask_targets(
    polygons: list[list[list[float]]],
    canvas: tuple[int, int],
    boxes: Tensor,
    image: Tensor,
    gt: Tensor,
    cells: int,
) -> Tensor:
    """Bitmaps of the canvas's size by pycocotools on the host, then RoIAlign, on from one half.

    Args:
        polygons: per image and object the corners x, y, x, y, ...
        canvas: height and width.
        boxes: [R, 4] xyxy.
        image: [R] into the images.
        gt: [R] into the image's objects.
        cells: per side.

    Returns:
        [R, cells, cells] bool.
    """
    from torchvision.ops import roi_align

    result = torch.zeros(len(boxes), cells, cells, dtype=torch.bool, device=boxes.device)
    for i, objects in enumerate(polygons):
        rles = coco_mask.frPyObjects(objects, *canvas)  # type: ignore[arg-type]
        bitmaps = np.ascontiguousarray(coco_mask.decode(rles).transpose(2, 0, 1))
        rows = (image == i).nonzero()[:, 0]
        masks = torch.from_numpy(bitmaps).to(boxes)[:, None]
        rois = torch.cat([gt[rows, None].to(boxes.dtype), boxes[rows]], dim=1)
        result[rows] = roi_align(masks, rois, (cells, cells), 1.0, 0, True)[:, 0] >= 0.5
    return result


def batched_nms(
    boxes: Tensor, scores: Tensor, group: Tensor, iou: float, count: int
) -> tuple[Tensor, Tensor]:
    """torchvision's, image by image; the results are padded for comparison only."""
    from torchvision.ops import batched_nms

    index = torch.zeros(len(boxes), count, dtype=torch.long, device=boxes.device)
    kept = torch.zeros(len(boxes), count, dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        keep = batched_nms(boxes[i], scores[i], group[i], iou)[:count]
        index[i, : len(keep)], kept[i, : len(keep)] = keep, True
    return index, kept


def select(
    config: InferenceConfig, logits: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As torchvision's Mask R-CNN does: a list of the likely (box, class), then batched NMS."""
    from torchvision.ops import batched_nms

    images = []
    for logit, box in zip(logits, boxes, strict=True):
        scores = logit.softmax(-1)[:, :-1]
        row, label = (scores > config.score_threshold).nonzero(as_tuple=True)
        score = scores[row, label]
        keep = batched_nms(box[row], score, label, config.nms_iou)[: config.detections]
        padding = config.detections - len(keep)
        images.append(
            (
                F.pad(box[row[keep]], (0, 0, 0, padding)),
                F.pad(score[keep], (0, padding)),
                F.pad(label[keep], (0, padding)),
                torch.arange(config.detections, device=boxes.device) < len(keep),
            )
        )
    best, scores, labels, valid = (torch.stack(rows) for rows in zip(*images, strict=True))
    return best, scores, labels, valid


def match_anchors(
    anchors: Tensor, inside: Tensor, gt_boxes: Tensor, thresholds: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Image by image, the anchors that lie inside and one loop over the objects.

    Args:
        anchors: [A, 4] xyxy.
        inside: [B, A] bool.
        gt_boxes: [B, G, 4] xyxy, real objects only.
        thresholds: positive, negative and low-quality IoU.

    Returns:
        object [B, A] int64, -1 unless positive; negative [B, A] bool.
    """
    from torchvision.ops import box_iou

    positive_iou, negative_iou, low_quality_iou = thresholds
    assigned = torch.full(inside.shape, -1, device=anchors.device)
    negative = torch.zeros_like(inside)
    for i, objects in enumerate(gt_boxes):
        rows = inside[i].nonzero()[:, 0]
        iou = box_iou(objects, anchors[rows])
        best, gt = iou.max(dim=0)
        gt = torch.where(best >= positive_iou, gt, -1)
        for k, overlaps in enumerate(iou):
            if overlaps.max() >= low_quality_iou:
                gt[overlaps == overlaps.max()] = k
        assigned[i, rows] = gt
        negative[i, rows] = (best < negative_iou) & (gt < 0)
    return assigned, negative


def match_rois(boxes: Tensor, gt_boxes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """[B, N, 4] boxes against [B, G, 4] objects by torchvision's box_iou, image by image."""
    from torchvision.ops import box_iou

    images = []
    for box, objects in zip(boxes, gt_boxes, strict=True):
        best, gt = box_iou(objects, box).max(dim=0)
        images.append((torch.where(best >= threshold, gt, -1), best < threshold))
    assigned, negative = (torch.stack(rows) for rows in zip(*images, strict=True))
    return assigned, negative


def sample(
    positive: Tensor, negative: Tensor, count: int, max_positive: int
) -> tuple[Tensor, Tensor]:
    """Nonzero and randperm, image by image; how many of each kind were drawn, [B] and [B]."""
    drawn = []
    for pos, neg in zip(positive, negative, strict=True):
        pos, neg = pos.nonzero()[:, 0], neg.nonzero()[:, 0]
        pos = pos[torch.randperm(len(pos), device=pos.device)[:max_positive]]
        neg = neg[torch.randperm(len(neg), device=neg.device)[: count - len(pos)]]
        drawn.append((len(pos), len(neg)))
    positives, negatives = torch.tensor(drawn, device=positive.device).unbind(1)
    return positives, negatives


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """[D, height, width] bool: bilinear sampling of every pixel of the image for each mask."""
    x = torch.arange(width) + 0.5 - boxes[:, 0:1]
    y = torch.arange(height) + 0.5 - boxes[:, 1:2]
    x = x / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
    y = y / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
    shape = (len(boxes), height, width)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def encode_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[Rle]:
    """Pycocotools on masks pasted into the whole image."""
    encoded = []
    for mask in paste_masks(masks, boxes, height, width).numpy():
        rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})  # type: ignore[union-attr]
    return encoded
