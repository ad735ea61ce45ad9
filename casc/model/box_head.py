"""One cascade stage for boxes: sampling, head, loss and refinement (Cai & Vasconcelos, 2018).

Legend: T stages, B images, G ground-truth capacity, N candidate boxes, S samples, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model import losses
from casc.model.boxes import decode, encode
from casc.model.layers import (
    JOINED,
    Norm,
    Params,
    cast,
    conv_module,
    join_layers,
    kaiming_normal,
    linear,
    new_conv_module,
    new_weight,
    xavier_normal,
)
from casc.model.matching import covered, match_rois, sample, take
from casc.model.targets import Targets
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import RoiKernel, Sampling, roi_align
from casc.ops.roi_linear import roi_linear

PREFIX = "roi_head.bbox_head"


@dataclass(frozen=True)
class StageConfig:
    """What differs from one cascade stage to the next."""

    iou: float
    """A box is positive from this overlap on."""
    stds: tuple[float, float, float, float]
    """Standard deviations of the box deltas."""
    loss_weight: float
    """Factor on the stage's losses."""


@dataclass(frozen=True)
class BoxHeadConfig:
    """The box heads; all stages are alike."""

    samples: int = 512
    """Boxes per image in each stage's loss."""
    positive_fraction: float = 0.25
    """The most of them that may be positive."""
    cells: int = 7
    """RoIAlign cells per side."""
    channels: int = 1024
    """Width of the fully connected layers."""
    convs: int = 0
    """3x3 convolutions before the fully connected layers; 4 with fcs 1 is "4conv1fc"."""
    conv_channels: int = 256
    """Their channels."""
    norm: Norm = "none"
    """After each convolution. gn: group norm. ln: layer norm over channels, as in ViTDet."""
    fcs: int = 2
    """Fully connected layers, at least one."""
    class_specific: bool = False
    """Regress a box for each class (Fast R-CNN), not one for all (Cascade R-CNN)."""
    loss: losses.BoxLoss = "smooth_l1"
    """Of boxes. smooth_l1: of the deltas. giou, diou, ciou: of the decoded boxes, 1 - that IoU."""
    box_weight: float = 1.0
    """Factor on the box loss beside the stage's own; 10 is usual with giou."""
    beta: float = 1.0
    """Where the smooth L1 loss turns linear."""


class RoiSample(NamedTuple):
    """The boxes of one stage's loss: positives first."""

    boxes: Tensor
    """[B, S, 4] xyxy."""
    gt: Tensor
    """[B, S] int64, the box's ground truth (meaningful where positive)."""
    labels: Tensor
    """[B, S] int64, the class or, for negatives, K."""
    valid: Tensor
    """[B, S] bool."""
    positive: Tensor
    """[B, S] bool."""
    from_gt: Tensor
    """[B, S] bool: the box is a ground truth itself, not a proposal."""
    indices: Tensor
    """[B, S] int64 into the candidates: G ground truths, then the proposals."""


class BoxOutput(NamedTuple):
    """A box head's predictions, float32."""

    logits: Tensor
    """[R, K + 1]; the last is background."""
    deltas: Tensor
    """[R, 4], the same for all classes; or [R, K * 4], each class's own."""


def max_positive(config: BoxHeadConfig) -> int:
    """The most positives per image; they fill the first slots of a sample."""
    return int(config.samples * config.positive_fraction)


def sample_rois(
    config: BoxHeadConfig,
    stage: StageConfig,
    classes: int,
    proposals: Tensor,
    valid: Tensor,
    targets: Targets,
    keys: Tensor,
    probe: Probe = unwatched,
) -> RoiSample:
    """Put the ground truth in front of the proposals, match, and draw the sample.

    Proposals that a region to ignore covers are left out; the ground truth never is.

    Args:
        config: counts.
        stage: the threshold.
        classes: K.
        proposals: [B, N, 4] xyxy.
        valid: [B, N] bool.
        targets: padded ground truth.
        keys: [B, G + N] noise in [0, 1).
        probe: sees the proposals' matches.

    Returns:
        S boxes per image.
    """
    capacity = targets.boxes.shape[1]
    if targets.regions is not None:
        valid = valid & ~covered(proposals, targets.regions)
    # Only proposals look for their ground truth: a ground truth answers for itself, even where it
    # coincides with another.
    matches = match_rois(proposals, valid, targets.boxes, targets.valid, iou=stage.iou)
    matches = probe("box.matches", matches)
    itself = torch.arange(capacity, device=proposals.device).expand(proposals.shape[0], -1)
    boxes = torch.cat([targets.boxes, proposals], dim=1)
    gt = torch.cat([itself, matches.gt], dim=1)
    drawn = sample(
        torch.cat([targets.valid, matches.positive], dim=1),
        torch.cat([torch.zeros_like(targets.valid), matches.negative], dim=1),
        keys,
        count=config.samples,
        max_positive=max_positive(config),
    )
    index, kept, positive = drawn
    gt = take(gt, index)
    labels = torch.where(positive, take(targets.labels, gt), classes)
    from_gt = kept & (index < capacity)
    return RoiSample(take(boxes, index), gt, labels, kept, positive, from_gt, index)


