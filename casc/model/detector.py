"""Cascade Mask R-CNN, from canvas to losses and from canvas to detections.

Pure functions of (parameters, buffers, inputs, noise) with shapes that never change.

Legend: B images, H x W canvas, G ground-truth capacity, A anchors, P proposals, S samples
per image and stage, K classes, D detections.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from casc.model import noise as noises
from casc.model.anchors import AnchorConfig, grid_anchors
from casc.model.backbone import (
    Backbone,
    drop_places,
    feature_maps,
    init_backbone,
    is_frozen,
    map_channels,
)
from casc.model.box_head import (
    BoxHeadConfig,
    BoxOutput,
    RoiSample,
    StageConfig,
    box_head,
    box_head_at,
    box_losses,
    init_box_head,
    max_positive,
    own_deltas,
    refine,
    regressed_class,
    sample_rois,
)
from casc.model.fpn import FPNConfig, fpn, init_fpn
from casc.model.layers import Params, cast_together, gathers_gradients
from casc.model.losses import LossSums, add_prefix, join
from casc.model.mask_head import (
    MaskHeadConfig,
    MaskRois,
    init_mask_head,
    mask_head,
    mask_heads,
    mask_losses,
    mask_rois,
    mask_targets,
)
from casc.model.matching import take
from casc.model.resnet import ResNetConfig
from casc.model.rpn import (
    Proposals,
    RPNConfig,
    candidates,
    init_rpn,
    propose,
    rpn_head,
    rpn_head_at,
    rpn_losses,
    rpn_targets,
)
from casc.model.targets import Targets
from casc.ops.nms import NmsKernel, batched_nms
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid, flatten_pyramid
from casc.ops.roi_align import RoiKernel, detach_unread, roi_align
from casc.ops.soft_nms import SoftNms, soft_nms

STAGES = (
    StageConfig(iou=0.5, stds=(0.1, 0.1, 0.2, 0.2), loss_weight=1.0),
    StageConfig(iou=0.6, stds=(0.05, 0.05, 0.1, 0.1), loss_weight=0.5),
    StageConfig(iou=0.7, stds=(0.033, 0.033, 0.067, 0.067), loss_weight=0.25),
)
# P6 serves the RPN only.
ROI_LEVELS = 4
SIGMA = 0.5
"""Of Gaussian soft-NMS, as its authors chose it."""


@dataclass(frozen=True)
class InferenceConfig:
    """From scores to detections."""

    score_threshold: float = 0.05
    """Scores up to this one are dropped before suppression."""
    nms_iou: float = 0.5
    """Class-wise suppression above this overlap."""
    detections: int = 100
    """The most detections per image."""
    nms_kernel: NmsKernel = "auto"
    """As of the RPN: greedy, fixed, triton, or auto, which chooses by the device."""
    average: Literal["logits", "probabilities"] = "logits"
    """What of the stages' scores is averaged. logits: turned into probabilities once, as the
    reference does. probabilities: of each stage by itself, as Detectron2 does."""
    soft_nms: SoftNms = "off"
    """Overlapped boxes lose score instead of going (Bodla et al., 2017). linear: those above
    nms_iou are multiplied by 1 - IoU. gaussian: all by exp(-IoU^2 / 0.5)."""
    class_agnostic: bool = False
    """Each proposal counts for its best class alone, and classes suppress each other."""
    classes: tuple[int, ...] = ()
    """Only detections of these labels; none given: of all."""


@dataclass(frozen=True)
class DetectorConfig:
    """Cascade Mask R-CNN; the defaults are the reference's R50-FPN."""

    classes: int = 80
    """Object classes, background not counted."""
    backbone: Backbone = field(default_factory=ResNetConfig)
    fpn: FPNConfig = field(default_factory=FPNConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    stages: tuple[StageConfig, ...] = STAGES
    """Cascade stages, first to last."""
    box_head: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    mask_head: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    masks: Literal["heads", "none"] = "heads"
    """none: no mask heads, boxes alone. Trained on objects without a mask too, and evaluated by
    boxes; --model.mask-head doesn't count then."""
    ignore: Literal["none", "crowds"] = "none"
    """crowds: anchors and proposals that lie by 0.7 of their area in a crowd's box, or in that of
    an object marked as ignore or, with mask heads, without a usable mask, are neither objects nor
    background. none: they are background, as in the reference."""
    roi_align: Literal["fixed", "adaptive"] = "fixed"
    """Samples per RoIAlign cell. fixed: 2x2. adaptive: the reference's ceil(side / cells)."""
    roi_kernel: RoiKernel = "auto"
    """How the fixed grid is computed. aten: by an embedding bag. native: by the device's own
    RoIAlign. triton: by casc's Triton kernels. auto: triton on a GPU and native on an NPU, if it
    proves right before the first step; else aten."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def reference_settings(config: DetectorConfig) -> DetectorConfig:
    """The same detector with every equivalent replaced by the reference's own way."""
    mask = replace(config.mask_head, target="bitmap")
    return replace(config, roi_align="adaptive", mask_head=mask)


class Inputs(NamedTuple):
    """Images on their canvas, and their ground truth when training."""

    image: Tensor
    """[B, C, H, W] normalised, 0 outside the image; H and W divisible by 32."""
    size: Tensor
    """[B, 2] float32, height and width of the image within the canvas."""
    scale: Tensor
    """[B, 4] float32, canvas pixels per stored pixel (x, y, x, y)."""
    targets: Targets


class Noise(NamedTuple):
    """The random numbers of one step, uniform in [0, 1)."""

    rpn: Tensor
    """[B, A]."""
    stages: tuple[Tensor, ...]
    """Per stage [B, G + P] or [B, G + S]."""
    drop: Tensor | None = None
    """[B, D], which paths of the backbone are dropped; None where none are."""


class Features(NamedTuple):
    """What the heads read."""

    levels: list[Tensor]
    """P2 to P6, [B, C, H_l, W_l]."""
    pyramid: Pyramid
    """P2 to P5, ready for RoIAlign."""


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


def init(
    config: DetectorConfig, generator: torch.Generator, channels: int = 3
) -> tuple[Params, Params]:
    """Fresh parameters and buffers (batch norm statistics), float32 on the CPU.

    Keys are the reference's state_dict names. `channels` are those of the images.
    """
    params: Params = {}
    buffers: Params = {}
    init_backbone(config.backbone, params, buffers, generator, channels)
    init_fpn(config.fpn, map_channels(config.backbone), params, generator)
    channels = config.fpn.channels
    init_rpn(config.rpn, config.anchors, channels, params, generator)
    for i in range(len(config.stages)):
        init_box_head(config.box_head, i, config.classes, channels, params, generator)
        if i < mask_stages(config):
            init_mask_head(config.mask_head, i, config.classes, channels, params, generator)
    return params, buffers


def trainable(config: DetectorConfig, params: Params) -> Params:
    """The parameters that learn: all but the backbone's frozen stages."""
    return {k: v for k, v in params.items() if not is_frozen(config.backbone, k)}


def mask_stages(config: DetectorConfig) -> int:
    """How many stages have a mask head, from the first on."""
    if config.masks == "none":
        return 0
    return len(config.stages) if config.mask_head.stages == "every" else 1


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


def cast_heads(params: Params, image: Tensor, *, masks: bool = True) -> Params:
    """The parameters with those of neck and heads in the image's dtype, where that pays.

    See `cast_together`. The masks' last layer stays in float32, in which its rows are chosen.
    """
    if not gathers_gradients(image):
        return params
    left_out = ("backbone.",) if masks else ("backbone.", "roi_head.mask_head.")
    names = (k for k in params if not k.startswith(left_out) and "conv_logits" not in k)
    return cast_together(params, names, image.dtype)


def extract(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    image: Tensor,
    probe: Probe = unwatched,
    drop: Tensor | None = None,
    size: Tensor | None = None,
) -> Features:
    """Backbone and pyramid of [B, C, H, W] images; `drop` is the step's noise of that name.

    With the images' sizes [B, 2] float32 given, group norms normalise over the image and not over
    what the canvas adds to it: what is found hardly depends on the canvas then.
    """
    share = None
    if size is not None and "gn" in (getattr(config.backbone, "norm", None), config.fpn.norm):
        height, width = image.shape[2:]
        share = torch.stack([size[:, 0] / height, size[:, 1] / width], dim=1)
    maps = probe("maps", feature_maps(params, buffers, config.backbone, image, drop, share))
    levels = probe("levels", fpn(params, config.fpn, maps, share))
    strides = config.anchors.strides[:ROI_LEVELS]
    return Features(levels, flatten_pyramid(levels[:ROI_LEVELS], strides))


def level_sizes(levels: list[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each level, in cells."""
    return [(x.shape[2], x.shape[3]) for x in levels]


def anchor_lengths(config: DetectorConfig, levels: list[Tensor]) -> list[int]:
    """How many anchors each level has."""
    return [height * width * len(config.anchors.ratios) for height, width in level_sizes(levels)]


def features_anchors(config: DetectorConfig, features: Features) -> Tensor:
    """The anchors of all levels, [A, 4]."""
    device = features.pyramid.pixels.device
    return torch.cat(grid_anchors(config.anchors, level_sizes(features.levels), device))


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
        flat, image = _flat(rois.boxes)
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
            deltas = _chosen_deltas(output, rois.labels.shape, rois.labels)
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


def detect(
    params: Params,
    buffers: Params,
    config: DetectorConfig,
    inputs: Inputs,
    probe: Probe = unwatched,
    anchors: Tensor | None = None,
) -> Detections:
    """Detections with masks; `inputs.targets` isn't read.

    Each stage scores the RoIs that it was given; the mean of the three stages' logits is
    turned into scores once (see `InferenceConfig.average`). Masks are the mean of the three
    heads' probabilities. `anchors` are as for `box_branch`.
    """
    features = extract(params, buffers, config, inputs.image, probe, size=inputs.size)
    if anchors is None:
        anchors = features_anchors(config, features)
    output = rpn_head(params, config.rpn, features.levels)
    lengths = anchor_lengths(config, features.levels)
    found = candidates(config.rpn, output, anchors, lengths, inputs.size, train=False)
    proposals = probe("proposals", propose(config.rpn, found, train=False))
    logits, boxes = cascade_scores(params, config, features.pyramid, proposals, inputs.size, probe)
    boxes, scores, labels, valid = select(
        config.inference, logits, boxes / inputs.scale[:, None], proposals.valid, probe
    )
    if not mask_stages(config):
        return Detections(boxes, scores, labels, valid, None)
    rois = probe("mask.rois", boxes * inputs.scale[:, None])
    masks = detect_masks(params, config, features.pyramid, rois, labels, probe)
    return Detections(boxes, scores, labels, valid, masks * valid[..., None, None])


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
            deltas = _chosen_deltas(output, boxes.shape[:2], None)
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
    if config.soft_nms == "off":
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
        scores = take(scores, index)
    else:
        sigma = SIGMA if config.soft_nms == "gaussian" else 0.0
        index, scores = soft_nms(
            boxes, scores, group, candidate, config.nms_iou, sigma, config.detections
        )
        kept = scores > config.score_threshold
    return (
        torch.where(kept[..., None], take(boxes, index), 0.0),
        torch.where(kept, scores, 0.0),
        torch.where(kept, take(labels, index), 0),
        kept,
    )


def detect_masks(
    params: Params,
    config: DetectorConfig,
    pyramid: Pyramid,
    boxes: Tensor,
    labels: Tensor,
    probe: Probe = unwatched,
) -> Tensor:
    """Mean mask probability of all stages that have a mask head: [B, D, 28, 28] float32.

    Args:
        params: weights by name.
        config: the detector.
        pyramid: features.
        boxes: [B, D, 4] xyxy in canvas pixels.
        labels: [B, D] int64.
        probe: sees each stage's logits.
    """
    features = _align(config, pyramid, boxes, config.mask_head.cells)
    logits = [
        probe("mask.logits", mask_head(params, config.mask_head, i, features, labels.flatten()))
        for i in range(mask_stages(config))
    ]
    stages = [each.sigmoid() for each in logits]
    mean = torch.stack(stages).sum(dim=0) / len(stages)
    return mean.reshape(*labels.shape, *mean.shape[1:])


def _align(config: DetectorConfig, pyramid: Pyramid, boxes: Tensor, cells: int) -> Tensor:
    """RoIAlign of [B, N, 4] boxes: [B * N, C, cells, cells]."""
    return roi_align(pyramid, *_flat(boxes), cells, config.roi_align, config.roi_kernel)


def _chosen_deltas(output: BoxOutput, shape: torch.Size, labels: Tensor | None) -> Tensor:
    """The deltas [B, N, 4] of the class that `regressed_class` chooses; `shape` is [B, N]."""
    logits, deltas = (x.reshape(*shape, -1) for x in output)
    return own_deltas(deltas, regressed_class(logits, labels))


def _flat(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, 4] boxes as [B * N, 4], and the image of each."""
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2])
    return boxes.flatten(0, 1), image.reshape(-1)


def _per_image(mask: Tensor) -> Tensor:
    """Mean count of a [B, N] mask per image."""
    return mask.sum(dtype=torch.float32) / mask.shape[0]
