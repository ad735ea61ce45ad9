from functools import partial

import pytest
import torch

from casc.checkpoints.state import State
from casc.train.guard import follow, new_guard, scaled_loss
from casc.train.optim import Optim, make_optimizer, update

FUSED = pytest.mark.parametrize("fused", [True, False])
"""The fused kernel, and what devices without one do."""


def make_state(seed=0, *, scaled=False) -> State:
    generator = torch.Generator().manual_seed(seed)
    params = {
        "conv": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "bias": torch.randn(5, generator=generator),
    }
    for value in params.values():
        value.requires_grad_()
    momentum = {k: torch.zeros_like(v).detach() for k, v in params.items()}
    return State(0, params, {}, momentum, new_guard(torch.device("cpu"), scaled=scaled))


def optimizer_of(state, fused, **settings) -> torch.optim.SGD:
    optimizer = make_optimizer(Optim(**settings), state)
    (group,) = optimizer.param_groups
    assert group["fused"]
    group["fused"] = fused
    return optimizer


def backward(state, scale=1.0):
    """Gradient of scale * sum(p ** 3): 3 * scale * p ** 2."""
    (scale * torch.stack([(p**3).sum() for p in state.params.values()]).sum()).backward()


@FUSED
def test_update_is_sgd_with_momentum_and_decay(fused):
    state, rates = make_state(), [0.01, 0.02, 0.005]
    expected = {k: v.detach().clone() for k, v in state.params.items()}
    momentum = {k: torch.zeros_like(v) for k, v in expected.items()}
    optimizer = optimizer_of(state, fused, momentum=0.9, weight_decay=1e-2)
    for rate in rates:
        backward(state, 0.1)
        norm = update(optimizer, rate, None)
        gradients = {k: 0.3 * v**2 for k, v in expected.items()}
        assert norm.item() == pytest.approx(
            torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        )
        for k, value in expected.items():
            momentum[k] = 0.9 * momentum[k] + gradients[k] + 1e-2 * value
            expected[k] = value - rate * momentum[k]
    for k, value in expected.items():
        torch.testing.assert_close(state.params[k].detach(), value)
        torch.testing.assert_close(state.momentum[k], momentum[k])
        assert state.params[k].grad is None


@FUSED
def test_clipping(fused):
    state = make_state()
    before = {k: v.detach().clone() for k, v in state.params.items()}
    optimizer = optimizer_of(state, fused, momentum=0.0, weight_decay=0.0)
    backward(state)
    norm = update(optimizer, 1.0, 0.5)
    moved = torch.cat([(before[k] - v).flatten() for k, v in state.params.items()])
    assert norm > 0.5
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@FUSED
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, fused):
    state = make_state()
    optimizer = optimizer_of(state, fused)
    backward(state)
    update(optimizer, 0.1, None)
    before = {k: v.detach().clone() for k, v in (state.params | state.momentum).items()}
    (state.params["bias"] * bad).sum().backward()
    state.params["conv"].sum().backward()
    assert not update(optimizer, 0.1, None, state.guard).isfinite()
    for k, v in (state.params | state.momentum).items():
        assert torch.equal(before[k], v.detach())
    assert state.guard["skipped"] == state.guard["skipped_in_a_row"] == 1
    # Nor does a loss, with whatever gradient.
    backward(state)
    update(optimizer, 0.1, None, state.guard, torch.tensor(bad))
    for k, v in (state.params | state.momentum).items():
        assert torch.equal(before[k], v.detach())
    assert state.guard["skipped"] == state.guard["skipped_in_a_row"] == 2
    backward(state)
    update(optimizer, 0.1, None, state.guard, torch.tensor(1.0))
    assert not torch.equal(before["bias"], state.params["bias"].detach())
    assert (state.guard["skipped"], state.guard["skipped_in_a_row"]) == (2, 0)


@FUSED
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_loss_scale_is_grad_scalers(fused, clip_norm, monkeypatch):
    """Against torch.amp.GradScaler with clipping after `unscale_`, overflows in between."""
    monkeypatch.setattr("casc.train.optim.follow", partial(follow, interval=3))
    state, reference = make_state(scaled=True), make_state()
    optimizer = optimizer_of(state, fused, momentum=0.9, weight_decay=1e-2)
    theirs = torch.optim.SGD(reference.params.values(), 0.01, momentum=0.9, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scales = []
    for bad in (0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0):
        gradient = {k: torch.full_like(v, 0.1).detach() for k, v in state.params.items()}
        if bad:
            gradient["bias"][2] = float("inf")
        for made, scale in ((state, None), (reference, scaler)):
            pairs = zip(gradient.values(), made.params.values(), strict=True)
            loss = torch.stack([(g * p).sum() for g, p in pairs]).sum()
            (scale.scale(loss) if scale else scaled_loss(made.guard, loss)).backward()
        norm = update(optimizer, 0.01, clip_norm, state.guard)
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


@FUSED
def test_parts_learn_at_their_own_rates(fused):
    names = ("backbone.conv1.weight", "neck.fpn.weight", "rpn_head.bias", "roi_head.fc.weight")
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(6, generator=generator) for name in names}
    before = {name: value.clone() for name, value in params.items()}
    for value in params.values():
        value.requires_grad_()
    momentum = {k: torch.zeros_like(v).detach() for k, v in params.items()}
    state = State(0, params, {}, momentum, new_guard(torch.device("cpu"), scaled=False))
    config = Optim(momentum=0.9, weight_decay=0.1, backbone_lr=0.1, neck_lr=0.5, heads_lr=2.0)
    optimizer = make_optimizer(config, state)
    for group in optimizer.param_groups:
        group["fused"] = fused
    expected, speed = dict(before), {name: torch.zeros(6) for name in names}
    for rate in (0.01, 0.02):
        backward(state, 0.1)
        norm = update(optimizer, rate, 0.5)
        gradients = {k: 0.3 * v**2 for k, v in expected.items()}
        total = torch.cat([*gradients.values()]).norm()
        assert norm.item() == pytest.approx(total.item())
        # Clipping sees the gradients of all parts together, and no rates.
        assert total > 0.5
        for name, factor in zip(names, (0.1, 0.5, 2.0, 2.0), strict=True):
            gradient = gradients[name] * 0.5 / total + 0.1 * expected[name]
            speed[name] = 0.9 * speed[name] + gradient
            expected[name] = expected[name] - rate * factor * speed[name]
    for name in names:
        torch.testing.assert_close(params[name].detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_read_back():
    """On meta tensors there would be nothing to read."""
    state = make_state(scaled=True)
    moved = State(0, *({k: v.to("meta") for k, v in part.items()} for part in state[1:]))
    for value in moved.params.values():
        value.detach_().requires_grad_().grad = torch.empty_like(value)
    update(optimizer_of_meta(moved), 0.1, 1.0, moved.guard, torch.empty((), device="meta"))


def optimizer_of_meta(state) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(state.params.values(), 0.1, momentum=0.9)
    for name, momentum in state.momentum.items():
        optimizer.state[state.params[name]]["momentum_buffer"] = momentum
    return optimizer
