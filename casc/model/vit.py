"""The plain vision transformer (Dosovitskiy et al., 2021) as ViTDet (Li et al., 2022) uses it.

Most blocks attend within windows, few to the whole image. Names are timm's with a prefix:
`backbone.blocks.0.attn.qkv.weight`.

Legend: B images, N windows or images, h x w patches, C channels, D places where paths are dropped.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casc.model.layers import (
    LN_EPS,
    Params,
    cast_together,
    casts_together,
    conv,
    keep_path,
    linear,
    new_norm,
    new_weight,
    recomputed,
    torch_default,
)
from casc.model.resnet import PREFIX

PATCH = 16
EXPANSION = 4
SCALE = 1e-5
"""What layer scale begins with."""


@dataclass(frozen=True)
class ViTConfig:
    """A plain vision transformer with patches of 16 x 16; the defaults are ViTDet's ViT-B."""

    channels: int = 768
    """Channels of every block."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads of a block."""
    grid: int = 14
    """Patches on a side of the images that it was pretrained on, for which the position embedding
    is stored; it is resized to the canvas."""
    window: int = 14
    """Patches on a side of a window; 0: every block attends to the whole image."""
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks, from 0, that attend to the whole image."""
    relative: bool = True
    """Add relative position embeddings, one for rows and one for columns, to each attention."""
    relative_grid: int = 64
    """Patches on a side for which those of global blocks are stored: the training canvas's."""
    layer_scale: bool = False
    """A learnt factor for each channel of what a block adds, as DINOv2's weights have."""
    drop_path: float = 0.1
    """Probability of leaving out the last block when training (stochastic depth, Huang et al.,
    2016); it grows linearly from 0 at the first."""
    frozen_stages: int = -1
    """-1 trains everything, 0 freezes the patch embedding, n that and the first n blocks."""
    recompute: bool = False
    """Keep only the input of each block that trains, and compute the rest again in the backward
    pass: less memory for larger batches, and slower. Changes no number."""


def vit(params: Params, config: ViTConfig, image: Tensor, drop: Tensor | None = None) -> Tensor:
    """The last block's output, without a final norm.

    Args:
        params: weights by name.
        config: which network.
        image: [B, 3, H, W] normalised, H and W divisible by 16.
        drop: [B, D] float32, uniform noise that decides which paths are dropped, two of each
            block; None drops none.

    Returns:
        [B, C, H / 16, W / 16].
    """
    if casts_together(image):
        names = [name for name in params if name.startswith(f"{PREFIX}.")]
        params = cast_together(params, names, image)
    x = conv(params, f"{PREFIX}.patch_embed.proj", image, stride=PATCH).permute(0, 2, 3, 1)
    x = x + _positions(params[f"{PREFIX}.pos_embed"], x.shape[1], x.shape[2]).to(x.dtype)
    keep = None
    for i in range(config.depth):
        if drop is not None:
            probability = config.drop_path * i / max(config.depth - 1, 1)
            keep = keep_path(drop[:, 2 * i : 2 * i + 2], probability)
        arguments = (params, config, i, x, keep)
        if config.recompute and torch.is_grad_enabled() and i >= config.frozen_stages:
            x = recomputed(_block, *arguments)
        else:
            x = _block(*arguments)
    return x.permute(0, 3, 1, 2)


