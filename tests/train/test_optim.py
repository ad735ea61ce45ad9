"""Against torch.optim, clipping and GradScaler of torch.amp; one by one and as one buffer."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from casc.checkpoints.state import State
from casc.device.compute import Compute
from casc.train.flat import buffer_of, flatten, spans
from casc.train.guard import follow, new_guard, scaled_loss
from casc.train.optim import FlatOptimizer, Optim, Optimizer, adamw, make_optimizer, sgd, update

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["one by one", "flat"])
"""What a CPU does, and what accelerators do."""
NAMES = {
    "backbone.conv1.weight": (4, 3, 3, 3),
    "backbone.conv1.bias": (5,),
    "neck.fpn.weight": (6, 7),
    "rpn_head.bias": (33,),
    "roi_head.fc.weight": (3, 17),
    "backbone.pos_embed": (1, 1, 3),
}
LAYERS = {"backbone.conv1.weight": 4, "backbone.pos_embed": 4, "backbone.conv1.bias": 1}


def make_state(seed=0, *, scaled=False, device="cpu") -> State:
    generator = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(shape, generator=generator).to(device) for k, shape in NAMES.items()}
    first = "backbone.conv1.weight"
    values[first] = values[first].to(memory_format=torch.channels_last)
    params = flatten(values)
    momentum, second = (
        flatten({k: torch.zeros_like(v) for k, v in params.items()}) for _ in range(2)
    )
    for value in params.values():
        value.requires_grad_()
    guard = new_guard(torch.device(device), scaled=scaled)
    return State(0, params, {}, momentum, guard, {}, second)


def optimizer_of(state, flat, monkeypatch, **settings) -> Optimizer:
    monkeypatch.setattr("casc.train.optim.is_accelerator", lambda device: flat)
    optimizer = make_optimizer(Optim(**settings), state, layers=LAYERS)
    assert isinstance(optimizer, FlatOptimizer) == flat
    return optimizer


def test_the_update_is_compiled_by_what_compiles_the_step(monkeypatch):
    """Inductor isn't everywhere; a stretch each for more layers than Dynamo gives a function."""
    values = {f"backbone.{i}.weight": torch.rand(2, 40 * (i + 1)) for i in range(12)}
    params, momentum = flatten(values), flatten({k: torch.zeros_like(v) for k, v in values.items()})
    for value in params.values():
        value.requires_grad_()
    state = State(0, params, {}, momentum, new_guard(torch.device("cpu"), scaled=False))
    layers = {name: i for i, name in enumerate(values)}
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    monkeypatch.setattr("casc.train.optim.is_accelerator", lambda device: True)
    compute = Compute(compile=True, backend=backend)  # type: ignore[arg-type]
    config = Optim(layer_decay=0.9)
    optimizer = make_optimizer(config, state, compute=compute, layers=layers)
    backward(state)
    before = {name: value.detach().clone() for name, value in state.params.items()}
    update(optimizer, rate_of(0.1), state.guard, torch.ones(()))
    assert isinstance(optimizer, FlatOptimizer)
    assert len(seen) == len(optimizer.stretches) == 12
    assert not any(torch.equal(before[name], value) for name, value in state.params.items())


def rate_of(value: float) -> Tensor:
    return torch.tensor(value)


def backward(state, scale=1.0):
    """Gradient of scale * sum(p ** 3): 3 * scale * p ** 2."""
    (scale * torch.stack([(p**3).sum() for p in state.params.values()]).sum()).backward()


def torchs(config: Optim, params: dict[str, Tensor]) -> torch.optim.Optimizer:
    """torch's own optimizer with a group for each parameter."""
    groups = []
    for name, value in params.items():
        part = name.partition(".")[0]
        factor = {"backbone": config.backbone_lr, "neck": config.neck_lr}.get(part, config.heads_lr)
        factor *= config.layer_decay ** LAYERS.get(name, 0)
        spared = value.ndim <= 1 or name == "backbone.pos_embed"
        decay = 0.0 if spared and not config.decay_vectors else config.weight_decay
        groups.append({"params": [value], "factor": factor, "weight_decay": decay})
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=0.1, betas=config.betas, eps=config.eps)


