"""The usual way to load: everything is done to every image in the worker, with libraries.

Decode with PIL, rasterise the polygons with pycocotools, then torchvision's v2 transforms:
flip, resize, normalise. Masks are made at the stored size and resized with the image, as
torchvision's own scripts and transforms do; or else, which takes more care and less time,
polygons are scaled and rasterised at the final size.
"""

import io
import json
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from casc.model.preprocess import ImageConfig


class Loaded(NamedTuple):
    """What the usual worker hands over: h x w is the size after resizing."""

    image: Tensor
    """[3, h, w] float32, normalised."""
    boxes: Tensor
    """[g, 4] float32 xyxy in pixels."""
    labels: Tensor
    """[g] int64."""
    masks: Tensor
    """[g, h, w] uint8."""


def load_usually(
    image_bytes: bytes,
    json_bytes: bytes,
    flip: bool,
    config: ImageConfig,
    *,
    rasterise_last: bool = False,
) -> Loaded:
    """Load one sample.

    Args:
        image_bytes: of the shard's sample.
        json_bytes: of the shard's sample.
        flip: whether to mirror it.
        config: sizes, mean and deviation.
        rasterise_last: rasterise scaled polygons; otherwise resize masks.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    record = json.loads(json_bytes)
    objects = [a for a in record["annotations"] if a["train"]]
    image = functional.pil_to_tensor(Image.open(io.BytesIO(image_bytes)).convert("RGB"))
    stored = (image.shape[1], image.shape[2])
    scale = min(config.short / min(stored), config.long / max(stored))
    size = [int(side * scale + 0.5) for side in stored]

    image = functional.resize(image, size)
    boxes = torch.tensor([a["box"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes = boxes * torch.tensor([size[1] / stored[1], size[0] / stored[0]]).repeat(2)
    segmentations = [a["segmentation"] for a in objects]
    if rasterise_last:
        masks = torch.from_numpy(
            _rasterise([_resized(s, size, stored) for s in segmentations], size)
        )
    else:
        masks = torch.from_numpy(_rasterise(segmentations, list(stored)))
        masks = functional.resize(masks, size, interpolation=InterpolationMode.NEAREST)
    if flip:
        image, masks = functional.horizontal_flip(image), functional.horizontal_flip(masks)
        boxes = torch.stack(
            [size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=1
        )
    image = functional.to_dtype(image, torch.float32, scale=True)
    mean, std = ([value / 255 for value in values] for values in (config.mean, config.std))
    image = functional.normalize(image, mean, std, inplace=True)
    labels = torch.tensor([a["label"] for a in objects], dtype=torch.int64)
    return Loaded(image, boxes, labels, masks)


def _rasterise(segmentations: list[Any], size: list[int]) -> np.ndarray:
    """[g, height, width] uint8."""
    height, width = size
    if not segmentations:
        return np.zeros((0, height, width), np.uint8)
    rles: Any = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            rles.append(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
        elif isinstance(segmentation["counts"], list):
            rles.append(coco_mask.frPyObjects(segmentation, height, width))
        else:
            rles.append(segmentation)
    return coco_mask.decode(rles).transpose(2, 0, 1)


def _resized(segmentation: Any, size: list[int], stored: tuple[int, int]) -> Any:
    """A segmentation in the pixels of the resized image."""
    if isinstance(segmentation, list):
        ratio = np.array([size[1] / stored[1], size[0] / stored[0]])
        return [(np.reshape(part, (-1, 2)) * ratio).ravel().tolist() for part in segmentation]
    mask = _rasterise([segmentation], list(stored))[0]
    resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return coco_mask.encode(np.asfortranarray(resized))
