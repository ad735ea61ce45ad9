"""Set our record of a training step beside the reference's, part by part.

Legend: B images, A anchors, N what the reference recorded.
"""

import torch
from torch import Tensor

from casc.model.detector import Inputs
from casc.model.detector_config import ROI_LEVELS, DetectorConfig
from casc.model.mask_targets import bitmap_coverage
from casc.ops.nms import batched_nms
from casc.ops.roi_align import roi_levels
from casc.verify.compare import ANCHOR_PIXELS, BOX_PIXELS, GRADIENT, RELATIVE, SCORE, Comparison
from casc.verify.goldens import GoldenSet, gradient_probe, train_inputs
from casc.verify.record import Record


def compare_training(
    golden: GoldenSet, config: DetectorConfig, record: Record, table: Comparison
) -> None:
    """Rows for everything recorded of the training step but the gradients."""
    record = {k: v.cpu() for k, v in record.items()}
    inputs = train_inputs(golden)
    _features(table, record)
    _rpn_maps(table, record)
    for image in range(record["rpn.inside"].shape[0]):
        _rpn_matching(table, record, image)
        _rpn_proposals(table, config, record, image)
    _rpn_targets(table, record)
    stage = 0
    while f"s{stage}.rois" in record:
        rows = {
            k.removeprefix(f"s{stage}."): v for k, v in record.items() if k.startswith(f"s{stage}.")
        }
        for image in range(rows["rois"].shape[0]):
            _stage_matching(table, rows, inputs, stage, image)
        _box_head(table, rows, stage)
        _mask_head(table, rows, inputs, stage)
        stage += 1
    _losses(table, golden, record)


def compare_gradients(
    golden: GoldenSet, gradients: dict[str, Tensor | None], table: Comparison
) -> None:
    """Norm of every parameter's gradient, and its product with a recorded random direction."""
    part = "gradients"
    for name, facts in golden.facts["grads"].items():
        gradient = gradients.get(name)
        if facts is None:
            table.add(part, f"{name} (frozen)", gradient is not None, 0, "mismatches")
            continue
        if gradient is None:
            table.add(part, f"{name} (missing)", float("inf"), 0, "mismatches")
            continue
        gradient = gradient.cpu().double()
        # A head that no positive reached has a gradient of exactly zero.
        scale = facts["norm"] or 1.0
        table.add(part, name, (gradient.norm() - facts["norm"]).abs() / scale, GRADIENT, "relative")
        dot = (gradient * gradient_probe(name, tuple(gradient.shape))).sum()
        error = (dot - facts["dot"]).abs() / scale
        table.add(part, f"{name} (direction)", error, GRADIENT, "relative")


def compare_fixed_grid(config: DetectorConfig, record: Record, table: Comparison) -> None:
    """Rows for the fixed grid of RoIAlign, where it is the reference's adaptive one.

    That is so for RoIs whose cells have sides of 1 to 2 pixels of their level. Only the first
    stage is given the reference's boxes.
    """
    rows = {k.removeprefix("s0."): v.cpu() for k, v in record.items() if k.startswith("s0.")}
    part = "fixed grid"
    boxes, valid = rows["rois"].flatten(0, 1), rows["valid"].flatten()
    same = _samples_alike(boxes[valid], config.box_head.cells)
    for name in ("cls_score", "bbox_pred"):
        table.relative_rows(part, f"s0.{name}", rows[name][valid], same)
    valid = rows["mask_valid"]
    same = _samples_alike(rows["mask_boxes"][valid], config.mask_head.cells)
    table.relative_rows(part, "s0.mask_logits", rows["mask_logits"][valid], same)


def _samples_alike(boxes: Tensor, cells: int) -> Tensor:
    """Which boxes [N, 4] the reference samples on a 2x2 grid in every cell, to the letter: [N]."""
    strides = 4 * 2 ** roi_levels(boxes, ROI_LEVELS)
    sides = (boxes[:, 2:] - boxes[:, :2]) / strides[:, None] / cells
    # Not so near that rounding could decide.
    return ((sides > 1.001) & (sides < 1.999)).all(dim=1)


