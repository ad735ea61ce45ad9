"""From images on their canvas, with ground truth, to every loss of the cascade.

Legend: B images, G ground-truth capacity, A anchors, P proposals, S samples per image and stage.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from casc.model import noise as noises
from casc.model.box_head import (
    BoxOutput,
    RoiSample,
    StageNumbers,
    box_head_at,
    box_losses,
    max_positive,
    refine,
    sample_rois,
)
from casc.model.boxes import area
from casc.model.detector import (
    Features,
    Inputs,
    anchor_lengths,
    cast_heads,
    chosen_deltas,
    extract,
    level_sizes,
    roi_images,
)
from casc.model.detector_config import DetectorConfig, mask_stages, scores_masks
from casc.model.fixed import Fixed, make_fixed, noise_counts
from casc.model.layers import Params
from casc.model.losses import LossSums, add_prefix, join
from casc.model.mask_head import MaskRois, mask_heads, mask_losses, mask_rois, mask_targets
from casc.model.mask_scoring import mask_iou_head, mask_iou_loss, mask_ious
from casc.model.rpn import (
    Proposals,
    candidates,
    propose,
    rpn_head,
    rpn_head_at,
    rpn_losses,
    rpn_targets,
)
from casc.model.targets import Targets
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Neighbours, Pyramid
from casc.ops.roi_align import detach_unread, roi_align


class Noise(NamedTuple):
    """The random numbers of one step, uniform in [0, 1)."""

    rpn: Tensor
    """[B, A]."""
    stages: tuple[Tensor, ...]
    """Per stage [B, G + P] or [B, G + S]."""
    drop: Tensor | None = None
    """[B, D], which paths of the backbone are dropped; None where none are."""
    flip: Tensor | None = None
    """[B, 1], whether the image is mirrored; None where that is decided elsewhere."""


def draw_noise(
    config: DetectorConfig,
    seed: Tensor,
    anchors: int,
    capacity: int,
    draws: noises.Draws | None = None,
) -> Noise:
    """All noise of a step from one seed per image.

    Args:
        config: how many numbers each part needs.
        seed: [B] int64.
        anchors: A, of all levels.
        capacity: G.
        draws: of `noise_counts`; made here if None.
    """
    counts = noise_counts(config, anchors, capacity)
    made = dict(zip(counts, noises.uniforms(seed, counts, draws), strict=True))
    stages = tuple(made[noises.STAGE + i] for i in range(len(config.stages)))
    return Noise(made[noises.RPN], stages, made.get(noises.DROP_PATH), made[noises.FLIP])


def losses(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    inputs: Inputs,
    noise: Noise,
    probe: Probe = unwatched,
    fixed: Fixed | None = None,
) -> LossSums:
    """Every loss of a batch in one graph.

    Mask heads run on as many RoIs as there can be. `casc.model.steps` splits the same
    functions in two graphs when it may count the positives instead.

    Args:
        params: weights by name.
        buffers: batch norm statistics by name.
        config: the detector.
        inputs: images with ground truth.
        noise: the step's random numbers.
        probe: sees what is computed on the way.
        fixed: as for `box_branch`.

    Returns:
        Losses and measures, named like the reference's log.
    """
    params = cast_heads(params, inputs.image)
    features = extract(params, buffers, config, inputs.image, probe, noise.drop)
    result, pyramid, rois = box_branch(params, config, features, inputs, noise, probe, fixed)
    stages = range(mask_stages(config))
    if not stages:
        return result
    # The heads share nothing that depends on order: one pass serves them all.
    masks = mask_branch(params, config, stages, pyramid, rois, inputs.targets, probe)
    return join(result, weighted_mask_losses(config, stages, masks))


def weighted_mask_losses(
    config: DetectorConfig, stages: Sequence[int], made: Sequence[tuple[Tensor, Tensor]]
) -> LossSums:
    """What `mask_branch` gave, with the stages' weights, by name."""
    names = [*(f"s{i}.loss_mask" for i in stages), "loss_mask_iou"]
    weights = [*(config.stages[i].loss_weight for i in stages), 1.0]
    columns = list(zip(names, weights, made, strict=False))
    return LossSums(
        {name: weight * loss for name, weight, (loss, _) in columns},
        {name: count for name, _, (_, count) in columns},
        {},
    )


