"""What a program's user has to know of it, as JSON that travels with the file."""

from typing import Any

import torch

import casc
from casc.checkpoints.model import Trained, class_names
from casc.config import to_json
from casc.export.program import Shape
from casc.model.detector_config import mask_stages, scores_masks
from casc.model.preprocess import per_channel

INPUTS = ("pixels", "size")
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks", "mask_scores")
"""The fifth where the model has masks, the last where it scores them."""
ANY = "batch"
"""A shape's first side where it may be any number."""
KEY = "casc"
"""Under which ONNX and AOTInductor keep it; in torch.export's file it is `casc.json`."""


def describe(trained: Trained, shape: Shape, form: str) -> dict[str, Any]:
    """Inputs, outputs, classes, sizes, thresholds, versions and recipe of a program.

    Args:
        trained: the checkpoint; its model and image settings are those of the program.
        shape: the program's sizes.
        form: onnx, pt2 or aoti.
    """
    model, image = trained.model, trained.image
    batch, most, cells = shape.batch or ANY, model.inference.detections, 2 * model.mask_head.cells
    kind = {1: "grey", 3: "RGB"}.get(image.channels, "planes")
    numbers = per_channel(image)
    inputs = (
        (
            [batch, *shape.pixels, image.channels],
            "uint8",
            f"{kind}, each image in the top left corner, 0 beside it",
        ),
        ([batch, 2], "int64", "height and width of each image in pixels; 1 and 1 for none"),
    )
    outputs = (
        ([batch, most, 4], "float32", "x1, y1, x2, y2 in pixels of the input, 0 where not valid"),
        ([batch, most], "float32", "falling, 0 where not valid"),
        ([batch, most], "int64", "into classes, 0 where not valid"),
        ([batch, most], "bool", "which rows are detections; these come first"),
        ([batch, most, cells, cells], "float32", "probability of each cell of the box"),
        ([batch, most], "float32", "what masks are ranked by, 0 where not valid"),
    )
    masked = mask_stages(model) > 0
    names = OUTPUTS[: 4 + masked + scores_masks(model)]
    made = {
        "format": form,
        "versions": {"casc": casc.__version__, "torch": torch.__version__},
        "checkpoint": {"source": trained.weights.source, "step": trained.weights.step},
        "classes": [{"id": c.id, "name": c.name} for c in class_names(trained)],
        "inputs": _tensors(INPUTS, inputs),
        "outputs": _tensors(names, outputs[: len(names)]),
        "preprocessing": {
            "where": "inside the program",
            "resize": "bilinear, half-pixel centres; shorter side to `short` unless the longer"
            " one exceeds `long`, and further down where `canvas` has no room for it",
            "short": image.short,
            "long": image.long,
            "canvas": list(shape.canvas),
            "mean": list(numbers.mean),
            "std": list(numbers.std),
        },
        "thresholds": {
            "score": model.inference.score_threshold,
            "nms_iou": model.inference.nms_iou,
            "detections": most,
            "mask": 0.5,
        },
        "masks": "a pixel is on the object where the bilinear interpolation of the cells' values"
        " at its centre, zero outside of the box, reaches thresholds.mask",
        "model": to_json(model),
        "recipe": trained.weights.recipe,
    }
    if not masked:
        del made["masks"], made["thresholds"]["mask"]
    return made


def _tensors(names: tuple[str, ...], rows: tuple[tuple[list[Any], str, str], ...]) -> list[dict]:
    return [
        {"name": name, "shape": size, "dtype": dtype, "meaning": meaning}
        for name, (size, dtype, meaning) in zip(names, rows, strict=True)
    ]