def _features(table: Comparison, record: Record) -> None:
    for name in [k for k in record if k.startswith("feat.")]:
        x = record[name]
        table.relative("features", name, x)
        table.relative("features", f"{name}.s8", x[:, ::8, ::4, ::4])
        table.relative("features", f"{name}.ch_mean", x.double().mean(dim=(0, 2, 3)))
        channels = x.double().transpose(0, 1).flatten(1)
        table.relative("features", f"{name}.ch_l2", channels.norm(dim=1))


def _rpn_maps(table: Comparison, record: Record) -> None:
    start = level = 0
    while (cls := table.golden(f"rpn.cls.{level}")) is not None:
        batch, ratios, height, width = cls.shape
        rows = slice(start, start + ratios * height * width)
        for name, values in (("cls", record["rpn.logits"]), ("reg", record["rpn.deltas"])):
            as_map = values[:, rows].reshape(batch, height, width, -1).permute(0, 3, 1, 2)
            table.relative("rpn", f"rpn.{name}.{level}", as_map)
        anchors = record["rpn.anchors"][rows]
        table.absolute("rpn", f"rpn.anchors.{level}", anchors, ANCHOR_PIXELS, "pixels")
        start, level = rows.stop, level + 1
    # With gradient the head runs on the sampled anchors only, by other operators.
    drawn, valid = record["rpn.sampled"], record["rpn.sampled_valid"]
    batch = torch.arange(len(drawn))[:, None]
    for name, dense in (("logits", record["rpn.logits"]), ("deltas", record["rpn.deltas"])):
        error = (dense[batch, drawn] - record[f"rpn.sampled_{name}"]).abs()[valid].max()
        error = error / dense.abs().max().clamp(min=1e-12)
        table.add("rpn", f"{name} of the sample", error, RELATIVE, "relative")


def _rpn_matching(table: Comparison, record: Record, image: int) -> None:
    inside = record["rpn.inside"][image]
    table.equal("rpn", f"rpn.inside.{image}", inside)
    flags = table.golden(f"rpn.valid.{image}")
    if flags is not None:
        # The reference also asks that anchors start within the padded image; inside implies it.
        table.add("rpn", f"rpn.valid.{image}", (inside & (flags == 0)).sum(), 0, "mismatches")
    gt = torch.where(inside, _gt_numbers(record, "rpn.", image), -2)
    table.equal("rpn", f"rpn.assign.gt_inds.{image}", gt)
    iou = torch.where(inside, record["rpn.iou"][image].clamp(min=0), -1.0)
    table.relative("rpn", f"rpn.assign.max_overlaps.{image}", iou)
    drawn = record["rpn.sampled"][image]
    positive = record["rpn.sampled_positive"][image]
    negative = record["rpn.sampled_valid"][image] & ~positive
    table.equal("rpn", f"rpn.sample.pos_inds.{image}", drawn[positive].sort().values)
    table.equal("rpn", f"rpn.sample.neg_inds.{image}", drawn[negative].sort().values)


