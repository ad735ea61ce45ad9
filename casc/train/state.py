"""All that a training run carries from one step to the next."""

from typing import NamedTuple

import torch

from casc import detector
from casc.detector import DetectorConfig
from casc.layers import Params
from casc.train.guard import new_guard
from casc.train.step import to_format


class State(NamedTuple):
    """The training state; a step updates the tensors in place and counts on."""

    step: int
    """Updates made so far."""
    params: Params
    """Every parameter by name, float32; the ones that train require a gradient."""
    buffers: Params
    """Batch norm statistics by name, which training doesn't change."""
    momentum: Params
    """The optimizer's, for the parameters that train, under their names."""
    guard: Params
    """Scalars of the numerical guards by name, from `casc.train.guard`."""
    ema: Params = {}  # noqa: RUF012  # where it is empty, nothing is ever put in
    """Moving averages of the parameters that train, under their names; empty without."""


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
