"""What the numbers of a detector may be."""

import math

from casc.errors import UserError
from casc.inference.settings import MOST_DETECTIONS
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig

MOST = 2**31 - 1
"""Of any count."""
MOST_LAYERS = 1000
"""Of a part. Each is built one by one, so a mistyped number would take hours."""


def check_model(model: DetectorConfig) -> None:
    """Refuse a detector that can't be built, or that computes nothing.

    Raises:
        UserError: naming the flag to change.
    """
    if not model.stages:
        raise UserError("--model.stages: give one at least")
    _check_counts(model)
    _check_shares(model)
    _check_positive(model)
    for part, head in (("rpn", model.rpn), ("box-head", model.box_head)):
        if head.samples * head.positive_fraction < 1:
            raise UserError(
                f"--model.{part}.positive-fraction {head.positive_fraction}: leaves no room for an"
                f" object among --model.{part}.samples {head.samples}; use larger ones"
            )
    _check_unused(model)
    if model.mask_head.scoring and model.masks == "none":
        raise UserError(
            "--model.mask-head.scoring: --model.masks none has no masks to score; use"
            " --model.mask-head.no-scoring, or masks heads"
        )
    if model.mask_head.scoring and model.mask_head.capacity == "counted":
        raise UserError(
            "--model.mask-head.scoring: is trained in one graph with all else; use"
            " --model.mask-head.capacity full, or auto"
        )
    unknown = [label for label in model.inference.classes if not 0 <= label < model.classes]
    if unknown:
        raise UserError(
            f"--model.inference.classes {unknown[0]}: there are labels 0 to {model.classes - 1}"
        )
    if len(model.anchors.strides) != 5 or any(stride < 1 for stride in model.anchors.strides):
        given = " ".join(map(str, model.anchors.strides))
        raise UserError(f"--model.anchors.strides {given}: must be five, each at least 1")
    if not model.anchors.ratios:
        raise UserError("--model.anchors.ratios: give one at least, such as 0.5 1 2")


def _check_counts(model: DetectorConfig) -> None:
    rpn, box, mask = model.rpn, model.box_head, model.mask_head
    for flag, value, least, most in (
        ("classes", model.classes, 1, MOST),
        ("backbone.width", getattr(model.backbone, "width", 1), 1, MOST),
        ("fpn.channels", model.fpn.channels, 1, MOST),
        ("rpn.channels", rpn.channels, 1, MOST),
        ("rpn.convs", rpn.convs, 1, MOST_LAYERS),
        ("rpn.samples", rpn.samples, 1, MOST),
        ("rpn.train-pre-nms", rpn.train_pre_nms, 1, MOST),
        ("rpn.train-proposals", rpn.train_proposals, 1, MOST),
        ("rpn.test-pre-nms", rpn.test_pre_nms, 1, MOST),
        ("rpn.test-proposals", rpn.test_proposals, 1, MOST),
        ("box-head.samples", box.samples, 1, MOST),
        ("box-head.cells", box.cells, 1, MOST),
        ("box-head.channels", box.channels, 1, MOST),
        ("box-head.convs", box.convs, 0, MOST_LAYERS),
        ("box-head.conv-channels", box.conv_channels, 1, MOST),
        ("box-head.fcs", box.fcs, 1, MOST_LAYERS),
        ("mask-head.cells", mask.cells, 1, MOST),
        ("mask-head.convs", mask.convs, 1, MOST_LAYERS),
        ("mask-head.channels", mask.channels, 1, MOST),
        ("inference.detections", model.inference.detections, 1, MOST_DETECTIONS),
    ):
        if not least <= value <= most:
            raise UserError(f"--model.{flag} {value}: must be {least} to {most}")


def _check_shares(model: DetectorConfig) -> None:
    rpn, inference = model.rpn, model.inference
    for flag, share in (
        ("rpn.positive-iou", rpn.positive_iou),
        ("rpn.negative-iou", rpn.negative_iou),
        ("rpn.low-quality-iou", rpn.low_quality_iou),
        ("rpn.positive-fraction", rpn.positive_fraction),
        ("rpn.nms-iou", rpn.nms_iou),
        ("box-head.positive-fraction", model.box_head.positive_fraction),
        *((f"stages.{i}.iou", stage.iou) for i, stage in enumerate(model.stages)),
        ("inference.score-threshold", inference.score_threshold),
        ("inference.nms-iou", inference.nms_iou),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"--model.{flag} {share}: must be from 0 to 1")


def _check_positive(model: DetectorConfig) -> None:
    for flag, *values in (
        ("anchors.scale", model.anchors.scale),
        ("anchors.ratios", *model.anchors.ratios),
        ("box-head.box-weight", model.box_head.box_weight),
        *((f"stages.{i}.stds", *stage.stds) for i, stage in enumerate(model.stages)),
    ):
        if not all(0 < value < math.inf for value in values):
            given = " ".join(map(str, values))
            raise UserError(f"--model.{flag} {given}: must be more than 0")
    for flag, value in (
        ("rpn.beta", model.rpn.beta),
        ("box-head.beta", model.box_head.beta),
        *((f"stages.{i}.loss-weight", stage.loss_weight) for i, stage in enumerate(model.stages)),
    ):
        if not 0 <= value < math.inf:
            raise UserError(f"--model.{flag} {value}: must not be negative")


def _check_unused(model: DetectorConfig) -> None:
    """Refuse settings of what a box head hasn't got."""
    box, usual = model.box_head, BoxHeadConfig()
    for flag, given, default in (
        ("norm", box.norm, usual.norm),
        ("conv-channels", box.conv_channels, usual.conv_channels),
    ):
        if not box.convs and given != default:
            raise UserError(
                f"--model.box-head.{flag} {given}: is of convolutions, of which the heads have"
                f" none; give --model.box-head.convs, such as 4, or use {default}"
            )
    if box.loss != "smooth_l1" and box.beta != usual.beta:
        raise UserError(
            f"--model.box-head.beta {box.beta}: is of --model.box-head.loss smooth_l1, {box.loss}"
            f" has none; use that loss, or leave it at {usual.beta}"
        )
