"""One cascade stage for boxes: sampling, head, loss and refinement (Cai & Vasconcelos, 2018).

Legend: B images, G ground-truth capacity, N candidate boxes, S samples, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model import losses
from casc.model.boxes import decode, encode
from casc.model.layers import Params, cast, linear, new_weight, xavier_normal
from casc.model.matching import match_rois, sample, take
from casc.model.targets import Targets
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid
from casc.ops.roi_align import RoiKernel, Sampling
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
    """Width of the two fully connected layers."""
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
    """[R, 4], the same for all classes."""


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

    Args:
        config: counts.
        stage: the threshold.
        classes: K.
        proposals: [B, N, 4] xyxy.
        valid: [B, N] bool.
        targets: padded ground truth.
        keys: [B, G + N] noise in [0, 1).
        probe: sees the matches.

    Returns:
        S boxes per image.
    """
    capacity = targets.boxes.shape[1]
    boxes = torch.cat([targets.boxes, proposals], dim=1)
    candidates = torch.cat([targets.valid, valid], dim=1)
    matches = match_rois(boxes, candidates, targets.boxes, targets.valid, iou=stage.iou)
    matches = probe("box.matches", matches)
    # A ground truth answers for itself, even where it coincides with another.
    itself = torch.arange(capacity, device=boxes.device).expand(boxes.shape[0], -1)
    gt = torch.cat([itself, matches.gt[:, capacity:]], dim=1)
    is_gt = torch.arange(boxes.shape[1], device=boxes.device) < capacity
    drawn = sample(
        matches.positive | (candidates & is_gt),
        matches.negative & ~is_gt,
        keys,
        count=config.samples,
        max_positive=max_positive(config),
    )
    index, kept, positive = drawn
    gt = take(gt, index)
    labels = torch.where(positive, take(targets.labels, gt), classes)
    from_gt = kept & (index < capacity)
    return RoiSample(take(boxes, index), gt, labels, kept, positive, from_gt, index)


def box_head(params: Params, stage: int, features: Tensor) -> BoxOutput:
    """Class logits and deltas of each RoI from its [R, C, cells, cells] features."""
    return _outputs(
        params, stage, linear(params, f"{PREFIX}.{stage}.shared_fcs.0", features.flatten(1))
    )


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
        config: cells per side.
        stage: which head.
        pyramid: features.
        boxes: [R, 4] xyxy in pixels of the canvas.
        image: [R] int64, each RoI's image in the batch.
        sampling: RoIAlign's, and its
        kernel: see `roi_align`.
        probe: see `roi_linear`.
    """
    name = f"{PREFIX}.{stage}.shared_fcs.0"
    matrix = cast(params[f"{name}.weight"], pyramid.pixels.dtype)
    bias = params[f"{name}.bias"].to(matrix.dtype)
    x, pyramid = roi_linear(
        pyramid, boxes, image, config.cells, sampling, kernel, matrix, bias, probe
    )
    return _outputs(params, stage, x), pyramid


def _outputs(params: Params, stage: int, x: Tensor) -> BoxOutput:
    """What follows the first fully connected layer."""
    name = f"{PREFIX}.{stage}"
    x = F.relu(linear(params, f"{name}.shared_fcs.1", F.relu(x)))
    logits = linear(params, f"{name}.fc_cls", x)
    return BoxOutput(logits.float(), linear(params, f"{name}.fc_reg", x).float())


def box_losses(
    config: BoxHeadConfig,
    stage: StageConfig,
    output: BoxOutput,
    rois: RoiSample,
    targets: Targets,
    probe: Probe = unwatched,
) -> losses.LossSums:
    """Classification and box loss, both to be divided by the batch's number of samples.

    Returns:
        The losses `loss_cls` and `loss_bbox`, weighted; `acc`, the percentage of samples
        whose best class is right, and `samples`, how many there are per image.
    """
    samples = rois.valid.sum(dtype=torch.float32)
    labels, valid = rois.labels.flatten(), rois.valid.flatten()
    loss_cls = losses.cross_entropy(output.logits, labels, valid)
    hits = (output.logits.detach().argmax(dim=1) == labels) & valid
    first = max_positive(config)
    boxes, gt, positive = (t[:, :first] for t in (rois.boxes, rois.gt, rois.positive))
    goal = probe("box.goal", encode(boxes, take(targets.boxes, gt), stage.stds))
    deltas = output.deltas.reshape(*rois.valid.shape, 4)[:, :first]
    loss_bbox = losses.smooth_l1(deltas, goal, positive, config.beta)
    return losses.LossSums(
        {"loss_cls": stage.loss_weight * loss_cls, "loss_bbox": stage.loss_weight * loss_bbox},
        {"loss_cls": samples, "loss_bbox": samples},
        {
            "acc": 100 * hits.sum() / samples.clamp(min=1),
            "samples": samples / rois.valid.shape[0],
        },
    )


def refine(stage: StageConfig, boxes: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """The next stage's boxes: decoded and clipped, without gradient.

    Args:
        stage: its standard deviations.
        boxes: [B, N, 4] xyxy.
        deltas: [B * N, 4].
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
    """Add fresh parameters of one stage: Xavier normal everywhere, as the reference ends up.

    Its config asks for N(0, 0.01) and N(0, 0.001) in the last layers, but a later entry
    for all linear layers overrides both.
    """
    name = f"{PREFIX}.{stage}"
    flat = in_channels * config.cells**2
    for layer, out, inputs in (
        ("shared_fcs.0", config.channels, flat),
        ("shared_fcs.1", config.channels, config.channels),
        ("fc_cls", classes + 1, config.channels),
        ("fc_reg", 4, config.channels),
    ):
        new_weight(params, f"{name}.{layer}", (out, inputs), xavier_normal, generator, bias=out)
