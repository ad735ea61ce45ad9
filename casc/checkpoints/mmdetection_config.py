"""What MMDetection's config says of a model's conventions, 2.x and 3.x.

Each of them is taken over into casc's config or refused; what concerns training alone isn't
looked at, since nothing of it is in the weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from casc.checkpoints.config_text import at
from casc.checkpoints.foreign import Channels, resnet_of
from casc.config import from_json, to_json
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig
from casc.ops.roi_align import FINEST_SIDE

_NO_SCALE = [0.0] * 4
_ROI = "model.roi_head."
# What casc has no other way for: path, the values that it can do, and what that is where the
# config is silent.
_ONLY: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("model.type", ("CascadeRCNN",), "CascadeRCNN"),
    ("model.backbone.type", ("ResNet",), "ResNet"),
    ("model.backbone.num_stages", (4,), 4),
    ("model.backbone.out_indices", ([0, 1, 2, 3],), [0, 1, 2, 3]),
    ("model.backbone.strides", ([1, 2, 2, 2],), [1, 2, 2, 2]),
    ("model.backbone.dilations", ([1, 1, 1, 1],), [1, 1, 1, 1]),
    ("model.backbone.deep_stem", (False,), False),
    ("model.backbone.avg_down", (False,), False),
    ("model.backbone.conv_cfg", (None,), None),
    ("model.backbone.dcn", (None,), None),
    ("model.backbone.plugins", (None, []), None),
    ("model.neck.type", ("FPN",), "FPN"),
    ("model.neck.num_outs", (5,), 5),
    ("model.neck.start_level", (0,), 0),
    ("model.neck.add_extra_convs", (False,), False),
    ("model.neck.upsample_cfg.mode", ("nearest",), "nearest"),
    ("model.rpn_head.type", ("RPNHead",), "RPNHead"),
    ("model.rpn_head.num_convs", (1,), 1),
    ("model.rpn_head.anchor_generator.type", ("AnchorGenerator",), "AnchorGenerator"),
    ("model.rpn_head.anchor_generator.center_offset", (0.0,), 0.0),
    ("model.rpn_head.anchor_generator.base_sizes", (None,), None),
    ("model.rpn_head.bbox_coder.type", ("DeltaXYWHBBoxCoder",), "DeltaXYWHBBoxCoder"),
    ("model.rpn_head.bbox_coder.target_means", (_NO_SCALE,), _NO_SCALE),
    ("model.rpn_head.bbox_coder.target_stds", ([1.0] * 4,), [1.0] * 4),
    ("model.rpn_head.bbox_coder.add_ctr_clamp", (False,), False),
    ("model.rpn_head.loss_cls.use_sigmoid", (True,), True),
    (_ROI + "type", ("CascadeRoIHead",), "CascadeRoIHead"),
    (_ROI + "shared_head", (None,), None),
    ("model.test_cfg.rcnn.nms.type", ("nms",), "nms"),
    ("model.test_cfg.rpn.nms.type", ("nms",), "nms"),
    ("model.test_cfg.rpn.min_bbox_size", (0,), 0),
    ("model.test_cfg.rcnn.mask_thr_binary", (0.5,), 0.5),
)
_EXTRACTOR = (
    ("type", ("SingleRoIExtractor",), "SingleRoIExtractor"),
    ("finest_scale", (FINEST_SIDE,), FINEST_SIDE),
    ("featmap_strides", ([4, 8, 16, 32],), [4, 8, 16, 32]),
    ("roi_layer.type", ("RoIAlign",), "RoIAlign"),
    ("roi_layer.aligned", (True,), True),
    ("roi_layer.pool_mode", ("avg",), "avg"),
)
_BOX_HEAD = (
    ("type", ("Shared2FCBBoxHead",), "Shared2FCBBoxHead"),
    ("reg_class_agnostic", (True,), True),
    ("bbox_coder.type", ("DeltaXYWHBBoxCoder",), "DeltaXYWHBBoxCoder"),
    ("bbox_coder.target_means", (_NO_SCALE,), _NO_SCALE),
    ("bbox_coder.add_ctr_clamp", (False,), False),
    ("loss_cls.use_sigmoid", (False,), False),
)
_MASK_HEAD = (
    ("type", ("FCNMaskHead",), "FCNMaskHead"),
    ("class_agnostic", (False,), False),
    ("upsample_cfg.type", ("deconv",), "deconv"),
    ("upsample_cfg.scale_factor", (2,), 2),
)


class Said(NamedTuple):
    """A config, understood."""

    model: DetectorConfig
    image: ImageConfig
    channels: Channels | None
    """None where it doesn't say."""
    problem: str | None
    """The first thing that casc's model can't do."""


def understand(config: dict[str, Any], model: DetectorConfig, image: ImageConfig) -> Said:
    """Take a config's conventions over into casc's.

    Args:
        config: of `read_config`.
        model: what the tensors' shapes say.
        image: casc's default.
    """
    config = _modern(config)
    problem = next(_problems(config, model), None)
    channels, image = _image(config, image)
    if problem is None:
        try:
            made = to_json(_model(config, model))
            model = from_json(DetectorConfig, made, "as casc's config")
        except (TypeError, ValueError) as error:
            problem = f"a setting of its config is of an unexpected kind ({error})"
    elif at(config, "model.backbone.style") == "caffe" and resnet_of(model).depth >= 50:
        model = replace(model, backbone=replace(resnet_of(model), stride_in_1x1=True))
    return Said(model, image, channels, problem)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """Early 2.x has its test settings beside the model."""
    if "test_cfg" in config and at(config, "model.test_cfg") is None and at(config, "model"):
        return {**config, "model": {**config["model"], "test_cfg": config["test_cfg"]}}
    return config


