import pytest
import torch
from torch import Tensor, nn

from casc.model import layers


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def params_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{k}": v.detach() for k, v in module.state_dict().items()}


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "conv": nn.Conv2d(6, 8, 3, stride=2, padding=1),
        "no_bias": nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        "bn": nn.BatchNorm2d(8).eval(),
        "gn": nn.GroupNorm(32, 64),
        "few": nn.GroupNorm(8, 24),
        "linear": nn.Linear(5, 7),
    }
    norms = (m for m in made.values() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm))
    for seed, norm in enumerate(norms):
        shape = norm.weight.shape[0]
        norm.weight.data = 1 + 0.3 * randn(shape, seed=seed)
        norm.bias.data = randn(shape, seed=10 + seed)
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = randn(shape, seed=20)
            norm.running_var = 0.5 + randn(shape, seed=21).abs()
    return made


def test_layers_are_torchs(mode):
    nets = modules()
    params = {k: v for name, net in nets.items() for k, v in params_of(net, name).items()}
    image, wide, rows = randn(2, 6, 9, 12), randn(2, 64, 4, 5), randn(3, 5)

    def run(params, image, wide, rows):
        norms = layers.frozen_norms(params, params, image.dtype)
        return (
            layers.conv(params, "conv", image, 2, 1),
            layers.conv(params, "no_bias", image, 2, 1),
            layers.conv_affine(params, "no_bias", norms["bn"], image, 2, 1),
            layers.group_norm(params, "gn", wide),
            layers.group_norm(params, "few", wide[:, :24]),
            layers.linear(params, "linear", rows),
        )

    with torch.no_grad():
        expected = (
            nets["conv"](image),
            nets["no_bias"](image),
            nets["bn"](nets["no_bias"](image)),
            nets["gn"](wide),
            nets["few"](wide[:, :24]),
            nets["linear"](rows),
        )
        for made, right in zip(mode(run)(params, image, wide, rows), expected, strict=True):
            torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-5)


def test_group_norm_normalises_over_the_image_alone(mode):
    """As torch does with what is cut out; whole, in part, and the 1 x 1 that fills up a batch."""
    net = modules()["gn"]
    params, image = params_of(net, "gn"), 3 * randn(3, 64, 12, 16)
    # Of a canvas of 48 x 64 pixels, 4 to a cell; the second image ends within a cell.
    size = torch.tensor([[48.0, 64], [22, 41], [1, 1]])

    def run(params, image, size):
        return layers.group_norm(params, "gn", image, layers.image_cells(size, (48, 64), (4, 8)))

    made = mode(run)(params, image, size)
    for i, (height, width) in enumerate(((12, 16), (6, 11), (1, 1))):
        with torch.no_grad():
            right = net(image[i : i + 1, :, :height, :width])
        torch.testing.assert_close(made[i : i + 1, :, :height, :width], right, rtol=1e-4, atol=1e-5)
    assert made.isfinite().all()


def test_frozen_bn_has_batch_norms_gradients():
    nets = modules()
    conv, bn = nets["no_bias"], nets["bn"]
    params = params_of(conv, "conv") | params_of(bn, "bn")
    leaves = {
        k: params[k].clone().requires_grad_() for k in ("conv.weight", "bn.weight", "bn.bias")
    }
    weight = randn(2, 8, 5, 6, seed=3)
    norms = layers.frozen_norms(leaves, params, torch.float32)
    made = layers.conv_affine(leaves, "conv", norms["bn"], randn(2, 6, 9, 12), 2, 1)
    (made * weight).sum().backward()
    (bn(conv(randn(2, 6, 9, 12))) * weight).sum().backward()
    theirs = dict(conv.named_parameters("conv")) | dict(bn.named_parameters("bn"))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