def vit_stage(name: str) -> int:
    """The block of a parameter of the backbone, from 1; 0 before the first."""
    found = re.match(rf"{PREFIX}\.blocks\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 0


def init_vit(config: ViTConfig, params: Params, generator: torch.Generator) -> None:
    """Add fresh backbone parameters: truncated normal weights, identity norms."""
    channels = config.channels
    shape = (channels, 3, PATCH, PATCH)
    name = f"{PREFIX}.patch_embed.proj"
    new_weight(params, name, shape, torch_default, generator, bias=channels)
    params[f"{PREFIX}.pos_embed"] = torch.empty(1, config.grid**2, channels)
    _truncated_normal(params[f"{PREFIX}.pos_embed"], generator)
    for i in range(config.depth):
        name = f"{PREFIX}.blocks.{i}"
        new_norm(params, f"{name}.norm1", channels)
        for layer, out, width in (
            ("attn.qkv", 3 * channels, channels), ("attn.proj", channels, channels),
            ("mlp.fc1", EXPANSION * channels, channels),
            ("mlp.fc2", channels, EXPANSION * channels),
        ):  # fmt: skip
            shape = (out, width)
            new_weight(params, f"{name}.{layer}", shape, _truncated_normal, generator, bias=out)
        new_norm(params, f"{name}.norm2", channels)
        if config.relative:
            side = config.relative_grid if _is_global(config, i) else config.window
            for axis in ("h", "w"):
                shape = (2 * side - 1, channels // config.heads)
                params[f"{name}.attn.rel_pos_{axis}"] = torch.zeros(shape)
        if config.layer_scale:
            for k in (1, 2):
                params[f"{name}.ls{k}.gamma"] = torch.full((channels,), SCALE)


def _truncated_normal(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(tensor, std=0.02, generator=generator)


def _is_global(config: ViTConfig, block: int) -> bool:
    return config.window == 0 or block in config.global_blocks


def _block(params: Params, config: ViTConfig, index: int, x: Tensor, keep: Tensor | None) -> Tensor:
    """One block on [B, h, w, C]; `keep` [B, 2] multiplies what its two halves add."""
    name = f"{PREFIX}.blocks.{index}"
    y = _norm(params, f"{name}.norm1", x)
    if _is_global(config, index):
        y = _attention(params, config, f"{name}.attn", y)
    else:
        windows = _windows(y, config.window)
        windows = _attention(params, config, f"{name}.attn", windows)
        y = _unwindowed(windows, x.shape)
    x = x + _scaled(params, f"{name}.ls1", y, None if keep is None else keep[:, 0])
    y = _norm(params, f"{name}.norm2", x).flatten(0, 2)
    y = linear(params, f"{name}.mlp.fc2", F.gelu(linear(params, f"{name}.mlp.fc1", y)))
    y = y.view(x.shape)
    return x + _scaled(params, f"{name}.ls2", y, None if keep is None else keep[:, 1])


def _attention(params: Params, config: ViTConfig, name: str, x: Tensor) -> Tensor:
    """Each patch of [N, h, w, C] attends to all of its window."""
    count, height, width, channels = x.shape
    qkv = linear(params, f"{name}.qkv", x.flatten(0, 2))
    qkv = qkv.view(count, height * width, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    bias = None
    if config.relative:
        bias = _relative_bias(params, name, q.unflatten(2, (height, width)))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y = y.transpose(1, 2).reshape(-1, channels)
    return linear(params, f"{name}.proj", y).view(x.shape)


def _relative_bias(params: Params, name: str, q: Tensor) -> Tensor:
    """What relative positions add to the logits of queries [N, heads, h, w, c] (Li et al., 2022b).

    Returns:
        [N, heads, h * w, h * w].
    """
    height, width = q.shape[2:4]
    rows = _relative(params[f"{name}.rel_pos_h"], height).to(q.dtype)
    columns = _relative(params[f"{name}.rel_pos_w"], width).to(q.dtype)
    by_row = torch.einsum("nahwc,hkc->nahwk", q, rows)
    by_column = torch.einsum("nahwc,wkc->nahwk", q, columns)
    bias = by_row[..., :, None] + by_column[..., None, :]
    return bias.flatten(4, 5).flatten(2, 3)


def _relative(table: Tensor, size: int) -> Tensor:
    """[size, size, c]: the embedding of the distance from each query to each key."""
    if len(table) != 2 * size - 1:
        table = _resampled(len(table), 2 * size - 1, "linear", table) @ table.float()
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def _positions(embedding: Tensor, height: int, width: int) -> Tensor:
    """[h, w, C] of the stored [1, grid * grid, C], resized by bicubic interpolation."""
    grid = int(embedding.shape[1] ** 0.5)
    table = embedding.float().view(grid, grid, -1)
    rows = _resampled(grid, height, "bicubic", table)
    columns = _resampled(grid, width, "bicubic", table)
    return torch.einsum("hg,gkc,wk->hwc", rows, table, columns)


def _resampled(count: int, size: int, mode: str, like: Tensor) -> Tensor:
    """The matrix [size, count] that resizes `count` numbers.

    As a product, resizing has a gradient whose order is fixed.
    """
    one = torch.eye(count, device=like.device)
    if mode == "linear":
        return F.interpolate(one[None], size=size, mode="linear")[0].t()
    return F.interpolate(one[None, None], size=(size, count), mode="bicubic")[0, 0]


def _windows(x: Tensor, side: int) -> Tensor:
    """[B, h, w, C] as windows [N, side, side, C], padded with zeros to whole ones."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(0, 2)


def _unwindowed(windows: Tensor, shape: torch.Size) -> Tensor:
    """The [B, h, w, C] that `_windows` cut up."""
    batch, height, width, _ = shape
    side = windows.shape[1]
    rows, columns = -(-height // side), -(-width // side)
    x = windows.unflatten(0, (batch, rows, columns)).permute(0, 1, 3, 2, 4, 5)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _norm(params: Params, name: str, x: Tensor) -> Tensor:
    weight, bias = params[f"{name}.weight"].to(x.dtype), params[f"{name}.bias"].to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, LN_EPS)


def _scaled(params: Params, name: str, x: Tensor, keep: Tensor | None) -> Tensor:
    if f"{name}.gamma" in params:
        x = x * params[f"{name}.gamma"].to(x.dtype)
    return x if keep is None else x * keep[:, None, None, None].to(x.dtype)
