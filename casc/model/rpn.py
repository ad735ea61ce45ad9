"""Region proposal network (Ren et al., 2015) over a pyramid: head, loss, proposals.

Legend: B images, A anchors of all levels in the order (level, y, x, ratio), G ground-truth
capacity, K proposals.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.model import losses
from casc.model.anchors import AnchorConfig, inside
from casc.model.boxes import decode, encode
from casc.model.layers import JOINED, Params, conv, join_layers, new_weight, normal_001
from casc.model.matching import Matches, Sample, covered, match_anchors, sample, take
from casc.ops.nms import NmsKernel, batched_nms
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Neighbours, Pyramid, patches

PREFIX = "rpn_head"
STDS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class RPNConfig:
    """The region proposal network."""

    channels: int = 256
    """Channels of its 3x3 convolutions."""
    convs: int = 1
    """3x3 convolutions, a ReLU after each."""
    positive_iou: float = 0.7
    """An anchor is an object from this overlap on."""
    negative_iou: float = 0.3
    """An anchor is background below this overlap; in between it is ignored."""
    low_quality_iou: float = 0.3
    """Each object also claims its best anchors, if they overlap at least this much."""
    samples: int = 256
    """Anchors per image in the loss."""
    positive_fraction: float = 0.5
    """The most of them that may be positive."""
    beta: float = 1 / 9
    """Where the smooth L1 loss turns linear."""
    nms_iou: float = 0.7
    """Proposals that overlap a better one by more go."""
    nms_kernel: NmsKernel = "auto"
    """greedy: fast on the CPU. fixed: a fixed number of launches, no read. triton: the same in two
    kernels. auto: greedy on the CPU, triton where the device has it and it computes the same, else
    fixed. The proposals are the same."""
    train_pre_nms: int = 2000
    """Best anchors per level that enter suppression when training."""
    train_proposals: int = 2000
    """Proposals per image when training."""
    test_pre_nms: int = 1000
    """The same at inference."""
    test_proposals: int = 1000
    """The same at inference."""


class RPNOutput(NamedTuple):
    """The head's predictions, float32."""

    logits: Tensor
    """[B, A], or [B, S] of the anchors of a sample."""
    deltas: Tensor
    """[B, A, 4] or [B, S, 4]."""


class RPNTargets(NamedTuple):
    """What the loss compares with."""

    matches: Matches
    """Of all A anchors."""
    sample: Sample
    """The anchors in the loss."""


class Proposals(NamedTuple):
    """Candidate boxes, best first."""

    boxes: Tensor
    """[B, K, 4] xyxy pixels of the canvas, 0 where padded."""
    scores: Tensor
    """[B, K] in [0, 1], 0 where padded."""
    valid: Tensor
    """[B, K] bool."""


def rpn_head(params: Params, config: RPNConfig, levels: list[Tensor]) -> RPNOutput:
    """Objectness and deltas of every anchor, the same head on each level."""
    both = join_layers(params, f"{PREFIX}.rpn_cls", f"{PREFIX}.rpn_reg")
    ratios = params[f"{PREFIX}.rpn_cls.bias"].shape[0]
    cells = []
    for x in levels:
        for name in _convs(config):
            x = F.relu(conv(params, name, x, padding=1))
        cells.append(conv(both, JOINED, x).permute(0, 2, 3, 1).flatten(1, 2))
    found = torch.cat(cells, dim=1).float()
    logits, deltas = found[..., :ratios], found[..., ratios:]
    return RPNOutput(logits.flatten(1), deltas.unflatten(2, (ratios, 4)).flatten(1, 2))


