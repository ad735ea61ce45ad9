"""From images on their canvas to detections.

Legend: B images, P proposals, K classes, D detections.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from casc.model.box_head import box_head, refine
from casc.model.detector import (
    Inputs,
    anchor_lengths,
    cast_heads,
    chosen_deltas,
    extract,
    flat_rois,
    level_sizes,
)
from casc.model.detector_config import DetectorConfig, InferenceConfig, mask_stages, scores_masks
from casc.model.fixed import Fixed, make_fixed
from casc.model.layers import Params
from casc.model.mask_head import mask_head
from casc.model.mask_scoring import mask_iou_head
from casc.model.matching import take
from casc.model.rpn import Proposals, candidates, propose, rpn_head
from casc.ops.nms import batched_nms
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import roi_align
from casc.ops.soft_nms import soft_nms

SIGMA = 0.5
"""Of Gaussian soft-NMS, as its authors chose it."""


class Detections(NamedTuple):
    """A fixed number of detections per image, best first."""

    boxes: Tensor
    """[B, D, 4] float32 xyxy in pixels of the stored image, 0 where invalid."""
    scores: Tensor
    """[B, D] float32, 0 where invalid."""
    labels: Tensor
    """[B, D] int64 in [0, K), 0 where invalid."""
    valid: Tensor
    """[B, D] bool."""
    masks: Tensor | None = None
    """[B, D, 28, 28] float32, probability that each cell of the box is on the object. None where
    the detector has no mask heads."""
    mask_scores: Tensor | None = None
    """[B, D] float32, what masks are ranked by, in place of the scores; 0 where invalid. None where
    the detector doesn't score masks."""


def detect(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    inputs: Inputs,
    probe: Probe = unwatched,
    fixed: Fixed | None = None,
) -> Detections:
    """Detections with masks; `inputs.targets` isn't read.

    Each stage scores the RoIs that it was given; the mean of the three stages' logits is
    turned into scores once (see `InferenceConfig.average`). Masks are the mean of the three
    heads' probabilities. `fixed` is as for `forward_train.box_branch`.
    """
    params = cast_heads(params, inputs.image)
    features = extract(params, buffers, config, inputs.image, probe, size=inputs.size)
    if fixed is None:
        fixed = make_fixed(config, level_sizes(features.levels), inputs.image.device)
    output = rpn_head(params, config.rpn, features.levels)
    lengths = anchor_lengths(config, features.levels)
    found = candidates(
        config.rpn, output, fixed.anchors, lengths, inputs.size, train=False, slots=fixed.slots
    )
    proposals = probe("proposals", propose(config.rpn, found, train=False))
    logits, boxes = cascade_scores(params, config, features.pyramid, proposals, inputs.size, probe)
    boxes, scores, labels, valid = select(
        config.inference, logits, boxes / inputs.scale[:, None], proposals.valid, probe
    )
    if not mask_stages(config):
        return Detections(boxes, scores, labels, valid, None)
    rois = probe("mask.rois", boxes * inputs.scale[:, None])
    masks, fit = detect_masks(params, config, features.pyramid, rois, labels, probe)
    masks = masks * valid[..., None, None]
    return Detections(boxes, scores, labels, valid, masks, None if fit is None else scores * fit)


def cascade_scores(
    params: Params,
    config: DetectorConfig,
    pyramid: Pyramid,
    proposals: Proposals,
    size: Tensor,
    probe: Probe = unwatched,
) -> tuple[Tensor, Tensor]:
    """Mean logits [B, P, K + 1] and final boxes [B, P, 4] in canvas pixels.

    Where each class has its own box, these are [B, P * K, 4], the class fastest.
    Where the config averages probabilities, the logarithms of these are the logits.
    """
    boxes = proposals.boxes
    logits = []
    for i, stage in enumerate(config.stages):
        boxes = probe("box.rois", boxes)
        features = _align(config, pyramid, boxes, config.box_head.cells)
        output = probe("box.output", box_head(params, config.box_head, i, features))
        logits.append(output.logits.reshape(*boxes.shape[:2], -1))
        deltas = output.deltas
        if config.box_head.class_specific and i + 1 < len(config.stages):
            deltas = chosen_deltas(output, boxes.shape[:2], None)
        elif config.box_head.class_specific:
            boxes = boxes.repeat_interleave(config.classes, dim=1)
        boxes = refine(stage, boxes, deltas, size)
    if config.inference.average == "probabilities":
        logs = torch.stack(logits).log_softmax(dim=-1)
        return logs.logsumexp(dim=0) - math.log(len(logits)), boxes
    return probe("box.average", torch.stack(logits).sum(dim=0) / len(logits)), boxes