def box_branch(
    params: Params,
    config: DetectorConfig,
    features: Features,
    inputs: Inputs,
    noise: Noise,
    probe: Probe = unwatched,
    fixed: Fixed | None = None,
) -> tuple[LossSums, Pyramid, list[MaskRois]]:
    """All losses but the masks', and what these need: features, and each stage's positive RoIs.

    The pyramid goes from reader to reader, which bounds the gradients held at once. `fixed` is
    the canvas's; without it, it is made.
    """
    if fixed is None:
        device, capacity = inputs.image.device, inputs.targets.valid.shape[1]
        fixed = make_fixed(config, level_sizes(features.levels), device, capacity)
    anchors = probe("anchors", fixed.anchors)
    result, pyramid = rpn_branch(
        params, config, features, anchors, inputs, noise.rpn, probe, fixed.neighbours
    )
    with torch.no_grad():
        output = probe("rpn.output", rpn_head(params, config.rpn, features.levels))
    lengths = anchor_lengths(config, features.levels)
    found = candidates(
        config.rpn, output, anchors, lengths, inputs.size, train=True, slots=fixed.slots
    )
    found = probe("candidates", found)
    proposals = probe("proposals", propose(config.rpn, found, train=True))
    cascade, pyramid, samples = cascade_losses(
        params, config, pyramid, proposals, inputs, noise.stages, probe, fixed.numbers
    )
    masked = samples[: mask_stages(config)]
    rois = mask_rois(masked, max_positive(config.box_head)) if masked else []
    pyramid = detach_unread(pyramid, config.roi_align, config.roi_kernel)
    return join(result, cascade), pyramid, rois


def rpn_branch(
    params: Params,
    config: DetectorConfig,
    features: Features,
    anchors: Tensor,
    inputs: Inputs,
    keys: Tensor,
    probe: Probe = unwatched,
    table: Neighbours | None = None,
) -> tuple[LossSums, Pyramid]:
    """The RPN's losses and number of positive anchors per image; the pyramid for what follows."""
    gt = inputs.targets
    targets = rpn_targets(
        config.rpn, anchors, inputs.size, gt.boxes, gt.valid, keys, probe, gt.regions
    )
    targets = probe("rpn.targets", targets)
    sizes = level_sizes(features.levels)
    index = targets.sample.indices
    sampled, pyramid = rpn_head_at(params, config.rpn, features.pyramid, sizes, index, table)
    sampled = probe("rpn.sampled", sampled)
    result = rpn_losses(config.rpn, sampled, anchors, targets, gt.boxes, probe)
    result.measures["rpn.positives"] = _per_image(targets.sample.positive)
    return result, pyramid


def cascade_losses(
    params: Params,
    config: DetectorConfig,
    pyramid: Pyramid,
    proposals: Proposals,
    inputs: Inputs,
    keys: tuple[Tensor, ...],
    probe: Probe = unwatched,
    numbers: StageNumbers | None = None,
) -> tuple[LossSums, Pyramid, list[RoiSample]]:
    """Box losses of every stage, each starting from the boxes refined by the one before.

    Also the pyramid for what follows, and each stage's RoIs.
    """
    boxes, valid = proposals.boxes, proposals.valid
    outputs: list[BoxOutput] = []
    samples: list[RoiSample] = []
    image = roi_images(boxes, config.box_head.samples)
    for i, stage in enumerate(config.stages):
        boxes, valid = probe("box.candidates", (boxes, valid))
        rois = sample_rois(
            config.box_head, stage, config.classes, boxes, valid, inputs.targets, keys[i], probe
        )
        rois = probe("box.rois", rois)
        flat = rois.boxes.flatten(0, 1)
        sampling, kernel = config.roi_align, config.roi_kernel
        output, pyramid = box_head_at(
            params, config.box_head, i, pyramid, flat, image, sampling, kernel, probe
        )
        output = probe("box.output", output)
        outputs.append(output)
        samples.append(rois)
        if i + 1 == len(config.stages):
            break
        deltas = output.deltas
        if config.box_head.class_specific:
            deltas = chosen_deltas(output, rois.labels.shape, rois.labels)
        boxes = refine(stage, rois.boxes, deltas, inputs.size)
        # Ground truth is added afresh by each stage; its own refinement would come twice.
        valid = rois.valid & ~rois.from_gt
    made = box_losses(
        config.box_head, config.stages, outputs, samples, inputs.targets, probe, numbers
    )
    return join(*(add_prefix(f"s{i}.", each) for i, each in enumerate(made))), pyramid, samples