def _problems(config: dict[str, Any], model: DetectorConfig) -> Iterator[str]:
    yield from _unlike(config, "", _ONLY)
    for name in ("bbox", "mask"):
        yield from _unlike(config, f"{_ROI}{name}_roi_extractor.", _EXTRACTOR)
    for path in _stages(config, "bbox_head", len(model.stages)):
        yield from _unlike(config, path + ".", _BOX_HEAD)
        classes = at(config, path + ".num_classes", model.classes)
        if classes != model.classes:
            yield (
                f"{path}.num_classes is {classes} for {model.classes + 1} outputs: MMDetection 1"
                " counted the background, as class 0; upgrade it there"
            )
    for path in _stages(config, "mask_head", len(model.stages)):
        yield from _unlike(config, path + ".", _MASK_HEAD)
    samples = {at(config, f"{_ROI}{n}_roi_extractor.roi_layer.sampling_ratio", 0) for n in _BOTH}
    if not samples <= {0, 2} or len(samples) > 1:
        yield f"RoIAlign takes {sorted(map(str, samples))} samples per cell; casc's heads 0 or 2"


_BOTH = ("bbox", "mask")


def _unlike(
    config: dict[str, Any], prefix: str, only: tuple[tuple[str, tuple[Any, ...], Any], ...]
) -> Iterator[str]:
    for path, allowed, default in only:
        value = at(config, prefix + path, default)
        short = value.rpartition(".")[2] if isinstance(value, str) else value
        if short not in allowed:
            yield f"{prefix}{path} is {value!r:.60}; casc's model has {allowed[0]!r}"


def _stages(config: dict[str, Any], name: str, count: int) -> list[str]:
    """The paths of a head of each stage: one for all, or a list."""
    if isinstance(at(config, _ROI + name), list):
        return [f"{_ROI}{name}.{i}" for i in range(count)]
    return [_ROI + name]


def _model(config: dict[str, Any], model: DetectorConfig) -> DetectorConfig:
    generator = "model.rpn_head.anchor_generator."
    scales = at(config, generator + "scales", [model.anchors.scale])
    (scale,) = scales if isinstance(scales, list) else [scales]
    anchors = replace(
        model.anchors,
        strides=tuple(at(config, generator + "strides", model.anchors.strides)),
        scale=float(scale),
        ratios=tuple(float(r) for r in at(config, generator + "ratios", model.anchors.ratios)),
    )
    paths = _stages(config, "bbox_head", len(model.stages))
    stages = tuple(
        replace(stage, stds=tuple(at(config, f"{path}.bbox_coder.target_stds", stage.stds)))
        for stage, path in zip(model.stages, paths * len(model.stages), strict=False)
    )
    rpn, rcnn = "model.test_cfg.rpn.", "model.test_cfg.rcnn."
    proposals = at(config, rpn + "max_per_img", at(config, rpn + "max_num"))
    found = model.inference
    backbone = resnet_of(model)
    caffe = at(config, "model.backbone.style", "pytorch") == "caffe"
    sampling = at(config, _ROI + "bbox_roi_extractor.roi_layer.sampling_ratio", 0)
    return replace(
        model,
        anchors=anchors,
        stages=stages,
        backbone=replace(backbone, stride_in_1x1=caffe and backbone.depth >= 50),
        rpn=replace(
            model.rpn,
            test_pre_nms=at(config, rpn + "nms_pre", model.rpn.test_pre_nms),
            test_proposals=proposals or model.rpn.test_proposals,
            nms_iou=_iou(config, rpn, model.rpn.nms_iou),
        ),
        inference=replace(
            found,
            score_threshold=at(config, rcnn + "score_thr", found.score_threshold),
            nms_iou=_iou(config, rcnn, found.nms_iou),
            detections=at(config, rcnn + "max_per_img", found.detections),
        ),
        roi_align="fixed" if sampling == 2 else "adaptive",
    )


def _iou(config: dict[str, Any], where: str, default: float) -> float:
    for name in ("nms.iou_threshold", "nms.iou_thr", "nms_thr"):
        default = at(config, where + name, default)
    return default


def _image(config: dict[str, Any], image: ImageConfig) -> tuple[Channels | None, ImageConfig]:
    norm = at(config, "model.data_preprocessor") or next(
        (step for step in _steps(config) if step.get("type") == "Normalize"), None
    )
    norm = norm or config.get("img_norm_cfg")
    if not isinstance(norm, dict) or "mean" not in norm:
        return None, image
    modern = "bgr_to_rgb" in norm or "pad_size_divisor" in norm
    rgb = norm.get("bgr_to_rgb", False) if modern else norm.get("to_rgb", True)
    mean, std = (tuple(float(v) for v in norm.get(k, ())) for k in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise UserError("img_norm_cfg: mean and std must have three numbers")
    # The reference turns an image before it subtracts: the numbers are in the network's order.
    turn = slice(None) if rgb else slice(None, None, -1)
    image = replace(image, mean=mean[turn], std=std[turn])
    for step in _steps(config):
        scale = step.get("img_scale") or (step.get("type") == "Resize" and step.get("scale"))
        if isinstance(scale, list) and len(scale) == 2 and all(isinstance(v, int) for v in scale):
            return "rgb" if rgb else "bgr", replace(image, short=min(scale), long=max(scale))
    return "rgb" if rgb else "bgr", image


def _steps(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of the test pipeline, and those inside of them."""
    steps = at(config, "test_pipeline") or at(config, "data.test.pipeline") or []
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict):
            yield step
            inner = step.get("transforms") or []
            yield from (s for s in inner if isinstance(s, dict))
