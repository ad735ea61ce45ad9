"""Layers as functions: parameters by name in, tensors out.

A layer takes the flat dict of parameters and its own name; `name + ".weight"` is then a
key of the reference's state_dict. Parameters are stored in float32 and cast to the
activations' dtype where they are used, so the dtype of the input decides the precision.
"""

# torch has functions of lists under private names only.
# pyright: reportPrivateImportUsage=false

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from casc.device.devices import is_accelerator, traits
from casc.device.versions import PARTS_AS_BIAS
from casc.ops.linear import linear as linear_product

Params = dict[str, Tensor]
Affine = dict[str, tuple[Tensor | None, Tensor]]
"""Scale and shift of each channel, by the norm's name; no scale where the weight has it already."""
Norm = Literal["none", "gn", "ln"]
Cells = dict[tuple[int, int], Tensor]
"""Which cells of maps are image, [B, H_l, W_l] bool by their height and width."""

BN_EPS = 1e-5
GN_GROUPS = 32
GN_EPS = 1e-5
LN_EPS = 1e-6
JOINED = "joined"
_VARIANCE = ".running_var"


def conv(params: Params, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution with an optional bias: [B, C, H, W] to [B, C', H', W']."""
    bias = params.get(f"{name}.bias")
    weight = cast(params[f"{name}.weight"], x.dtype)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


def join_layers(params: Params, *names: str) -> Params:
    """One layer, named `JOINED`, that gives what several give of the same input, side by side."""
    return {
        f"{JOINED}.{kind}": torch.cat([params[f"{name}.{kind}"] for name in names])
        for kind in ("weight", "bias")
    }


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Affine map: [N, C] to [N, C']."""
    weight = cast(params[f"{name}.weight"], x.dtype)
    return linear_product(x, weight, params[f"{name}.bias"].to(x.dtype))


def frozen_norms(params: Params, buffers: Params, dtype: torch.dtype) -> Affine:
    """What batch norms with fixed statistics come to: each one's scale and shift.

    All at once, as one vector, rather than a few launches for each.

    Args:
        params: `name.weight` and `name.bias` of each norm, [C] float32.
        buffers: `name.running_mean` and `name.running_var`; they name the norms.
        dtype: of the shifts, which are added to activations.

    Returns:
        By name, scale [C] float32 and shift [C].
    """
    made: Affine = {}
    groups = _alike(params, (k.removesuffix(_VARIANCE) for k in buffers if k.endswith(_VARIANCE)))
    if torch.compiler.is_compiling() and not PARTS_AS_BIAS:
        groups = [[name] for group in groups for name in group]
    for group in groups:
        scale, shift = _scales_and_shifts(params, buffers, group, dtype)
        sizes = [len(params[f"{name}.weight"]) for name in group]
        both = zip(scale.split(sizes), shift.split(sizes), strict=True)
        made |= dict(zip(group, both, strict=True))
    return made


def _alike(params: Params, norms: Iterable[str]) -> list[list[str]]:
    """Those that train, and those that don't: together, the latter would be given gradients."""
    training, others = [], []
    for name in norms:
        (training if params[f"{name}.weight"].requires_grad else others).append(name)
    return [group for group in (training, others) if group]


def _scales_and_shifts(
    params: Params, buffers: Params, norms: list[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of some norms, one after the other: [C] float32 and [C]."""
    weight, bias = (torch.cat([params[f"{n}.{k}"] for n in norms]) for k in ("weight", "bias"))
    mean, var = (
        torch.cat([buffers[f"{n}.{k}"] for n in norms]) for k in ("running_mean", "running_var")
    )
    scale = weight * torch.rsqrt(var + BN_EPS)
    return scale, (bias - mean * scale).to(dtype)


def folds_rows(x: Tensor) -> bool:
    """Whether these activations are of a device that `fold_rows` is for."""
    own = traits(x.device)
    return is_accelerator(x.device) and own.memory_format == torch.contiguous_format


def fold_rows(
    params: Params, buffers: Params, convs: dict[str, str], dtype: torch.dtype
) -> tuple[Params, Affine]:
    """Fold norms into their convolutions' weights where each operator is a launch.

    All weights are scaled as one matrix, whose rows are as long as divides the rows of each:
    ResNet-50 has 53, and 7 lengths of rows among those that train. Scales are repeated, and their
    gradients added up, for all weights of a length at once.

    Args:
        params: weights by name.
        buffers: of the norms.
        convs: each norm's convolution, whose weight is contiguous.
        dtype: of activations.

    Returns:
        The parameters with folded weights in place of theirs, and what is left of the norms.
    """

    def length(norm: str) -> int:
        return params[f"{convs[norm]}.weight"][0].numel()

    left: Affine = {}
    folded: Params = {}
    for group in _alike(params, convs):
        norms = sorted(group, key=length)
        scale, shift = _scales_and_shifts(params, buffers, norms, dtype)
        weights = {name: params[name] for name in (f"{convs[norm]}.weight" for norm in norms)}
        channels = [len(weight) for weight in weights.values()]
        runs: dict[int, int] = defaultdict(int)
        for norm, count in zip(norms, channels, strict=True):
            runs[length(norm)] += count
        own = (scale, dict(runs), dtype)
        folded |= _as_one(weights, lambda flat, own=own: _ScaledRows.apply(flat, *own))
        left |= {n: (None, part) for n, part in zip(norms, shift.split(channels), strict=True)}
    return params | folded, left


def _as_one(tensors: Params, function: Callable[[Tensor], Tensor]) -> Params:
    """What a function makes of tensors' numbers, all as one vector, in the tensors' shapes."""
    flat = function(torch.cat([tensor.flatten() for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {n: part.view_as(t) for (n, t), part in zip(tensors.items(), parts, strict=True)}


class _ScaledRows(torch.autograd.Function):
    """Rows of several lengths, one after the other, each times its own number."""

    @staticmethod
    def forward(ctx, flat, scales, runs, dtype):
        # All as rows of a length that divides each: their scales are fewer, and one product.
        width = math.gcd(*runs)
        repeated = torch.cat(
            [
                own[:, None].expand(-1, size // width).flatten()
                for own, size in zip(scales.split(list(runs.values())), runs, strict=True)
            ]
        )[:, None]
        ctx.save_for_backward(flat, repeated)
        ctx.runs = runs
        return (flat.view(-1, width) * repeated).to(dtype).flatten()

    @staticmethod
    def backward(ctx, *grads):
        flat, repeated = ctx.saved_tensors
        grad = grads[0].to(flat.dtype)
        rows = grad.view(len(repeated), -1) * repeated
        parts = (grad * flat).split([size * count for size, count in ctx.runs.items()])
        sums = [part.view(-1, size).sum(1) for part, size in zip(parts, ctx.runs, strict=True)]
        return rows.flatten(), torch.cat(sums), None, None


def conv_affine(
    params: Params,
    name: str,
    affine: tuple[Tensor | None, Tensor],
    x: Tensor,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Convolution, then a scale and a shift of each channel, as one convolution.

    The scale is folded into the weight: the same function and gradients (a norm's gamma and
    beta still train), without a pass over the activations.
    """
    scale, shift = affine
    weight = params[f"{name}.weight"]
    if scale is not None:
        weight = _rematerialised(_scaled, weight, scale, x.dtype)
    return F.conv2d(x, weight, shift, stride, padding)


def gathers_gradients(x: Tensor) -> bool:
    """Whether a step with these activations is compiled for a GPU, to be trained.

    There `fold_together` and `cast_together` pay. On a CPU launches are cheap, and the weights
    made of parameters had better be made again for the backward pass. On an NPU functions of lists
    are as many launches as the lists are long.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    return bool(traits(x.device).triton_kernels)


def fold_together(
    params: Params, buffers: Params, convs: dict[str, str], dtype: torch.dtype
) -> tuple[Params, Affine]:
    """Fold the norms that train into their convolutions' weights, all gradients at once.

    A compiler launches one kernel for each gradient when that weight's turn comes. Here they wait
    for each other, which costs a GPU nothing, and take a few launches in all.

    Args:
        params: weights by name.
        buffers: of the norms.
        convs: each norm's convolution.
        dtype: of activations.

    Returns:
        The parameters with folded weights in place of theirs, and what is left of the norms.
    """
    norms = [name for name in convs if params[f"{name}.weight"].requires_grad]
    names = [f"{convs[name]}.weight" for name in norms]
    tensors = [params[name] for name in names]
    tensors += [params[f"{name}.{kind}"] for kind in ("weight", "bias") for name in norms]
    means = [buffers[f"{name}.running_mean"] for name in norms]
    roots = [torch.rsqrt(buffers[f"{name}{_VARIANCE}"] + BN_EPS) for name in norms]
    made = _Fold.apply(dtype, means, roots, *tensors)
    folded, shifts = made[: len(norms)], made[len(norms) :]
    left = {name: (None, shift) for name, shift in zip(norms, shifts, strict=True)}
    # One by one: what doesn't depend on gradients a compiler launches as one anyway.
    frozen: Affine = {}
    for name in (name for name in convs if name not in left):
        root = torch.rsqrt(buffers[f"{name}{_VARIANCE}"] + BN_EPS)
        scale = params[f"{name}.weight"] * root
        shift = params[f"{name}.bias"] - buffers[f"{name}.running_mean"] * scale
        frozen[name] = (scale, shift.to(dtype))
    return params | dict(zip(names, folded, strict=True)), frozen | left


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, means, roots, *tensors):
        count = len(means)
        weights, gammas, betas = tensors[:count], tensors[count:-count], tensors[-count:]
        ctx.save_for_backward(*weights, *gammas, *means, *roots)
        scales = torch._foreach_mul(gammas, roots)
        shifts = torch._foreach_sub(betas, torch._foreach_mul(means, scales))
        folded = [_scaled(*each, dtype) for each in zip(weights, scales, strict=True)]
        return *folded, *(shift.to(dtype) for shift in shifts)

    @staticmethod
    def backward(ctx, *grads):
        count = len(grads) // 2
        saved = ctx.saved_tensors
        weights, gammas, means, roots = (saved[i * count : (i + 1) * count] for i in range(4))
        weight_grads, shift_grads = _floats(grads[:count]), _floats(grads[count:])
        scales = [s[:, None, None, None] for s in torch._foreach_mul(gammas, roots)]
        products = torch._foreach_mul(weight_grads, weights)
        scale_grads = torch._foreach_sub(
            [product.sum(dim=(1, 2, 3)) for product in products],
            torch._foreach_mul(shift_grads, means),
        )
        return (
            None,
            None,
            None,
            *torch._foreach_mul(weight_grads, scales),
            *torch._foreach_mul(scale_grads, roots),
            *shift_grads,
        )


def casts_together(x: Tensor) -> bool:
    """Whether `cast_together` pays with these activations: each cast by itself is a launch."""
    return folds_rows(x) or gathers_gradients(x)


def cast_together(params: Params, names: Iterable[str], x: Tensor) -> Params:
    """The parameters with those named in the activations' dtype, their gradients cast at once.

    Args:
        params: weights by name.
        names: which to cast.
        x: activations that `casts_together` holds for.
    """
    names = [name for name in names if params[name].dtype != x.dtype]
    if not names:
        return params
    if not folds_rows(x):
        made = _Cast.apply(x.dtype, *(params[name] for name in names))
        return params | dict(zip(names, made, strict=True))
    cast: Params = {}
    for trains in (True, False):
        own = {name: params[name] for name in names if params[name].requires_grad == trains}
        if own:
            cast |= _as_one(own, lambda flat: flat.to(x.dtype))
    return params | cast


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *weights):
        return tuple(weight.to(dtype) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_floats(grads)


def _floats(grads: Sequence[Tensor]) -> list[Tensor]:
    """In float32 by one launch: less nothing, as there is no function of lists that only casts."""
    return list(torch._foreach_sub([grad.float() for grad in grads], 0.0))


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the activations' dtype."""
    return weight if weight.dtype == dtype else _rematerialised(Tensor.to, weight, dtype)


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale[:, None, None, None]).to(dtype)


def _rematerialised(function: Callable[..., Tensor], *args: object) -> Tensor:
    """A weight made of parameters, which a compiler makes again for the backward pass.

    That is quicker than keeping it is dear. Eager, the layer that uses it keeps it anyway.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return recomputed(function, *args)
    return function(*args)


def recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function and keep nothing of its inside for the backward pass but its arguments.

    What the gradient needs is computed again there (Chen et al., 2016). Compiled, that is just
    what is needed; eager, it is all of the function.
    """
    result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def keep_path(noise: Tensor, probability: float) -> Tensor:
    """Factors that drop paths (stochastic depth, Huang et al., 2016) or make up for those dropped.

    Args:
        noise: uniform in [0, 1), any shape.
        probability: of 0, in [0, 1); others are 1 / (1 - probability).
    """
    return (noise >= probability).to(noise.dtype) / (1 - probability)


def group_norm(params: Params, name: str, x: Tensor, cells: Cells | None = None) -> Tensor:
    """Group normalisation (Wu & He, 2018) over at most 32 groups: [B, C, H, W], same shape.

    Args:
        params: weights by name.
        name: of the norm.
        x: activations.
        cells: from `image_cells`. Mean and variance are of these, so that they don't depend on how
            large the canvas is; None: of all cells.
    """
    channels = x.shape[1]
    groups = math.gcd(GN_GROUPS, channels)
    weight, bias = params[f"{name}.weight"].to(x.dtype), params[f"{name}.bias"].to(x.dtype)
    if cells is None:
        return F.group_norm(x, groups, weight, bias)
    inside = cells[x.shape[2], x.shape[3]][:, None, None]
    parts = x.float().unflatten(1, (groups, channels // groups))
    count = inside.sum(dim=(2, 3, 4), keepdim=True) * (channels // groups)
    centred = parts - (parts * inside).sum(dim=(2, 3, 4), keepdim=True) / count
    variance = (centred.square() * inside).sum(dim=(2, 3, 4), keepdim=True) / count
    normal = (centred * torch.rsqrt(variance + GN_EPS)).flatten(1, 2).to(x.dtype)
    return normal * weight[:, None, None] + bias[:, None, None]


def image_cells(size: Tensor, canvas: tuple[int, int], strides: Iterable[int]) -> Cells:
    """Cells that are image, in full or in part, at least one: made once for all norms.

    Args:
        size: [B, 2] float32, height and width of the images on the canvas.
        canvas: (H, W), divisible by the strides.
        strides: of the maps.
    """

    def along(axis: int, length: int) -> Tensor:
        # Sizes are whole pixels: a number of cells is whole, or farther from it than this.
        share = size[:, axis : axis + 1] / canvas[axis]
        inside = (share * length - 1e-3).ceil().clamp(min=1)
        return torch.arange(length, device=size.device) < inside

    maps = [(canvas[0] // stride, canvas[1] // stride) for stride in strides]
    return {(h, w): along(0, h)[:, :, None] & along(1, w)[:, None] for h, w in maps}


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Layer normalisation (Ba et al., 2016) over the channels of each cell: [B, C, H, W]."""
    weight, bias = params[f"{name}.weight"].to(x.dtype), params[f"{name}.bias"].to(x.dtype)
    x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, LN_EPS)
    return x.permute(0, 3, 1, 2)


def conv_module(
    params: Params,
    name: str,
    x: Tensor,
    padding: int,
    norm: Norm,
    cells: Cells | None = None,
) -> Tensor:
    """A ConvModule of mmcv without its activation: `name.conv`, then `name.gn` or `name.ln`.

    `cells` is as for `group_norm`.
    """
    x = conv(params, f"{name}.conv", x, padding=padding)
    if norm == "gn":
        return group_norm(params, f"{name}.gn", x, cells)
    return layer_norm(params, f"{name}.ln", x) if norm == "ln" else x


# What follows makes initial parameters: `fill` is one of torch.nn.init's functions with
# its options bound, and gets the run's generator.

Fill = Callable[[Tensor, torch.Generator], object]


def kaiming_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """He normal over fan-out, for layers that a ReLU follows."""
    nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)


def xavier_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Glorot uniform."""
    nn.init.xavier_uniform_(tensor, generator=generator)


def xavier_normal(tensor: Tensor, generator: torch.Generator) -> None:
    """Glorot normal."""
    nn.init.xavier_normal_(tensor, generator=generator)


def normal_001(tensor: Tensor, generator: torch.Generator) -> None:
    """Normal with standard deviation 0.01."""
    nn.init.normal_(tensor, std=0.01, generator=generator)


def torch_default(tensor: Tensor, generator: torch.Generator) -> None:
    """What torch gives a new convolution: uniform in +-1/sqrt(fan-in)."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def grown(weight: Tensor, channels: int) -> Tensor:
    """The first convolution of RGB images [C, 3, k, k] for images of other channels.

    Planes beyond RGB, and all of images with fewer, get the mean of RGB's weights; then all are
    multiplied by 3 / channels. So an image whose planes are all alike gives the response that its
    RGB copy gives: for grey the weights are RGB's sum.

    Args:
        weight: [C, 3, k, k].
        channels: of the images.

    Returns:
        [C, channels, k, k].
    """
    first = weight if channels >= 3 else weight[:, :0]
    mean = weight.mean(dim=1, keepdim=True).expand(-1, channels - first.shape[1], -1, -1)
    return torch.cat([first, mean], dim=1) * (3 / channels)


def new_weight(
    params: Params,
    name: str,
    shape: tuple[int, ...],
    fill: Fill,
    generator: torch.Generator,
    *,
    bias: int | None = None,
) -> None:
    """Add `name.weight` of `shape`, and `name.bias` of `bias` zeros unless None."""
    weight = torch.empty(shape)
    fill(weight, generator)
    params[f"{name}.weight"] = weight
    if bias is not None:
        params[f"{name}.bias"] = torch.zeros(bias)


def new_norm(params: Params, name: str, channels: int) -> None:
    """Add a norm's `name.weight` of ones and `name.bias` of zeros."""
    params[f"{name}.weight"] = torch.ones(channels)
    params[f"{name}.bias"] = torch.zeros(channels)


def new_conv_module(
    params: Params,
    name: str,
    shape: tuple[int, ...],
    fill: Fill,
    generator: torch.Generator,
    norm: Norm,
) -> None:
    """Add the parameters that `conv_module` reads; a norm takes the bias's place."""
    bias = shape[0] if norm == "none" else None
    new_weight(params, f"{name}.conv", shape, fill, generator, bias=bias)
    if norm != "none":
        new_norm(params, f"{name}.{norm}", shape[0])
