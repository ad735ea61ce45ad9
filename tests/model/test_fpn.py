import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from casc.model.fpn import FPNConfig, fpn, init_fpn
from casc.model.layers import Params

CHANNELS = [8, 16, 24, 40]
NAMES = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}


def maps(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, h, w, generator=generator)
        for c, (h, w) in zip(CHANNELS, sizes, strict=True)
    ]


def torchvision_neck(norm: str) -> tuple[FeaturePyramidNetwork, Params]:
    torch.manual_seed(0)
    layer = (lambda c: nn.GroupNorm(32, c)) if norm == "gn" else None
    neck = FeaturePyramidNetwork(CHANNELS, 32, LastLevelMaxPool(), layer)
    params = {}
    for name, tensor in neck.state_dict().items():
        # inner_blocks.2.0.weight: block, level, 0 the convolution or 1 the norm.
        block, level, part, kind = name.split(".")
        nn.init.normal_(tensor, std=0.2)
        params[f"neck.{NAMES[block]}.{level}.{'conv' if part == '0' else 'gn'}.{kind}"] = tensor
    return neck, params


@pytest.mark.parametrize("norm", ["none", "gn"])
# The second pyramid isn't exactly halved from level to level.
@pytest.mark.parametrize(
    "sizes", [[(24, 32), (12, 16), (6, 8), (3, 4)], [(25, 34), (13, 17), (7, 9), (4, 5)]]
)
def test_levels_are_torchvisions(norm, sizes):
    neck, params = torchvision_neck(norm)
    inputs = maps(sizes)
    made = fpn(params, FPNConfig(channels=32, norm=norm), inputs)
    with torch.no_grad():
        expected = list(neck({str(i): x for i, x in enumerate(inputs)}).values())
    assert len(made) == len(expected) == 5
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_p6_is_every_second_cell_of_p5():
    _, params = torchvision_neck("none")
    *_, p5, p6 = fpn(params, FPNConfig(channels=32), maps([(24, 32), (12, 16), (6, 8), (3, 4)]))
    assert torch.equal(p6, p5[:, :, ::2, ::2])


def test_compiled_equals_eager(compiled):
    _, params = torchvision_neck("none")
    inputs, config = maps([(24, 32), (12, 16), (6, 8), (3, 4)]), FPNConfig(channels=32)
    fast = compiled(fpn)(params, config, inputs)
    for made, expected in zip(fast, fpn(params, config, inputs), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "gn"])
def test_fresh_parameters_are_the_ones_that_it_reads(norm):
    params: Params = {}
    config = FPNConfig(channels=32, norm=norm)
    init_fpn(config, CHANNELS, params, torch.Generator().manual_seed(0))
    _, expected = torchvision_neck(norm)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in expected.items()}