def box_head(params: Params, config: BoxHeadConfig, stage: int, features: Tensor) -> BoxOutput:
    """Class logits and deltas of each RoI from its [R, C, cells, cells] features."""
    name = f"{PREFIX}.{stage}"
    for i in range(config.convs):
        x = conv_module(params, f"{name}.shared_convs.{i}", features, padding=1, norm=config.norm)
        features = F.relu(x)
    x = linear(params, f"{name}.shared_fcs.0", features.flatten(1))
    return _outputs(params, config, stage, x)


def box_head_at(
    params: Params,
    config: BoxHeadConfig,
    stage: int,
    pyramid: Pyramid,
    boxes: Tensor,
    image: Tensor,
    sampling: Sampling,
    kernel: RoiKernel,
    probe: Probe = unwatched,
) -> tuple[BoxOutput, Pyramid]:
    """`box_head` on what RoIAlign reads, and the pyramid for the next reader; see `roi_linear`.

    Args:
        params: weights by name.
        config: the head; without convolutions, its first layer is one operator with RoIAlign.
        stage: which head.
        pyramid: features.
        boxes: [R, 4] xyxy in pixels of the canvas.
        image: [R] int64, each RoI's image in the batch.
        sampling: RoIAlign's, and its
        kernel: see `roi_align`.
        probe: see `roi_linear`.
    """
    if config.convs:
        features = roi_align(pyramid, boxes, image, config.cells, sampling, kernel)
        features = probe("box.features", features)
        return box_head(params, config, stage, features), pyramid
    name = f"{PREFIX}.{stage}.shared_fcs.0"
    matrix = cast(params[f"{name}.weight"], pyramid.pixels.dtype)
    bias = params[f"{name}.bias"].to(matrix.dtype)
    x, pyramid = roi_linear(
        pyramid, boxes, image, config.cells, sampling, kernel, matrix, bias, probe
    )
    return _outputs(params, config, stage, x), pyramid


def _outputs(params: Params, config: BoxHeadConfig, stage: int, x: Tensor) -> BoxOutput:
    """What follows the first fully connected layer."""
    name = f"{PREFIX}.{stage}"
    x = F.relu(x)
    for i in range(1, config.fcs):
        x = F.relu(linear(params, f"{name}.shared_fcs.{i}", x))
    both = linear(join_layers(params, f"{name}.fc_cls", f"{name}.fc_reg"), JOINED, x).float()
    classes = params[f"{name}.fc_cls.bias"].shape[0]
    return BoxOutput(*both.split([classes, both.shape[1] - classes], dim=1))


class StageNumbers(NamedTuple):
    """What the losses of stages differ by, on the device."""

    stds: Tensor
    """[T, 1, 1, 4] float32, of the deltas."""
    weights: Tensor
    """[T] float32, of the losses."""


def stage_numbers(stages: Sequence[StageConfig], device: torch.device) -> StageNumbers:
    """Made by filling in: copies from the host would be transfers."""

    def vector(numbers: Sequence[float]) -> Tensor:
        return torch.stack([torch.full((), number, device=device) for number in numbers])

    stds = torch.stack([vector(stage.stds) for stage in stages])
    return StageNumbers(stds[:, None, None], vector([stage.loss_weight for stage in stages]))


