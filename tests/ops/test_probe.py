"""A recorder sees what a function computes, compiled and eager, and changes nothing but what
it is told to."""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.device.compute import Compute
from casc.model import detector
from casc.model.losses import mean_losses
from casc.model.steps import make_detect_step, make_loss_step
from casc.ops.probe import Recorder, recorded, unwatched


class Pair(NamedTuple):
    double: Tensor
    parts: list[Tensor]


def function(x, weight, probe=unwatched):
    pair = probe("pair", Pair(2 * x, [x + 1, x + 2]))
    for part in pair.parts:
        x = probe("product", part * weight)
    return x.sum() + pair.double.sum()


def test_a_record_is_whole_and_without_gradient(mode):
    recorder = Recorder()
    weight = torch.tensor(3.0, requires_grad=True)
    step = recorded(function, recorder, mode)
    for start in (0, 1):
        x = torch.arange(4.0) + start
        result = step(x, weight)
        assert result == ((x + 2) * 3 + 2 * x).sum()
    (grad,) = torch.autograd.grad(result, weight)
    assert grad == (x + 2).sum()
    x = torch.arange(4.0)
    assert [type(pair).__name__ for pair in recorder.seen["pair"]] == ["Pair"] * 2
    assert torch.equal(recorder.seen["pair"][0].double, 2 * x)
    products = [(x + 1) * 3, (x + 2) * 3, (x + 2) * 3, (x + 3) * 3]
    assert all(map(torch.equal, recorder.seen["product"], products))
    assert not any(value.requires_grad for value in recorder.seen["product"])


def test_what_is_given_takes_the_place(mode):
    given = Pair(torch.zeros(4), [torch.ones(4)])
    recorder = Recorder({"pair": given})
    x = torch.arange(4.0)
    assert recorded(function, recorder, mode)(x, torch.tensor(3.0)) == 12
    assert torch.equal(recorder.seen["pair"][0].double, 2 * x)
    # Who doesn't watch gets the function itself.
    assert recorded(function, None, lambda f: f) is function


def test_a_recorded_step_is_the_step(tiny, tiny_batch):
    """Compiled, with the counted mask heads' second graph, which is used by three stages."""
    config, image, canvas = tiny
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    batch = tiny_batch([2, 1])
    eager = Compute(compile=False)
    step = make_loss_step(config, image, canvas, eager)
    plain, measures = mean_losses(step(params, buffers, batch))
    recorder = Recorder()
    compute = Compute(backend="aot_eager")
    step = make_loss_step(config, image, canvas, compute, recorder=recorder)
    total, found = mean_losses(step(params, buffers, batch))
    torch.testing.assert_close(total, plain)
    for name, value in measures.items():
        torch.testing.assert_close(found[name], value)
    for name in ("box.output", "box.goal", "mask.logits"):
        assert len(recorder.seen[name]) == 3, name
    assert not any(logits.requires_grad for logits in recorder.seen["mask.logits"])

    plain = make_detect_step(config, image, canvas, eager)(params, buffers, batch)
    recorder = Recorder()
    found = make_detect_step(config, image, canvas, eager, recorder)(params, buffers, batch)
    for a, b in zip(found[:5], plain[:5], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert len(recorder.seen["mask.logits"]) == 3
