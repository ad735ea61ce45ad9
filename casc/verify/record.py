"""What a step's recorder has seen, under the names that the goldens have for it.

Legend: B images, A anchors, S samples, D detections.
"""

from typing import Any

import torch
from torch import Tensor

from casc.model.forward_detect import Detections

Record = dict[str, Tensor]
Seen = dict[str, list[Any]]


def training_record(seen: Seen, total: Tensor, losses: dict[str, Tensor]) -> Record:
    """Of a training step: its losses, and everything on the way to them."""
    (maps,), (levels,), (output,) = seen["maps"], seen["levels"], seen["rpn.output"]
    record = {f"feat.C{i + 2}": x for i, x in enumerate(maps)}
    record |= {f"feat.P{i + 2}": x for i, x in enumerate(levels)}
    (targets,), (found,), (proposals,) = (
        seen[k] for k in ("rpn.targets", "candidates", "proposals")
    )
    record |= {
        "rpn.logits": output.logits,
        "rpn.deltas": output.deltas,
        "rpn.anchors": seen["anchors"][0],
        "rpn.inside": seen["rpn.inside"][0],
        "rpn.gt": targets.matches.gt,
        "rpn.iou": targets.matches.iou,
        "rpn.positive": targets.matches.positive,
        "rpn.negative": targets.matches.negative,
        "rpn.sampled": targets.sample.indices,
        "rpn.sampled_valid": targets.sample.valid,
        "rpn.sampled_positive": targets.sample.positive,
        "rpn.sampled_logits": seen["rpn.sampled"][0].logits,
        "rpn.sampled_deltas": seen["rpn.sampled"][0].deltas,
        "rpn.goal": seen["rpn.goal"][0],
        "rpn.prenms.boxes": found.boxes,
        "rpn.prenms.scores": found.scores,
        "rpn.prenms.level": found.level,
        "rpn.prenms.valid": found.valid,
        "rpn.proposals": torch.cat([proposals.boxes, proposals.scores[..., None]], dim=-1),
        "rpn.proposals_valid": proposals.valid,
    }
    for stage in range(len(seen["box.rois"])):
        rows = _stage_record({k: v[stage] for k, v in seen.items() if len(v) > stage})
        record |= {f"s{stage}.{k}": v for k, v in rows.items()}
    record |= {f"loss.{k}": v for k, v in losses.items()}
    return record | {"loss.total": total.detach()}


def detection_record(seen: Seen, found: Detections) -> Record:
    """Of inference on one image: its detections, and everything on the way to them."""
    record: Record = {}
    (proposals,) = seen["proposals"]
    for i, (rois, output) in enumerate(zip(seen["box.rois"], seen["box.output"], strict=True)):
        record[f"s{i}.rois"] = rois
        record[f"s{i}.cls_score"] = output.logits[None]
        record[f"s{i}.bbox_pred"] = output.deltas[None]
    for i, logits in enumerate(seen["mask.logits"]):
        record[f"s{i}.mask_logits"] = logits[None]
    if "box.average" in seen:
        record["cls_score_avg"] = seen["box.average"][0]
    ((scores, candidate),) = seen["scores"]
    return record | {
        # Of what enters suppression only the lowest is looked at: 1 where nothing does.
        "lowest_score": torch.where(candidate, scores, 1.0).amin(dim=(1, 2)),
        "proposals": torch.cat([proposals.boxes, proposals.scores[..., None]], dim=-1),
        "proposals_valid": proposals.valid,
        "det_bboxes": torch.cat([found.boxes, found.scores[..., None]], dim=-1),
        "det_labels": found.labels,
        "det_valid": found.valid,
        "mask_rois": seen["mask.rois"][0],
        "mask_prob": found.masks,
    }


def _stage_record(seen: dict[str, Any]) -> Record:
    """Of one cascade stage of a training step, boxes and masks."""
    boxes, valid = seen["box.candidates"]
    matches, rois, masks = seen["box.matches"], seen["box.rois"], seen["mask.rois"]
    # The bags of the fixed grid never hold all features at once.
    aligned = {"bbox_feats": seen["box.features"]} if "box.features" in seen else {}
    return aligned | {
        "proposals": boxes,
        "proposals_valid": valid,
        "gt": matches.gt,
        "iou": matches.iou,
        "positive": matches.positive,
        "negative": matches.negative,
        "sampled": rois.indices,
        "rois": rois.boxes,
        "valid": rois.valid,
        "sampled_positive": rois.positive,
        "sampled_gt": rois.gt,
        "sampled_labels": rois.labels,
        "from_gt": rois.from_gt,
        "goal": seen["box.goal"],
        "cls_score": seen["box.output"].logits,
        "bbox_pred": seen["box.output"].deltas,
        "mask_boxes": masks.boxes,
        "mask_image": masks.image,
        "mask_gt": masks.gt,
        "mask_labels": masks.labels,
        "mask_valid": masks.valid,
        "mask_feats": seen["mask.features"],
        "mask_targets": seen["mask.goal"],
        "mask_logits": seen["mask.logits"],
    }