def _rpn_proposals(table: Comparison, config: DetectorConfig, record: Record, image: int) -> None:
    """Candidates and proposals as sets; suppression alone, on the golden candidates, as a list."""
    name = "rpn.prenms"
    boxes, scores, level, keep = (
        table.golden(f"{name}.{k}.{image}") for k in ("boxes", "scores", "level", "keep")
    )
    valid = record[f"{name}.valid"][image]
    if scores is not None and len(scores) == valid.sum():
        # The reference sorts only levels that have more than enter suppression.
        apart = scores.sort().values - record[f"{name}.scores"][image][valid].sort().values
        table.add("rpn", f"{name}.scores.{image}", apart.abs().max(), SCORE, "score")
    if boxes is not None and scores is not None:
        ours = [record[f"{name}.boxes"][image], record[f"{name}.scores"][image][:, None]]
        golden = torch.cat([boxes, scores[:, None]], dim=1)
        table.box_set("rpn", f"{name}.{image}", golden, torch.cat(ours, dim=1)[valid])
        if level is not None and keep is not None:
            everything = torch.ones(1, len(boxes), dtype=torch.bool)
            index, kept = batched_nms(
                boxes[None],
                scores[None],
                level[None],
                everything,
                iou=config.rpn.nms_iou,
                count=len(boxes),
            )
            table.equal("rpn", f"{name}.keep.{image}", index[kept])
    if level is not None:
        counts = record[f"{name}.level"][valid].bincount()
        wrong = (counts != level.long().bincount(minlength=len(counts))).sum()
        table.add("rpn", f"{name}.level.{image}", wrong, 0, "mismatches")
    ours = record["rpn.proposals"][image][record["rpn.proposals_valid"][image]]
    key = f"rpn.proposals.{image}"
    table.box_set("rpn", key, table.golden(key), ours)


def _rpn_targets(table: Comparison, record: Record) -> None:
    """Dense targets [B, A]: label 0 is an object and 1 background, there."""
    labels = torch.ones_like(record["rpn.gt"])
    weights = torch.zeros_like(record["rpn.iou"])
    box_weights = torch.zeros_like(record["rpn.deltas"])
    goal = torch.zeros_like(record["rpn.deltas"])
    for image, drawn in enumerate(record["rpn.sampled"]):
        positive = drawn[record["rpn.sampled_positive"][image]]
        labels[image, positive] = 0
        weights[image, drawn[record["rpn.sampled_valid"][image]]] = 1
        box_weights[image, positive] = 1
        goal[image, positive] = record["rpn.goal"][image][: len(positive)]
    table.equal("rpn", "rpn.target.labels", labels)
    table.relative("rpn", "rpn.target.label_weights", weights)
    table.relative("rpn", "rpn.target.bbox_weights", box_weights)
    table.relative("rpn", "rpn.target.bbox_targets", goal)


def _stage_matching(table: Comparison, r: Record, inputs: Inputs, stage: int, image: int) -> None:
    part, s = f"stage {stage}", f"s{stage}"
    valid = r["proposals_valid"][image]
    proposals = r["proposals"][image][valid]
    table.absolute(part, f"{s}.proposals.{image}", proposals, BOX_PIXELS, "pixels")
    if stage:
        key = f"s{stage - 1}.refined.{image}"
        table.absolute(part, key, proposals, BOX_PIXELS, "pixels")
    gt = _gt_numbers(r, "", image)[valid]
    table.equal(part, f"{s}.assign.gt_inds.{image}", gt)
    iou = r["iou"][image][valid].clamp(min=0)
    table.relative(part, f"{s}.assign.max_overlaps.{image}", iou)
    labels = table.golden(f"train.gt_labels.{image}")
    if labels is not None and len(labels):
        ours = torch.where(gt > 0, labels.long()[(gt - 1).clamp(min=0)], -1)
        table.equal(part, f"{s}.assign.labels.{image}", ours)
    positive = r["sampled_positive"][image]
    negative = r["valid"][image] & ~positive
    # Where each slot (ground truths, proposals) stands when padding is left out.
    present = torch.cat([inputs.targets.valid[image], valid])
    place = present.long().cumsum(0) - 1
    for name, rows in (("pos_inds", positive), ("neg_inds", negative)):
        table.equal(part, f"{s}.sample.{name}.{image}", place[r["sampled"][image][rows]])
    for name, values in (
        ("pos_assigned_gt_inds", r["sampled_gt"]),
        ("pos_gt_labels", r["sampled_labels"]),
        ("pos_is_gt", r["from_gt"]),
    ):
        table.equal(part, f"{s}.sample.{name}.{image}", values[image][positive])


