"""Each operator beside the straightforward way of doing it, on the same made-up inputs.

Legend: B images, G ground-truth capacity, A anchors, R RoIs, C channels, E edges of an object.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import operator_inputs as inputs
import torch
import usual_operators as usual
from operator_inputs import Sizes
from torch import Tensor

from casc.evaluate.mask_rle import encode_masks, paste_masks
from casc.model import noise
from casc.model.detector_config import ROI_LEVELS, DetectorConfig
from casc.model.forward_detect import select
from casc.model.forward_train import mask_branch
from casc.model.mask_head import MaskRois, init_mask_head, pack
from casc.model.mask_targets import polygon_targets
from casc.model.matching import match_anchors, match_rois, sample
from casc.model.steps import CAPACITY_SHARES
from casc.ops.nms import batched_nms
from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import roi_align

Tree = Any
"""Tensors in tuples or lists, or what a test of equality of its own understands."""


class Case(NamedTuple):
    """One operator, ready to run."""

    ours: Callable[[], Tree]
    """Pure: may be compiled."""
    usual: Callable[[], Tree]
    """The same by the operators that everybody uses."""
    tolerance: float
    """The largest `difference` of results and of gradients."""
    difference: Callable[[Tree, Tree], float]
    """Between ours and the usual."""
    leaves: tuple[Tensor, ...] = ()
    """What gradients flow to; without any there is no backward."""
    compiles: bool = True
    """Whether the product compiles it."""


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Case]]:
    """How to make each case, by name; `dtype` is that of features and weights."""
    rungs = sorted({max(1, round(share * sizes.mask_rois)) for share in CAPACITY_SHARES})
    return {
        "roi_align_box": lambda: _roi_align(sizes, sizes.box_rois, 7, dtype, device),
        "roi_align_mask": lambda: _roi_align(sizes, sizes.mask_rois, 14, dtype, device),
        "mask_targets": lambda: _mask_targets(sizes, device),
        **{
            f"mask_capacity_{rung}": lambda rung=rung: _mask_capacity(sizes, rung, dtype, device)
            for rung in rungs
        },
        "nms_proposals": lambda: _nms_proposals(sizes, device),
        "nms_classes": lambda: _nms_classes(sizes, device),
        "match_anchors": lambda: _match_anchors(sizes, device),
        "match_rois": lambda: _match_rois(sizes, device),
        "sample_anchors": lambda: _sample_anchors(sizes, device),
        "noise": lambda: _noise(sizes, device),
        "paste": lambda: _paste(sizes),
        "encode": lambda: _encode(sizes),
    }


def largest(ours: Tree, expected: Tree) -> float:
    """The largest absolute difference of two trees of tensors, in units of the largest value."""
    if isinstance(ours, Tensor):
        ours, expected = ours.detach().double(), expected.detach().double()
        return ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    return max(largest(a, b) for a, b in zip(ours, expected, strict=True))


def unequal(ours: Tree, expected: Tree) -> float:
    """The share of entries that differ, of two trees of tensors."""
    pairs = [(ours, expected)] if isinstance(ours, Tensor) else zip(ours, expected, strict=True)
    different = [(a != b).flatten() for a, b in pairs]
    return torch.cat(different).float().mean().item()


# ---- RoIAlign, and the mask branch ----


def _roi_align(
    sizes: Sizes, count: int, cells: int, dtype: torch.dtype, device: torch.device
) -> Case:
    levels = tuple(level.requires_grad_() for level in inputs.some_features(sizes, dtype, device))
    strides = DetectorConfig().anchors.strides[:ROI_LEVELS]
    per_image = count // sizes.batch
    boxes = inputs.some_boxes(sizes, per_image, device).flatten(0, 1)
    image = torch.arange(sizes.batch, device=device).repeat_interleave(per_image)
    # float32: the order of summation. bfloat16: weights have 3 digits, and a pixel's gradient
    # is rounded on the way from RoI to RoI where many read it.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    return Case(
        lambda: roi_align(flatten_pyramid(list(levels), strides), boxes, image, cells, "fixed"),
        lambda: usual.roi_align(levels, strides, boxes, image, cells),
        tolerance,
        largest,
        levels,
    )


def _mask_targets(sizes: Sizes, device: torch.device) -> Case:
    rois, targets, _ = inputs.positive_rois(sizes, sizes.mask_rois, device)
    edges = targets.edges.unflatten(1, (sizes.capacity, sizes.edges))[:, : sizes.objects]
    polygons = edges[..., :2].flatten(-2).tolist()
    return Case(
        lambda: polygon_targets(
            targets.edges, targets.edge_gt, rois.boxes, rois.image, rois.gt, 28
        ),
        lambda: usual.mask_targets(polygons, sizes.canvas, rois.boxes, rois.image, rois.gt, 28),
        # Both approximate the covered area; they round cells on the border differently.
        0.03,
        unequal,
    )


def _mask_capacity(sizes: Sizes, count: int, dtype: torch.dtype, device: torch.device) -> Case:
    """`count` positives: run on as many RoIs, or on all that there can be."""
    rois, targets, classes = inputs.positive_rois(sizes, count, device)
    config = DetectorConfig()
    params: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    init_mask_head(config.mask_head, 0, classes, sizes.channels, params, generator)
    for name, value in params.items():
        params[name] = value.to(device).requires_grad_()
    levels = inputs.some_features(sizes, dtype, device)
    pyramid = flatten_pyramid(levels, config.anchors.strides[:ROI_LEVELS])
    packed = pack(rois, count)

    def mean_loss(chosen: MaskRois) -> Tensor:
        ((total, cells),) = mask_branch(params, config, (0,), pyramid, [chosen], targets)
        return total / cells

    return Case(
        lambda: mean_loss(packed),
        lambda: mean_loss(rois),
        # The sum over RoIs changes its order; in bfloat16 each gradient is rounded as well.
        1e-4 if dtype == torch.float32 else 0.05,
        largest,
        tuple(params.values()),
    )


# ---- suppression ----


def _nms_proposals(sizes: Sizes, device: torch.device) -> Case:
    config = DetectorConfig()
    lengths = [min(sizes.proposals, h * w * 3) for h, w in inputs.level_sizes(sizes)]
    level = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])
    boxes = inputs.some_boxes(sizes, sum(lengths), device)
    scores = inputs.distinct_scores(boxes.shape[0], boxes.shape[1], device)
    valid = torch.ones_like(scores, dtype=torch.bool)
    iou, count = config.rpn.nms_iou, sizes.proposals
    return Case(
        lambda: batched_nms(boxes, scores, level, valid, iou=iou, count=count),
        lambda: usual.batched_nms(boxes, scores, level.expand(scores.shape), iou, count),
        0.0,
        unequal,
    )


def _nms_classes(sizes: Sizes, device: torch.device) -> Case:
    """As a trained detector leaves it: each proposal sure of one class or of none."""
    config, generator = DetectorConfig(), torch.Generator().manual_seed(4)
    count = max(sizes.proposals // 2, 1)
    boxes = inputs.some_boxes(sizes, count, device)
    logits = torch.randn(sizes.batch, count, config.classes + 1, generator=generator)
    likely = torch.randint(config.classes + 1, (sizes.batch, count, 1), generator=generator)
    logits = logits.scatter_add(2, likely, torch.full(logits.shape, 6.0)).to(device)
    valid = torch.ones(sizes.batch, count, dtype=torch.bool, device=device)
    return Case(
        lambda: select(config.inference, logits, boxes, valid),
        lambda: usual.select(config.inference, logits, boxes),
        1e-6,
        largest,
    )


# ---- matching and sampling ----


def _match_anchors(sizes: Sizes, device: torch.device) -> Case:
    config, targets = DetectorConfig().rpn, inputs.some_targets(sizes, device)
    anchors, within = inputs.all_anchors(sizes, device)
    thresholds = (config.positive_iou, config.negative_iou, config.low_quality_iou)

    def ours() -> tuple[Tensor, ...]:
        matches = match_anchors(
            anchors,
            within,
            targets.boxes,
            targets.valid,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            low_quality_iou=config.low_quality_iou,
        )
        return torch.where(matches.positive, matches.gt, -1), matches.negative

    real = targets.boxes[:, : sizes.objects]
    return Case(ours, lambda: usual.match_anchors(anchors, within, real, thresholds), 0.0, unequal)


def _match_rois(sizes: Sizes, device: torch.device) -> Case:
    targets = inputs.some_targets(sizes, device)
    boxes = torch.cat([targets.boxes, inputs.some_boxes(sizes, sizes.proposals, device)], dim=1)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)

    def ours() -> tuple[Tensor, ...]:
        matches = match_rois(boxes, valid, targets.boxes, targets.valid, iou=0.5)
        return torch.where(matches.positive, matches.gt, -1), matches.negative

    real = targets.boxes[:, : sizes.objects]
    return Case(ours, lambda: usual.match_rois(boxes, real, 0.5), 0.0, unequal)


def _sample_anchors(sizes: Sizes, device: torch.device) -> Case:
    """Random either way: equal are the numbers of positives and of negatives drawn."""
    config, generator = DetectorConfig().rpn, torch.Generator().manual_seed(5)
    _, within = inputs.all_anchors(sizes, device)
    chance = torch.rand(within.shape, generator=generator).to(device)
    positive, negative = within & (chance < 2e-4), within & (chance > 0.01)
    keys = noise.uniform(torch.arange(sizes.batch, device=device), noise.RPN, within.shape[1])
    half = int(config.samples * config.positive_fraction)

    def ours() -> tuple[Tensor, ...]:
        index, valid, is_positive = sample(
            positive, negative, keys, count=config.samples, max_positive=half
        )
        right = torch.where(is_positive, positive.gather(1, index), negative.gather(1, index))
        return (is_positive & right).sum(dim=1), (valid & ~is_positive & right).sum(dim=1)

    return Case(ours, lambda: usual.sample(positive, negative, config.samples, half), 0.0, unequal)


def _noise(sizes: Sizes, device: torch.device) -> Case:
    """Random either way: equal are the distributions."""
    anchors = sum(h * w * 3 for h, w in inputs.level_sizes(sizes))
    seed = torch.arange(sizes.batch, device=device)

    def distance(ours: Tensor, expected: Tensor) -> float:
        """Kolmogorov and Smirnov's."""
        return (ours.flatten().sort()[0] - expected.flatten().sort()[0]).abs().max().item()

    # Chance alone exceeds this once in ten million times.
    tolerance = 4 / math.sqrt(sizes.batch * anchors)
    return Case(
        lambda: noise.uniform(seed, noise.RPN, anchors),
        lambda: torch.rand(sizes.batch, anchors, device=device),
        tolerance,
        distance,
    )


# ---- masks at the image's size ----


def _paste(sizes: Sizes) -> Case:
    masks, boxes = inputs.soft_masks(sizes)
    return Case(
        lambda: paste_masks(masks, boxes, *sizes.image),
        lambda: usual.paste_masks(masks, boxes, *sizes.image),
        0.0,
        unequal,
        compiles=False,
    )


def _encode(sizes: Sizes) -> Case:
    masks, boxes = inputs.soft_masks(sizes)

    def different(ours: Tree, expected: Tree) -> float:
        return sum(a != b for a, b in zip(ours, expected, strict=True)) / len(expected)

    return Case(
        lambda: encode_masks(masks, boxes, *sizes.image),
        lambda: usual.encode_masks(masks, boxes, *sizes.image),
        0.0,
        different,
        compiles=False,
    )
