"""The detector over a split of shards: detections, and what they are worth."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model.detector import Detections, DetectorConfig
from casc.model.layers import Params
from casc.model.preprocess import ImageConfig
from casc.model.steps import DetectStep, make_detect_step


class Detector(NamedTuple):
    """A trained detector on its device, ready for any canvas."""

    params: Params
    buffers: Params
    step: Callable[[tuple[int, int], tuple[torch.Size, ...]], DetectStep]
    """The step for a canvas (H, W) and shapes of a batch, made when it is first asked for."""
    image: ImageConfig
    device: torch.device

    def __call__(self, batch: Batch, size: tuple[int, int]) -> Detections:
        """Detections of a batch on the device whose images fit the canvas `size`."""
        shapes = tuple(t.shape for t in batch if t is not None)
        return self.step(size, shapes)(self.params, self.buffers, batch)


def new_detector(
    params: Params,
    buffers: Params,
    model: DetectorConfig,
    image: ImageConfig,
    compute: Compute,
    device: torch.device,
) -> Detector:
    """A detector over these parameters; later updates in place are seen."""

    @cache
    def step(size: tuple[int, int], shapes: tuple[torch.Size, ...]) -> DetectStep:
        return make_detect_step(model, image, size, compute)

    return Detector(params, buffers, step, image, device)
