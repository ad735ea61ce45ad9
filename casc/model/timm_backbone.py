"""Networks of timm (Wightman, 2019) as functions: any with `features_only` and usual strides.

timm's module is only the recipe of a computation: it lies on the meta device, without numbers, and
`torch.func.functional_call` gives it the parameters of the step. It is always in its evaluating
mode: batch norms use fixed statistics, and dropout does nothing but for drop path, whose noise is
an input. Names are timm's with a prefix: `backbone.stages_0.blocks.0.conv_dw.weight`.

Legend: B images, D the most places where paths may be dropped.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from casc.errors import UserError
from casc.model.layers import Params, cast_together, casts_together, keep_path
from casc.model.resnet import LAYER_BLOCKS, PREFIX

STRIDES = (4, 8, 16, 32)
PLAIN_STRIDE = 16
MOST_DROPS = 256
"""D. A number of the config's, not the network's: timm isn't asked while a step is compiled."""
# What some networks want to be told, lest they take images of one size only.
_ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True}
_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class TimmConfig:
    """A backbone of timm, by its name; needs the extra casc[timm]."""

    name: str
    """timm's name, such as convnext_tiny. Its feature maps must have strides 4, 8, 16 and 32, or
    all 16: then ViTDet's simple pyramid takes the place of the FPN."""
    drop_path: float = 0.0
    """Probability of leaving out the last block of the network when training (stochastic depth,
    Huang et al., 2016); earlier ones are left out less often, as timm has it."""
    frozen_stages: int = -1
    """-1 trains everything, 0 freezes the stem, n the stem and the first n stages."""


class Network(NamedTuple):
    """What there is to know of a network of timm."""

    module: nn.Module
    """On the meta device; what drops paths takes its factors from a buffer."""
    drops: dict[str, float]
    """The buffers for these factors, with the probability of dropping each, first to last."""
    channels: list[int]
    places: dict[str, tuple[int, int]]
    """Stage and layer of each parameter, the stem being 0."""
    channels_last: bool


