from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from casc.model.backbone import is_frozen
from casc.model.layers import Params
from casc.model.resnet import BLOCKS, ResNetConfig, init_resnet, out_channels, resnet


def named(config: ResNetConfig) -> tuple[Params, Params]:
    params: Params = {}
    buffers: Params = {}
    init_resnet(config, params, buffers, torch.Generator().manual_seed(0))
    return params, buffers


def torchvision_net(depth: int, norm: str) -> nn.Module:
    """torchvision's network in evaluation mode, with norms and statistics that matter."""
    layer = partial(nn.GroupNorm, 32) if norm == "gn" else nn.BatchNorm2d
    torch.manual_seed(depth)
    net = getattr(models, f"resnet{depth}")(weights=None, norm_layer=layer).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def our_name(name: str, norm: str) -> str:
    """torchvision's name under our prefix; mmdet calls group norms gn."""
    parts = name.split(".")
    if norm == "gn":
        parts = [p.replace("bn", "gn") if p.startswith("bn") else p for p in parts]
    return ".".join(["backbone", *parts])


def maps_of(net: nn.Module, image: Tensor) -> list[Tensor]:
    stem = nn.Sequential(*(getattr(net, k) for k in ("conv1", "bn1", "relu", "maxpool")))
    maps, x = [], stem(image)
    for i in range(1, 5):
        x = getattr(net, f"layer{i}")(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
@pytest.mark.parametrize("depth", BLOCKS)
def test_names_and_shapes_are_torchvisions(depth, norm):
    layer = partial(nn.GroupNorm, 32) if norm == "gn" else nn.BatchNorm2d
    with torch.device("meta"):
        net = getattr(models, f"resnet{depth}")(weights=None, norm_layer=layer)
    params, buffers = named(ResNetConfig(depth=depth, norm=norm))
    theirs = {
        our_name(k, norm): tuple(v.shape)
        for k, v in net.state_dict().items()
        if not k.startswith("fc.")
    }
    assert {k: tuple(v.shape) for k, v in (params | buffers).items()} == theirs
    assert set(params) == {
        our_name(k, norm) for k, _ in net.named_parameters() if not k.startswith("fc.")
    }


@pytest.mark.parametrize(
    ("depth", "norm"), [(18, "frozen_bn"), (50, "frozen_bn"), (18, "gn"), (50, "gn")]
)
def test_activations_are_torchvisions(depth, norm):
    net = torchvision_net(depth, norm)
    config = ResNetConfig(depth=depth, norm=norm)
    state = {our_name(k, norm): v for k, v in net.state_dict().items()}
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made, expected = resnet(state, state, config, image), maps_of(net, image)
    for ours, theirs, channels, stride in zip(
        made, expected, out_channels(config), (4, 8, 16, 32), strict=True
    ):
        assert ours.shape == (2, channels, 64 // stride, 96 // stride)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_stride_may_sit_in_the_first_convolution():
    net = torchvision_net(50, "frozen_bn")
    state = {our_name(k, "bn"): v for k, v in net.state_dict().items()}
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for name in ("layer2", "layer3", "layer4"):
        block: Any = next(net.get_submodule(name).children())
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    with torch.no_grad():
        made = resnet(state, state, ResNetConfig(depth=50, stride_in_1x1=True), image)
        other = resnet(state, state, ResNetConfig(depth=50), image)
        for ours, theirs in zip(made, maps_of(net, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (made[1] - other[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="no 1x1"):
        resnet({}, {}, ResNetConfig(depth=18, stride_in_1x1=True), image)


def test_gradients_are_torchvisions():
    net = torchvision_net(18, "frozen_bn")
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.stack([m.square().sum() for m in maps_of(net, image)]).sum().backward()
    params = {
        our_name(k, "bn"): v.detach().clone().requires_grad_() for k, v in net.named_parameters()
    }
    buffers = {our_name(k, "bn"): v for k, v in net.named_buffers()}
    made = resnet(params, buffers, ResNetConfig(depth=18), image)
    torch.stack([m.square().sum() for m in made]).sum().backward()
    for name, parameter in net.named_parameters():
        if not name.startswith("fc."):
            ours, theirs = params[our_name(name, "bn")].grad, parameter.grad
            assert ours is not None
            assert theirs is not None
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_compiled_equals_eager(compiled, monkeypatch):
    # The step's tests compile batch norms and four stages, the goldens' bottlenecks.
    monkeypatch.setitem(BLOCKS, 18, (1, 2))
    config = ResNetConfig(depth=18, norm="gn", width=8)
    params, buffers = named(config)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    fast = compiled(resnet)(params, buffers, config, image)
    for made, expected in zip(fast, resnet(params, buffers, config, image), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [-1, 0, 1, 4])
def test_frozen_stages(stages):
    params, _ = named(ResNetConfig(depth=18, width=8))
    config = ResNetConfig(depth=18, width=8, frozen_stages=stages)
    frozen = {name.split(".")[1] for name in params if is_frozen(config, name)}
    free = {name.split(".")[1] for name in params if not is_frozen(config, name)}
    parts = [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]
    assert frozen == set().union(*parts[: stages + 1])
    assert free == set().union(*parts[stages + 1 :])
    assert not is_frozen(config, "neck.lateral_convs.0.conv.weight")


def test_width_scales_every_channel():
    params, _ = named(ResNetConfig(depth=50, width=16))
    whole, _ = named(ResNetConfig(depth=50))
    for name, tensor in params.items():
        for a, b in zip(tensor.shape, whole[name].shape, strict=True):
            assert a == b or 4 * a == b
    assert out_channels(ResNetConfig(depth=50, width=16)) == [64, 128, 256, 512]


@pytest.mark.parametrize("depth", [18, 50])
# What is saved and what is recomputed is decided before code is generated, so none is.
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_recomputing_changes_no_number(backend, depth, monkeypatch):
    # The first of two stages is frozen; the second has a block that strides and one that doesn't.
    monkeypatch.setitem(BLOCKS, depth, (1, 2))

    def mode(function):
        return torch.compile(function, backend=backend, fullgraph=True) if backend else function

    torch.compiler.reset()
    results = []
    for recompute in (False, True):
        config = ResNetConfig(depth=depth, width=8, recompute=recompute)
        params, buffers = named(config)
        for name, value in params.items():
            value.requires_grad_(not is_frozen(config, name))
        image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
        run = mode(lambda params, buffers, image, c=config: resnet(params, buffers, c, image))
        maps = run(params, buffers, image)
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        results.append([*maps, *(v.grad for v in params.values())])
    for plain, again in zip(*results, strict=True):
        if plain is None:
            assert again is None
        else:
            # Small entries are sums of large ones. Against float64, either way is within 2e-6 of
            # a tensor's largest entry.
            atol = 1e-5 * plain.abs().max().item()
            torch.testing.assert_close(again, plain, rtol=1e-5, atol=atol)


def test_recomputing_keeps_less():
    kept = []
    for recompute in (False, True):
        config = ResNetConfig(depth=50, width=8, recompute=recompute)
        params, buffers = named(config)
        for name, value in params.items():
            value.requires_grad_(not is_frozen(config, name))
        weights = {v.data_ptr() for v in params.values()}
        bytes_kept = 0

        def count(x: Tensor, weights=weights) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += x.nbytes * (x.data_ptr() not in weights)
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            resnet(params, buffers, config, torch.randn(1, 3, 128, 128))
        kept.append(bytes_kept)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_wait_for_each_other_are_the_same(dtype, monkeypatch):
    """As a step compiled for an accelerator folds its norms: the same bits."""
    config = ResNetConfig(depth=50, width=8)
    params, buffers = named(config)
    generator = torch.Generator().manual_seed(0)
    for name, value in buffers.items():
        if name.endswith("var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith("mean"):  # so small that nothing dies
            value.copy_(0.2 * torch.rand(value.shape, generator=generator) - 0.1)
    leaves = [p.requires_grad_() for name, p in params.items() if not is_frozen(config, name)]
    image = torch.randn(1, 3, 64, 64, generator=generator).to(dtype)

    def run() -> list[Tensor]:
        maps = resnet(params, buffers, config, image)
        total = torch.stack([x.float().square().mean() for x in maps]).sum()
        return [*maps, *torch.autograd.grad(total, leaves)]

    apart = run()
    monkeypatch.setattr("casc.model.resnet.gathers_gradients", lambda x: True)
    for made, expected in zip(run(), apart, strict=True):
        assert expected.any()
        assert torch.equal(made, expected)
