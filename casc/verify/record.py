"""Every intermediate tensor of a training step and of an inference, as pure functions.

They are composed of the detector's own functions, have fixed shapes, and compile whole, so
what is verified is what trains, in eager and compiled.

Legend: B images, P proposals, S samples, A anchors, R = B * S RoIs.
"""

import torch
from torch import Tensor

from casc.model.anchors import grid_anchors, inside
from casc.model.box_head import box_head, box_losses, max_positive, refine, sample_rois
from casc.model.boxes import encode
from casc.model.detector import (
    ROI_LEVELS,
    DetectorConfig,
    Features,
    Inputs,
    Noise,
    cascade_scores,
    detect_masks,
    extract,
    level_sizes,
    select,
    total,
)
from casc.model.fpn import fpn
from casc.model.layers import Params
from casc.model.mask_head import mask_head, mask_loss, mask_rois, mask_targets
from casc.model.mask_targets import bitmap_coverage
from casc.model.matching import match_rois, take
from casc.model.resnet import resnet
from casc.model.rpn import (
    STDS,
    Proposals,
    candidates,
    propose,
    rpn_head,
    rpn_head_at,
    rpn_losses,
    rpn_targets,
)
from casc.ops.pyramid import Pyramid, flatten_pyramid
from casc.ops.roi_align import roi_align, roi_levels

Record = dict[str, Tensor]


def training_record(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    inputs: Inputs,
    noise: Noise,
    proposals: Proposals,
) -> tuple[Tensor, Record]:
    """The total loss, and everything on the way to it.

    The cascade starts from the given proposals, so that two anchors whose scores differ
    in the last bit can't change what later parts are compared with; the RPN's own
    proposals are recorded too.
    """
    maps = resnet(params, buffers, config.backbone, inputs.image)
    levels = fpn(params, config.fpn, maps)
    record = {f"feat.C{i + 2}": x for i, x in enumerate(maps)}
    record |= {f"feat.P{i + 2}": x for i, x in enumerate(levels)}
    pyramid = flatten_pyramid(levels[:ROI_LEVELS], config.anchors.strides[:ROI_LEVELS])
    features = Features(levels, pyramid)
    losses, rpn = _rpn_record(params, config, features, inputs, noise.rpn)
    boxes, valid = proposals.boxes, proposals.valid
    for i in range(len(config.stages)):
        stage_losses, stage = _stage_record(
            params, config, i, pyramid, boxes, valid, inputs, noise.stages[i]
        )
        losses |= {f"s{i}.{k}": v for k, v in stage_losses.items()}
        boxes, valid = stage["refined"], stage["refined_valid"]
        record |= {f"s{i}.{k}": v for k, v in stage.items()}
    loss = total(losses)
    record |= rpn | {f"loss.{k}": v for k, v in losses.items()} | {"loss.total": loss}
    return loss, {k: v.detach() for k, v in record.items()}


def detection_record(
    params: Params, buffers: Params, config: DetectorConfig, inputs: Inputs, proposals: Proposals
) -> Record:
    """Inference on one image from the given proposals; the RPN's own are recorded too."""
    features = extract(params, buffers, config, inputs.image)
    anchors = grid_anchors(config.anchors, level_sizes(features.levels), inputs.size.device)
    output = rpn_head(params, features.levels)
    found = candidates(config.rpn, output, anchors, inputs.size, train=False)
    own = propose(config.rpn, found, train=False)
    logits, boxes = cascade_scores(params, config, features.pyramid, proposals, inputs.size)
    det_boxes, scores, labels, valid = select(
        config.inference, logits, boxes / inputs.scale[:, None], proposals.valid
    )
    mask_boxes = det_boxes * inputs.scale[:, None]
    record = _scored(params, config, features.pyramid, proposals, inputs.size)
    image = torch.zeros_like(labels[0])
    mask_features = roi_align(
        features.pyramid, mask_boxes[0], image, config.mask_head.cells, config.roi_align
    )
    for i in range(len(config.stages)):
        masks = mask_head(params, config.mask_head, i, mask_features, labels[0])
        record[f"s{i}.mask_logits"] = masks[None]
    return record | {
        "proposals": torch.cat([own.boxes, own.scores[..., None]], dim=-1),
        "proposals_valid": own.valid,
        "cls_score_avg": logits,
        "det_bboxes": torch.cat([det_boxes, scores[..., None]], dim=-1),
        "det_labels": labels,
        "det_valid": valid,
        "mask_rois": mask_boxes,
        "mask_prob": detect_masks(params, config, features.pyramid, mask_boxes, labels),
    }


def _scored(
    params: Params, config: DetectorConfig, pyramid: Pyramid, proposals: Proposals, size: Tensor
) -> Record:
    """What each stage of inference was given and made of it, for one image."""
    record: Record = {}
    boxes = proposals.boxes
    image = torch.zeros_like(boxes[0, :, 0], dtype=torch.long)
    for i, stage in enumerate(config.stages):
        features = roi_align(pyramid, boxes[0], image, config.box_head.cells, config.roi_align)
        output = box_head(params, i, features)
        record[f"s{i}.rois"] = boxes
        record[f"s{i}.cls_score"] = output.logits[None]
        record[f"s{i}.bbox_pred"] = output.deltas[None]
        boxes = refine(stage, boxes, output.deltas, size)
    return record


