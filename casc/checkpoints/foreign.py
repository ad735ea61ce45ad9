"""What the readers and writers of other programs' checkpoints share.

Inside, a detector has casc's names and conventions: RGB, 0 to 255, classes from 0 with the
background last. A reader brings a checkpoint to these and says what it did; a writer takes
them elsewhere, or says what can't be said there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from casc.checkpoints.report import Convention, Row
from casc.checkpoints.shapes import BATCHES, expected, image_channels
from casc.config import from_json, to_json
from casc.data.index import Category
from casc.errors import UserError
from casc.json_files import parse_json
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import PREFIX, ResNetConfig

Channels = Literal["rgb", "bgr"]
Known = Literal["file", "given", "assumed", "fixed"]
STEM = f"{PREFIX}.conv1.weight"
# Where checkpoints written for other programs keep casc's own settings.
FLAVOUR = "casc"


@dataclass(frozen=True)
class Stated:
    """What the user says of a checkpoint of another program, where its file doesn't."""

    channels: Literal["auto", "rgb", "bgr"] = "auto"
    """The order of colours that its network takes. auto: as the file says, else as is usual
    there (Detectron2 bgr, the others rgb); when writing, as it once came."""
    pixel_mean: tuple[float, float, float] | None = None
    """Subtracted from its pixels (0 to 255), in the order of --channels."""
    pixel_std: tuple[float, float, float] | None = None
    """Divides its pixels, in the order of --channels."""
    stride_in_1x1: Literal["auto", "yes", "no"] = "auto"
    """Whether its bottlenecks' stride sits in the first 1x1 convolution ("caffe" style) or the
    3x3 ("pytorch" style). auto: as the file says, else as is usual there (Detectron2 yes)."""
    reg_weights: tuple[float, ...] | None = None
    """Weights of (dx, dy, dw, dh), four numbers per cascade stage: one over the deltas' standard
    deviations."""
    roi_align: Literal["auto", "fixed", "adaptive"] = "auto"
    """Samples per RoIAlign cell in what is written for casc. auto: as it was trained, which is
    adaptive by default elsewhere. fixed: casc's faster 2x2."""


class Checkpoint(NamedTuple):
    """A checkpoint in casc's names and conventions."""

    tensors: dict[str, Tensor]
    model: DetectorConfig
    image: ImageConfig
    categories: tuple[Category, ...] | None
    """In the order of labels; id -1 where only names are known."""
    channels: Channels | None
    """The order that its network took where it came from; None where it is casc's own."""
    whole: bool
    """Whether it is a detector; else a backbone alone."""


class Read(NamedTuple):
    """What a reader returns."""

    checkpoint: Checkpoint
    rows: list[Row]
    conventions: list[Convention]


class Written(NamedTuple):
    """What a writer returns."""

    data: Any
    """For the file."""
    rows: list[Row]
    conventions: list[Convention]
    settings: list[str]
    differences: list[str]


def resnet_of(model: DetectorConfig) -> ResNetConfig:
    """The model's ResNet, the one backbone that other programs' checkpoints are written for.

    Raises:
        UserError: it has another one.
    """
    if not isinstance(model.backbone, ResNetConfig):
        raise UserError(
            f"model.backbone {type(model.backbone).__name__}: only casc reads such a network; keep"
            " the weights as they are, or export the detector (casc export)"
        )
    return model.backbone


def check_expressible(model: DetectorConfig, image: ImageConfig) -> None:
    """Refuse what has no place in other programs' checkpoints as casc writes them.

    Raises:
        UserError: naming the field.
    """
    for field, there, usual in (
        ("model.masks", model.masks, "heads"),
        ("image.channels", image.channels, 3),
    ):
        if there != usual:
            raise UserError(
                f"{field} {there}: checkpoints for other programs are written of detectors with"
                " masks on RGB only; export the detector (casc export)"
            )
    plain = DetectorConfig()
    resnet_of(model)
    for part, names in (
        ("fpn", ("norm",)),
        ("rpn", ("convs",)),
        ("box_head", ("convs", "fcs", "class_specific")),
        ("mask_head", ("norm", "stages", "scoring")),
    ):
        for name in names:
            found, usual = (getattr(getattr(m, part), name) for m in (model, plain))
            if found not in (usual, "gn"):
                raise UserError(
                    f"model.{part}.{name} {found}: only casc reads such heads; keep the weights as"
                    " they are, or export the detector (casc export)"
                )


