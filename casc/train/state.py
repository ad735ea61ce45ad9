"""All that a training run carries from one step to the next."""

import torch

from casc.checkpoints.state import State
from casc.model import detector
from casc.model.detector_config import DetectorConfig
from casc.model.layers import Params
from casc.model.steps import to_format
from casc.train.flat import flatten
from casc.train.guard import new_guard


def new_state(
    config: DetectorConfig,
    params: Params,
    buffers: Params,
    device: torch.device,
    memory_format: torch.memory_format,
    *,
    moments: int = 1,
    scaled: bool = False,
    averaged: bool = False,
) -> State:
    """A state at step 0 on the device, in its layout, without momentum yet.

    What trains, each of its moments and its averages are views of one buffer each.

    Args:
        config: says what trains.
        params: starting weights.
        buffers: statistics.
        device: where the state is to be.
        memory_format: of 4-d parameters.
        moments: how many tensors the optimizer keeps of each parameter, 1 or 2.
        scaled: with a loss scale, which float16 needs.
        averaged: with moving averages.
    """
    params = {k: v.detach().to(device, copy=True) for k, v in params.items()}
    params = to_format(params, memory_format)
    training = flatten(detector.trainable(config, params))
    nothing = {k: torch.zeros_like(v) for k, v in training.items()}
    momentum = flatten(nothing)
    second = flatten(nothing) if moments == 2 else {}
    ema = flatten(training) if averaged else {}
    for value in training.values():
        value.requires_grad_()
    buffers = {k: v.to(device) for k, v in buffers.items()}
    guard = new_guard(device, scaled=scaled)
    return State(0, params | training, buffers, momentum, guard, ema, second)