def test_norms_that_do_not_train_get_no_gradient():
    params = {"a.weight": torch.ones(3), "b.weight": torch.ones(2).requires_grad_()}
    params |= {"a.bias": torch.zeros(3), "b.bias": torch.zeros(2).requires_grad_()}
    stats = {f"{n}.running_mean": torch.zeros(c) for n, c in (("a", 3), ("b", 2))}
    stats |= {f"{n}.running_var": torch.ones(c) for n, c in (("a", 3), ("b", 2))}
    norms = layers.frozen_norms(params, stats, torch.bfloat16)
    made = [t for name in "ab" for t in norms[name] if t is not None]
    assert [t.requires_grad for t in made] == [False, False, True, True]
    assert [t.dtype for t in made[2:]] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_folded_by_rows_are_norms_folded_one_by_one(dtype):
    """Several weights of a length, one of another, and one that doesn't train; to the bit."""
    shapes = {"a": (4, 6, 1, 1), "b": (3, 2, 3, 3), "c": (8, 6, 1, 1), "d": (2, 6, 1, 1)}
    params, stats, convs = {}, {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        trains, channels, norm = name != "d", shape[0], f"{name}.bn"
        params[f"{name}.weight"] = randn(*shape, seed=seed).requires_grad_(trains)
        for kind, add in (("weight", 10), ("bias", 20)):
            params[f"{norm}.{kind}"] = randn(channels, seed=seed + add).requires_grad_(trains)
        stats[f"{norm}.running_mean"] = randn(channels, seed=seed + 30)
        stats[f"{norm}.running_var"] = randn(channels, seed=seed + 40).abs()
        convs[norm] = name
    together, left = layers.fold_rows(params, stats, convs, dtype)
    norms = layers.frozen_norms(params, stats, dtype)
    leaves = [value for value in params.values() if value.requires_grad]
    grads = []
    for weights, affine in ((together, left), (params, norms)):
        made = []
        for norm, name in convs.items():
            image = randn(2, shapes[name][1], 5, 4, seed=1).to(dtype)
            made.append(layers.conv_affine(weights, name, affine[norm], image))
        assert [out.requires_grad for out in made] == [True, True, True, False]
        grads.append(
            [
                *made,
                *torch.autograd.grad(torch.cat([out.flatten() for out in made[:3]]).sum(), leaves),
            ]
        )
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)


def test_the_inputs_dtype_decides():
    params = params_of(modules()["conv"], "conv")
    image = randn(2, 6, 9, 12)
    made = layers.conv(params, "conv", image.bfloat16(), 2, 1)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(
        made.float(), layers.conv(params, "conv", image, 2, 1), rtol=0.03, atol=0.03
    )


@pytest.mark.parametrize("norm", ["none", "gn", "ln"])
def test_conv_module_is_a_convolution_and_perhaps_a_norm(norm):
    params: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    layers.new_conv_module(params, "m", (64, 6, 3, 3), layers.xavier_uniform, generator, norm)
    norm_keys = {"m.conv.bias"} if norm == "none" else {f"m.{norm}.weight", f"m.{norm}.bias"}
    assert set(params) == {"m.conv.weight"} | norm_keys
    image = randn(2, 6, 5, 7)
    expected = nn.functional.conv2d(image, params["m.conv.weight"], padding=1)
    if norm == "gn":
        expected = nn.functional.group_norm(expected, 32)
    if norm == "ln":
        mean, var = expected.mean(1, keepdim=True), expected.var(1, keepdim=True, correction=0)
        expected = (expected - mean) / (var + 1e-6).sqrt()
    torch.testing.assert_close(layers.conv_module(params, "m", image, 1, norm), expected)


def test_fills_follow_the_generator():
    for fill in (
        layers.kaiming_normal,
        layers.xavier_uniform,
        layers.xavier_normal,
        layers.normal_001,
        layers.torch_default,
    ):
        made = [torch.empty(8, 4, 3, 3) for _ in range(3)]
        for tensor, seed in zip(made, (1, 1, 2), strict=True):
            fill(tensor, torch.Generator().manual_seed(seed))
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("as_one", [False, True])
def test_weights_cast_together_are_those_cast_alone(monkeypatch, as_one):
    monkeypatch.setattr(layers, "folds_rows", lambda x: as_one)
    params = {"a": randn(3, 4).requires_grad_(), "b": randn(5, seed=1).requires_grad_()}
    params |= {"c": randn(2, 3, 1, 1, seed=3).requires_grad_(), "d": randn(4, seed=4)}
    names = ["a", "c", "d"]
    made = layers.cast_together(params, names, torch.empty(1, dtype=torch.bfloat16))
    for name in names:
        assert torch.equal(made[name], params[name].bfloat16())
    assert made["b"] is params["b"]
    assert made["c"].requires_grad
    if as_one:  # what doesn't train isn't given a gradient with the rest
        assert not made["d"].requires_grad
    weights = [randn(3, 4, seed=5).bfloat16(), randn(2, 3, 1, 1, seed=6).bfloat16()]
    total = (made["a"] * weights[0]).sum() + (made["c"] * weights[1]).sum()
    grads = torch.autograd.grad(total, (params["a"], params["c"]))
    for grad, weight in zip(grads, weights, strict=True):
        assert torch.equal(grad, weight.float())
    assert layers.cast_together(params, ["b"], torch.empty(1)) is params
