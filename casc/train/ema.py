"""The exponential moving average of the parameters that train, held in the state.

It is a function of the parameters after each update and of the number of updates, so it is
the same on all ranks and resumes exactly. Nothing is read back, and it costs nothing when off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from casc.model.layers import Params
from casc.train.flat import buffer_of


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the weights."""

    decay: float | None = None
    """What is kept of the average at an update, such as 0.9998, after a warm-up in which it is
    (1 + update) / (10 + update). None: no average."""
    evaluate: bool = True
    """Evaluate the average, and save it as the checkpoint's weights, from which `casc eval`,
    `casc predict` and --init start. Off: the raw weights; the average is saved beside them."""


def decay_at(decay: float, step: int) -> float:
    """The decay of one update, small at first so that the initial weights are soon forgotten.

    As TensorFlow's ExponentialMovingAverage has it with `num_updates`.

    Args:
        decay: in the long run.
        step: updates made before this one.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(ema: Params, params: Params, share: Tensor) -> None:
    """Move the averages, in place, towards the parameters: ema += share * (params - ema).

    Args:
        ema: averages by name, views of one buffer.
        params: that train, under the same names, likewise.
        share: float32 scalar on the device, 1 - decay.
    """
    buffer_of(ema).lerp_(buffer_of(params), share)
