"""A checkpoint as a detector: which model it is of, its weights, and its classes."""

from dataclasses import replace
from typing import NamedTuple

import torch

from casc.checkpoints.pickles import first_line
from casc.checkpoints.read import Weights, fit_weights, read_weights
from casc.checkpoints.shapes import BATCHES, expected, image_channels, model_of
from casc.config import from_json
from casc.data.index import Category
from casc.errors import UserError
from casc.model import detector
from casc.model.detector_config import DetectorConfig, mask_stages
from casc.model.layers import Params
from casc.model.preprocess import ImageConfig


class Trained(NamedTuple):
    """All that inference needs, float32 on the CPU."""

    weights: Weights
    model: DetectorConfig
    image: ImageConfig
    params: Params
    buffers: Params


def load_trained(source: str) -> Trained:
    """Load a checkpoint of casc or of the reference.

    What model it is of, casc's checkpoints say; of the reference's, sizes are read off the
    tensors, and the rest is as the configuration in the file has it, or the reference's.

    Args:
        source: see `read_weights`.

    Raises:
        UserError: it can't be read, isn't a whole detector, or has no tensor for some part.
    """
    weights = read_weights(source)
    image = ImageConfig()
    if weights.kind != "casc":
        model = replace(model_of(weights.tensors, weights.source), roi_align="adaptive")
        image = replace(image, channels=image_channels(weights.tensors))
    else:
        model = DetectorConfig()
    if weights.problem:
        raise UserError(f"{weights.source}: {weights.problem}")
    if weights.recipe is not None:
        where = f"{weights.source}: recipe"
        model = from_json(DetectorConfig, weights.recipe.get("model"), f"{where}.model")
        image = from_json(ImageConfig, weights.recipe.get("image"), f"{where}.image")
    if not model.stages:
        raise UserError(f"{weights.source}: recipe.model.stages: there is none")
    layers, tensors = _layers(model), len(weights.tensors)
    if layers > tensors:  # as each would be built, which for a claim of any size never ends
        raise UserError(
            f"{weights.source}: recipe.model: has {layers} layers at least, the file has {tensors}"
            " tensors"
        )
    try:
        shapes = expected(model, image.channels)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{weights.source}: recipe.model: there is no such model ({first_line(error)})"
        ) from None
    # Before memory is taken for a model of any size.
    for name, shape in shapes.items():
        found = weights.tensors.get(name)
        if found is None and name.endswith(BATCHES):
            continue
        if found is None or found.shape != shape:
            raise UserError(f"{weights.source}: {name!r} is missing or of another shape")
    generator = torch.Generator().manual_seed(0)
    params, buffers = detector.init(model, generator, image.channels)
    params, buffers, _ = fit_weights(params, buffers, weights.tensors)
    known = weights.categories
    if known is not None and len(known) != model.classes:
        raise UserError(
            f"{weights.source}: names {len(known)} classes, but its heads know {model.classes}"
        )
    return Trained(weights, model, image, params, buffers)


def _layers(model: DetectorConfig) -> int:
    """A number of layers that a detector doesn't fall below; each has a tensor or more."""
    box, mask = model.box_head, model.mask_head
    counts = (
        (1, getattr(model.backbone, "depth", 0)),
        (1, model.rpn.convs),
        (len(model.stages), box.convs),
        (len(model.stages), box.fcs),
        (mask_stages(model), mask.convs),
    )
    return sum(heads * max(0, layers) for heads, layers in counts)


def class_names(trained: Trained) -> tuple[Category, ...]:
    """The classes as far as the checkpoint knows them, numbered from 1 where it doesn't."""
    known = trained.weights.categories
    if known is None:
        return tuple(Category(i + 1, f"class {i + 1}") for i in range(trained.model.classes))
    return tuple(Category(i + 1, c.name) if c.id < 0 else c for i, c in enumerate(known))
