"""The update: a pure function of parameters, gradients and moments, which never branches.

What the host would decide (the rate, whether anything is finite) are tensors on the device, so an
update reads nothing back and can be recorded once and replayed. All that trains is one buffer,
updated in as many stretches as there are different rates and decays. A CPU, which waits for nobody,
has torch.optim's fused kernels instead: they read and write each number once without a compiler.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from casc.checkpoints.state import State
from casc.device.compute import Compute
from casc.device.devices import is_accelerator
from casc.device.versions import compile_apart
from casc.distributed import ALONE, Ranks, mean_
from casc.model.layers import Params
from casc.train.flat import ALIGNMENT, as_vector, buffer_of, spans
from casc.train.guard import SCALE, UPDATES, follow

NO_LAYERS: Mapping[str, int] = MappingProxyType({})
# As little to be drawn towards 0 as a bias, whatever their shape: tables that say where something
# is, tokens, and scales of channels or heads. ViTDet's rel_pos_h and rel_pos_w decay in Detectron2.
_SPARED = (
    "pos_embed", "relative_position_bias_table", "cls_token", "reg_token",
    "gamma", "logit_scale", "temperature",
)  # fmt: skip


@dataclass(frozen=True)
class Optim:
    """Gradient descent."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """sgd: with momentum. adamw: Loshchilov and Hutter 2019, as torch.optim.AdamW."""
    lr: float = 0.02
    """Peak learning rate at the reference batch."""
    reference_batch: int = 16
    """Images per step (over all devices) that `lr` is meant for."""
    scale_lr: bool = True
    """Scale `lr` by images per step / reference batch (the linear scaling rule)."""
    momentum: float = 0.9
    """Momentum (kind=sgd)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments (kind=adamw)."""
    eps: float = 1e-8
    """Added to the root of the second moment (kind=adamw)."""
    weight_decay: float = 1e-4
    """Weight decay, on everything that trains, norms and biases included."""
    decay_vectors: bool = True
    """Whether biases, norms, scales, tokens and embeddings of positions decay; newer recipes spare
    them (--no-decay-vectors)."""
    clip_norm: float | None = None
    """Clip the gradients' total norm to this; None doesn't clip."""
    backbone_lr: float = 1.0
    """Multiplies the learning rate of the backbone. What shall not train at all is frozen:
    --model.backbone.frozen-stages."""
    neck_lr: float = 1.0
    """Multiplies the learning rate of the FPN."""
    heads_lr: float = 1.0
    """Multiplies the learning rate of the RPN and of the box and mask heads."""
    layer_decay: float = 1.0
    """Multiplies the learning rate of the backbone once more for each of its layers from the top
    down to the stem (Bao et al., 2022): 0.7 for instance. A ViT's block is a layer, and so are
    three blocks of a stage of another network."""
    max_skips: int = 20
    """Stop after so many updates in a row were skipped because the loss or its gradient wasn't
    finite."""


def moments_of(config: Optim) -> int:
    """How many tensors an optimizer keeps of each parameter."""
    return 2 if config.kind == "adamw" else 1


def rate_factor(config: Optim, name: str, layers: Mapping[str, int] = NO_LAYERS) -> float:
    """What multiplies the learning rate of a parameter.

    Args:
        config: the recipe's.
        name: of the parameter.
        layers: how many layers the backbone's parameters lie below the neck, by name.
    """
    part = name.partition(".")[0]
    factors = {"backbone": config.backbone_lr, "neck": config.neck_lr}
    return factors.get(part, config.heads_lr) * config.layer_decay ** layers.get(name, 0)


def decay_of(config: Optim, name: str, param: Tensor) -> float:
    """The weight decay of a parameter."""
    spared = param.ndim <= 1 or name.rpartition(".")[2] in _SPARED
    return 0.0 if spared and not config.decay_vectors else config.weight_decay


def sgd(
    param: Tensor, gradient: Tensor, momentum: Tensor, rate: Tensor, *, decay: float, factor: float
) -> tuple[Tensor, Tensor]:
    """One step of torch.optim.SGD (no dampening, no Nesterov).

    Args:
        param: `[n]` float32.
        gradient: `[n]`.
        momentum: `[n]`.
        rate: scalar.
        decay: weight decay.
        factor: what is kept of the momentum.

    Returns:
        The new parameter and momentum.
    """
    momentum = torch.add(torch.add(gradient, param, alpha=decay), momentum, alpha=factor)
    return param - rate * momentum, momentum


def adamw(
    param: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: Tensor,
    number: Tensor,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of torch.optim.AdamW (no AMSGrad).

    Args:
        param: `[n]` float32.
        gradient: `[n]`.
        mean: `[n]`, the first moment.
        square: `[n]`, the second.
        rate: scalar.
        number: scalar, the number of this update, from 1.
        decay: weight decay.
        betas: what is kept of the moments.
        eps: added to the root of the second.

    Returns:
        The new parameter and moments.
    """
    # 1 - beta ** number, without rounding near 1.
    first, second = (-torch.expm1(number * math.log(beta)) for beta in betas)
    mean = torch.lerp(mean, gradient, 1 - betas[0])
    square = betas[1] * square + (1 - betas[1]) * gradient * gradient
    root = square.sqrt() / second.sqrt() + eps
    return param * (1 - rate * decay) - (rate / first) * (mean / root), mean, square


