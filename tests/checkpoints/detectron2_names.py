"""Detectron2's own statement of its Cascade Mask R-CNN: the oracle of the conversion's tests.

Written from the names of its modules (GeneralizedRCNN with a ResNet and FPN, StandardRPNHead,
CascadeROIHeads, MaskRCNNConvUpsampleHead) and from its configuration's defaults, beside
MMDetection's names; nothing here comes from casc.
"""

import re

import torch
from torch import Tensor

# (MMDetection's name, Detectron2's); where a number shifts, a function of the match.
RENAMES = (
    (r"backbone\.conv1\.(\w+)", r"backbone.bottom_up.stem.conv1.\1"),
    (r"backbone\.[bg]n1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (
        r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(\w+)",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.{m[4]}",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.[bg]n(\d)\.(\w+)",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.downsample\.0\.(\w+)",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.{m[2]}.shortcut.{m[3]}",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.downsample\.1\.(\w+)",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}",
    ),
    (
        r"neck\.lateral_convs\.(\d)\.conv\.(\w+)",
        lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.{m[2]}",
    ),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", lambda m: f"backbone.fpn_output{int(m[1]) + 2}.{m[2]}"),
    (
        r"neck\.lateral_convs\.(\d)\.gn\.(\w+)",
        lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.norm.{m[2]}",
    ),
    (
        r"neck\.fpn_convs\.(\d)\.gn\.(\w+)",
        lambda m: f"backbone.fpn_output{int(m[1]) + 2}.norm.{m[2]}",
    ),
    (r"rpn_head\.rpn_conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.0\.(\w+)", r"roi_heads.box_head.\1.fc1.\2"),
    (r"roi_head\.bbox_head\.(\d)\.shared_fcs\.1\.(\w+)", r"roi_heads.box_head.\1.fc2.\2"),
    (r"roi_head\.bbox_head\.(\d)\.fc_cls\.(\w+)", r"roi_heads.box_predictor.\1.cls_score.\2"),
    (r"roi_head\.bbox_head\.(\d)\.fc_reg\.(\w+)", r"roi_heads.box_predictor.\1.bbox_pred.\2"),
    # One mask head: of MMDetection's three, the first.
    (
        r"roi_head\.mask_head\.0\.convs\.(\d)\.conv\.(\w+)",
        lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}",
    ),
    (
        r"roi_head\.mask_head\.0\.convs\.(\d)\.gn\.(\w+)",
        lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.norm.{m[2]}",
    ),
    (r"roi_head\.mask_head\.0\.upsample\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_head\.mask_head\.0\.conv_logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
)
# MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS and what MMDetection divides deltas by.
REG_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
# MODEL.PIXEL_MEAN and PIXEL_STD, in BGR.
PIXEL_MEAN, PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
# What MMDetection divides red, green and blue by.
DEVIATIONS = (58.395, 57.12, 57.375)


def detectron2_name(name: str) -> str | None:
    """Its name of one of MMDetection's tensors; None for what it doesn't have."""
    if name.endswith("num_batches_tracked"):  # FrozenBatchNorm2d has none
        return None
    for pattern, theirs in RENAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs) if isinstance(theirs, str) else theirs(match)
    assert re.match(r"roi_head\.mask_head\.[12]\.", name), name
    return None


def detectron2_model(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """MMDetection's detector as Detectron2 would hold it, in its model zoo's conventions.

    But for the order of its layers' strides, which tensors don't show.
    """
    model = {theirs: v for k, v in reference.items() if (theirs := detectron2_name(k))}
    # Its input isn't divided by the deviations, so the first convolution has to; and is BGR.
    stem = "backbone.bottom_up.stem.conv1.weight"
    scaled = model[stem] / torch.tensor(DEVIATIONS)[:, None, None]
    model[stem] = scaled[:, [2, 1, 0]].contiguous()
    for stage, (weights, stds) in enumerate(zip(REG_WEIGHTS, STDS, strict=False)):
        # delta * std = delta' / weight
        factor = torch.tensor([w * s for w, s in zip(weights, stds, strict=True)])
        for leaf in ("weight", "bias"):
            name = f"roi_heads.box_predictor.{stage}.bbox_pred.{leaf}"
            if name in model:
                model[name] = model[name] * factor.reshape(-1, *[1] * (model[name].dim() - 1))
    model["pixel_mean"] = torch.tensor(PIXEL_MEAN).reshape(3, 1, 1)
    model["pixel_std"] = torch.tensor(PIXEL_STD).reshape(3, 1, 1)
    return model
