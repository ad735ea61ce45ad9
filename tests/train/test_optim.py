import pytest
import torch

from casc.train.optim import Optim, make_optimizer, update
from casc.train.state import State


def make_state(seed=0) -> State:
    generator = torch.Generator().manual_seed(seed)
    params = {
        "conv": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "bias": torch.randn(5, generator=generator),
    }
    for value in params.values():
        value.requires_grad_()
    return State(0, params, {}, {k: torch.zeros_like(v).detach() for k, v in params.items()})


def backward(state, scale=1.0):
    """Gradient of scale * sum(p ** 3): 3 * scale * p ** 2."""
    (scale * torch.stack([(p**3).sum() for p in state.params.values()]).sum()).backward()


def test_update_is_sgd_with_momentum_and_decay():
    state, rates = make_state(), [0.01, 0.02, 0.005]
    expected = {k: v.detach().clone() for k, v in state.params.items()}
    momentum = {k: torch.zeros_like(v) for k, v in expected.items()}
    optimizer = make_optimizer(Optim(momentum=0.9, weight_decay=1e-2), state)
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


def test_clipping():
    state = make_state()
    before = {k: v.detach().clone() for k, v in state.params.items()}
    optimizer = make_optimizer(Optim(momentum=0.0, weight_decay=0.0), state)
    backward(state)
    norm = update(optimizer, 1.0, 0.5)
    moved = torch.cat([(before[k] - v).flatten() for k, v in state.params.items()])
    assert norm > 0.5
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    state = make_state()
    optimizer = make_optimizer(Optim(), state)
    backward(state)
    update(optimizer, 0.1, None)
    before = {k: v.detach().clone() for k, v in (state.params | state.momentum).items()}
    (state.params["bias"] * bad).sum().backward()
    state.params["conv"].sum().backward()
    assert not update(optimizer, 0.1, None).isfinite()
    for k, v in (state.params | state.momentum).items():
        assert torch.equal(before[k], v.detach())
    backward(state)
    update(optimizer, 0.1, None)
    assert not torch.equal(before["bias"], state.params["bias"].detach())