def _box_head(table: Comparison, r: Record, stage: int) -> None:
    part, s = f"stage {stage}", f"s{stage}"
    valid, positive = r["valid"].flatten(), r["sampled_positive"].flatten()
    image = torch.arange(r["rois"].shape[0])[:, None].expand(r["valid"].shape).flatten()
    rois = torch.cat([image[:, None].float(), r["rois"].flatten(0, 1)], dim=1)
    table.absolute(part, f"{s}.rois", rois[valid], BOX_PIXELS, "pixels")
    table.equal(part, f"{s}.roi_levels", roi_levels(rois[valid][:, 1:], ROI_LEVELS))
    table.equal(part, f"{s}.target.labels", r["sampled_labels"].flatten()[valid])
    table.relative(part, f"{s}.target.label_weights", valid[valid].float())
    goal = torch.zeros_like(r["rois"])
    goal[:, : r["goal"].shape[1]] = r["goal"]
    goal = torch.where(positive[:, None], goal.flatten(0, 1), 0.0)
    table.relative(part, f"{s}.target.bbox_targets", goal[valid])
    weights = positive[:, None].expand(-1, 4).float()
    table.relative(part, f"{s}.target.bbox_weights", weights[valid])
    table.relative(part, f"{s}.bbox_feats.first4", r["bbox_feats"][valid][:4])
    _row_sums(table, part, f"{s}.bbox_feats", r["bbox_feats"][valid])
    table.relative(part, f"{s}.cls_score", r["cls_score"][valid])
    table.relative(part, f"{s}.bbox_pred", r["bbox_pred"][valid])


def _mask_head(table: Comparison, r: Record, inputs: Inputs, stage: int) -> None:
    part, s = f"stage {stage}", f"s{stage}"
    valid = r["mask_valid"]
    rois = torch.cat([r["mask_image"][:, None].float(), r["mask_boxes"]], dim=1)
    table.absolute(part, f"{s}.mask_rois", rois[valid], BOX_PIXELS, "pixels")
    table.equal(part, f"{s}.mask_labels", r["mask_labels"][valid])
    if table.golden(f"{s}.mask_targets_soft") is not None:
        assert inputs.targets.bitmaps is not None, "golden inputs carry bitmaps"
        at = (r["mask_boxes"], r["mask_image"], r["mask_gt"])
        soft = bitmap_coverage(inputs.targets.bitmaps, *at, r["mask_targets"].shape[-1])
        table.relative(part, f"{s}.mask_targets_soft", soft[valid])
    table.equal(part, f"{s}.mask_targets", r["mask_targets"][valid])
    table.relative(part, f"{s}.mask_logits", r["mask_logits"][valid])
    _row_sums(table, part, f"{s}.mask_feats", r["mask_feats"][valid])


def _row_sums(table: Comparison, part: str, key: str, rows: Tensor) -> None:
    rows = rows.flatten(1).double()
    table.relative(part, f"{key}.roi_sum", rows.sum(dim=1))
    table.relative(part, f"{key}.roi_l2", rows.norm(dim=1))


def _losses(table: Comparison, golden: GoldenSet, record: Record) -> None:
    for name, value in golden.facts["log_vars"].items():
        ours = record["loss.total" if name == "loss" else f"loss.{name}"].item()
        scale = abs(value) or 1.0
        table.add("losses", name, abs(ours - value) / scale, RELATIVE, "relative")
    for key, value in golden.tensors.items():
        if key.startswith("loss."):
            # The RPN's are recorded per level, and summed in the log.
            table.seen.add(key)
            ours, value = record[key].item(), value.double().sum().item()
            scale = abs(value) or 1.0
            table.add("losses", key, abs(ours - value) / scale, RELATIVE, "relative")


def _gt_numbers(record: Record, prefix: str, image: int) -> Tensor:
    """The reference's numbering: k for ground truth k - 1, 0 background, -1 ignored."""
    gt, positive, negative = (record[f"{prefix}{k}"][image] for k in ("gt", "positive", "negative"))
    return torch.where(positive, gt + 1, torch.where(negative, 0, -1))