class _DropPath(nn.Module):
    """Multiplies what each image's path gives by a factor that `functional_call` puts in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.empty(1, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.get_buffer("factor").to(x.dtype)
        return x * factor.view(-1, *[1] * (x.ndim - 1))


def timm_features(
    params: Params, buffers: Params, config: TimmConfig, image: Tensor, drop: Tensor | None = None
) -> list[Tensor]:
    """Feature maps of strides 4, 8, 16 and 32, or one of stride 16.

    Parameters are cast to the image's dtype, but for those of batch norms, whose statistics need
    float32.

    Args:
        params: weights by name.
        buffers: batch norm statistics and tables by name.
        config: which network.
        image: [B, 3, H, W] normalised, H and W divisible by 32.
        drop: [B, D] float32, uniform noise that decides which paths are dropped; None drops none.

    Returns:
        1 or 4 tensors [B, C_l, H / stride, W / stride].
    """
    rate = config.drop_path if drop is not None else 0.0
    start = f"{PREFIX}."
    names = [name for name in params if name.startswith(start)]
    held = {name.rpartition(".")[0] for name in buffers if name.endswith(_STATISTICS)}
    cast = [name for name in names if name.rpartition(".")[0] not in held]
    if casts_together(image):
        params = cast_together(params, cast, image)
    else:
        params = params | {name: params[name].to(image.dtype) for name in cast}
    tensors = {name: params[name] for name in names}
    for name, value in buffers.items():
        whole = name.endswith(_STATISTICS) or not value.is_floating_point()
        tensors[name] = value if whole else value.to(image.dtype)
    tensors = {name.removeprefix(start): value for name, value in tensors.items()}
    return list(_call(config.name, rate, tensors, image, drop))


def drop_rates(config: TimmConfig) -> dict[str, float]:
    """The buffers for factors of paths, with the probability of dropping each, first to last."""
    return _network(config.name, config.drop_path).drops


def timm_channels(config: TimmConfig) -> list[int]:
    """Channels of each map.

    Raises:
        UserError: there is no such network, or none that fits a detector.
    """
    return _network(config.name, 0.0).channels


def timm_stage(config: TimmConfig, name: str) -> int:
    """The stage of a parameter of the backbone, 0 being the stem."""
    return _network(config.name, 0.0).places[name.removeprefix(f"{PREFIX}.")][0]


def timm_layer(config: TimmConfig, name: str) -> int:
    """The layer of a parameter of the backbone, 0 being the stem: three blocks of a stage each."""
    return _network(config.name, 0.0).places[name.removeprefix(f"{PREFIX}.")][1]


def init_timm(
    config: TimmConfig, params: Params, buffers: Params, generator: torch.Generator | None
) -> None:
    """Add fresh backbone parameters as timm makes them, and all its buffers.

    Raises:
        UserError: as `timm_channels`.
    """
    _network(config.name, config.drop_path)
    with torch.random.fork_rng(devices=[]):
        if generator is not None:  # none: shapes are all that is wanted
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        module = create(config.name)
    for name, value in module.named_parameters():
        params[f"{PREFIX}.{name}"] = value.detach()
    for name, value in module.named_buffers():
        buffers[f"{PREFIX}.{name}"] = value


def create(name: str, where: str = "", **options: Any) -> nn.Module:
    """Timm's own module of a network: its maps of strides 4 to 32, or its last of stride 16.

    Args:
        name: timm's, with or without the tag of weights.
        where: what errors call the name's place; by default the config's flag.
        options: more of `timm.create_model`.

    Raises:
        UserError: there is no such network, or none that fits a detector.
    """
    with torch.device("meta"):
        info = build(name, where, features_only=True).feature_info.info
    strides = [entry["reduction"] for entry in info]
    if all(stride in strides for stride in STRIDES):
        last = {stride: i for i, stride in enumerate(strides)}
        indices = tuple(last[stride] for stride in STRIDES)
    elif set(strides) == {PLAIN_STRIDE}:
        indices = (len(strides) - 1,)
    else:
        raise UserError(
            f"--model.backbone.name {name}: its maps have strides {strides}; a detector needs 4, 8,"
            " 16 and 32, or 16 alone; choose another, such as convnext_tiny"
        )
    return build(name, where, features_only=True, out_indices=indices, **options)


def build(name: str, where: str = "", **options: Any) -> Any:
    """`timm.create_model`, for images of any size where the network can do so.

    Raises:
        UserError: timm isn't there, or it has no such network or weights.
    """
    where = where or f"--model.backbone.name {name}"
    try:
        import timm
    except ImportError:
        raise UserError(
            f"{where}: this needs timm, which isn't installed; pip install 'casc[timm]'"
        ) from None
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name.partition(".")[0], timm.list_models()))
        raise UserError(
            f"{where}: timm {timm.__version__} has no such model"
            + (f"; it has {near}, ..." if near else "; timm.list_models() has all names")
        )
    sizes: dict[str, Any] = dict(_ANY_SIZE)
    while True:
        try:
            return timm.create_model(name, **sizes, **options)
        except TypeError as error:  # only some networks know these
            unknown = [key for key in sizes if f"'{key}'" in str(error)]
            for key in unknown:
                del sizes[key]
            if not unknown and "'drop_path_rate'" in str(error):
                raise UserError(
                    f"--model.backbone.drop-path {options['drop_path_rate']}: {name} has no paths"
                    " to drop; use 0"
                ) from None
            if not unknown and "'img_size'" in str(error):
                raise UserError(
                    f"{where}: isn't a plain vision transformer; use the weights of one, such as"
                    " timm:vit_base_patch16_224.mae"
                ) from None
            if not unknown:
                raise UserError(f"{where}: timm can't build it for a detector ({error})") from None
        except (RuntimeError, AssertionError) as error:
            network, _, tag = name.partition(".")
            if tag and "pretrained tag" in str(error):
                known = ", ".join(timm.list_pretrained(f"{network}.*"))
                raise UserError(
                    f"{where}: timm has no weights {tag} of {network}"
                    + (f"; it has {known}" if known else ", nor any others")
                ) from None
            raise UserError(
                f"{where}: timm can't build it for a detector ({str(error).splitlines()[0]})"
            ) from None


@cache
def _network(name: str, drop_path: float) -> Network:
    # Dynamo needn't understand timm's Python: its operators are found when the graph is made.
    torch.compiler.allow_in_graph(_call)
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    with torch.device("meta"):
        module: Any = create(name, **options).eval()
        drops = {}
        for path, part in list(module.named_modules()):
            if drop_path and type(part).__name__ == "DropPath":
                module.set_submodule(path, _DropPath())
                drops[f"{path}.factor"] = float(part.drop_prob)
        if drop_path and not 0 < len(drops) <= MOST_DROPS:
            raise UserError(
                f"--model.backbone.drop-path {drop_path}: {name} has {len(drops)} paths to drop, it"
                f" must be from 1 to {MOST_DROPS}; use 0"
            )
        channels_last = str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC")
        network = Network(
            module, drops, module.feature_info.channels(), _places(module), channels_last
        )
        _check_shapes(name, network)
    return network


def _call(
    name: str, drop_path: float, tensors: Params, image: Tensor, drop: Tensor | None
) -> tuple[Tensor, ...]:
    network = _network(name, drop_path)
    tensors = dict(tensors)
    if drop is not None:
        for i, (factor, probability) in enumerate(network.drops.items()):
            tensors[factor] = keep_path(drop[:, i], probability)
    maps = torch.func.functional_call(network.module, tensors, (image,), strict=True)
    return tuple(x.permute(0, 3, 1, 2) if network.channels_last else x for x in maps)


def _check_shapes(name: str, network: Network) -> None:
    """Refuse a network that can't see a canvas, before anything is trained."""
    strides = STRIDES if len(network.channels) > 1 else (PLAIN_STRIDE,)
    height, width = 64, 96
    fault = ""
    try:
        maps = network.module(torch.empty(1, 3, height, width))
        shapes = [tuple(x.shape[1:]) for x in maps]
        if network.channels_last:
            shapes = [(c, h, w) for h, w, c in shapes]
        wanted = [
            (c, height // s, width // s) for c, s in zip(network.channels, strides, strict=True)
        ]
        if shapes != wanted:
            fault = f"maps are {shapes} where {wanted} are needed"
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        fault = str(error).splitlines()[0]
    if fault:
        raise UserError(
            f"--model.backbone.name {name}: it takes no images of {height} x {width} pixels"
            f" ({fault}); choose a network for any size, such as convnext_tiny"
        )


def _places(module: Any) -> dict[str, tuple[int, int]]:
    """Stage and layer of each parameter: what lies between stages belongs to the later one."""
    info = module.feature_info
    plain = len(info.channels()) == 1  # then each block is a stage
    ends = [] if plain else [_start_of(module, found) for found in info.module_name()]
    stages: dict[str, int] = {}
    blocks: dict[int, dict[str, None]] = {}
    own: dict[str, str] = {}
    reached = 0
    for path, part in module.named_modules():
        start = f"{path}." if path else ""
        here = next((i for i, end in enumerate(ends, start=1) if start.startswith(end)), 0)
        if plain:
            found = re.search(r"\bblocks\.(\d+)\.", start)
            reached = stage = int(found[1]) + 1 if found else reached
        else:
            stage = here or min(reached + 1 if reached else 0, len(ends))
            reached = max(reached, here)
            rest = start.removeprefix(ends[here - 1]) if here else start
            found = re.match(r"(?:blocks\.)?[a-z]?\d+\.", rest)
        for leaf, _ in part.named_parameters(recurse=False):
            name = f"{start}{leaf}"
            stages[name], own[name] = stage, found[0] if found else ""
            if found:
                blocks.setdefault(stage, {})[found[0]] = None
    places, below = {}, 0
    group = 1 if plain else LAYER_BLOCKS
    for stage in sorted(set(stages.values())):
        order = list(blocks.get(stage, {}))
        for name in (name for name in stages if stages[name] == stage):
            index = order.index(own[name]) if own[name] else 0
            places[name] = (stage, below + 1 + index // group if stage else 0)
        below += max(1, -(-len(order) // group)) if stage else 0
    return places


def _start_of(module: nn.Module, part: str) -> str:
    """How the names of a part's parameters begin; timm renames what it flattens."""
    there = dict(module.named_modules())
    return next(f"{n}." for n in (part, part.replace(".", "_"), f"model.{part}") if n in there)
