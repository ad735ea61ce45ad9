# ruff: noqa: E501 -- a mutant is a line
"""Mistakes of one line in casc/model and casc/ops, and what finds them: `just mutants`.

Each is applied to a copy of the tree. The tests that are named for it have to find it, or where
none are `casc verify` on the goldens. Exits with 1 if one survives, or no longer fits the code.
"""

import argparse
import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TREE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """One line that a person could have written wrongly."""

    name: str
    file: str
    """Below casc/."""
    old: str
    """Stands there exactly once."""
    new: str
    tests: tuple[str, ...] = ()
    """Files below tests/ that find it where no golden does; none: `casc verify` must."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    name: str
    by: str
    """What found it; "" if it survived."""
    seconds: float


# fmt: off
MUTANTS = (
    # ---- images and ground truth ----
    Mutant("red and blue swapped", "model/preprocess.py", "(image[..., i] - mean) / std", "(image[..., 2 - i] - mean) / std"),
    Mutant("mean and std swapped", "model/preprocess.py", "zip(config.mean, config.std, strict=True)", "zip(config.std, config.mean, strict=True)"),
    Mutant("resized sides rounded down", "model/preprocess.py", "return (2 * size * target + side) // (2 * side)", "return size * target // side"),
    Mutant("the longer limit ignored", "model/preprocess.py", "target = torch.where(long_limits, long, short)", "target = torch.where(long_limits, short, short)", ("model/test_preprocess.py",)),
    Mutant("resize without half pixels", "model/preprocess.py", "(at.to(torch.float32) + 0.5) * step - 0.5)", "at.to(torch.float32) * step)"),
    Mutant("boxes not mirrored", "model/preprocess.py", "boxes = torch.where(flip[:, None, None], mirrored, boxes) * valid[..., None]", "boxes = boxes * valid[..., None]"),
    Mutant("polygons not mirrored", "model/preprocess.py", "edges = torch.where(flip[:, None, None], mirrored, edges)", "edges = edges + 0 * mirrored", ("model/test_preprocess.py",)),
    Mutant("mirrored about the last pixel", "model/preprocess.py", "columns = torch.where(view.flip[:, None], width - 1 - columns, columns)", "columns = torch.where(view.flip[:, None], width - columns, columns)"),
    Mutant("boxes scaled by (y, x)", "model/preprocess.py", "scale = ratio.flip(-1).repeat(1, 2)", "scale = ratio.repeat(1, 2)"),
    Mutant("padding normalised too", "model/preprocess.py", "return normalised if kept is None else torch.where(kept[..., None], normalised, 0.0)", "return normalised"),
    Mutant("a window's corner not subtracted from polygons", "model/preprocess.py", "boxes, edges = boxes - corner, edges - corner", "boxes, edges = boxes - corner, edges", ("model/test_preprocess.py",)),
    Mutant("a crop's place drawn for each axis", "model/preprocess.py", "seed, {noises.SCALE: 1, noises.CROP: 1}", "seed, {noises.SCALE: 1, noises.CROP: 2}", ("model/test_large_scale_jitter.py",)),
    Mutant("a crop's place rounded down", "model/preprocess.py", "corner = (2 * beyond * where + _DRAWS) // (2 * _DRAWS)", "corner = beyond * where // _DRAWS", ("model/test_large_scale_jitter.py",)),
    Mutant("a window's padding black", "model/preprocess.py", "PAD = 128.0", "PAD = 0.0", ("model/test_large_scale_jitter.py",)),
    Mutant("antialiasing of enlarged images too", "model/preprocess.py", "reach = step.clamp(min=1)[..., None]", "reach = 2 * step.clamp(min=1)[..., None]", ("model/test_large_scale_jitter.py",)),
    Mutant("annotated boxes of what isn't cut", "model/crop_boxes.py", "outlined = _sums(long[..., None].long(), edge_gt, boxes.shape[1]) > 0", "outlined = (clipped != boxes).any(dim=-1, keepdim=True)", ("model/test_crop_boxes.py", "model/test_large_scale_jitter.py")),
    Mutant("never all objects pasted", "model/copy_paste.py", "(valid.sum(dim=1) + 1)).floor()", "valid.sum(dim=1)).floor()", ("model/test_copy_paste.py",)),
    Mutant("the image before pastes", "model/copy_paste.py", "image = torch.where(pasted[..., None], image.roll(-1, 0), image)", "image = torch.where(pasted[..., None], image.roll(1, 0), image)", ("model/test_copy_paste.py",)),
    Mutant("what is hidden stays in its box", "model/copy_paste.py", "cut = (left.pixels < areas)[..., None]", "cut = (left.pixels < 0)[..., None]", ("model/test_copy_paste.py",)),
    Mutant("what is wholly hidden stays", "model/copy_paste.py", "valid = targets.valid & ~gone", "valid = targets.valid", ("model/test_copy_paste.py",)),
    Mutant("pasted pixels half a pixel off", "model/copy_paste.py", "y = torch.arange(height, device=edges.device) + 0.5", "y = torch.arange(height, device=edges.device)", ("model/test_copy_paste.py",)),
    Mutant("pasted objects hidden too", "model/mask_targets.py", "(gt < under)[:, None, None]", "(gt >= 0)[:, None, None]", ("model/test_copy_paste.py",)),
    Mutant("saturation before contrast", "model/photometric.py", "_blend(image, mean[:, None, None, None], contrast[..., None])", "_blend(image, mean[:, None, None, None], saturation[..., None])", ("model/test_photometric.py",)),
    Mutant("contrast about the padding's mean", "model/photometric.py", "mean = torch.where(inside, _grey(image), 0.0).sum(dim=(1, 2)) / count", "mean = _grey(image).mean(dim=(1, 2))", ("model/test_photometric.py",)),
    Mutant("the last rectangle that fits", "model/photometric.py", "falling = torch.arange(TRIES, 0, -1, device=seed.device)", "falling = torch.arange(1, TRIES + 1, device=seed.device)", ("model/test_photometric.py",)),
    Mutant("pasted outlines are the image's own objects'", "model/copy_paste.py", "source.edge_gt + objects], dim=1)", "source.edge_gt], dim=1)", ("model/test_copy_paste.py",)),
    Mutant("nothing erased where images are jittered", "model/preprocess.py", "kept = ~erased if kept is None else kept & ~erased", "kept = None if kept is None else kept & ~erased", ("model/test_photometric.py",)),
    # ---- backbone and pyramid ----
    Mutant("batch norm's epsilon", "model/layers.py", "BN_EPS = 1e-5", "BN_EPS = 1e-3"),
    Mutant("the variance not rooted", "model/layers.py", "torch.rsqrt(var + BN_EPS)", "torch.reciprocal(var + BN_EPS)"),
    Mutant("gathered gradients of the scales without the means", "model/layers.py", "torch._foreach_mul(shift_grads, means),", "torch._foreach_mul(shift_grads, gammas),", ("model/test_resnet.py",)),
    Mutant("scales of NPUs' folded weights get means for gradients", "model/layers.py", "part.view(-1, size).sum(1) for part", "part.view(-1, size).mean(1) for part", ("model/test_layers.py",)),
    Mutant("what doesn't train cast with what does", "model/layers.py", "if params[name].requires_grad == trains}", "if trains}", ("model/test_layers.py",)),
    Mutant("grey gets the mean of RGB's first weights", "model/layers.py", "* (3 / channels)", "* 1.0", ("train/test_image_channels.py",)),
    Mutant("one stage more is frozen", "model/backbone.py", "return stage <= config.frozen_stages", "return stage <= config.frozen_stages + 1"),
    Mutant("the stem trains", "model/resnet.py", "    if not name.startswith(f\"{PREFIX}.layer\"):\n        return 0", "    if not name.startswith(f\"{PREFIX}.layer\"):\n        return 5"),
    Mutant("the stem's pooling unpadded", "model/resnet.py", "kernel_size=3, stride=2, padding=1", "kernel_size=3, stride=2, ceil_mode=True"),
    Mutant("the stride in the 1x1", "model/resnet.py", "(stride, 1) if config.stride_in_1x1 else (1, stride)", "(1, stride) if config.stride_in_1x1 else (stride, 1)"),
    Mutant("no ReLU after the shortcut", "model/resnet.py", "    y = _conv_norm(params, norms, config, cells, name, \"conv3\", 3, y)\n    return F.relu(y + ", "    y = _conv_norm(params, norms, config, cells, name, \"conv3\", 3, y)\n    return (y + "),
    Mutant("laterals overwritten", "model/fpn.py", "return (blocks + coarse[:, :, :, None, :, None])", "return coarse[:, :, :, None, :, None].expand_as(blocks)"),
    Mutant("laterals upsampled bilinearly", "model/fpn.py", "if fine.shape[2:] != (2 * height, 2 * width):\n        return fine + F.interpolate(coarse, size=fine.shape[2:], mode=\"nearest\")", "if True:\n        return fine + F.interpolate(coarse, size=fine.shape[2:], mode=\"bilinear\")"),
    Mutant("P6 by 2x2 pooling", "model/fpn.py", "kernel_size=1, stride=2", "kernel_size=2, stride=2"),
    Mutant("dropped paths not made up for", "model/layers.py", "(noise >= probability).to(noise.dtype) / (1 - probability)", "(noise >= probability).to(noise.dtype)", ("model/test_backbones.py",)),
    Mutant("one number drops both halves of a block", "model/vit.py", "y, None if keep is None else keep[:, 1])", "y, None if keep is None else keep[:, 0])", ("model/test_vit.py",)),
    Mutant("what lies between two maps is of the earlier stage", "model/timm_backbone.py", "stage = here or min(reached + 1 if reached else 0, len(ends))", "stage = here or reached", ("model/test_backbones.py",)),
    Mutant("relative positions mirrored", "model/vit.py", "at[:, None] - at + size - 1", "at - at[:, None] + size - 1", ("model/test_vit.py",)),
    Mutant("transposed convolution's cells turned", "model/fpn.py", "x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 1, 4, 2, 3)", ("model/test_vit.py",)),
    Mutant("group norm of too few groups", "model/layers.py", "GN_GROUPS = 32", "GN_GROUPS = 16", ("model/test_layers.py",)),
    Mutant("the variance of padding, too", "model/layers.py", "variance = (centred.square() * inside)", "variance = centred.square()", ("model/test_layers.py",)),
    Mutant("cells that are image in part left out", "model/layers.py", "- 1e-3).ceil().clamp(min=1)", "- 1e-3).floor().clamp(min=1)", ("model/test_layers.py",)),
    # ---- anchors, boxes, matching, sampling ----
    Mutant("anchors at cell centres", "model/anchors.py", "x = torch.arange(width, device=device, dtype=torch.float32) * stride", "x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride"),
    Mutant("ratios are width over height", "model/anchors.py", "(0.5 * side / math.sqrt(r), 0.5 * side * math.sqrt(r))", "(0.5 * side * math.sqrt(r), 0.5 * side / math.sqrt(r))"),
    Mutant("a stride of the anchors", "model/anchors.py", "(4, 8, 16, 32, 64)", "(4, 8, 16, 32, 32)"),
    Mutant("anchors may touch the border", "model/anchors.py", "(x2 < width) & (y2 < height)", "(x2 <= width) & (y2 <= height)"),
    Mutant("deltas times their deviations when encoding", "model/boxes.py", "_by_axis(torch.div, *pair)", "_by_axis(torch.mul, *pair)", ("model/test_boxes.py",)),
    Mutant("log of the inverse ratio", "model/boxes.py", "(goal_side / side).log()", "(side / goal_side).log()"),
    Mutant("no clip of dh", "model/boxes.py", "growth.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "growth.exp()", ("model/test_boxes.py",)),
    Mutant("the ratio's clip", "model/boxes.py", "math.log(16 / 1000)", "math.log(1000 / 32)", ("model/test_boxes.py",)),
    Mutant("boxes clipped to (height, width)", "model/boxes.py", "torch.minimum(corners, size.flip(-1)[:, None, None])", "torch.minimum(corners, size[:, None, None])"),
    Mutant("refined boxes unclipped", "model/box_head.py", "stage.stds, size)", "stage.stds, None)"),
    Mutant("union counts the intersection twice", "model/boxes.py", "area(a) + area(b) - intersection", "area(a) + area(b)"),
    Mutant("no low-quality matches", "model/matching.py", "(iou == gt_best) & (gt_best >= low_quality_iou)", "(iou == gt_best) & (gt_best > 1)", ("model/test_matching.py",)),
    Mutant("no low-quality matches on a CPU", "model/matching.py", "torch.where(gt_best >= low_quality_iou, gt_best, 2.0)", "torch.full_like(gt_best, 2.0)"),
    Mutant("the first claim wins", "model/matching.py", "torch.where(claim >= 0, claim, gt).long()", "gt.long()", ("model/test_matching.py",)),
    Mutant("an overlap of just the threshold", "model/matching.py", "valid & (best >= iou), valid & (best < iou)", "valid & (best > iou), valid & (best <= iou)", ("model/test_matching.py",)),
    Mutant("ignored anchors are background", "model/matching.py", "inside & (best < negative_iou) & ~positive", "inside & (best < positive_iou) & ~positive"),
    Mutant("the smallest keys of the negatives", "model/matching.py", "negative]), keys, -1.0)", "negative]), torch.where(negative, 1 - keys, keys), -1.0)"),
    Mutant("regions to ignore by the region's own area", "model/matching.py", "area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)", "area = (regions[..., 2:] - regions[..., :2]).prod(dim=-1).amax(dim=1, keepdim=True).expand(boxes.shape[:2]) + 0 * boxes[..., 0]", ("model/test_ignore_regions.py",)),
    Mutant("regions to ignore not mirrored", "model/preprocess.py", "return torch.where(view.flip[:, None, None], mirrored, moved)", "return torch.where(view.flip[:, None, None] & False, mirrored, moved)", ("model/test_ignore_regions.py",)),
    Mutant("a positive too few", "model/matching.py", "is_positive = slot < n_pos", "is_positive = slot < n_pos - 1"),
    Mutant("negatives begin with the second", "model/matching.py", "(slot - n_pos).clamp(0,", "(slot - n_pos + 1).clamp(0,"),
    Mutant("ground truth refined twice", "model/forward_train.py", "valid = rois.valid & ~rois.from_gt", "valid = rois.valid"),
    Mutant("ground truth not among the samples", "model/box_head.py", "torch.cat([targets.valid, matches.positive], dim=1),", "torch.cat([~targets.valid & targets.valid, matches.positive], dim=1),"),
    Mutant("background is class 0", "model/box_head.py", "take(targets.labels, gt), classes)", "take(targets.labels, gt), 0)"),
    Mutant("more positives in the boxes' samples", "model/box_head.py", "positive_fraction: float = 0.25", "positive_fraction: float = 0.02"),
    Mutant("one seed for all stages' noise", "model/fixed.py", "stages = {noises.STAGE + i: capacity + count for", "stages = {noises.STAGE + i // 2: capacity + count for", ("model/test_detector.py", "model/test_noise.py")),
    # ---- RPN ----
    Mutant("the RPN's loss beta", "model/rpn.py", "beta: float = 1 / 9", "beta: float = 1.0"),
    Mutant("proposals suppressed too eagerly", "model/rpn.py", "nms_iou: float = 0.7", "nms_iou: float = 0.6"),
    Mutant("proposals of training at inference", "model/rpn.py", "count = config.train_pre_nms if train else config.test_pre_nms", "count = config.test_pre_nms if train else config.train_pre_nms"),
    Mutant("the RPN's normaliser", "model/rpn.py", "(positive, valid & ~positive)]", "(positive, positive)]"),
    Mutant("the RPN's maps in channel order", "model/rpn.py", "conv(both, JOINED, x).permute(0, 2, 3, 1)", "conv(both, JOINED, x).permute(0, 1, 2, 3)"),
    Mutant("the sampled head reads the wrong ratio", "model/rpn.py", "own = anchor[..., None] % ratios ==", "own = anchor[..., None] // ratios =="),
    Mutant("the sampled head's patches transposed", "model/rpn.py", "weight = params[f\"{last}.weight\"].permute(0, 2, 3, 1)", "weight = params[f\"{last}.weight\"].permute(0, 3, 2, 1)"),
    Mutant("patches wrap round the border", "ops/pyramid.py", "weight = within.reshape(-1, 1).to(pyramid.pixels.dtype)", "weight = torch.ones_like(within.reshape(-1, 1)).to(pyramid.pixels.dtype)", ("model/test_rpn.py",)),
    # ---- box heads ----
    Mutant("all stages refine as the first", "model/forward_train.py", "boxes = refine(stage, rois.boxes, deltas, inputs.size)", "boxes = refine(config.stages[0], rois.boxes, deltas, inputs.size)"),
    Mutant("the first stage's deviations at inference", "model/forward_detect.py", "boxes = refine(stage, boxes, deltas, size)", "boxes = refine(config.stages[0], boxes, deltas, size)"),
    Mutant("a stage's threshold", "model/detector_config.py", "StageConfig(iou=0.6,", "StageConfig(iou=0.5,"),
    Mutant("a stage's weight", "model/detector_config.py", "loss_weight=0.25", "loss_weight=0.5"),
    Mutant("a stage's deviation", "model/detector_config.py", "(0.033, 0.033, 0.067, 0.067)", "(0.033, 0.033, 0.067, 0.067 / 2)"),
    Mutant("the box loss unweighted", "model/box_head.py", "goal = encode(boxes, gt_boxes, numbers.stds)", "goal = encode(boxes, gt_boxes, numbers.stds[:1])"),
    Mutant("the boxes' normaliser", "model/box_head.py", "drawn = valid.sum(dim=(1, 2), dtype=torch.float32)", "drawn = positive.sum(dim=(1, 2), dtype=torch.float32)"),
    Mutant("smooth L1 not halved", "model/losses.py", "reduction=\"none\", beta=beta)", "reduction=\"none\", beta=beta) * 2"),
    Mutant("smooth L1 of padding too", "model/losses.py", "return loss * mask[..., None]", "return loss"),
    Mutant("gradient through the refined boxes", "model/box_head.py", "deltas.detach().reshape(boxes.shape)", "deltas.reshape(boxes.shape)", ("model/test_box_head.py",)),
    Mutant("a ReLU missing in the box head", "model/box_head.py", "x = F.relu(linear(params, f\"{name}.shared_fcs.{i}\", x))", "x = linear(params, f\"{name}.shared_fcs.{i}\", x)"),
    Mutant("GIoU's enclosing box not that", "model/losses.py", "loss = 1 - iou + (enclosing - union) / (enclosing + eps)", "loss = 1 - iou + (enclosing - union) / (union + eps)", ("model/test_losses.py",)),
    Mutant("CIoU's weight with a gradient", "model/losses.py", "(shape / (1 - iou + shape + eps)).detach()", "(shape / (1 - iou + shape + eps))", ("model/test_losses.py",)),
    Mutant("the second RPN convolution sees beyond the level", "model/rpn.py", " * within.flatten(0, 1)[:, None].to(x.dtype)", "", ("model/test_rpn.py",)),
    Mutant("the RPN's convolutions the other way round", "model/rpn.py", "conv\" for i in range(config.convs)]", "conv\" for i in reversed(range(config.convs))]", ("model/test_rpn.py",)),
    Mutant("all boxes decoded by the first stage's deviations", "model/box_head.py", "decode(box, delta, own.stds, None) for box, delta, own in every", "decode(box, delta, stages[0].stds, None) for box, delta, own in every", ("model/test_box_head.py",)),
    Mutant("a positive hands on the best class's box", "model/forward_train.py", "chosen_deltas(output, rois.labels.shape, rois.labels)", "chosen_deltas(output, rois.labels.shape, None)", ("model/test_detector.py",)),
    Mutant("masks scored by their own part of an object", "model/mask_scoring.py", "torch.maximum(whole, inside)", "inside", ("model/test_mask_scoring.py",)),
    Mutant("an object's area not in the RoI's cells", "model/forward_train.py", "cells * area(own) / area(rois.boxes).clamp(min=1e-6)", "cells.float()", ("model/test_mask_scoring.py",)),
    Mutant("masks that miss their object are scored", "model/mask_scoring.py", "counts = valid & (ious > 0)", "counts = valid", ("model/test_mask_scoring.py",)),
    Mutant("the first stage's masks are scored", "model/forward_train.py", "features[-1], logits[-1], goals[-1]", "features[-1], logits[0], goals[-1]", ("model/test_mask_scoring.py",)),
    Mutant("masks' scores without the box's", "model/forward_detect.py", "None if fit is None else scores * fit", "fit", ("model/test_mask_scoring.py",)),
    Mutant("soft-NMS's sigma", "model/forward_detect.py", "SIGMA = 0.5", "SIGMA = 0.05", ("model/test_detector.py",)),
    # ---- RoIAlign ----
    Mutant("features doubled on the way to the box head", "ops/roi_linear.py", "return linear(features.flatten(1), matrix, bias), pyramid", "return linear(2 * features.flatten(1), matrix, bias), pyramid"),
    Mutant("the fixed grid's features doubled", "ops/roi_linear.py", "return product(_features(pixels, index, weight, cells), matrix, bias)", "return product(2 * _features(pixels, index, weight, cells), matrix, bias)"),
    Mutant("the matrix's gradient doubled", "ops/roi_linear.py", "return product(grad.t(), _features(pixels, index, weight, cells).t())", "return product(grad.t(), 2 * _features(pixels, index, weight, cells).t())", ("ops/test_roi_linear.py",)),
    Mutant("later readers' gradient lost", "ops/row_sums.py", "weight, total.shape[0]).add_(total)", "weight, total.shape[0])", ("ops/test_row_sums.py", "ops/test_roi_linear.py")),
    Mutant("the level's finest side", "ops/roi_align.py", "FINEST_SIDE = 56.0", "FINEST_SIDE = 112.0"),
    Mutant("levels by the longer side", "ops/roi_align.py", "area = sides[:, 0] * sides[:, 1]", "area = sides.amax(dim=1).square()"),
    Mutant("the fixed grid half a pixel off", "ops/roi_align.py", "[:, None] - 0.5\n", "[:, None]\n"),
    Mutant("the fixed grid's axes swapped", "ops/roi_align.py", "index = y[:, :, None, :, None] * width[:, None, None, None, None] + x[:, None, :, None, :]", "index = x[:, :, None, :, None] * width[:, None, None, None, None] + y[:, None, :, None, :]"),
    Mutant("all RoIs read image 0", "ops/roi_align.py", "by_level(level, offsets) + image * per_image,", "by_level(level, offsets) + 0 * image * per_image,"),
    Mutant("samples beyond the border count", "ops/roi_align.py", "counts = (at >= -1) & (at <= last + 1)", "counts = (at >= -9e9) & (at <= last + 9e9)", ("ops/test_roi_align.py",)),
    Mutant("the adaptive grid's scale", "ops/roi_align.py", "scales = [1 / stride for stride in pyramid.strides]", "scales = [1 / (stride + 1) for stride in pyramid.strides]"),
    Mutant("the adaptive grid's backward is fixed", "ops/roi_align.py", "grads = _native_backward(grad, rois, here, ctx.scales, ctx.shape, ctx.cells, ctx.grid)", "grads = _native_backward(grad, rois, here, ctx.scales, ctx.shape, ctx.cells, 1)"),
    # ---- masks ----
    Mutant("mask logits of the next class", "model/mask_head.py", "(_stack(labels)[..., None] == every)", "((_stack(labels) + 1)[..., None] == every)"),
    Mutant("the upsampling's axes swapped", "model/mask_head.py", "params[f\"{n}.weight\"].permute(0, 2, 3, 1).flatten(1) for n in names", "params[f\"{n}.weight\"].permute(0, 3, 2, 1).flatten(1) for n in names"),
    Mutant("masks on from more than one half", "model/mask_targets.py", "image, gt, cells) >= 0.5", "image, gt, cells) > 0.6"),
    Mutant("polygons by the even-odd rule", "model/mask_targets.py", "on = winding != 0", "on = winding % 2 != 0", ("model/test_mask_targets.py",)),
    Mutant("polygon scan lines at the samples' edge", "model/mask_targets.py", "(line.to(self.top.dtype) + 0.5) / count", "line.to(self.top.dtype) / count", ("model/test_mask_targets.py",)),
    Mutant("the masks' normaliser", "model/mask_head.py", "(logits.shape[2] * logits.shape[3])", "logits.shape[2]"),
    Mutant("mask RoIs of the wrong image", "model/mask_head.py", "[:, None].expand(gt.shape[1:])", "[:, None].flip(0).expand(gt.shape[1:])"),
    Mutant("packed masks lose the last", "model/mask_head.py", "falling = torch.arange(slots, 0, -1, device=rois.valid.device)", "falling = torch.arange(slots - 1, -1, -1, device=rois.valid.device)", ("model/test_mask_head.py", "model/test_steps.py")),
    Mutant("a counted step rounds down", "model/steps.py", "-(-count // CAPACITY_STEP) * CAPACITY_STEP", "count // CAPACITY_STEP * CAPACITY_STEP"),
    # ---- inference ----
    Mutant("scores of the last stage only", "model/forward_detect.py", "torch.stack(logits).sum(dim=0) / len(logits)", "logits[-1]"),
    Mutant("masks of the first stage only", "model/forward_detect.py", "mean = torch.stack(stages).sum(dim=0) / len(stages)", "mean = stages[0]"),
    Mutant("background in front", "model/forward_detect.py", "logits.softmax(dim=-1)[..., :-1]", "logits.softmax(dim=-1)[..., 1:]"),
    Mutant("the score threshold", "model/detector_config.py", "score_threshold: float = 0.05", "score_threshold: float = 0.1"),
    Mutant("detections' suppression", "model/detector_config.py", "nms_iou: float = 0.5", "nms_iou: float = 0.7"),
    Mutant("labels by the wrong factor", "model/forward_detect.py", "torch.arange(classes, device=scores.device).repeat(proposals)", "torch.arange(classes, device=scores.device).repeat_interleave(proposals)"),
    Mutant("boxes not scaled back", "model/forward_detect.py", "config.inference, logits, boxes / inputs.scale[:, None], proposals.valid, probe", "config.inference, logits, boxes, proposals.valid, probe"),
    Mutant("masks at the stored image's scale", "model/forward_detect.py", "rois = probe(\"mask.rois\", boxes * inputs.scale[:, None])", "rois = probe(\"mask.rois\", boxes)"),
    # ---- suppression ----
    Mutant("groups aren't apart", "ops/nms.py", "[..., None] * (extent + 1)", "[..., None] * 0 * (extent + 1)", ("ops/test_nms.py",)),
    Mutant("groups apart by half an image", "ops/nms.py", "[..., None] * (extent + 1)", "[..., None] * (extent / 2)", ("ops/test_nms.py",)),
    Mutant("fixed suppression of equal overlaps", "ops/fixed_nms.py", "_iou(part) > just_below(iou)", "_iou(part) >= just_below(iou)", ("ops/test_fixed_nms.py", "ops/test_nms.py")),
    Mutant("fixed suppression forgets earlier blocks", "ops/fixed_nms.py", "overlaps[:, block, later])", "overlaps[:, block, later], alpha=0)", ("ops/test_fixed_nms.py",)),
    Mutant("fixed suppression of invalid boxes", "ops/fixed_nms.py", "scatter(1, slot, valid.to(boxes.dtype))", "scatter(1, slot, torch.ones_like(scores))", ("ops/test_fixed_nms.py", "ops/test_nms.py")),
)
# fmt: on


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants, print a table; 1 if one survives or doesn't fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all mutants without any")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--suite", action="store_true", help="all tests where named ones don't do")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    start = time.monotonic()
    outcomes = try_all(chosen, options.jobs, whole_suite=options.suite)
    survived = [outcome.name for outcome in outcomes if not outcome.by]
    print(f"\n{len(outcomes)} mutants, {len(survived)} survived, {time.monotonic() - start:.0f} s")
    return bool(survived)


def try_all(mutants: Sequence[Mutant], jobs: int, *, whole_suite: bool = False) -> list[Outcome]:
    """What becomes of each; prints a Markdown table on the way.

    Every mutant gets a process that begins with torch, the goldens and the weights in memory.

    Raises:
        ValueError: the old text of one isn't in its file exactly once, or, if all are tried, the
            code as it is doesn't pass.
    """
    for mutant in mutants:
        found = (TREE / "casc" / mutant.file).read_text().count(mutant.old)
        if found != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has its old text {found} times")
    # Forks can't use threads that were started before.
    torch.set_num_threads(1)
    _load()
    print("| mutant | found by | s |\n|---|---|---|", flush=True)
    context = multiprocessing.get_context("fork")
    outcomes = []
    same = Mutant("the code as it is", "model/boxes.py", "import math\n", "import math\n")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        tried = (same, *mutants) if len(mutants) == len(MUTANTS) else mutants
        tasks = [(mutant, whole_suite) for mutant in tried]
        for outcome in pool.imap(_try, tasks, chunksize=1):
            if outcome.name == same.name:
                if outcome.by:
                    raise ValueError(f"the code as it is doesn't pass: {outcome.by}")
                continue
            by = outcome.by or "**SURVIVED**"
            print(f"| {outcome.name} | {by} | {outcome.seconds:.0f} |", flush=True)
            outcomes.append(outcome)
    return outcomes


_loaded: dict[str, Any] = {}


def _load() -> None:
    from casc.model.detector_config import DetectorConfig
    from casc.verify.goldens import golden_weights, read_sets

    (_loaded["golden"],) = read_sets(TREE / "tests" / "goldens", log=lambda line: None)
    _loaded["weights"] = golden_weights(DetectorConfig())
    gc.freeze()


def _try(task: tuple[Mutant, bool]) -> Outcome:
    """Apply a mutant to a copy of the tree and look for what finds it."""
    mutant, whole_suite = task
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _copy(tree)
        file = tree / "casc" / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
        by = (_test(tree, mutant.tests) if mutant.tests else "") or _verify(tree)
        if not by and whole_suite and mutant.old != mutant.new:
            by = _test(tree, [""])
    return Outcome(mutant.name, by, time.monotonic() - start)


def _copy(tree: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "goldens", "recipes")
    for name in ("casc", "tests", "data_tools"):
        shutil.copytree(TREE / name, tree / name, ignore=ignored)
    for name in ("recipes", "pyproject.toml", "docs", "README.md"):
        (tree / name).symlink_to(TREE / name)
    (tree / "casc" / "recipes").symlink_to(TREE / "recipes")
    (tree / "tests" / "goldens").symlink_to(TREE / "tests" / "goldens")


def _verify(tree: Path) -> str:
    """The first comparison of `casc verify` that fails in the tree; "" if it passes."""
    for name in [n for n in sys.modules if n == "casc" or n.startswith("casc.")]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    import casc.verify as verify
    from casc.device.compute import Compute
    from casc.model.detector_config import DetectorConfig, reference_settings
    from casc.verify.compare import Comparison

    assert Path(verify.__file__).is_relative_to(tree)
    golden, (params, buffers) = _loaded["golden"], _loaded["weights"]
    table = Comparison(golden.tensors)
    config, device = reference_settings(DetectorConfig()), torch.device("cpu")
    compute = Compute(compile=False)
    try:
        for _ in verify.compare_parts(golden, config, params, buffers, device, compute, table):
            failed = [row for row in table.rows if not row.passed]
            if failed:
                return f"verify: {failed[0].name}"
    except Exception as error:  # a mutant may break the step altogether
        return f"verify: {type(error).__name__}"
    return ""


def _test(tree: Path, files: Sequence[str]) -> str:
    """The first test that fails in the tree; "" if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # What finds a mistake compiled finds it eager, too.
    command += ["-m", "not slow", "-k", "not compiled", *(f"tests/{file}" for file in files)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