def rpn_head_at(
    params: Params,
    config: RPNConfig,
    pyramid: Pyramid,
    sizes: list[tuple[int, int]],
    anchor: Tensor,
    table: Neighbours | None = None,
) -> tuple[RPNOutput, Pyramid]:
    """What `rpn_head` says of chosen anchors only.

    The loss looks at 256 anchors of an image and its gradient is zero everywhere else. So
    the head runs over the whole pyramid without gradient, for proposals, and once more on
    the neighbourhoods of the sample, with gradient: the dense backward pass, a sixth of all
    operations of a step, isn't needed.

    Args:
        params: weights by name.
        config: how many convolutions.
        pyramid: features.
        sizes: (H_l, W_l) of every level with anchors, P6 included.
        anchor: [B, S] int64 into A.
        table: of all cells, `patch_side` a side; see `patches`.

    Returns:
        Logits [B, S] and deltas [B, S, 4], and the pyramid for the next reader.
    """
    ratios = params[f"{PREFIX}.rpn_cls.weight"].shape[0]
    # Each convolution takes a cell off every side of the neighbourhood.
    x, within, pyramid = patches(pyramid, sizes, anchor // ratios, patch_side(config), table)
    *first, last = _convs(config)
    for name in first:
        side = within.shape[-1]
        x = x.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        within = within[..., 1:-1, 1:-1]
        # The next one sees zeros beyond the level, not what this one makes there.
        x = F.relu(conv(params, name, x)) * within.flatten(0, 1)[:, None].to(x.dtype)
        x = x.permute(0, 2, 3, 1).flatten(1)
    weight = params[f"{last}.weight"].permute(0, 2, 3, 1).flatten(1).to(x.dtype)
    x = F.relu(F.linear(x, weight, params[f"{last}.bias"].to(x.dtype)))
    both = join_layers(params, f"{PREFIX}.rpn_cls", f"{PREFIX}.rpn_reg")
    weight, bias = both[f"{JOINED}.weight"].flatten(1), both[f"{JOINED}.bias"]
    found = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float()
    found = found.reshape(*anchor.shape, -1)
    logits, deltas = found.split([ratios, 4 * ratios], dim=-1)
    deltas = deltas.unflatten(-1, (ratios, 4))
    # A product with ones and zeros is exact, and unlike an index's its backward has no order.
    own = anchor[..., None] % ratios == torch.arange(ratios, device=anchor.device)
    return RPNOutput((logits * own).sum(-1), (deltas * own[..., None]).sum(-2)), pyramid


def patch_side(config: RPNConfig) -> int:
    """Side of what `rpn_head_at` reads for a cell, in cells."""
    return 2 * config.convs + 1


def rpn_targets(
    config: RPNConfig,
    anchors: Tensor,
    size: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    keys: Tensor,
    probe: Probe = unwatched,
    regions: Tensor | None = None,
) -> RPNTargets:
    """Match anchors that lie inside their image and draw the loss's sample.

    Args:
        config: thresholds and counts.
        anchors: [A, 4] xyxy.
        size: [B, 2] image height and width in pixels.
        gt_boxes: [B, G, 4] xyxy.
        gt_valid: [B, G] bool.
        keys: [B, A] noise in [0, 1).
        probe: sees which anchors lie inside.
        regions: [B, R, 4] xyxy to ignore: the anchors that they cover take no part.

    Returns:
        Matches and sample.
    """
    candidates = probe("rpn.inside", inside(anchors, size))
    if regions is not None:
        candidates = candidates & ~covered(anchors, regions)
    matches = match_anchors(
        anchors,
        candidates,
        gt_boxes,
        gt_valid,
        positive_iou=config.positive_iou,
        negative_iou=config.negative_iou,
        low_quality_iou=config.low_quality_iou,
    )
    drawn = sample(
        matches.positive,
        matches.negative,
        keys,
        count=config.samples,
        max_positive=_max_positive(config),
    )
    return RPNTargets(matches, drawn)


def rpn_losses(
    config: RPNConfig,
    sampled: RPNOutput,
    anchors: Tensor,
    targets: RPNTargets,
    gt_boxes: Tensor,
    probe: Probe = unwatched,
) -> losses.LossSums:
    """Objectness and box loss, both to be divided by the batch's number of sampled anchors.

    The reference counts at least one positive and one negative per image.

    Args:
        config: counts and the box loss's bend.
        sampled: the head's output at `targets.sample`.
        anchors: [A, 4] xyxy.
        targets: matches and sample.
        gt_boxes: [B, G, 4] xyxy.
        probe: sees the box loss's targets.

    Returns:
        The losses `loss_rpn_cls` and `loss_rpn_bbox`, and `rpn.samples`, their count per image.
    """
    index, valid, positive = targets.sample
    per_image = [(m.sum(dim=1)).clamp(min=1) for m in (positive, valid & ~positive)]
    count = (per_image[0] + per_image[1]).sum().to(torch.float32)
    loss_cls = losses.binary_cross_entropy(sampled.logits, positive, valid)
    # Positives come first in a sample: only so many rows can have a box loss.
    first = slice(_max_positive(config))
    index, positive = index[:, first], positive[:, first]
    goal = encode(anchors[index], take(gt_boxes, take(targets.matches.gt, index)), STDS)
    goal = probe("rpn.goal", goal)
    loss_bbox = losses.smooth_l1(sampled.deltas[:, first], goal, positive, config.beta).sum()
    return losses.LossSums(
        {"loss_rpn_cls": loss_cls, "loss_rpn_bbox": loss_bbox},
        {"loss_rpn_cls": count, "loss_rpn_bbox": count},
        {"rpn.samples": count / index.shape[0]},
    )


class Candidates(NamedTuple):
    """What enters suppression: the best anchors of each level, decoded."""

    boxes: Tensor
    """[B, N, 4] xyxy pixels of the canvas, levels one after the other."""
    scores: Tensor
    """[B, N] in [0, 1], falling within a level."""
    level: Tensor
    """[N] int64."""
    valid: Tensor
    """[B, N] bool; a box without width or height is not."""
    lengths: list[int]
    """How many boxes each level has."""


class CandidateSlots(NamedTuple):
    """What of the candidates doesn't depend on the images."""

    level: Tensor
    """[N] int64."""
    first: Tensor
    """[N] int64, the level's first anchor."""


def candidate_slots(
    config: RPNConfig, lengths: list[int], device: torch.device, *, train: bool
) -> CandidateSlots:
    """Of levels with so many anchors."""
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    counts = _candidate_counts(config, lengths, train=train)
    columns = list(range(len(lengths))), firsts
    return CandidateSlots(
        *(
            torch.cat([torch.full((n,), v, device=device) for n, v in zip(counts, c, strict=True)])
            for c in columns
        )
    )


def _candidate_counts(config: RPNConfig, lengths: list[int], *, train: bool) -> list[int]:
    count = config.train_pre_nms if train else config.test_pre_nms
    return [min(count, length) for length in lengths]


def candidates(
    config: RPNConfig,
    output: RPNOutput,
    anchors: Tensor,
    lengths: list[int],
    size: Tensor,
    *,
    train: bool,
    slots: CandidateSlots | None = None,
) -> Candidates:
    """Decode and clip the best anchors of each level; no gradient.

    Args:
        config: counts.
        output: of the head.
        anchors: [A, 4] xyxy.
        lengths: how many of them each level has, A_l.
        size: [B, 2] image height and width in pixels.
        train: whether the training or the inference count holds.
        slots: from `candidate_slots`; made here if None.

    Returns:
        N = sum over levels of min(count, A_l).
    """
    if slots is None:
        slots = candidate_slots(config, lengths, anchors.device, train=train)
    counts = _candidate_counts(config, lengths, train=train)
    levels = output.logits.detach().sigmoid().split(lengths, dim=1)
    best = [level.topk(count, dim=1) for level, count in zip(levels, counts, strict=True)]
    scores, index = (torch.cat(column, dim=1) for column in zip(*best, strict=True))
    index = index + slots.first
    deltas = take(output.deltas.detach(), index)
    boxes = decode(anchors[index], deltas, STDS, size)
    valid = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    return Candidates(boxes, scores, slots.level, valid, counts)


def propose(config: RPNConfig, found: Candidates, *, train: bool) -> Proposals:
    """One suppression within levels, then the best by score over all of them.

    Returns:
        K proposals per image.
    """
    index, kept = batched_nms(
        found.boxes,
        found.scores,
        found.level,
        found.valid,
        iou=config.nms_iou,
        count=config.train_proposals if train else config.test_proposals,
        lengths=found.lengths,
        kernel=config.nms_kernel,
    )
    return Proposals(
        take(found.boxes, index) * kept[..., None],
        take(found.scores, index) * kept,
        kept,
    )


def init_rpn(
    config: RPNConfig,
    anchors: AnchorConfig,
    in_channels: int,
    params: Params,
    generator: torch.Generator,
) -> None:
    """Add fresh RPN parameters: N(0, 0.01), zero biases."""
    inputs = [in_channels, *[config.channels] * (config.convs - 1)]
    for name, out, channels, kernel in (
        *((c, config.channels, i, 3) for c, i in zip(_convs(config), inputs, strict=True)),
        (f"{PREFIX}.rpn_cls", len(anchors.ratios), config.channels, 1),
        (f"{PREFIX}.rpn_reg", 4 * len(anchors.ratios), config.channels, 1),
    ):
        shape = (out, channels, kernel, kernel)
        new_weight(params, name, shape, normal_001, generator, bias=out)


def _convs(config: RPNConfig) -> list[str]:
    """The convolutions' names, MMDetection's: several are numbered."""
    if config.convs == 1:
        return [f"{PREFIX}.rpn_conv"]
    return [f"{PREFIX}.rpn_conv.{i}.conv" for i in range(config.convs)]


def _max_positive(config: RPNConfig) -> int:
    return int(config.samples * config.positive_fraction)