class Stretch(NamedTuple):
    """Numbers that are updated alike."""

    param: Tensor
    """`[n]`, as the moments are; all are views of the state."""
    moments: tuple[Tensor, ...]
    factor: float
    """Of the learning rate."""
    decay: float


class FlatOptimizer:
    """Updates a state's tensors in place: from one buffer of gradients, as accelerators want it."""

    def __init__(
        self, config: Optim, state: State, *, compute: Compute | None = None,
        layers: Mapping[str, int] = NO_LAYERS,
    ):  # fmt: skip
        """Prepare.

        Args:
            config: the recipe's.
            state: from `casc.train.state.new_state`.
            layers: as of `rate_factor`.
            compute: says whether to compile the update, and with what; eager if None.
        """
        self.config = config
        self.trained = {name: state.params[name] for name in state.momentum}
        self.spans = spans(self.trained)
        # Gradients come one by one; side by side they are exchanged and measured at once.
        self.gradient = torch.zeros_like(buffer_of(self.trained))
        self.gaps = self.gradient.new_zeros(ALIGNMENT)
        self.stretches = _stretches(config, self.trained, _moments(config, state), layers)
        self._apply = _apply
        if compute is not None and compute.compile:
            # Each stretch is of another length.
            stretches = max(len(self.stretches), 1)
            self._apply = compile_apart(_apply, backend=compute.backend, recompile_limit=stretches)

    def gather(self, ranks: Ranks) -> Tensor:
        """Put the gradients side by side, as their mean over the ranks; gives their total norm."""
        parts = []
        for name, start, stop in self.spans:
            parts.append(_gradient_of(self.trained[name]))
            if gap := (start - stop) % ALIGNMENT:
                parts.append(self.gaps[:gap])
        torch.cat(parts, out=self.gradient)
        mean_(self.gradient, ranks)
        # vector_norm adds so many numbers up one after the other; sum by halves, so it rounds less.
        return self.gradient.square().sum().sqrt()

    @torch.no_grad()
    def step(
        self, rate: Tensor, loss_scale: Tensor | None, clip: Tensor | None, finite: Tensor,
        number: Tensor,
    ) -> None:  # fmt: skip
        """Update everything where `finite` holds, and nothing where it doesn't.

        Args:
            rate: scalar float32.
            loss_scale: scalar that the gradients were multiplied by, or None.
            clip: scalar in (0, 1] that multiplies them, or None.
            finite: scalar bool.
            number: scalar, the number of this update, from 1.
        """
        scale = clip
        if loss_scale is not None:
            scale = 1 / loss_scale if clip is None else clip / loss_scale
        gradients = self.gradient.split([len(stretch.param) for stretch in self.stretches])
        for gradient, stretch in zip(gradients, self.stretches, strict=True):
            own_rate = rate if stretch.factor == 1 else rate * stretch.factor
            columns = (gradient, stretch.param, *stretch.moments)
            self._apply(self.config, stretch.decay, own_rate, scale, finite, number, *columns)


class FusedOptimizer:
    """The same on a CPU, one parameter after the other, by torch.optim."""

    def __init__(self, config: Optim, state: State, *, layers: Mapping[str, int] = NO_LAYERS):
        """Prepare; arguments are `FlatOptimizer`'s."""
        self.config = config
        self.trained = {name: state.params[name] for name in state.momentum}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in self.trained.items():
            key = rate_factor(config, name, layers), decay_of(config, name, param)
            groups.setdefault(key, []).append(param)
        columns: list[dict[str, Any]] = [
            {"params": params, "factor": factor, "weight_decay": decay}
            for (factor, decay), params in groups.items()
        ]
        if config.kind == "adamw":
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(
                columns, lr=0.0, betas=config.betas, eps=config.eps, fused=True
            )
            keys = ("exp_avg", "exp_avg_sq")
        else:
            self.torch = torch.optim.SGD(columns, lr=0.0, momentum=config.momentum, fused=True)
            keys = ("momentum_buffer",) if config.momentum else ()
        for name, param in self.trained.items():
            for key, moment in zip(keys, _moments(config, state), strict=False):
                self.torch.state[param][key] = moment[name]

    def gather(self, ranks: Ranks) -> Tensor:
        """The gradients' total norm; DistributedDataParallel has taken their mean already."""
        return torch.nn.utils.get_total_norm(self._gradients())

    @torch.no_grad()
    def step(
        self, rate: Tensor, loss_scale: Tensor | None, clip: Tensor | None, finite: Tensor,
        number: Tensor,
    ) -> None:  # fmt: skip
        """As `FlatOptimizer.step`."""
        if clip is not None:
            # By a factor, so it doesn't matter that the gradients are still scaled.
            for gradient in self._gradients():
                gradient *= clip
        for group in self.torch.param_groups:
            group["lr"] = rate.item() * group["factor"]
        if self.config.kind == "adamw":
            for param in self.trained.values():
                self.torch.state[param]["step"] = (number - 1).float()
        # What GradScaler sets, and the fused kernels honour.
        self.torch.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.torch.grad_scale = loss_scale  # type: ignore[attr-defined]
        self.torch.step()

    def _gradients(self) -> list[Tensor]:
        return [_there(param) for param in self.trained.values()]


