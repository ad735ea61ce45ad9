"""Write a Cascade Mask R-CNN for Detectron2."""

from collections.abc import Mapping

import torch
from torch import Tensor

from casc.checkpoints.detectron2 import MASK, MEAN, STD, layer_names, reordered
from casc.checkpoints.foreign import (
    FLAVOUR,
    Checkpoint,
    Ours,
    Stated,
    Written,
    channel_line,
    check_expressible,
    resnet_of,
    to_rgb,
    to_text,
)
from casc.checkpoints.report import Row
from casc.checkpoints.shapes import BATCHES
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig


def write_detectron2(
    checkpoint: Checkpoint, stated: Stated, *, mask_stage: int | None = None
) -> Written:
    """A Cascade Mask R-CNN for Detectron2, and what to set in its config.

    Args:
        checkpoint: the detector.
        stated: the order of colours.
        mask_stage: whose mask head to keep; None wants all to be the same.

    Raises:
        UserError: it isn't a whole detector, or has other heads, or there is no such stage.
    """
    if not checkpoint.whole:
        raise UserError("a backbone alone is no Cascade Mask R-CNN; use --to torchvision")
    model, image = checkpoint.model, checkpoint.image
    check_expressible(model, image)
    channels = stated.channels if stated.channels != "auto" else checkpoint.channels or "bgr"
    tensors = to_rgb(checkpoint.tensors, channels)
    differences = []
    if mask_stage is not None and not 0 <= mask_stage < len(model.stages):
        raise UserError(f"--mask-stage {mask_stage}: stages are 0 to {len(model.stages) - 1}")
    if not _alike(tensors, len(model.stages)):
        if mask_stage is None:
            raise UserError(
                "Detectron2's cascade has one mask head, this model has another one in each"
                " stage; choose one with --mask-stage"
            )
        differences.append(f"masks: the mean of all stages' here, stage {mask_stage}'s there")
    if model.inference.average != "probabilities":
        differences.append(
            "scores: this model averages the stages' logits, Detectron2 their probabilities"
        )
    names = layer_names("gn" if resnet_of(model).norm == "gn" else "bn", stages=len(model.stages))
    state: dict[str, Tensor] = {}
    rows = []
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        theirs = f"{names[layer]}.{leaf}"
        shape = tuple(value.shape)
        counter = name.endswith(BATCHES)
        if counter and not value.any():
            rows.append(Row("left over", name, None, shape, "0; nothing reads it"))
        elif name.startswith(MASK) and name.split(".")[2] != str(mask_stage or 0):
            rows.append(Row("left over", name, None, shape, "one mask head serves all stages"))
        else:
            state[theirs] = value
            rows.append(Row("renamed", name, theirs, shape))
    if channels == "bgr":
        rows = [reordered(row) for row in rows]
    turn = slice(None) if channels == "rgb" else slice(None, None, -1)
    mean, std = list(image.mean[turn]), list(image.std[turn])
    for name, values in ((MEAN, mean), (STD, std)):
        state[name] = torch.tensor(values).reshape(3, 1, 1)
        rows.append(Row("created", None, name, (3, 1, 1), "from casc's settings"))
    ours = to_text(Ours(model, image, channels))
    data = {"model": state, "__author__": "casc", FLAVOUR: ours}
    settings = _settings(model, image, channels, mean, std)
    return Written(data, rows, [channel_line(channels, "fixed")], settings, differences)


def _alike(tensors: Mapping[str, Tensor], stages: int) -> bool:
    """Whether all stages have the same mask head."""
    first = {n: v for n, v in tensors.items() if n.startswith(f"{MASK}0.")}
    return all(
        torch.equal(value, tensors[name.replace(f"{MASK}0.", f"{MASK}{stage}.", 1)])
        for name, value in first.items()
        for stage in range(1, stages)
    )


def _settings(
    model: DetectorConfig, image: ImageConfig, channels: str, mean: list[float], std: list[float]
) -> list[str]:
    """Lines of Detectron2's YAML."""
    backbone, found, anchors = resnet_of(model), model.inference, model.anchors
    weights = [[round(1 / v, 6) for v in stage.stds] for stage in model.stages]
    sizes = [[stride * anchors.scale] for stride in anchors.strides]
    return [
        f"INPUT.FORMAT: {channels.upper()}",
        f"INPUT.MIN_SIZE_TEST: {image.short}, INPUT.MAX_SIZE_TEST: {image.long}",
        f"MODEL.PIXEL_MEAN: {mean}, MODEL.PIXEL_STD: {std}",
        f"MODEL.RESNETS: DEPTH {backbone.depth}, STRIDE_IN_1X1 {backbone.stride_in_1x1}, NORM"
        f" {'GN' if backbone.norm == 'gn' else 'FrozenBN'}, STEM_OUT_CHANNELS {backbone.width}",
        f"MODEL.FPN.OUT_CHANNELS: {model.fpn.channels}",
        f"MODEL.ANCHOR_GENERATOR: SIZES {sizes}, ASPECT_RATIOS {[list(anchors.ratios)]}",
        "MODEL.ROI_HEADS: NAME CascadeROIHeads, NUM_CLASSES"
        f" {model.classes}, SCORE_THRESH_TEST {found.score_threshold:g}, NMS_THRESH_TEST"
        f" {found.nms_iou:g}",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: True",
        f"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS: {weights}",
        "POOLER_TYPE: ROIAlignV2, POOLER_SAMPLING_RATIO:"
        f" {2 if model.roi_align == 'fixed' else 0} (of box and mask heads)",
    ]
