"""Detectron2's Cascade Mask R-CNN: other names, BGR, and one mask head for all stages."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from casc.checkpoints.foreign import (
    FLAVOUR,
    Channels,
    Checkpoint,
    Known,
    Ours,
    Read,
    Stated,
    as_float32,
    channel_line,
    complete,
    from_text,
    in_rgb,
    one,
    resnet_of,
    stated_image,
    stated_model,
    stds,
    to_rgb,
)
from casc.checkpoints.report import Convention, Row
from casc.checkpoints.shapes import model_of
from casc.errors import UserError
from casc.model.anchors import base_anchors
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig

MEAN, STD = "pixel_mean", "pixel_std"
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
# What its config has by default, which all of its model zoo's Cascade Mask R-CNNs keep to.
_BGR_MEAN, _BGR_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
_REG_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
# As many as any of these networks has of a layer.
_BLOCKS, _CONVS, _STAGES = 36, 8, 3
MASK = "roi_head.mask_head."


def layer_names(norm: str, *, stages: int = _STAGES) -> dict[str, str]:
    """Detectron2's name of each of casc's layers, for networks of any depth.

    Its single mask head stands for that of each stage.

    Args:
        norm: casc's short name of the norm layers: bn or gn.
        stages: of the cascade.
    """
    names = {"backbone.conv1": "backbone.bottom_up.stem.conv1"}
    names[f"backbone.{norm}1"] = "backbone.bottom_up.stem.conv1.norm"
    for stage in range(1, 5):
        for block in range(_BLOCKS):
            ours = f"backbone.layer{stage}.{block}"
            theirs = f"backbone.bottom_up.res{stage + 1}.{block}"
            for i in (1, 2, 3):
                names[f"{ours}.conv{i}"] = f"{theirs}.conv{i}"
                names[f"{ours}.{norm}{i}"] = f"{theirs}.conv{i}.norm"
            names[f"{ours}.downsample.0"] = f"{theirs}.shortcut"
            names[f"{ours}.downsample.1"] = f"{theirs}.shortcut.norm"
    for level in range(4):
        for ours, theirs in (("lateral_convs", "lateral"), ("fpn_convs", "output")):
            names[f"neck.{ours}.{level}.conv"] = f"backbone.fpn_{theirs}{level + 2}"
            names[f"neck.{ours}.{level}.gn"] = f"backbone.fpn_{theirs}{level + 2}.norm"
    rpn = {"rpn_conv": "conv", "rpn_cls": "objectness_logits", "rpn_reg": "anchor_deltas"}
    for ours, theirs in rpn.items():
        names[f"rpn_head.{ours}"] = f"proposal_generator.rpn_head.{theirs}"
    for stage in range(stages):
        head = f"roi_head.bbox_head.{stage}"
        for i in (0, 1):
            names[f"{head}.shared_fcs.{i}"] = f"roi_heads.box_head.{stage}.fc{i + 1}"
        names[f"{head}.fc_cls"] = f"roi_heads.box_predictor.{stage}.cls_score"
        names[f"{head}.fc_reg"] = f"roi_heads.box_predictor.{stage}.bbox_pred"
        for i in range(_CONVS):
            names[f"{MASK}{stage}.convs.{i}.conv"] = f"roi_heads.mask_head.mask_fcn{i + 1}"
            names[f"{MASK}{stage}.convs.{i}.gn"] = f"roi_heads.mask_head.mask_fcn{i + 1}.norm"
        names[f"{MASK}{stage}.upsample"] = "roi_heads.mask_head.deconv"
        names[f"{MASK}{stage}.conv_logits"] = "roi_heads.mask_head.predictor"
    return names


def read_detectron2(data: Mapping[str, Any], source: str, stated: Stated) -> Read:
    """Bring a Cascade Mask R-CNN of Detectron2 to casc's names and conventions.

    Raises:
        UserError: casc's model can't compute what this one does.
    """
    if "blobs" in data or data.get("__author__") == "Caffe2":
        raise UserError(f"{source}: of Detectron 1 (Caffe2), which casc doesn't read")
    found = _state_dict(data, source)
    ours = from_text(data.get(FLAVOUR), source)
    settings = {n: v for n, v in found.items() if n in (MEAN, STD) or n.startswith(_ANCHORS)}
    tensors, rows, used = _renamed(found)
    for name in found:
        if name not in used and name not in settings:
            raise UserError(f"{source}: {name!r} is no part of casc's model")
    model = ours.model if ours else _usual(model_of(tensors, source))
    model, lines = stated_model(stated, model, from_file=ours is not None, source=source)
    given = None if stated.channels == "auto" else stated.channels
    in_file = ours.channels if ours else None
    channels: Channels = one(in_file, given, source, "--channels") or "bgr"
    known: Known = "file" if in_file else "given" if given else "assumed"
    image, image_lines = _image(settings, ours, channels, stated, source)
    _check_anchors(settings, model, source)
    tensors, _ = as_float32(to_rgb(tensors, channels), source)
    tensors, created = complete(tensors, model, source, whole=True)
    rows += [
        Row("left over", name, None, tuple(v.shape), "a setting, taken over")
        for name, v in settings.items()
    ]
    if channels == "bgr":
        rows = [reordered(row) for row in rows]
    conventions = [
        channel_line(channels, known),
        *image_lines,
        *lines,
        Convention("masks", "one head for all stages, copied to each", "fixed"),
        Convention(
            "smallest boxes",
            "a stage shrinks a side to no less than a 62nd in casc; Detectron2 sets no limit",
            "fixed",
        ),
    ]
    checkpoint = Checkpoint(tensors, model, image, None, channels, whole=True)
    return Read(checkpoint, rows + created, conventions)


def reordered(row: Row) -> Row:
    """The row of the first convolution says that its inputs were turned; others stay."""
    if "backbone.conv1.weight" in (row.source, row.target):
        return row._replace(how="reordered", note="inputs BGR <-> RGB")
    return row


def _state_dict(data: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    state = data.get("model", data)
    if not isinstance(state, Mapping):
        raise UserError(f"{source}: holds no model")
    return {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def _renamed(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Row], set[str]]:
    """Tensors under casc's names, rows, and the names that were used."""
    batch_norm = "backbone.bottom_up.stem.conv1.norm.running_mean" in found
    stages = sum(f"roi_heads.box_head.{i}.fc1.weight" in found for i in range(_STAGES))
    tensors, rows = {}, []
    ours: dict[str, list[str]] = {}
    for mine, theirs in layer_names("bn" if batch_norm else "gn", stages=stages).items():
        ours.setdefault(theirs, []).append(mine)
    used = set()
    for name, value in found.items():
        layer, _, leaf = name.rpartition(".")
        targets = ours.get(layer, [])
        for target in targets:
            tensors[f"{target}.{leaf}"] = value.clone() if len(targets) > 1 else value
            how, note = ("copied", "to each stage") if len(targets) > 1 else ("renamed", "")
            rows.append(Row(how, name, f"{target}.{leaf}", tuple(value.shape), note))
            used.add(name)
    return tensors, rows, used