SETTINGS = [
    {},
    {"momentum": 0.0, "weight_decay": 0.0},
    {"weight_decay": 0.1, "decay_vectors": False, "backbone_lr": 0.1, "neck_lr": 0.5},
    {"kind": "adamw", "weight_decay": 0.05},
    {"kind": "adamw", "weight_decay": 0.1, "decay_vectors": False, "heads_lr": 2.0},
    {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-3, "clip_norm": 0.5},
    {"clip_norm": 0.5, "heads_lr": 3.0},
    {"clip_norm": 100.0},  # never reached: nothing is scaled up to it
    {"kind": "adamw", "weight_decay": 0.05, "decay_vectors": False, "layer_decay": 0.7},
    {"layer_decay": 0.5, "backbone_lr": 0.5},
]


@FLAT
@pytest.mark.parametrize("given_settings", SETTINGS)
def test_fifty_updates_are_torchs(flat, given_settings, monkeypatch):
    state, theirs = make_state(), make_state()
    config = Optim(**given_settings)
    optimizer = optimizer_of(state, flat, monkeypatch, **given_settings)
    reference = torchs(config, theirs.params)
    generator = torch.Generator().manual_seed(3)
    for step in range(50):
        rate = 0.01 * (1 + math.cos(step / 8))
        for made in (state, theirs):
            backward(made, 0.1)
        noise = {k: torch.randn(v.shape, generator=generator) for k, v in theirs.params.items()}
        for name, value in noise.items():
            for made in (state, theirs):
                gradient = made.params[name].grad
                assert gradient is not None
                gradient += 0.1 * value
        norm = update(optimizer, rate_of(rate), state.guard)
        limit = math.inf if config.clip_norm is None else config.clip_norm
        expected = torch.nn.utils.clip_grad_norm_(theirs.params.values(), limit)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = rate * group["factor"]
        reference.step()
        reference.zero_grad()
    for name, value in theirs.params.items():
        torch.testing.assert_close(state.params[name], value, rtol=2e-5, atol=2e-6)
        assert state.params[name].grad is None
    assert state.guard["updates"] == 50


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_one_by_one_and_flat_agree(kind, monkeypatch):
    states = [make_state(), make_state()]
    settings = {"kind": kind, "weight_decay": 0.1, "backbone_lr": 0.5, "decay_vectors": False}
    with monkeypatch.context() as patch:
        optimizers = [optimizer_of(states[0], False, patch, **settings)]
        optimizers.append(optimizer_of(states[1], True, patch, **settings))
        for _ in range(5):
            norms = []
            for state, optimizer in zip(states, optimizers, strict=True):
                backward(state, 0.1)
                norms.append(update(optimizer, rate_of(0.01), state.guard))
            torch.testing.assert_close(*norms)
    for name in NAMES:
        torch.testing.assert_close(*(s.params[name] for s in states), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(*(s.momentum[name] for s in states), rtol=1e-6, atol=1e-7)


def test_a_gradient_may_lie_in_memory_otherwise_than_its_parameter(monkeypatch):
    """As the first convolution's might, whose weight is channels_last."""
    state = make_state()
    optimizer = optimizer_of(state, True, monkeypatch, weight_decay=0.0)
    backward(state)
    weight = state.params["backbone.conv1.weight"]
    assert weight.grad is not None
    weight.grad = weight.grad.contiguous()
    assert weight.grad.stride() != weight.stride()
    before = weight.detach().clone()
    update(optimizer, rate_of(0.01), state.guard)
    torch.testing.assert_close(weight, before - 0.01 * 3 * before**2)


@FLAT
def test_a_large_parameter_is_updated_to_its_end(flat, monkeypatch):
    values = {"a": torch.ones(400_001), "b": torch.ones(3)}
    params, momentum = flatten(values), flatten({k: torch.zeros_like(v) for k, v in values.items()})
    for value in params.values():
        value.requires_grad_().grad = torch.full_like(value, 2.0)
    state = State(0, params, {}, momentum, new_guard(torch.device("cpu"), scaled=False))
    optimizer = optimizer_of(state, flat, monkeypatch, weight_decay=0.0)
    update(optimizer, rate_of(0.25), state.guard)
    for value in params.values():
        assert (value == 0.5).all()


@FLAT
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, flat, kind, monkeypatch):
    state = make_state()
    optimizer = optimizer_of(state, flat, monkeypatch, kind=kind)
    backward(state)
    update(optimizer, rate_of(0.1), state.guard)
    parts = {"p": state.params, "m": state.momentum, "s": state.second}
    before = {(a, k): v.detach().clone() for a, part in parts.items() for k, v in part.items()}

    def assert_unchanged():
        for (a, k), old in before.items():
            assert torch.equal(old, parts[a][k].detach()), (a, k)

    backward(state)
    (state.params["rpn_head.bias"] * bad).sum().backward()
    assert not update(optimizer, rate_of(0.1), state.guard).isfinite()
    assert_unchanged()
    assert state.guard["skipped"] == state.guard["skipped_in_a_row"] == 1
    # However fine the loss is.
    backward(state)
    (state.params["rpn_head.bias"] * bad).sum().backward()
    update(optimizer, rate_of(0.1), state.guard, torch.tensor(1.0))
    assert_unchanged()
    # Nor does a loss, with whatever gradient.
    backward(state)
    update(optimizer, rate_of(0.1), state.guard, torch.tensor(bad))
    assert_unchanged()
    assert state.guard["skipped"] == state.guard["skipped_in_a_row"] == 3
    backward(state)
    update(optimizer, rate_of(0.1), state.guard, torch.tensor(1.0))
    assert not torch.equal(before["p", "rpn_head.bias"], state.params["rpn_head.bias"].detach())
    assert (state.guard["skipped"], state.guard["skipped_in_a_row"]) == (3, 0)
    # AdamW corrects its moments by the updates that were made.
    assert state.guard["updates"] == 2