def box_losses(
    config: BoxHeadConfig,
    stages: Sequence[StageConfig],
    outputs: Sequence[BoxOutput],
    samples: Sequence[RoiSample],
    targets: Targets,
    probe: Probe = unwatched,
    numbers: StageNumbers | None = None,
) -> list[losses.LossSums]:
    """Classification and box loss, both to be divided by the batch's number of samples.

    Of several stages at once: what each operator launches then serves them all.

    Args:
        config: which losses.
        stages: whose losses.
        outputs: of each.
        samples: of each, as many boxes.
        targets: ground truth.
        probe: sees each stage's goal.
        numbers: from `stage_numbers`; made here if None.

    Returns:
        Of each stage the losses `loss_cls` and `loss_bbox`, weighted; `acc`, the percentage of
        samples whose best class is right, and how many `samples` and `positives` there are per
        image.
    """
    if numbers is None:
        numbers = stage_numbers(stages, targets.boxes.device)
    boxes, gt, labels, valid, positive = (
        torch.stack([getattr(rois, name) for rois in samples])
        for name in ("boxes", "gt", "labels", "valid", "positive")
    )
    count, batch = valid.shape[:2]
    logits = torch.stack([output.logits for output in outputs])
    own = labels.flatten(1)
    entropies = losses.cross_entropies(logits.flatten(0, 1), own.flatten(), valid.flatten())
    loss_cls = entropies.unflatten(0, (count, -1)).sum(dim=1)
    hits = (logits.detach().argmax(dim=2) == own) & valid.flatten(1)
    drawn = valid.sum(dim=(1, 2), dtype=torch.float32)
    # Positives come first in a sample: only so many rows can have a box loss.
    first = slice(max_positive(config))
    boxes, gt, few = boxes[:, :, first], gt[:, :, first], positive[:, :, first]
    gt_boxes = take(targets.boxes, gt.transpose(0, 1).flatten(1)).unflatten(1, gt.shape[::2])
    gt_boxes = gt_boxes.transpose(0, 1)
    goal = encode(boxes, gt_boxes, numbers.stds)
    for each in goal:
        probe("box.goal", each)
    deltas = torch.stack([output.deltas for output in outputs])
    deltas = deltas.reshape(*valid.shape, -1)[:, :, first]
    if config.class_specific:
        own_boxes = own_deltas(deltas.flatten(0, 1), labels[:, :, first].flatten(0, 1))
        deltas = own_boxes.unflatten(0, (count, -1))
    if config.loss == "smooth_l1":
        loss_bbox = losses.smooth_l1(deltas, goal, few, config.beta).sum(dim=(1, 2, 3))
    else:
        every = zip(boxes, deltas, stages, strict=True)
        moved = torch.stack([decode(box, delta, own.stds, None) for box, delta, own in every])
        loss_bbox = losses.iou_loss(config.loss, moved, gt_boxes, few).sum(dim=(1, 2))
    loss_cls, loss_bbox = loss_cls * numbers.weights, loss_bbox * numbers.weights
    if config.box_weight != 1:
        loss_bbox = loss_bbox * config.box_weight
    measures = {
        "acc": 100 * hits.sum(dim=1) / drawn.clamp(min=1),
        "samples": drawn / batch,
        "positives": positive.sum(dim=(1, 2), dtype=torch.float32) / batch,
    }
    # Of unbind the gradient is one stack; of numbers taken singly, three launches for each.
    columns = zip(loss_cls.unbind(), loss_bbox.unbind(), drawn.unbind(), strict=True)
    return [
        losses.LossSums(
            {"loss_cls": cls, "loss_bbox": box},
            {"loss_cls": drawn, "loss_bbox": drawn},
            {name: values[i] for name, values in measures.items()},
        )
        for i, (cls, box, drawn) in enumerate(columns)
    ]


def own_deltas(deltas: Tensor, labels: Tensor) -> Tensor:
    """The deltas of each RoI's class where each class has its own.

    By a product with ones and zeros, as in the mask head: exact, and its backward has no order.

    Args:
        deltas: [B, N, K * 4].
        labels: [B, N] int64; where not in [0, K) the deltas are 0.

    Returns:
        [B, N, 4].
    """
    each = deltas.unflatten(-1, (-1, 4))
    own = labels[..., None] == torch.arange(each.shape[-2], device=labels.device)
    return (each * own[..., None]).sum(dim=-2)


def regressed_class(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Whose box the next stage gets where each class has its own, as MMDetection chooses.

    Args:
        logits: [B, N, K + 1].
        labels: [B, N] int64, the class of positives and K of others; None at inference.

    Returns:
        [B, N] int64 in [0, K): the class of positives, else that of the best score.
    """
    best = logits.detach()[..., :-1].argmax(dim=-1)
    return best if labels is None else torch.where(labels < logits.shape[-1] - 1, labels, best)


def refine(stage: StageConfig, boxes: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """The next stage's boxes: decoded and clipped, without gradient.

    Args:
        stage: its standard deviations.
        boxes: [B, N, 4] xyxy.
        deltas: [B * N, 4], or [B, N, 4].
        size: [B, 2] image height and width in pixels.

    Returns:
        [B, N, 4] xyxy.
    """
    return decode(boxes, deltas.detach().reshape(boxes.shape), stage.stds, size)


def init_box_head(
    config: BoxHeadConfig,
    stage: int,
    classes: int,
    in_channels: int,
    params: Params,
    generator: torch.Generator,
) -> None:
    """Add fresh parameters of one stage: Xavier normal, as the reference ends up.

    Convolutions, which the reference hasn't, are He normal.

    Its config asks for N(0, 0.01) and N(0, 0.001) in the last layers, but a later entry
    for all linear layers overrides both.
    """
    name = f"{PREFIX}.{stage}"
    for i in range(config.convs):
        shape = (config.conv_channels, in_channels, 3, 3)
        module = f"{name}.shared_convs.{i}"
        new_conv_module(params, module, shape, kaiming_normal, generator, config.norm)
        in_channels = config.conv_channels
    sides = [in_channels * config.cells**2, *[config.channels] * config.fcs]
    for layer, out, inputs in (
        *((f"shared_fcs.{i}", sides[i + 1], sides[i]) for i in range(config.fcs)),
        ("fc_cls", classes + 1, config.channels),
        ("fc_reg", 4 * (classes if config.class_specific else 1), config.channels),
    ):
        new_weight(params, f"{name}.{layer}", (out, inputs), xavier_normal, generator, bias=out)
