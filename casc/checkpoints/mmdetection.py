"""MMDetection 2.x and 3.x: its names are casc's; its conventions are in its config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from casc.checkpoints.config_text import read_config
from casc.checkpoints.foreign import (
    FLAVOUR,
    Channels,
    Checkpoint,
    Known,
    Ours,
    Read,
    Stated,
    Written,
    as_float32,
    channel_line,
    check_expressible,
    complete,
    from_text,
    one,
    resnet_of,
    stated_image,
    stated_model,
    to_rgb,
    to_text,
)
from casc.checkpoints.mmdetection_config import Said, understand
from casc.checkpoints.pickles import first_line
from casc.checkpoints.report import Row
from casc.checkpoints.shapes import model_of
from casc.data.index import Category
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig

# Beside the model: copies of an averaged model, and 3.x's normalisation in some releases.
_BESIDE = ("ema_", "data_preprocessor.")


def state_dict_of(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefix of data parallel models."""
    state = data.get("state_dict", data)
    return {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def categories_of(data: Mapping[str, Any]) -> tuple[Category, ...] | None:
    """The names of classes: `meta.CLASSES` in 2.x, `meta.dataset_meta.classes` in 3.x."""
    meta = _meta(data)
    about = meta.get("dataset_meta")
    about = about if isinstance(about, Mapping) else {}
    for names in (about.get("classes"), about.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(names, (str, list, tuple)) and names:
            names = [names] if isinstance(names, str) else names
            return tuple(Category(-1, str(name)) for name in names)
    return None


def settings_of(
    data: Mapping[str, Any], model: DetectorConfig, image: ImageConfig, source: str
) -> Said | None:
    """What the config in a checkpoint says, or None where there is none.

    Raises:
        UserError: it can't be read.
    """
    meta = _meta(data)
    ours = from_text(meta.get(FLAVOUR), source)
    if ours:
        return Said(ours.model, ours.image, ours.channels, None)
    texts = [text for text in (meta.get("cfg"), meta.get("config")) if isinstance(text, str)]
    if not any(texts):
        return None
    config = read_config(next(filter(None, texts)), source)
    try:
        return understand(config, model, image)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Its parts may be of any type, as those of the reference are.
        raise UserError(
            f"{source}: meta.config: not one that MMDetection reads ({first_line(error)})"
        ) from None


def read_mmdetection(data: Mapping[str, Any], source: str, stated: Stated) -> Read:
    """Bring a checkpoint of MMDetection to casc's conventions.

    Raises:
        UserError: casc's model can't compute what this one does.
    """
    version = str(_meta(data).get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise UserError(f"{source}: of MMDetection {version}; upgrade it to 2.x there first")
    found = state_dict_of(data)
    tensors = {name: v for name, v in found.items() if not name.startswith(_BESIDE)}
    model = replace(model_of(tensors, source), roi_align="adaptive")
    said = settings_of(data, model, ImageConfig(), source)
    if said and said.problem:
        raise UserError(f"{source}: {said.problem}")
    model, lines = stated_model(
        stated, said.model if said else model, from_file=said is not None, source=source
    )
    given = None if stated.channels == "auto" else stated.channels
    in_file = said.channels if said else None
    channels: Channels = one(in_file, given, source, "--channels") or "rgb"
    known: Known = "file" if in_file else "given" if given else "assumed"
    image_known = "file" if in_file else "assumed"
    image, image_lines = stated_image(
        stated,
        channels,
        said.image if said else ImageConfig(),
        {"mean": image_known, "std": image_known},
        source,
    )
    tensors, widened = as_float32(to_rgb(tensors, channels), source)
    tensors, created = complete(tensors, model, source, whole=True)
    rows = [_row(name, value, channels, widened) for name, value in found.items()]
    conventions = [channel_line(channels, known), *image_lines, *lines]
    categories = categories_of(data)
    if categories and len(categories) != model.classes:
        raise UserError(
            f"{source}: names {len(categories)} classes, but its heads know {model.classes}"
        )
    checkpoint = Checkpoint(tensors, model, image, categories, channels, whole=True)
    return Read(checkpoint, rows + created, conventions)


def write_mmdetection(checkpoint: Checkpoint, stated: Stated) -> Written:
    """A checkpoint for MMDetection 2.x and 3.x, and what to set in its config.

    Raises:
        UserError: it isn't a whole detector, or one whose heads only casc reads.
    """
    if not checkpoint.whole:
        raise UserError("a backbone alone is no checkpoint of MMDetection; use --to torchvision")
    model, image = checkpoint.model, checkpoint.image
    check_expressible(model, image)
    channels = stated.channels if stated.channels != "auto" else checkpoint.channels or "rgb"
    tensors = to_rgb(checkpoint.tensors, channels)
    rows = [_row(name, value, channels, []) for name, value in tensors.items()]
    names = [category.name for category in checkpoint.categories or ()]
    meta: dict[str, Any] = {FLAVOUR: to_text(Ours(model, image, channels))}
    if names:
        meta |= {"CLASSES": tuple(names), "dataset_meta": {"classes": tuple(names)}}
    turn = slice(None) if channels == "rgb" else slice(None, None, -1)
    mean, std = list(image.mean[turn]), list(image.std[turn])
    backbone = resnet_of(model)
    style = "caffe" if backbone.stride_in_1x1 else "pytorch"
    norm = {"frozen_bn": "BN", "gn": "GN"}[backbone.norm]
    rgb = channels == "rgb"
    settings = [
        f"backbone: depth={backbone.depth}, style={style!r}, norm_cfg type {norm!r},"
        f" base_channels={backbone.width}",
        f"neck: out_channels={model.fpn.channels}; heads: num_classes={model.classes}",
        f"2.x: img_norm_cfg mean={mean}, std={std}, to_rgb={rgb}",
        f"3.x: data_preprocessor mean={mean}, std={std}, bgr_to_rgb={rgb}",
        f"anchor_generator: scales=[{model.anchors.scale:g}], ratios={list(model.anchors.ratios)},"
        f" strides={list(model.anchors.strides)}",
        *(f"bbox_head {i}: target_stds={list(s.stds)}" for i, s in enumerate(model.stages)),
        f"roi_layer: sampling_ratio={2 if model.roi_align == 'fixed' else 0}",
        f"test_cfg.rcnn: score_thr={model.inference.score_threshold:g},"
        f" nms iou_threshold={model.inference.nms_iou:g}, max_per_img={model.inference.detections}",
    ]
    differences = []
    if model.inference.average != "logits":
        differences.append(
            "scores: this model averages the stages' probabilities, MMDetection their logits"
        )
    data = {"meta": meta, "state_dict": tensors}
    return Written(data, rows, [channel_line(channels, "fixed")], settings, differences)


def _meta(data: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = data.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _row(name: str, value: Tensor, channels: str, widened: list[str]) -> Row:
    shape = tuple(value.shape)
    if name.startswith(_BESIDE):
        return Row("left over", name, None, shape, "not of the model itself")
    if channels == "bgr" and name == "backbone.conv1.weight":
        return Row("reordered", name, name, shape, "inputs BGR <-> RGB")
    return Row("matched", name, name, shape, "widened to float32" if name in widened else "")
