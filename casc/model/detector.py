"""Cascade Mask R-CNN: its parameters, and what training and detection share, images to features.

`forward_train` goes on from here to losses, `forward_detect` to detections. All are pure functions
of (parameters, buffers, inputs, noise) with shapes that never change.

Legend: B images, H x W canvas, N boxes per image, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.model.backbone import feature_maps, init_backbone, is_frozen, map_channels
from casc.model.box_head import BoxOutput, init_box_head, own_deltas, regressed_class
from casc.model.detector_config import ROI_LEVELS, DetectorConfig, mask_stages, scores_masks
from casc.model.fpn import fpn, init_fpn
from casc.model.layers import Params, cast_together, casts_together, image_cells
from casc.model.mask_head import init_mask_head
from casc.model.mask_scoring import init_mask_iou_head
from casc.model.rpn import init_rpn
from casc.model.targets import Targets
from casc.ops.probe import Probe, unwatched
from casc.ops.pyramid import Pyramid, flatten_pyramid
from casc.ops.roi_align import is_native

NORM_STRIDES = (2, 4, 8, 16, 32)
"""Of all maps that group norms may see."""


class Inputs(NamedTuple):
    """Images on their canvas, and their ground truth when training."""

    image: Tensor
    """[B, C, H, W] normalised, 0 outside the image; H and W divisible by 32."""
    size: Tensor
    """[B, 2] float32, height and width of the image within the canvas."""
    scale: Tensor
    """[B, 4] float32, canvas pixels per stored pixel (x, y, x, y)."""
    targets: Targets


class Features(NamedTuple):
    """What the heads read."""

    levels: list[Tensor]
    """P2 to P6, [B, C, H_l, W_l]."""
    pyramid: Pyramid
    """P2 to P5, ready for RoIAlign."""


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
    if scores_masks(config):
        init_mask_iou_head(config.mask_head, config.classes, channels, params, generator)
    return params, buffers


def trainable(config: DetectorConfig, params: Params) -> Params:
    """The parameters that learn: all but the backbone's frozen stages."""
    return {k: v for k, v in params.items() if not is_frozen(config.backbone, k)}


def cast_heads(params: Params, image: Tensor, *, masks: bool = True) -> Params:
    """The parameters with those of neck and heads in the image's dtype, where that pays.

    See `cast_together`. The masks' last layer stays in float32, in which its rows are chosen.
    """
    if not casts_together(image):
        return params
    left_out = ("backbone.",) if masks else ("backbone.", "roi_head.mask_head.")
    names = (k for k in params if not k.startswith(left_out) and "conv_logits" not in k)
    return cast_together(params, names, image)


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
    cells = None
    if size is not None and "gn" in (getattr(config.backbone, "norm", None), config.fpn.norm):
        cells = image_cells(size, (image.shape[2], image.shape[3]), NORM_STRIDES)
    maps = probe("maps", feature_maps(params, buffers, config.backbone, image, drop, cells))
    levels = probe("levels", fpn(params, config.fpn, maps, cells))
    strides = config.anchors.strides[:ROI_LEVELS]
    pyramid = flatten_pyramid(levels[:ROI_LEVELS], strides)
    if is_native(config.roi_align, config.roi_kernel):
        # What such operators read: cast once, not for every one of them.
        pyramid = pyramid.with_levels([level.float() for level in pyramid.levels])
    return Features(levels, pyramid)


def level_sizes(levels: list[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each level, in cells."""
    return [(x.shape[2], x.shape[3]) for x in levels]


def anchor_lengths(config: DetectorConfig, levels: list[Tensor]) -> list[int]:
    """How many anchors each level has."""
    return [height * width * len(config.anchors.ratios) for height, width in level_sizes(levels)]


def flat_rois(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, 4] boxes as [B * N, 4], and the image of each."""
    return boxes.flatten(0, 1), roi_images(boxes, boxes.shape[1])


def roi_images(boxes: Tensor, count: int) -> Tensor:
    """The image [B * count] of `count` RoIs of each."""
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    return image.expand(-1, count).reshape(-1)


def chosen_deltas(output: BoxOutput, shape: torch.Size, labels: Tensor | None) -> Tensor:
    """The deltas [B, N, 4] of the class that `regressed_class` chooses; `shape` is [B, N]."""
    logits, deltas = (x.reshape(*shape, -1) for x in output)
    return own_deltas(deltas, regressed_class(logits, labels))