def _rpn_record(
    params: Params, config: DetectorConfig, features: Features, inputs: Inputs, keys: Tensor
) -> tuple[Record, Record]:
    levels = features.levels
    with torch.no_grad():
        output = rpn_head(params, levels)
    per_level = grid_anchors(config.anchors, level_sizes(levels), inputs.size.device)
    anchors, gt = torch.cat(per_level), inputs.targets
    targets = rpn_targets(config.rpn, anchors, inputs.size, gt.boxes, gt.valid, keys)
    matches = targets.matches
    found = candidates(config.rpn, output, per_level, inputs.size, train=True)
    proposals = propose(config.rpn, found, train=True)
    index = targets.sample.indices
    sampled, _ = rpn_head_at(params, features.pyramid, level_sizes(levels), index)
    losses = rpn_losses(config.rpn, sampled, anchors, targets, gt.boxes)
    return losses, {
        "rpn.logits": output.logits,
        "rpn.deltas": output.deltas,
        "rpn.anchors": anchors,
        "rpn.inside": inside(anchors, inputs.size),
        "rpn.gt": matches.gt,
        "rpn.iou": matches.iou,
        "rpn.positive": matches.positive,
        "rpn.negative": matches.negative,
        "rpn.sampled": targets.sample.indices,
        "rpn.sampled_valid": targets.sample.valid,
        "rpn.sampled_positive": targets.sample.positive,
        "rpn.bbox_targets": encode(anchors, take(gt.boxes, matches.gt), STDS),
        "rpn.prenms.boxes": found.boxes,
        "rpn.prenms.scores": found.scores,
        "rpn.prenms.level": found.level,
        "rpn.prenms.valid": found.valid,
        "rpn.proposals": torch.cat([proposals.boxes, proposals.scores[..., None]], dim=-1),
        "rpn.proposals_valid": proposals.valid,
    }


def _stage_record(
    params: Params,
    config: DetectorConfig,
    index: int,
    pyramid: Pyramid,
    proposals: Tensor,
    valid: Tensor,
    inputs: Inputs,
    keys: Tensor,
) -> tuple[Record, Record]:
    """Losses and intermediates of one cascade stage, boxes and masks."""
    stage, gt = config.stages[index], inputs.targets
    matches = match_rois(proposals, valid, gt.boxes, gt.valid, iou=stage.iou)
    rois = sample_rois(config.box_head, stage, config.classes, proposals, valid, gt, keys)
    flat = rois.boxes.flatten(0, 1)
    image = torch.arange(rois.boxes.shape[0], device=flat.device)
    image = image.repeat_interleave(rois.boxes.shape[1])
    features = roi_align(pyramid, flat, image, config.box_head.cells, config.roi_align)
    output = box_head(params, index, features)
    losses = box_losses(config.box_head, stage, output, rois, gt)
    positive = mask_rois(rois, max_positive(config.box_head))
    mask_features = roi_align(
        pyramid, positive.boxes, positive.image, config.mask_head.cells, config.roi_align
    )
    logits = mask_head(params, config.mask_head, index, mask_features, positive.labels)
    all_logits = mask_head(params, config.mask_head, index, mask_features, None)
    masks = mask_targets(config.mask_head, positive, gt)
    losses["loss_mask"] = stage.loss_weight * mask_loss(logits, masks, positive.valid)
    return losses, {
        "proposals": proposals,
        "proposals_valid": valid,
        "gt": matches.gt,
        "iou": matches.iou,
        "positive": matches.positive,
        "negative": matches.negative,
        "gt_valid": gt.valid,
        "sampled": rois.indices,
        "rois": rois.boxes,
        "valid": rois.valid,
        "sampled_positive": rois.positive,
        "sampled_gt": rois.gt,
        "sampled_labels": rois.labels,
        "from_gt": rois.from_gt,
        "roi_levels": roi_levels(flat, len(pyramid.levels)),
        "bbox_targets": encode(rois.boxes, take(gt.boxes, rois.gt), stage.stds),
        "bbox_feats": features,
        "cls_score": output.logits,
        "bbox_pred": output.deltas,
        "refined": refine(stage, rois.boxes, output.deltas, inputs.size),
        "refined_valid": rois.valid & ~rois.from_gt,
        "mask_boxes": positive.boxes,
        "mask_image": positive.image,
        "mask_labels": positive.labels,
        "mask_valid": positive.valid,
        "mask_feats": mask_features,
        "mask_targets": masks,
        "mask_coverage": bitmap_coverage(
            _bitmaps(inputs), positive.boxes, positive.image, positive.gt, masks.shape[-1]
        ),
        "mask_logits": logits,
        "mask_pred": all_logits,
    }


def _bitmaps(inputs: Inputs) -> Tensor:
    bitmaps = inputs.targets.bitmaps
    assert bitmaps is not None, "golden inputs carry bitmaps"
    return bitmaps