def to_rgb(tensors: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
    """Turn the first convolution's inputs from one order of colours to the other, or not."""
    result = dict(tensors)
    if channels == "bgr":
        result[STEM] = result[STEM].flip(1).contiguous()
    return result


def in_rgb(values: tuple[float, ...], channels: Channels) -> tuple[float, float, float]:
    """Three numbers per colour from one order to the other, or not."""
    red, green, blue = values if channels == "rgb" else values[::-1]
    return red, green, blue


def as_float32(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights in float32, and the names of those that weren't.

    Raises:
        UserError: a value would change.
    """
    result, changed = {}, []
    for name, value in tensors.items():
        wanted = torch.int64 if name.endswith(BATCHES) else torch.float32
        result[name] = value.to(wanted).contiguous()
        if value.dtype != wanted:
            changed.append(name)
            same = torch.equal(result[name].to(value.dtype), value)
            if not same or value.is_complex():
                raise UserError(f"{source}: {name!r} is {value.dtype}, which float32 can't hold")
    return result, changed


def complete(
    tensors: Mapping[str, Tensor], model: DetectorConfig, source: str, *, whole: bool
) -> tuple[dict[str, Tensor], list[Row]]:
    """Add the counters of batches, which nothing reads, where a file leaves them out.

    Returns:
        The tensors in the model's order, and rows of what was created or is missing.

    Raises:
        UserError: a tensor is none of the model's.
    """
    result, rows = {}, []
    for name, shape in expected(model, image_channels(tensors)).items():
        if name in tensors:
            result[name] = tensors[name]
        elif name.endswith(BATCHES) and (whole or name.startswith(PREFIX)):
            result[name] = torch.zeros(shape, dtype=torch.long)
            rows.append(Row("created", None, name, tuple(shape), "0; nothing reads it"))
        elif whole:
            raise UserError(f"{source}: {name!r} is missing")
        else:
            rows.append(Row("missing", None, name, tuple(shape)))
    for name in tensors:
        if name not in result:
            raise UserError(f"{source}: {name!r} is no part of casc's model")
    return result, rows


class Ours(NamedTuple):
    """What casc adds to the checkpoints that it writes for others, to read them back."""

    model: DetectorConfig
    image: ImageConfig
    channels: Channels


def to_text(ours: Ours) -> str:
    """As a checkpoint keeps it."""
    return json.dumps({name: to_json(value) for name, value in ours._asdict().items()})


def from_text(text: Any, source: str) -> Ours | None:
    """What `to_text` made, or None where there is nothing.

    Raises:
        UserError: it was changed.
    """
    if text is None:
        return None
    try:
        entries = parse_json(text, source)
        model, image, channels = (entries[name] for name in Ours._fields)
        if channels not in ("rgb", "bgr"):
            raise ValueError(f"channels {channels!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}: casc's settings in it can't be read ({error})") from None
    return Ours(
        from_json(DetectorConfig, model, f"{source}: model"),
        from_json(ImageConfig, image, f"{source}: image"),
        channels,
    )


def stated_image(
    stated: Stated,
    channels: Channels,
    image: ImageConfig,
    known: Mapping[str, Literal["file", "assumed"]],
    source: str,
) -> tuple[ImageConfig, list[Convention]]:
    """The normalisation in RGB after what the user says, who may not contradict the file.

    Args:
        stated: what the user says.
        channels: the order that `stated` is in.
        image: what the file says or is assumed, in RGB.
        known: which of the two, for "mean" and "std".
        source: the file.

    Raises:
        UserError: file and user differ, or a deviation isn't positive.
    """
    lines = []
    for name, given in (("mean", stated.pixel_mean), ("std", stated.pixel_std)):
        before, how = getattr(image, name), known[name]
        if given is not None:
            now = in_rgb(given, channels)
            if how == "file" and now != before:
                raise UserError(
                    f"{source}: --pixel-{name}: the file says {_list(before)} (RGB), you say"
                    f" {_list(now)}; leave the flag out"
                )
            image, how = replace(image, **{name: now}), how if how == "file" else "given"
        if name == "std" and not min(image.std) > 0:
            raise UserError(f"{source}: pixels would be divided by {_list(image.std)}")
        value = f"{_list(getattr(image, name))} for red, green, blue (0 to 255)"
        lines.append(Convention(f"pixel {name}", value, how, f"--pixel-{name}"))
    return image, lines


def channel_line(channels: Channels, known: Known) -> Convention:
    """What is said of the order of colours."""
    done = "as casc's" if channels == "rgb" else "first convolution's inputs turned to RGB"
    return Convention("channels", f"{channels.upper()}: {done}", known, "--channels")


def one(value: Any, stated: Any, source: str, flag: str) -> Any:
    """What the file says, which the user may repeat but not contradict.

    Raises:
        UserError: file and user differ.
    """
    if value is not None and stated is not None and value != stated:
        raise UserError(f"{source}: {flag}: the file says {value!r:.60}, you say {stated!r}")
    return stated if value is None else value


def stated_model(
    stated: Stated, model: DetectorConfig, *, from_file: bool, source: str
) -> tuple[DetectorConfig, list[Convention]]:
    """The model after what the user says, who may not contradict the file.

    Args:
        stated: what the user says.
        model: what the file says or is assumed.
        from_file: which of the two.
        source: the file.

    Raises:
        UserError: file and user differ, or a number is wrong.
    """
    known: Known = "file" if from_file else "assumed"
    stride_known = stds_known = known
    backbone = resnet_of(model)
    if stated.stride_in_1x1 != "auto":
        said = backbone.stride_in_1x1 if from_file else None
        stride = one(said, stated.stride_in_1x1 == "yes", source, "--stride-in-1x1")
        backbone, stride_known = replace(backbone, stride_in_1x1=stride), "given"
    if backbone.stride_in_1x1 and backbone.depth < 50:
        raise UserError(f"{source}: --stride-in-1x1: a ResNet-{backbone.depth} has no 1x1 there")
    stages = model.stages
    if stated.reg_weights is not None:
        given = stated.reg_weights
        if len(given) != 4 * len(stages) or not min(given) > 0:
            raise UserError(
                f"--reg-weights: expected {4 * len(stages)} positive numbers, (dx, dy, dw, dh) of"
                " each stage"
            )
        rows = [stds(given[i : i + 4]) for i in range(0, len(given), 4)]
        said = [stage.stds for stage in stages] if from_file else None
        rows = one(said, rows, source, "--reg-weights")
        stages = tuple(replace(s, stds=row) for s, row in zip(stages, rows, strict=True))
        stds_known = "given"
    model = replace(model, backbone=backbone, stages=stages)
    place = '1x1 convolution ("caffe")' if backbone.stride_in_1x1 else '3x3 ("pytorch")'
    deltas = ("(" + ", ".join(f"{v:.4g}" for v in stage.stds) + ")" for stage in model.stages)
    return model, [
        Convention("stride", f"in the {place}", stride_known, "--stride-in-1x1"),
        Convention("box deltas", "deviations " + " ".join(deltas), stds_known, "--reg-weights"),
        Convention("RoIAlign", f"aligned, {model.roi_align} sampling", known, "--roi-align"),
        Convention("boxes", "one regression for all classes", "fixed"),
        Convention("classes", f"{model.classes} from 0, background last", "fixed"),
        Convention("scores", f"from the mean of the stages' {model.inference.average}", "fixed"),
    ]


def stds(weights: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Deltas' standard deviations from Detectron2's weights."""
    x, y, w, h = (1.0 / weight for weight in weights)
    return x, y, w, h


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
