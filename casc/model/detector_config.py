"""What a Cascade Mask R-CNN consists of, and how its scores become detections.

What contradicts itself is refused by `casc.train.recipe_checks`.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from casc.model.anchors import AnchorConfig
from casc.model.backbone import Backbone
from casc.model.box_head import BoxHeadConfig, StageConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.ops.nms import NmsKernel
from casc.ops.roi_align import RoiKernel
from casc.ops.soft_nms import SoftNms

STAGES = (
    StageConfig(iou=0.5, stds=(0.1, 0.1, 0.2, 0.2), loss_weight=1.0),
    StageConfig(iou=0.6, stds=(0.05, 0.05, 0.1, 0.1), loss_weight=0.5),
    StageConfig(iou=0.7, stds=(0.033, 0.033, 0.067, 0.067), loss_weight=0.25),
)
# P6 serves the RPN only.
ROI_LEVELS = 4


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


def scores_masks(config: DetectorConfig) -> bool:
    """Whether masks have scores of their own."""
    return config.mask_head.scoring and mask_stages(config) > 0


def mask_stages(config: DetectorConfig) -> int:
    """How many stages have a mask head, from the first on."""
    if config.masks == "none":
        return 0
    return len(config.stages) if config.mask_head.stages == "every" else 1