def mask_branch(
    params: Params,
    config: DetectorConfig,
    stages: Sequence[int],
    pyramid: Pyramid,
    rois: list[MaskRois],
    targets: Targets,
    probe: Probe = unwatched,
) -> list[tuple[Tensor, Tensor]]:
    """The mask losses of some stages without their weights.

    Args:
        params: weights by name.
        config: the detector.
        stages: whose heads.
        pyramid: features.
        rois: of each of these stages.
        targets: ground truth.
        probe: sees each stage's RoIs, features, logits and targets.

    Returns:
        For each stage a sum, and over how many cells it is; then, if masks are scored and the last
        one is among them, the sum of the scores' loss, and over how many RoIs it is.
    """
    head = config.mask_head
    rois = [probe("mask.rois", each) for each in rois]
    every = MaskRois(*(torch.cat(column) for column in zip(*rois, strict=True)))
    counts = [each.valid.shape[0] for each in rois]
    features = roi_align(
        pyramid, every.boxes, every.image, head.cells, config.roi_align, config.roi_kernel
    )
    features = [probe("mask.features", each) for each in features.split(counts)]
    logits = mask_heads(params, head, stages, features, every.labels.split(counts))
    # Every stage has as many RoIs.
    goals = mask_targets(head, every, targets).unflatten(0, (len(rois), -1))
    for each, goal in zip(logits, goals, strict=True):
        probe("mask.logits", each)
        probe("mask.goal", goal)
    made = mask_losses(logits, goals, every.valid.unflatten(0, (len(rois), -1)))
    if scores_masks(config) and stages[-1] + 1 == mask_stages(config):
        scored = scoring_loss(
            params, config, features[-1], logits[-1], goals[-1], rois[-1], targets
        )
        made.append(scored)
    return made


def scoring_loss(
    params: Params,
    config: DetectorConfig,
    features: Tensor,
    logits: Tensor,
    goals: Tensor,
    rois: MaskRois,
    targets: Targets,
) -> tuple[Tensor, Tensor]:
    """The loss of masks' scores of one stage, and over how many RoIs it is.

    Args:
        params: weights by name.
        config: the detector.
        features: [R, C, M / 2, M / 2], what its mask head saw.
        logits: [R, M, M] float32, what it gave.
        goals: [R, M, M] bool.
        rois: [R] of them.
        targets: ground truth.
    """
    # An object's whole area is that of its mask in its own box: parts may overlap, so edges alone
    # don't tell it.
    own = targets.boxes[rois.image, rois.gt]
    cells = mask_targets(config.mask_head, rois._replace(boxes=own), targets).sum(dim=(1, 2))
    whole = cells * area(own) / area(rois.boxes).clamp(min=1e-6)
    predicted = mask_iou_head(params, features, logits.sigmoid(), rois.labels)
    return mask_iou_loss(predicted, mask_ious(logits, goals, whole), rois.valid)


def _per_image(mask: Tensor) -> Tensor:
    """Mean count of a [B, N] mask per image."""
    return mask.sum(dtype=torch.float32) / mask.shape[0]
