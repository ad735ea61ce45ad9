"""The plain vision transformer and its pyramid against timm's and torch's modules."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from casc.model.backbone import drop_places, feature_maps, init_backbone, is_frozen, layers_above
from casc.model.fpn import FPNConfig, fpn, init_fpn
from casc.model.layers import Params
from casc.model.vit import ViTConfig, vit

CONFIG = ViTConfig(
    channels=32, depth=3, heads=2, grid=5, window=4, global_blocks=(1,), relative_grid=6,
    layer_scale=True, drop_path=0.5,
)  # fmt: skip
CANVAS = (64, 96)


def random_params(config: ViTConfig) -> Params:
    params: Params = {}
    init_backbone(config, params, {}, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for name, value in params.items():
        params[name] = value + 0.2 * torch.randn(value.shape, generator=generator)
    return params


def image() -> Tensor:
    return torch.randn(2, 3, *CANVAS, generator=torch.Generator().manual_seed(2))


def their_features(config: ViTConfig, params: Params) -> Tensor:
    """timm's transformer with windows (of SAM, whose encoder is ViTDet's), its numbers ours."""
    module = VisionTransformerSAM(
        img_size=CANVAS, embed_dim=config.channels, depth=config.depth, num_heads=config.heads,  # type: ignore[arg-type]
        window_size=config.window, global_attn_indexes=config.global_blocks,
        use_rel_pos=config.relative, init_values=1.0 if config.layer_scale else None,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        use_abs_pos=False, num_classes=0,
    ).eval()  # fmt: skip
    mine = {name.removeprefix("backbone."): value for name, value in params.items()}
    embedding = mine.pop("pos_embed").view(1, config.grid, config.grid, -1).permute(0, 3, 1, 2)
    embedding = F.interpolate(embedding, size=(4, 6), mode="bicubic")
    for i in config.global_blocks if config.relative else ():
        for axis in ("h", "w"):  # theirs come in the canvas's size; it resizes others
            name = f"blocks.{i}.attn.rel_pos_{axis}"
            part = module.get_submodule(f"blocks.{i}.attn")
            setattr(part, f"rel_pos_{axis}", nn.Parameter(mine[name]))
    missing = module.load_state_dict(mine, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("neck", "head")) for name in missing.missing_keys)
    with torch.no_grad():
        x = module.patch_embed(image()) + embedding.permute(0, 2, 3, 1)
        return module.blocks(x).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("mode", "relative"),
    # What relative positions add is in the one graph.
    [("eager", False), ("eager", True), ("compiled", True)],
    indirect=["mode"],
)
def test_features_are_timms(mode, relative):
    """Windows that must be padded, resized embeddings, a canvas that isn't square."""
    config = replace(CONFIG, depth=2, relative=relative)
    params = random_params(config)
    with torch.no_grad():
        (made,) = mode(partial(feature_maps, config=config))(params, {}, image=image())
    torch.testing.assert_close(made, their_features(config, params), rtol=1e-4, atol=1e-5)


def test_without_windows_every_block_is_global():
    config = replace(CONFIG, window=0, relative=False)
    params = random_params(config)
    every = replace(config, window=4, global_blocks=(0, 1, 2))
    with torch.no_grad():
        made = vit(params, config, image())
        assert torch.equal(made, vit(params, every, image()))
        assert not torch.equal(made, vit(params, replace(every, global_blocks=()), image()))


def test_dropped_paths_add_nothing():
    """The first block always counts; others by their own numbers, for each image by itself."""
    params = random_params(CONFIG)
    assert drop_places(CONFIG) == 6
    keep = torch.full((2, 6), 0.999)
    drop = keep.clone()
    drop[0, 2:] = 0.0  # of the first image all that can be dropped is
    with torch.no_grad():
        kept, some = vit(params, CONFIG, image(), keep), vit(params, CONFIG, image(), drop)
        first = vit(params, replace(CONFIG, depth=1), image())
        # What is kept counts for what is dropped: by 1 / (1 - 0.25) and 1 / (1 - 0.5).
        scaled = dict(params)
        for i, factor in ((1, 4 / 3), (2, 2.0)):
            for part in ("ls1.gamma", "ls2.gamma"):
                name = f"backbone.blocks.{i}.{part}"
                scaled[name] = factor * params[name]
        torch.testing.assert_close(kept, vit(scaled, CONFIG, image()))
    torch.testing.assert_close(some[0], first[0])
    torch.testing.assert_close(some[1], kept[1])


