"""From images on their canvas, with ground truth, to every loss of the cascade.

Legend: B images, G ground-truth capacity, A anchors, P proposals, S samples per image and stage.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from casc.model import noise as noises
from casc.model.backbone import drop_places
from casc.model.box_head import (
    RoiSample,
    box_head_at,
    box_losses,
    max_positive,
    refine,
    sample_rois,
)
from casc.model.detector import (
    Features,
    Inputs,
    anchor_lengths,
    cast_heads,
    chosen_deltas,
    extract,
    features_anchors,
    flat_rois,
    level_sizes,
)
from casc.model.detector_config import DetectorConfig, mask_stages
from casc.model.layers import Params
from casc.model.losses import LossSums, add_prefix, join
from casc.model.mask_head import MaskRois, mask_heads, mask_losses, mask_rois, mask_targets
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
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import detach_unread, roi_align


class Noise(NamedTuple):
    """The random numbers of one step, uniform in [0, 1)."""

    rpn: Tensor
    """[B, A]."""
    stages: tuple[Tensor, ...]
    """Per stage [B, G + P] or [B, G + S]."""
    drop: Tensor | None = None
    """[B, D], which paths of the backbone are dropped; None where none are."""


def draw_noise(config: DetectorConfig, seed: Tensor, anchors: int, capacity: int) -> Noise:
    """All noise of a step from one seed per image.

    Args:
        config: how many numbers each part needs.
        seed: [B] int64.
        anchors: A, of all levels.
        capacity: G.
    """
    boxes = [config.rpn.train_proposals] + [config.box_head.samples] * (len(config.stages) - 1)
    stages = {noises.STAGE + i: capacity + count for i, count in enumerate(boxes)}
    places = drop_places(config.backbone)
    drops = {noises.DROP_PATH: places} if places else {}
    rpn, *others = noises.uniforms(seed, {noises.RPN: anchors} | stages | drops)
    drop = others.pop() if places else None
    return Noise(rpn, tuple(others), drop)


def losses(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    inputs: Inputs,
    noise: Noise,
    probe: Probe = unwatched,
    anchors: Tensor | None = None,
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
        anchors: as for `box_branch`.

    Returns:
        Losses and measures, named like the reference's log.
    """
    params = cast_heads(params, inputs.image)
    features = extract(params, buffers, config, inputs.image, probe, noise.drop)
    result, pyramid, rois = box_branch(params, config, features, inputs, noise, probe, anchors)
    stages = range(mask_stages(config))
    if not stages:
        return result
    # The heads share nothing that depends on order: one pass serves them all.
    masks = mask_branch(params, config, stages, pyramid, rois, inputs.targets, probe)
    return join(result, *(weighted_mask_loss(config, i, *masks[i]) for i in stages))


def weighted_mask_loss(config: DetectorConfig, stage: int, loss: Tensor, cells: Tensor) -> LossSums:
    """What `mask_branch` gave for a stage, with the stage's weight, under its name."""
    name = f"s{stage}.loss_mask"
    return LossSums({name: config.stages[stage].loss_weight * loss}, {name: cells}, {})


def box_branch(
    params: Params,
    config: DetectorConfig,
    features: Features,
    inputs: Inputs,
    noise: Noise,
    probe: Probe = unwatched,
    anchors: Tensor | None = None,
) -> tuple[LossSums, Pyramid, list[MaskRois]]:
    """All losses but the masks', and what these need: features, and each stage's positive RoIs.

    The pyramid goes from reader to reader, which bounds the gradients held at once. `anchors` are
    the canvas's, [A, 4]; without them they are made.
    """
    if anchors is None:
        anchors = features_anchors(config, features)
    anchors = probe("anchors", anchors)
    result, pyramid = rpn_branch(params, config, features, anchors, inputs, noise.rpn, probe)
    with torch.no_grad():
        output = probe("rpn.output", rpn_head(params, config.rpn, features.levels))
    lengths = anchor_lengths(config, features.levels)
    found = candidates(config.rpn, output, anchors, lengths, inputs.size, train=True)
    found = probe("candidates", found)
    proposals = probe("proposals", propose(config.rpn, found, train=True))
    cascade, pyramid, samples = cascade_losses(
        params, config, pyramid, proposals, inputs, noise.stages, probe
    )
    masked = samples[: mask_stages(config)]
    rois = [mask_rois(s, max_positive(config.box_head)) for s in masked]
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
) -> tuple[LossSums, Pyramid]:
    """The RPN's losses and number of positive anchors per image; the pyramid for what follows."""
    gt = inputs.targets
    targets = rpn_targets(
        config.rpn, anchors, inputs.size, gt.boxes, gt.valid, keys, probe, gt.regions
    )
    targets = probe("rpn.targets", targets)
    sizes = level_sizes(features.levels)
    index = targets.sample.indices
    sampled, pyramid = rpn_head_at(params, config.rpn, features.pyramid, sizes, index)
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
) -> tuple[LossSums, Pyramid, list[RoiSample]]:
    """Box losses of every stage, each starting from the boxes refined by the one before.

    Also the pyramid for what follows, and each stage's RoIs.
    """
    boxes, valid = proposals.boxes, proposals.valid
    stages: list[LossSums] = []
    samples = []
    for i, stage in enumerate(config.stages):
        boxes, valid = probe("box.candidates", (boxes, valid))
        rois = sample_rois(
            config.box_head, stage, config.classes, boxes, valid, inputs.targets, keys[i], probe
        )
        rois = probe("box.rois", rois)
        flat, image = flat_rois(rois.boxes)
        sampling, kernel = config.roi_align, config.roi_kernel
        output, pyramid = box_head_at(
            params, config.box_head, i, pyramid, flat, image, sampling, kernel, probe
        )
        output = probe("box.output", output)
        stage_losses = box_losses(config.box_head, stage, output, rois, inputs.targets, probe)
        stage_losses.measures["positives"] = _per_image(rois.positive)
        stages.append(add_prefix(f"s{i}.", stage_losses))
        deltas = output.deltas
        if config.box_head.class_specific:
            deltas = chosen_deltas(output, rois.labels.shape, rois.labels)
        boxes = refine(stage, rois.boxes, deltas, inputs.size)
        # Ground truth is added afresh by each stage; its own refinement would come twice.
        valid = rois.valid & ~rois.from_gt
        samples.append(rois)
    return join(*stages), pyramid, samples


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
        For each stage a sum, and over how many cells it is.
    """
    head = config.mask_head
    rois = [probe("mask.rois", each) for each in rois]
    every = MaskRois(*(torch.cat(column) for column in zip(*rois, strict=True)))
    counts = [each.valid.shape[0] for each in rois]
    features = roi_align(
        pyramid, every.boxes, every.image, head.cells, config.roi_align, config.roi_kernel
    )
    features = [probe("mask.features", each) for each in features.split(counts)]
    made = mask_heads(params, head, stages, features, every.labels.split(counts))
    logits = [probe("mask.logits", each) for each in made]
    goal = mask_targets(head, every, targets)
    goals = [probe("mask.goal", each) for each in goal.split(counts)]
    # Every stage has as many RoIs.
    valid = every.valid.unflatten(0, (len(rois), -1))
    return mask_losses(torch.stack(logits), torch.stack(goals), valid)


def _per_image(mask: Tensor) -> Tensor:
    """Mean count of a [B, N] mask per image."""
    return mask.sum(dtype=torch.float32) / mask.shape[0]