Optimizer = FlatOptimizer | FusedOptimizer


def make_optimizer(
    config: Optim, state: State, *, compute: Compute | None = None,
    layers: Mapping[str, int] = NO_LAYERS,
) -> Optimizer:  # fmt: skip
    """The optimizer of a state, as its device wants it. Arguments are `FlatOptimizer`'s."""
    device = next(iter(state.momentum.values())).device
    if is_accelerator(device):
        return FlatOptimizer(config, state, compute=compute, layers=layers)
    return FusedOptimizer(config, state, layers=layers)


def update(
    optimizer: Optimizer,
    rate: Tensor,
    guard: Params,
    loss: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Apply the gradients and clear them, without reading anything back.

    Where the gradients' norm or the loss isn't finite, parameters and moments stay as they
    are; the device decides that.

    Args:
        optimizer: of the state.
        rate: learning rate, a float32 scalar on the device.
        guard: counts what is made and skipped; its loss scale, if any, is taken out of the
            gradients.
        loss: of the step, a mean over all ranks.
        ranks: whose gradients are averaged.

    Returns:
        The gradients' total norm before clipping, a float32 scalar.
    """
    norm = optimizer.gather(ranks)
    loss_scale, limit = guard.get(SCALE), optimizer.config.clip_norm
    if loss_scale is not None:
        norm = norm / loss_scale
    finite = norm.isfinite() if loss is None else (norm.isfinite() & loss.isfinite())
    # As torch.nn.utils.clip_grads_with_norm_.
    clip = None if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step(rate, loss_scale, clip, finite, guard[UPDATES] + 1)
    for param in optimizer.trained.values():
        param.grad = None
    follow(guard, finite)
    return norm


def _apply(
    config: Optim,
    decay: float,
    rate: Tensor,
    scale: Tensor | None,
    finite: Tensor,
    number: Tensor,
    gradient: Tensor,
    param: Tensor,
    *moments: Tensor,
) -> None:
    if scale is not None:
        gradient = gradient * scale
    if config.kind == "adamw":
        mean, square = moments
        made = adamw(
            param, gradient, mean, square, rate, number,
            decay=decay, betas=config.betas, eps=config.eps,
        )  # fmt: skip
    else:
        made = sgd(param, gradient, moments[0], rate, decay=decay, factor=config.momentum)
    for old, new in zip((param, *moments), made, strict=True):
        old.copy_(torch.where(finite, new, old))


def _moments(config: Optim, state: State) -> tuple[Params, ...]:
    return (state.momentum, state.second)[: moments_of(config)]


def _stretches(
    config: Optim, trained: Params, moments: Sequence[Params], layers: Mapping[str, int]
) -> list[Stretch]:
    def alike(name: str) -> tuple[float, float]:
        return rate_factor(config, name, layers), decay_of(config, name, trained[name])

    buffers = [buffer_of(trained), *(buffer_of(moment) for moment in moments)]
    runs = [(key, next(run).start) for key, run in groupby(spans(trained), lambda s: alike(s.name))]
    stops = [start for _, start in runs[1:]] + [len(buffers[0])]
    return [
        Stretch(buffers[0][start:stop], tuple(b[start:stop] for b in buffers[1:]), *key)
        for (key, start), stop in zip(runs, stops, strict=True)
    ]


def _gradient_of(param: Tensor) -> Tensor:
    """A parameter's gradient in the order of the parameter's memory, `[n]`."""
    gradient = _there(param)
    if gradient.stride() != param.stride():
        gradient = torch.empty_like(param).copy_(gradient)
    return as_vector(gradient)


def _there(param: Tensor) -> Tensor:
    # Every loss reaches every parameter that trains, so a missing gradient is a mistake.
    assert param.grad is not None
    return param.grad