def test_the_halves_of_a_block_are_dropped_apart():
    params = random_params(CONFIG)
    with torch.no_grad():
        for block, half in ((1, 0), (1, 1), (2, 0), (2, 1)):
            drop = torch.full((2, 6), 0.999)
            drop[:, 2 * block + half] = 0.0
            nothing = dict(params)
            name = f"backbone.blocks.{block}.ls{half + 1}.gamma"
            nothing[name] = torch.zeros_like(params[name])
            made = vit(params, CONFIG, image(), drop)
            right = vit(nothing, CONFIG, image(), torch.full((2, 6), 0.999))
            torch.testing.assert_close(made, right)


def test_recomputing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        params = {name: value.requires_grad_() for name, value in random_params(CONFIG).items()}
        vit(params, replace(CONFIG, recompute=recompute), image()).square().mean().backward()
        grads.append({name: value.grad for name, value in params.items()})
    for name, grad in grads[0].items():
        assert grad is not None
        assert grad.abs().sum() > 0, name
        assert torch.equal(grad, grads[1][name]), name


def test_frozen_blocks_and_layers():
    params = random_params(CONFIG)
    config = replace(CONFIG, frozen_stages=1)
    frozen = {name for name in params if is_frozen(config, name)}
    assert {name.split(".")[1] for name in frozen} == {"patch_embed", "pos_embed", "blocks"}
    assert {name.split(".")[2] for name in frozen if ".blocks." in name} == {"0"}
    above = layers_above(CONFIG, list(params))
    assert above["backbone.pos_embed"] == above["backbone.patch_embed.proj.bias"] == 4
    assert [above[f"backbone.blocks.{i}.norm1.weight"] for i in range(3)] == [3, 2, 1]


def test_the_simple_pyramid_is_torchs(mode):
    params: Params = {}
    generator = torch.Generator().manual_seed(3)
    init_fpn(FPNConfig(channels=16, norm="ln"), [32], params, generator)
    for name, value in params.items():
        params[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    x = torch.randn(2, 32, 4, 6, generator=generator)

    def filled(module: nn.Module, name: str) -> nn.Module:
        state = {k: params[f"{name}.{k}"] for k in module.state_dict()}
        module.load_state_dict(state)
        return module

    def norm(name: str, channels: int, x: Tensor) -> Tensor:
        layer = filled(nn.LayerNorm(channels, eps=1e-6), name)
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def up(name: str, c: int, x: Tensor) -> Tensor:
        return filled(nn.ConvTranspose2d(c, c // 2, 2, 2), name)(x)

    with torch.no_grad():
        made = mode(partial(fpn, config=FPNConfig(channels=16, norm="ln")))(params, maps=[x])
        quarter = up("neck.fpn1.3", 16, F.gelu(norm("neck.fpn1.1", 16, up("neck.fpn1.0", 32, x))))
        maps = [quarter, up("neck.fpn2.0", 32, x), x, F.max_pool2d(x, 2)]
        expected = []
        for i, y in enumerate(maps):
            y = filled(nn.Conv2d(y.shape[1], 16, 1, bias=False), f"neck.lateral_convs.{i}.conv")(y)
            y = norm(f"neck.lateral_convs.{i}.ln", 16, y)
            y = filled(nn.Conv2d(16, 16, 3, padding=1, bias=False), f"neck.fpn_convs.{i}.conv")(y)
            expected.append(norm(f"neck.fpn_convs.{i}.ln", 16, y))
        expected.append(expected[-1][:, :, ::2, ::2])
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
