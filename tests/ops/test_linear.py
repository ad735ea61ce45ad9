import pytest
import torch
from torch import Tensor

from casc.ops import linear as module
from casc.ops.linear import linear


def make(shape: tuple[int, int, int], bias: bool, transposed: bool) -> list[Tensor]:
    n, c, out = shape
    generator = torch.Generator().manual_seed(n + c)
    x = torch.randn(n, c, generator=generator)
    weight = torch.randn(out, c, generator=generator) / c**0.5
    if transposed:
        weight = weight.t().contiguous().t()
    return [x, weight, *([torch.randn(out, generator=generator)] if bias else [])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (130, 300, 64)])
def test_values_and_gradients_are_those_of_double_precision(
    mode, monkeypatch, shape, bias, transposed
):
    monkeypatch.setattr(module, "WORTH_IT", 0)
    made = [t.requires_grad_() for t in make(shape, bias, transposed)]
    exact = [t.detach().double().requires_grad_() for t in made]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    y = mode(run)(*made)
    right = torch.nn.functional.linear(*exact)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    # A gradient that isn't contiguous comes out of the layers behind.
    grad = grad.t().contiguous().t()
    for a, b in zip(
        torch.autograd.grad(y, made, grad),
        torch.autograd.grad(right, exact, grad.double()),
        strict=True,
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_operator_is_what_it_says_to_the_compiler():
    x, weight, bias = (t.requires_grad_() for t in make((8, 16, 4), True, False))
    # test_schema and the others check strides, aliasing and gradients under fake tensors.
    torch.library.opcheck(torch.ops.casc.linear.default, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_torchs_own(dtype):
    x, weight, bias = (t.to(dtype) for t in make((512, 256, 256), True, False))
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
