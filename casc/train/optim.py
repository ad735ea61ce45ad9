"""The update: torch's SGD over the parameters that train, its momentum held in the state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from casc.checkpoints.state import State
from casc.device.devices import traits
from casc.model.layers import Params
from casc.train.guard import SCALE, follow

_FACTOR = "rate_factor"
"""Of a group of parameters, beside torch's own settings."""


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
    backbone_lr: float = 1.0
    """Multiplies the learning rate of the backbone. What shall not train at all is frozen:
    --model.backbone.frozen-stages."""
    neck_lr: float = 1.0
    """Multiplies the learning rate of the FPN."""
    heads_lr: float = 1.0
    """Multiplies the learning rate of the RPN and of the box and mask heads."""
    max_skips: int = 20
    """Stop after so many updates in a row were skipped because the loss or its gradient wasn't
    finite."""


def rate_factor(config: Optim, name: str) -> float:
    """What multiplies the learning rate of a parameter."""
    part = name.partition(".")[0]
    return {"backbone": config.backbone_lr, "neck": config.neck_lr}.get(part, config.heads_lr)


def make_optimizer(config: Optim, state: State) -> torch.optim.SGD:
    """An optimizer that updates the state's tensors in place, momentum included."""
    groups: dict[float, list[Tensor]] = {}
    for name in state.momentum:
        groups.setdefault(rate_factor(config, name), []).append(state.params[name])
    fused = traits(next(iter(groups.values()))[0].device).fused_optimizer
    optimizer = torch.optim.SGD(
        [{"params": params, _FACTOR: factor} for factor, params in groups.items()],
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True if fused else None,
    )
    if config.momentum:
        for name, momentum in state.momentum.items():
            optimizer.state[state.params[name]]["momentum_buffer"] = momentum
    return optimizer


def update(
    optimizer: torch.optim.SGD,
    rate: float,
    clip_norm: float | None,
    guard: Params | None = None,
    loss: Tensor | None = None,
) -> Tensor:
    """Apply the gradients and clear them, without reading anything back.

    Where the gradients' norm or the loss isn't finite, parameters and momentum stay as they
    are; the device decides that.

    Args:
        optimizer: from `make_optimizer`.
        rate: learning rate, which the groups' factors multiply.
        clip_norm: limit of the total norm, or None.
        guard: counts what is skipped; its loss scale, if any, is taken out of the gradients.
        loss: of the step, a mean over all ranks.

    Returns:
        The gradients' total norm before clipping, a float32 scalar.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    gradients = [p.grad for p in params]
    scale = None if guard is None else guard.get(SCALE)
    norm = torch.nn.utils.get_total_norm(gradients)
    if scale is not None:
        norm = norm / scale
    finite = norm.isfinite() if loss is None else (norm.isfinite() & loss.isfinite())
    if clip_norm is not None:
        # By a factor, so it doesn't matter that the gradients are still scaled.
        torch.nn.utils.clip_grads_with_norm_(params, clip_norm, norm)
    for group in groups:
        group["lr"] = rate * group.get(_FACTOR, 1.0)
    if groups[0]["fused"]:
        # What GradScaler sets, and the fused kernels honour.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
    else:
        _step_where(finite, optimizer, scale)
    optimizer.zero_grad(set_to_none=True)
    if guard is not None:
        follow(guard, finite)
    return norm


@torch.no_grad()
def _step_where(finite: Tensor, optimizer: torch.optim.SGD, scale: Tensor | None) -> None:
    """SGD for devices whose kernels can't skip: GradScaler would read the flag back."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            step = param.grad if scale is None else param.grad / scale
            step = step + group["weight_decay"] * param
            momentum = optimizer.state[param].get("momentum_buffer")
            if momentum is not None:
                step = group["momentum"] * momentum + step
                momentum.copy_(torch.where(finite, step, momentum))
            param.sub_(torch.where(finite, group["lr"] * step, 0.0))
