"""torchvision's ResNets: casc's backbone without its prefix, and a classifier that isn't needed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from casc.checkpoints.foreign import (
    Checkpoint,
    Read,
    Stated,
    Written,
    as_float32,
    channel_line,
    complete,
    resnet_of,
    stated_image,
)
from casc.checkpoints.report import Convention, Row
from casc.checkpoints.shapes import backbone_of, expected
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import PREFIX

CLASSIFIER = ("fc.weight", "fc.bias")


def is_torchvision(tensors: Mapping[str, Any]) -> bool:
    """Whether these are a torchvision ResNet's names."""
    return "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors


def read_torchvision(data: Mapping[str, Any], source: str, stated: Stated) -> Read:
    """A ResNet as casc's backbone.

    Raises:
        UserError: it is no ResNet that casc has, or the user says what it can't be.
    """
    found = {str(k): v for k, v in data.items() if isinstance(v, Tensor)}
    tensors = {f"{PREFIX}.{k}": v for k, v in found.items() if k not in CLASSIFIER}
    model = replace(DetectorConfig(), backbone=backbone_of(tensors, source))
    shapes = expected(model)
    for name, value in tensors.items():
        if name not in shapes or value.shape != shapes[name]:
            raise UserError(f"{source}: {name.removeprefix(PREFIX + '.')!r} isn't of casc's ResNet")
    absent = [n for n in shapes if n.startswith(PREFIX + ".") and n not in tensors]
    absent = [n for n in absent if not n.endswith("num_batches_tracked")]
    if absent:
        raise UserError(f"{source}: {absent[0].removeprefix(PREFIX + '.')!r} is missing")
    if stated.channels == "bgr" or stated.stride_in_1x1 == "yes" or stated.reg_weights:
        raise UserError(
            f"{source}: torchvision's ResNets take RGB, have their stride in the 3x3 convolution"
            " and no boxes; leave --channels, --stride-in-1x1 and --reg-weights out"
        )
    image, lines = stated_image(
        stated, "rgb", ImageConfig(), {"mean": "assumed", "std": "assumed"}, source
    )
    tensors, _ = as_float32(tensors, source)
    tensors, created = complete(tensors, model, source, whole=False)
    rows = [
        Row("left over", name, None, tuple(v.shape), "the classifier")
        if name in CLASSIFIER
        else Row("renamed", name, f"{PREFIX}.{name}", tuple(v.shape))
        for name, v in found.items()
    ]
    checkpoint = Checkpoint(tensors, model, image, None, "rgb", whole=False)
    stride = Convention("stride", 'in the 3x3 ("pytorch")', "fixed")
    conventions = [channel_line("rgb", "fixed"), *lines, stride]
    return Read(checkpoint, rows + created, conventions)


def write_torchvision(checkpoint: Checkpoint, stated: Stated) -> Written:
    """The backbone as a torchvision ResNet's state_dict.

    Raises:
        UserError: torchvision has no such network.
    """
    backbone, image = resnet_of(checkpoint.model), checkpoint.image
    for wrong, text in (
        (backbone.norm != "frozen_bn", "has group norm"),
        (backbone.width != 64, f"has {backbone.width} channels in its stem instead of 64"),
        (backbone.stride_in_1x1, "has its stride in the 1x1 convolution"),
        (stated.channels == "bgr", "is to take BGR"),
        (
            (image.mean, image.std) != (ImageConfig().mean, ImageConfig().std),
            f"is for pixels of mean {image.mean} and deviation {image.std}",
        ),
    ):
        if wrong:
            raise UserError(f"the backbone {text}; torchvision has no ResNet like that")
    state, rows = {}, []
    for name, value in checkpoint.tensors.items():
        theirs = name.removeprefix(f"{PREFIX}.")
        shape = tuple(value.shape)
        if theirs == name:
            rows.append(Row("left over", name, None, shape, "not of the backbone"))
        else:
            state[theirs] = value
            rows.append(Row("renamed", name, theirs, shape))
    rows += [Row("missing", None, None, (), f"{n}: casc keeps no classifier") for n in CLASSIFIER]
    settings = [
        f"model: torchvision.models.resnet{backbone.depth}(), load_state_dict(..., strict=False)"
    ]
    return Written(state, rows, [channel_line("rgb", "fixed")], settings, [])
