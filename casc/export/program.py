"""Inference as one function of two tensors, and its capture by torch.export.

Resize, normalisation and padding are inside: whoever runs it hands over decoded pixels.

Legend: B images, Hi x Wi input canvas, H x W canvas that the network sees, D detections.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from casc.data.batch import Batch
from casc.model import forward_detect
from casc.model.detector_config import DetectorConfig
from casc.model.forward_detect import Detections
from casc.model.layers import Params
from casc.model.preprocess import ImageConfig, View, plain_view, prepare


@dataclass(frozen=True)
class Shape:
    """The sizes that an exported program is made for."""

    batch: int | None
    """Images per call; None: any number, which the program takes one by one."""
    pixels: tuple[int, int]
    """(Hi, Wi) of the input, in stored pixels."""
    canvas: tuple[int, int]
    """(H, W) that images are resized into; both divisible by 32."""


def infer(
    params: Params,
    buffers: Params,
    model: DetectorConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    pixels: Tensor,
    size: Tensor,
) -> Detections:
    """Detections of decoded images: what is exported, and, eager, what that is compared with.

    Args:
        params: weights by name.
        buffers: batch norm statistics by name.
        model: the detector.
        image: resize and normalisation.
        canvas: (H, W).
        pixels: [B, Hi, Wi, C] uint8, each image in its top left corner.
        size: [B, 2] int64, height and width of each image in it.

    Returns:
        Boxes in pixels of the input.
    """
    count = pixels.shape[0]
    # At inference there is no ground truth, and nothing of these is computed with.
    floats, whole = pixels.new_zeros((count, 1, 4), dtype=torch.float32), size.new_zeros
    batch = Batch(
        image=pixels,
        size=size.to(torch.float32),
        boxes=floats,
        labels=whole((count, 1)),
        valid=whole((count, 1), dtype=torch.bool),
        edges=floats,
        edge_gt=whole((count, 1)),
        image_id=whole((count,)),
        seed=whole((count,)),
    )
    view = fitting_view(size, image, canvas)
    return forward_detect.detect(
        params, buffers, model, prepare(batch, view, image, canvas, floats.dtype)
    )


def fitting_view(size: Tensor, image: ImageConfig, canvas: tuple[int, int]) -> View:
    """Whole images at the recipe's size, or smaller where the canvas has no room for that.

    A run's own canvases always have the room: they follow from the images' aspects. A
    program meets images of any aspect, and must cut nothing off.

    Args:
        size: [B, 2] int64, stored height and width.
        image: the recipe's sizes.
        canvas: (H, W).
    """
    view = plain_view(size, image)
    height, width = size[:, 0:1], size[:, 1:2]
    tall = canvas[0] * width < canvas[1] * height
    target = torch.where(tall, canvas[0], canvas[1])
    side = torch.where(tall, height, width).clamp(min=1)
    largest = ((2 * size * target + side) // (2 * side)).clamp(min=1)
    fits = (view.size[:, 0:1] <= canvas[0]) & (view.size[:, 1:2] <= canvas[1])
    return view._replace(size=torch.where(fits, view.size, largest))


def capture(
    params: Params, buffers: Params, model: DetectorConfig, image: ImageConfig, shape: Shape
) -> ExportedProgram:
    """`infer` as a graph: (pixels, size) to (boxes, scores, labels, valid, masks, mask_scores).

    Of one image, where `shape.batch` is None; without what the model doesn't give. casc's
    own operators are still in it; see `casc.export.operators`.
    """
    # The kernels that have a plain form, whatever the training device preferred.
    portable = replace(
        model,
        roi_kernel="aten",
        rpn=replace(model.rpn, nms_kernel="greedy"),
        inference=replace(model.inference, nms_kernel="greedy"),
    )
    holder = _Holder(params, buffers, portable, image, shape.canvas).eval()
    batch = shape.batch or 1
    pixels = torch.zeros((batch, *shape.pixels, image.channels), dtype=torch.uint8)
    size = torch.tensor([shape.pixels]).repeat(batch, 1)
    with torch.no_grad():
        return torch.export.export(holder, (pixels, size), strict=False)


class _Holder(nn.Module):
    """What torch.export wants to be given: tensors by name, and a forward."""

    def __init__(
        self,
        params: Params,
        buffers: Params,
        model: DetectorConfig,
        image: ImageConfig,
        canvas: tuple[int, int],
    ) -> None:
        super().__init__()
        self.names = list(params), list(buffers)
        self.settings = model, image, canvas
        for name, value in (params | buffers).items():
            self.register_buffer(_attribute(name), value)

    def forward(self, pixels: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        params, buffers = ({n: getattr(self, _attribute(n)) for n in ns} for ns in self.names)
        found = infer(params, buffers, *self.settings, pixels, size)
        return tuple(t for t in found if t is not None)


def _attribute(name: str) -> str:
    """A parameter's name as an attribute's, which may hold no dots."""
    return name.replace(".", "__")
