"""timm's networks as functions against timm's own modules."""

import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from casc.errors import UserError
from casc.model.backbone import (
    drop_places,
    feature_maps,
    init_backbone,
    is_frozen,
    layers_above,
    map_channels,
)
from casc.model.layers import Params
from casc.model.resnet import ResNetConfig
from casc.model.timm_backbone import TimmConfig, drop_rates
from casc.train.optim import Optim, decay_of

# One of each family, and which of its maps a detector reads. The last has one map.
FAMILIES = {
    "convnext_atto": (0, 1, 2, 3),
    "convnextv2_atto": (0, 1, 2, 3),
    "swin_tiny_patch4_window7_224": (0, 1, 2, 3),
    "resnet18": (1, 2, 3, 4),
    "efficientnet_b0": (1, 2, 3, 4),
    "mobilenetv3_small_050": (1, 2, 3, 4),
    "vit_small_patch16_dinov3": (-1,),
}
SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"strict_img_size": False},
    "vit_small_patch16_dinov3": {"dynamic_img_size": True},
}
DROP = 0.4


def network(name: str, drop_path: float = 0.0) -> tuple[TimmConfig, Params, Params, nn.Module]:
    """casc's config and tensors, and timm's module with the same numbers, all of them random."""
    config = TimmConfig(name, drop_path)
    params, buffers = {}, {}
    init_backbone(config, params, buffers, torch.Generator().manual_seed(0))
    module = timm.create_model(
        name, features_only=True, out_indices=FAMILIES[name], **SIZES.get(name, {}),
        drop_path_rate=drop_path,
    )  # fmt: skip
    stored = module.state_dict().keys()
    generator = torch.Generator().manual_seed(1)
    for tensors in (params, buffers):
        for key, value in tensors.items():
            known = key.removeprefix("backbone.") in stored  # others are tables that timm makes
            if known and value.is_floating_point() and value.ndim == 1:
                tensors[key] = torch.rand(value.shape, generator=generator) + 0.5
    tensors = {k.removeprefix("backbone."): v for k, v in {**params, **buffers}.items()}
    module.load_state_dict({key: tensors[key].clone() for key in stored})
    return config, params, buffers, module.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def as_nchw(maps: list[Tensor], channels: list[int]) -> list[Tensor]:
    pairs = zip(maps, channels, strict=True)
    return [x if x.shape[1] == c else x.permute(0, 3, 1, 2) for x, c in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_timms_in_one_graph(name):
    """Each family, with paths dropped and without; other noise is no other graph."""
    config, params, buffers, module = network(name, DROP if name != "resnet18" else 0.0)
    places = drop_places(config)
    drop = torch.rand(2, places, generator=torch.Generator().manual_seed(3))
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(feature_maps, backend=count, fullgraph=True, dynamic=False)
    with torch.no_grad():
        theirs = as_nchw(module(image()), map_channels(config))
        for ours in (
            feature_maps(params, buffers, config, image()),
            compiled(params, buffers, config, image()),
        ):
            assert len(ours) == len(theirs) == len(FAMILIES[name])
            assert_equal(ours, theirs)
        if places:
            hook_drops(module, drop, config)
            dropped = as_nchw(module(image()), map_channels(config))
            assert not torch.equal(dropped[-1], theirs[-1])
            for ours in (
                feature_maps(params, buffers, config, image(), drop),
                compiled(params, buffers, config, image(), drop),
            ):
                assert_equal(ours, dropped)
            compiled(params, buffers, config, image(), 1 - drop)
    assert len(graphs) == (2 if places else 1)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To 1e-5 of each map's largest value."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def hook_drops(module: nn.Module, drop: Tensor, config: TimmConfig) -> None:
    """Let timm's drop paths, which do nothing in evaluation, do what `drop` says."""
    parts = [part for part in module.modules() if type(part).__name__ == "DropPath"]
    for i, part in enumerate(parts):
        keep = 1 - float(part.drop_prob)  # type: ignore[arg-type]
        factor = np.where(drop[:, i].numpy() >= 1 - keep, 1 / keep, 0.0)

        def scale(_, __, output, factor=factor):
            shape = [len(factor)] + [1] * (output.ndim - 1)
            return output * torch.tensor(factor, dtype=torch.float32).view(shape)

        part.register_forward_hook(scale)
    assert len(parts) == len(drop_rates(config))


def test_rates_grow_from_block_to_block():
    config = TimmConfig("convnext_atto", 0.3)
    assert drop_places(config) > 11
    # Of 12 blocks, the first is never left out, and so has no place.
    np.testing.assert_allclose(list(drop_rates(config).values()), np.linspace(0, 0.3, 12)[1:])
    assert drop_places(replace(config, drop_path=0.0)) == drop_places(ResNetConfig()) == 0


def test_gradients_are_timms():
    """Of every parameter, compiled; statistics and frozen stages get none."""
    config, params, buffers, module = network("convnext_atto")
    config = replace(config, frozen_stages=1)
    for name, value in params.items():
        value.requires_grad_(not is_frozen(config, name))

    def loss(maps: list[Tensor]) -> Tensor:
        return torch.stack([x.square().mean() for x in maps]).sum()

    torch.compiler.reset()
    function = torch.compile(
        lambda p, x: loss(feature_maps(p, buffers, config, x)), backend="aot_eager",
        fullgraph=True, dynamic=False,
    )  # fmt: skip
    function(params, image()).backward()
    loss(module(image())).backward()
    theirs = {f"backbone.{name}": value.grad for name, value in module.named_parameters()}
    frozen = {name for name, value in params.items() if value.grad is None}
    assert {name.split(".")[1] for name in frozen} == {"stem_0", "stem_1", "stages_0"}
    for name in params.keys() - frozen:
        torch.testing.assert_close(params[name].grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_precision_follows_the_image():
    """bf16 but for batch norms, whose statistics it would spoil."""
    config, params, buffers, module = network("mobilenetv3_small_050")
    with torch.no_grad():
        exact = module(image())
        maps = feature_maps(params, buffers, config, image().bfloat16())
    for ours, theirs in zip(maps, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < 0.05


def published_layer(name: str) -> int:
    """ConvNeXt-T's layers for detection, as its authors number them: 0 to 6 and the heads' 7."""
    found = re.match(r"backbone\.stages_(\d)\.(downsample|blocks\.(\d+))\.", name)
    if found is None:
        return 0 if name.startswith("backbone.stem") else 7
    stage, block = int(found[1]), int(found[3] or 0)
    return {0: 1, 1: 2, 2: 3 + block // 3, 3: 6}[stage]


def test_layers_of_convnext_are_its_authors():
    config = TimmConfig("convnext_tiny")
    with torch.device("meta"):
        params: Params = {"neck.a": torch.empty(1)}
        init_backbone(config, params, {}, None)  # type: ignore[arg-type]
    above = layers_above(config, list(params))
    for name in params:
        assert above.get(name, 0) == 7 - published_layer(name), name


def test_layers_and_decay_of_swin():
    """Stages of 2, 2, 6 and 2 blocks; its authors let no norm and no table of positions decay."""
    config = TimmConfig("swin_tiny_patch4_window7_224")
    params: Params = {}
    with torch.device("meta"):
        init_backbone(config, params, {}, None)  # type: ignore[arg-type]
    above = layers_above(config, list(params))
    groups = {
        "patch_embed": 6, "layers_0": 5, "layers_1": 4, "layers_2.downsample": 3,
        **{f"layers_2.blocks.{i}": 3 - i // 3 for i in range(6)}, "layers_3": 1,
    }  # fmt: skip
    for start, expected in groups.items():
        found = {v for k, v in above.items() if k.startswith(f"backbone.{start}.")}
        assert found == {expected}, start
    optim = Optim(weight_decay=0.1, decay_vectors=False)
    for name, value in params.items():
        spared = "norm" in name or name.endswith((".bias", ".relative_position_bias_table"))
        assert decay_of(optim, name, value) == (0.0 if spared else 0.1), name


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swinv2_tiny_window8_256", "fastvit_t8",
     "edgenext_small", "convnextv2_atto"],
)  # fmt: skip
def test_only_matrices_and_kernels_decay(name):
    """timm's own list, and what its shape only hides: tokens, temperatures, scales of channels."""
    config, params = TimmConfig(name), {}
    with torch.device("meta"):
        init_backbone(config, params, {}, None)  # type: ignore[arg-type]
        module: Any = timm.create_model(name)
    theirs = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    optim = Optim(weight_decay=0.1, decay_vectors=False)
    decaying = {k for k, v in params.items() if decay_of(optim, k, v)}
    assert decaying
    assert all(k.endswith(".weight") and params[k].ndim > 1 for k in decaying), decaying
    spared = {k for k in params if k.removeprefix("backbone.").removeprefix("model.") in theirs}
    assert not spared & decaying


def test_layers_and_stages_of_others():
    """Three blocks of a ResNet's stage are a layer, and each block of a plain network."""
    params: Params = {}
    with torch.device("meta"):
        init_backbone(ResNetConfig(), params, {}, None)  # type: ignore[arg-type]
    above = layers_above(ResNetConfig(), list(params))
    blocks = {"conv1": 7, "layer1.2": 6, "layer2.2": 5, "layer2.3": 4, "layer3.5": 2, "layer4.0": 1}
    for start, expected in blocks.items():
        found = {v for k, v in above.items() if k.startswith(f"backbone.{start}.")}
        assert found == {expected}, start
    # What lies between two maps belongs to the later one's stage: EfficientNet has maps of
    # blocks 1, 2, 4 and 6.
    config, params = TimmConfig("efficientnet_b0"), {}
    with torch.device("meta"):
        init_backbone(config, params, {}, None)  # type: ignore[arg-type]
    for stages, first in ((0, 1), (1, 2), (2, 3), (3, 5), (4, 7)):
        frozen = [k for k in params if is_frozen(replace(config, frozen_stages=stages), k)]
        held = {int(k.split(".")[2]) for k in frozen if ".blocks." in k}
        assert held == set(range(first)), stages
    config = TimmConfig("vit_tiny_patch16_224", frozen_stages=2)
    params = {}
    with torch.device("meta"):
        init_backbone(config, params, {}, None)  # type: ignore[arg-type]
    above = layers_above(config, list(params))
    assert above["backbone.model.pos_embed"] == 13
    assert above["backbone.model.blocks.11.mlp.fc2.bias"] == 1
    frozen = {".".join(k.split(".")[2:4]) for k in params if is_frozen(config, k)}
    assert {"blocks.0", "blocks.1", "patch_embed.proj"} < frozen
    assert "blocks.2" not in frozen


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TimmConfig("convnext_tinny"), "name .* timm .* has no such model; it has convnext_tiny, "),
        (
            TimmConfig("swin_tiny_patch4_window7_22"),
            "name .* no such model; it has swin_tiny_patch4_window7_224, ",
        ),
        (TimmConfig("12345"), "name .* no such model; timm.list_models"),
        (TimmConfig("vit_base_patch32_224"), r"name .* its maps have strides \[32"),
        (TimmConfig("hiera_tiny_224"), "name .* takes no images of 64 x 96 pixels"),
        (TimmConfig("vgg11", 0.1), "drop-path 0.1: vgg11 has no paths to drop; use 0"),
    ],
)
def test_networks_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UserError, match=f"--model.backbone.{message}"):
        init_backbone(config, {}, {}, torch.Generator())


def test_without_timm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'casc\[timm\]'"):
        map_channels(TimmConfig("convnext_atto_of_nobody"))