def select(
    config: InferenceConfig,
    logits: Tensor,
    boxes: Tensor,
    valid: Tensor,
    probe: Probe = unwatched,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Threshold, class-wise suppression, and the best over all classes.

    Args:
        config: thresholds.
        logits: [B, P, K + 1].
        boxes: [B, P, 4] xyxy in pixels of the stored image; or [B, P * K, 4], each class's own.
        valid: [B, P] bool.
        probe: sees all scores, and which of them enter suppression.

    Returns:
        boxes [B, D, 4], scores [B, D], labels [B, D] and valid [B, D]; 0 where invalid.
    """
    scores = logits.softmax(dim=-1)[..., :-1]
    classes = scores.shape[-1]
    candidate = (scores > config.score_threshold) & valid[..., None]
    scores, candidate = probe("scores", (scores, candidate))
    batch, proposals = valid.shape
    labels = torch.arange(classes, device=scores.device).repeat(proposals).expand(batch, -1)
    if boxes.shape[1] == proposals:
        boxes = boxes.repeat_interleave(classes, dim=1)
    if config.classes:
        wanted = torch.stack([labels == c for c in config.classes]).any(dim=0)
        candidate = candidate & wanted.view_as(candidate)
    best = torch.where(candidate, scores, -1.0).argmax(dim=-1) if config.class_agnostic else None
    scores, candidate, group = scores.flatten(1), candidate.flatten(1), labels
    if best is not None:
        place = best + classes * torch.arange(proposals, device=best.device)
        boxes, scores, labels, candidate = (
            take(t, place) for t in (boxes, scores, labels, candidate)
        )
        group = torch.zeros_like(labels)
    index, scores, kept = _suppress(config, boxes, scores, group, candidate, classes, proposals)
    return (
        torch.where(kept[..., None], take(boxes, index), 0.0),
        torch.where(kept, scores, 0.0),
        torch.where(kept, take(labels, index), 0),
        kept,
    )


def _suppress(
    config: InferenceConfig,
    boxes: Tensor,
    scores: Tensor,
    group: Tensor,
    candidate: Tensor,
    classes: int,
    proposals: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Places [B, D] of the best that remain of [B, N], their scores, and whether they are any."""
    if config.soft_nms != "off":
        sigma = SIGMA if config.soft_nms == "gaussian" else 0.0
        index, scores = soft_nms(
            boxes, scores, group, candidate, config.nms_iou, sigma, config.detections
        )
        return index, scores, scores > config.score_threshold
    index, kept = batched_nms(
        boxes,
        scores,
        group,
        candidate,
        iou=config.nms_iou,
        count=config.detections,
        groups=1 if config.class_agnostic else classes,
        largest=proposals,
        kernel=config.nms_kernel,
    )
    return index, take(scores, index), kept


def detect_masks(
    params: Params,
    config: DetectorConfig,
    pyramid: Pyramid,
    boxes: Tensor,
    labels: Tensor,
    probe: Probe = unwatched,
) -> tuple[Tensor, Tensor | None]:
    """Mean mask probability of all stages that have a mask head, and how well each mask fits.

    Args:
        params: weights by name.
        config: the detector.
        pyramid: features.
        boxes: [B, D, 4] xyxy in canvas pixels.
        labels: [B, D] int64.
        probe: sees each stage's logits.

    Returns:
        [B, D, 28, 28] float32; and [B, D] float32 in [0, 1], or None where masks aren't scored.
    """
    features = _align(config, pyramid, boxes, config.mask_head.cells)
    logits = [
        probe("mask.logits", mask_head(params, config.mask_head, i, features, labels.flatten()))
        for i in range(mask_stages(config))
    ]
    stages = [each.sigmoid() for each in logits]
    mean = torch.stack(stages).sum(dim=0) / len(stages)
    fit = None
    if scores_masks(config):
        fit = mask_iou_head(params, features, mean, labels.flatten()).clamp(0, 1)
        fit = fit.reshape(labels.shape)
    return mean.reshape(*labels.shape, *mean.shape[1:]), fit


def _align(config: DetectorConfig, pyramid: Pyramid, boxes: Tensor, cells: int) -> Tensor:
    """RoIAlign of [B, N, 4] boxes: [B * N, C, cells, cells]."""
    return roi_align(pyramid, *flat_rois(boxes), cells, config.roi_align, config.roi_kernel)
