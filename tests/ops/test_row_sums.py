"""Weighted sums of rows against plain indexing."""

from dataclasses import replace

import pytest
import torch

from casc.device.devices import TRAITS
from casc.ops.row_sums import bag_backward, chained_bags, weighted_row_sums


def _cases():
    generator = torch.Generator().manual_seed(0)
    for bags, taps in ((5, 16), (40, 1), (7, 4)):
        index = torch.randint(0, 30, (bags, taps), generator=generator)
        yield index, torch.rand((bags, taps), generator=generator)


def _plain(pixels, index, weight):
    return (pixels[index] * weight[..., None]).sum(dim=1)


def _loss(rows, seed):
    factors = torch.arange(rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    return (rows * torch.cos(factors + seed)).square().sum()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_readers_in_a_chain_give_the_gradient_of_independent_ones(compiled):
    pixels = torch.randn((30, 6), generator=torch.Generator().manual_seed(1)).requires_grad_()
    tables = list(_cases())

    def chained(pixels):
        total, left = pixels.new_zeros(()), pixels * 2
        for seed, (index, weight) in enumerate(tables):
            rows, left = chained_bags(left, index, weight)
            total = total + _loss(rows, seed)
        # What reads the pixels last, the masks' graph, adds its own gradient.
        return total + left.sin().sum()

    def independent(pixels):
        losses = [_loss(_plain(pixels * 2, *table), seed) for seed, table in enumerate(tables)]
        return torch.stack(losses).sum() + (pixels * 2).sin().sum()

    run = torch.compile(chained, fullgraph=True, dynamic=False) if compiled else chained
    results = []
    for function in (run, independent):
        value = function(pixels)
        results.append((value.detach(), *torch.autograd.grad(value, pixels)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_chain_that_nobody_goes_on_with_still_has_its_gradient():
    pixels = torch.randn((30, 6), generator=torch.Generator().manual_seed(2)).requires_grad_()
    index, weight = next(_cases())
    rows, _ = chained_bags(pixels, index, weight)
    (grad,) = torch.autograd.grad(_loss(rows, 0), pixels)
    (expected,) = torch.autograd.grad(_loss(_plain(pixels, index, weight), 0), pixels)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_bags_sum_weighted_rows():
    pixels = torch.randn((30, 6), generator=torch.Generator().manual_seed(3))
    for index, weight in _cases():
        torch.testing.assert_close(
            weighted_row_sums(pixels, index, weight), _plain(pixels, index, weight)
        )


@pytest.mark.parametrize("sorts", [True, False], ids=["sorted", "tap by tap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_many_bags_read_has_their_gradients_sum(dtype, sorts, monkeypatch):
    """Rounded once: in bfloat16 a running sum stops growing after some 256 equal terms."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], sorts_taps=sorts))
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(0, 5, (3000, 4), generator=generator)
    weight = torch.rand((3000, 4), generator=generator).to(dtype)
    grad = torch.rand((3000, 8), generator=generator).to(dtype)
    # Rows 5 and 6 are read by none.
    expected = torch.zeros((7, 8), dtype=torch.float64)
    for tap in range(4):
        expected.index_add_(0, index[:, tap], grad.double() * weight[:, tap, None].double())
    found = bag_backward(grad, index, weight, 7)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=max(torch.finfo(dtype).eps / 2, 1e-5) * 1.01, atol=0
    )
