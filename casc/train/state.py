"""All that a training run carries from one step to the next."""

import torch

from casc.checkpoints.state import State
from casc.model import detector
from casc.model.detector import DetectorConfig
from casc.model.layers import Params
from casc.model.steps import to_format
from casc.train.guard import new_guard


def new_state(
    config: DetectorConfig,
    params: Params,
    buffers: Params,
    device: torch.device,
    memory_format: torch.memory_format,
    *,
    scaled: bool = False,
    averaged: bool = False,
) -> State:
    """A state at step 0 on the device, in its layout, without momentum yet.

    `scaled` gives it a loss scale, which float16 needs; `averaged` the moving averages.
    """
    params = {k: v.detach().to(device, copy=True) for k, v in params.items()}
    params = to_format(params, memory_format)
    training = detector.trainable(config, params)
    for value in training.values():
        value.requires_grad_()
    momentum = {k: torch.zeros_like(v, requires_grad=False) for k, v in training.items()}
    buffers = {k: v.to(device) for k, v in buffers.items()}
    ema = {k: v.detach().clone() for k, v in training.items()} if averaged else {}
    return State(0, params, buffers, momentum, new_guard(device, scaled=scaled), ema)
