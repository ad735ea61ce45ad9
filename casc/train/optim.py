"""The update: torch's SGD over the parameters that train, its momentum held in the state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from casc.devices import traits
from casc.train.state import State


@dataclass(frozen=True)
class Optim:
    """Stochastic gradient descent."""

    lr: float = 0.02
    """Peak learning rate at the reference batch."""
    reference_batch: int = 16
    """Images per step (over all devices) that `lr` is meant for."""
    scale_lr: bool = True
    """Scale `lr` by images per step / reference batch (the linear scaling rule)."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 1e-4
    """Weight decay, on everything that trains, norms and biases included."""
    clip_norm: float | None = None
    """Clip the gradients' total norm to this; None doesn't clip."""


def make_optimizer(config: Optim, state: State) -> torch.optim.SGD:
    """An optimizer that updates the state's tensors in place, momentum included."""
    params = [state.params[name] for name in state.momentum]
    fused = traits(params[0].device).fused_optimizer
    optimizer = torch.optim.SGD(
        params,
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True if fused else None,
    )
    if config.momentum:
        for name, momentum in state.momentum.items():
            optimizer.state[state.params[name]]["momentum_buffer"] = momentum
    return optimizer


def update(optimizer: torch.optim.SGD, rate: float, clip_norm: float | None) -> Tensor:
    """Apply the gradients and clear them, without reading anything back.

    A fused optimizer leaves the parameters as they are when a gradient isn't finite, on
    the device.

    Returns:
        The gradients' total norm before clipping, a float32 scalar.
    """
    (group,) = optimizer.param_groups
    gradients = [p.grad for p in group["params"]]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(group["params"], clip_norm, norm)
    group["lr"] = rate
    if group["fused"]:
        # What GradScaler sets, and the fused kernels honour.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