@FLAT
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_loss_scale_is_grad_scalers(flat, clip_norm, monkeypatch):
    """Against torch.amp.GradScaler with clipping after `unscale_`, overflows in between."""
    monkeypatch.setattr("casc.train.optim.follow", partial(follow, interval=3))
    state, reference = make_state(scaled=True), make_state()
    optimizer = optimizer_of(
        state, flat, monkeypatch, momentum=0.9, weight_decay=1e-2, clip_norm=clip_norm
    )
    theirs = torch.optim.SGD(reference.params.values(), 0.01, momentum=0.9, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scales = []
    for bad in (0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0):
        gradient = {k: torch.full_like(v, 0.1).detach() for k, v in state.params.items()}
        if bad:
            gradient["rpn_head.bias"][2] = float("inf")
        for made, scale in ((state, None), (reference, scaler)):
            pairs = zip(gradient.values(), made.params.values(), strict=True)
            loss = torch.stack([(g * p).sum() for g, p in pairs]).sum()
            (scale.scale(loss) if scale else scaled_loss(made.guard, loss)).backward()
        norm = update(optimizer, rate_of(0.01), state.guard)
        scaler.unscale_(theirs)
        expected = torch.nn.utils.clip_grad_norm_(
            reference.params.values(), clip_norm or float("inf")
        )
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()
        assert bad or norm.item() == pytest.approx(expected.item())
        assert state.guard["loss_scale"] == scaler.get_scale()
        scales.append(scaler.get_scale())
        for k, v in reference.params.items():
            torch.testing.assert_close(state.params[k], v, rtol=1e-6, atol=1e-7)
    assert set(scales) == {16384, 32768, 65536}
    assert state.guard["skipped"] == 3


def test_the_scale_does_not_grow_to_infinity():
    guard = new_guard(torch.device("cpu"), scaled=True)
    guard["loss_scale"].fill_(2.0**127)
    follow(guard, torch.tensor(True), interval=1)
    assert guard["loss_scale"] == 2.0**127


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_nothing_is_read_back(kind, monkeypatch):
    """On meta tensors there would be nothing to read."""
    state = make_state(scaled=True, device="meta")
    for value in state.params.values():
        value.grad = torch.empty_like(value)
    optimizer = optimizer_of(state, True, monkeypatch, kind=kind, clip_norm=1.0)
    update(optimizer, torch.empty((), device="meta"), state.guard, torch.empty((), device="meta"))


def test_the_norm_of_a_large_buffer_is_exact(monkeypatch):
    values = {"a": torch.full((3_000_017,), 0.1)}
    params, momentum = flatten(values), flatten({k: torch.zeros_like(v) for k, v in values.items()})
    params["a"].requires_grad_().grad = values["a"].clone()
    state = State(0, params, {}, momentum, new_guard(torch.device("cpu"), scaled=False))
    norm = update(optimizer_of(state, True, monkeypatch), rate_of(0.0), state.guard)
    assert norm.item() == pytest.approx(values["a"].double().norm().item(), rel=1e-6)


def test_alike_neighbours_are_one_stretch(monkeypatch):
    state = make_state()
    whole = optimizer_of(state, True, monkeypatch)
    assert isinstance(whole, FlatOptimizer)
    assert len(whole.stretches) == 1
    parts = optimizer_of(state, True, monkeypatch, decay_vectors=False, backbone_lr=0.1)
    assert isinstance(parts, FlatOptimizer)
    # Weights, then vectors, each of the backbone and of the rest.
    assert [(s.factor, s.decay) for s in parts.stretches] == [
        (0.1, 1e-4), (1.0, 1e-4), (0.1, 0.0), (1.0, 0.0)
    ]  # fmt: skip
    for optimizer in (whole, parts):
        assert sum(len(s.param) for s in optimizer.stretches) == len(buffer_of(state.params))


def test_the_update_is_one_graph(mode):
    """Compiled as on accelerators; against the same in float64."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.rand(70, generator=generator) for _ in range(4)]
    rate, number = torch.tensor(0.1), torch.tensor(3)
    one: Callable[..., tuple] = partial(sgd, decay=0.1, factor=0.9)
    two: Callable[..., tuple] = partial(adamw, decay=0.1, betas=(0.9, 0.999), eps=1e-8)

    def both(param, gradient, mean, square, rate, number):
        return (
            *one(param, gradient, mean, rate), *two(param, gradient, mean, square, rate, number)
        )  # fmt: skip

    inputs = (*columns, rate, number)
    made, expected = mode(both)(*inputs), both(*(value.double() for value in inputs))
    for value, right in zip(made, expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)


# ---- the buffer ----

shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=6)


@settings(max_examples=30)
@given(shapes, st.booleans())
def test_flattened_tensors_are_the_same_in_one_buffer(shapes, last):
    values = {f"p{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
    if last:
        values = {
            k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v
            for k, v in values.items()
        }
    views = flatten(values)
    buffer, end = buffer_of(views), 0
    assert list(views) == list(values)
    for name, start, stop in spans(views):
        assert start % 16 == 0
        assert start >= end
        assert buffer[end:start].count_nonzero() == 0
        assert stop - start == values[name].numel()
        end = stop
    for name, value in values.items():
        assert torch.equal(views[name], value)
        assert views[name].stride() == value.stride()
    with torch.no_grad():
        buffer.fill_(7.0)
    assert all((view == 7).all() for view in views.values())


def test_other_tensors_have_no_buffer():
    with pytest.raises(ValueError, match="flatten"):
        buffer_of({"a": torch.ones(3)})
    one, other = (flatten({"a": torch.ones(3)})["a"] for _ in range(2))
    with pytest.raises(ValueError, match="flatten"):
        buffer_of({"a": one, "b": other})