def _usual(model: DetectorConfig) -> DetectorConfig:
    """The model with what Detectron2's config has by default and its code does."""
    backbone = resnet_of(model)
    return replace(
        model,
        backbone=replace(backbone, stride_in_1x1=backbone.depth >= 50),
        stages=tuple(
            replace(stage, stds=stds(weights))
            for stage, weights in zip(model.stages, _REG_WEIGHTS, strict=False)
        ),
        inference=replace(model.inference, average="probabilities"),
        roi_align="adaptive",
    )


def _image(
    settings: Mapping[str, Tensor],
    ours: Ours | None,
    channels: Channels,
    stated: Stated,
    source: str,
) -> tuple[ImageConfig, list[Convention]]:
    if ours:
        return stated_image(stated, channels, ours.image, {"mean": "file", "std": "file"}, source)
    image, known = ImageConfig(), {}
    for name, field, usual in ((MEAN, "mean", _BGR_MEAN), (STD, "std", _BGR_STD)):
        rgb = in_rgb(usual, "bgr")
        if name in settings:
            values = settings[name].flatten().float()
            if len(values) != 3:
                raise UserError(f"{source}: {name!r} has {len(values)} numbers instead of 3")
            # The shortest decimals of these float32: 123.675 rather than 123.67500305.
            rgb = in_rgb(tuple(float(str(v)) for v in values.numpy()), channels)
        image = replace(image, **{field: rgb})
        known[field] = "file" if name in settings else "assumed"
    return stated_image(stated, channels, image, known, source)


def _check_anchors(settings: Mapping[str, Tensor], model: DetectorConfig, source: str) -> None:
    for name, cells in settings.items():
        if name.startswith(_ANCHORS):
            level = name.removeprefix(_ANCHORS)
            known = level.isdigit() and int(level) < len(model.anchors.strides)
            mine = base_anchors(model.anchors, int(level) if known else 0, torch.device("cpu"))
            same = known and cells.shape == mine.shape
            if not same or not torch.allclose(cells.float(), mine, atol=1e-2):
                raise UserError(f"{source}: {name!r} are other anchors than casc's")
