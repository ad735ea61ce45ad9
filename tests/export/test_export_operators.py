"""casc's own operators as ONNX Runtime and plain ATen compute them, against torchvision's."""

import logging
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import roi_align as torchvision_roi_align

from casc.errors import UserError
from casc.export.onnx import write_onnx
from casc.export.operators import own_operators, plain
from casc.ops.linear import _linear
from casc.ops.nms import nms
from casc.ops.roi_align import _native
from casc.ops.row_sums import weighted_row_sums


class Calls(nn.Module):
    """What torch.export wants."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor):
        return self.function(*args)


@pytest.fixture(params=["onnx", "aten"])
def exported(request, tmp_path) -> Callable[..., list[Tensor]]:
    """Exports a function of casc's operators and runs it on other inputs of the same shapes."""

    def run(function: Callable, args: tuple[Tensor, ...], outputs: int = 1) -> list[Tensor]:
        like = tuple(torch.zeros_like(a) for a in args)
        program = torch.export.export(Calls(function), like, strict=False)
        assert own_operators(program)
        if request.param == "aten":
            program = plain(program)
            assert not own_operators(program)
            result = program.module()(*args)
            return [result] if outputs == 1 else list(result)
        names = [f"in{i}" for i in range(len(args))]
        path = tmp_path / "made.onnx"
        before = logging.getLogger("torch.onnx").level
        write_onnx(program, path, {}, names, [f"out{i}" for i in range(outputs)])
        assert logging.getLogger("torch.onnx").level == before
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = {name: a.numpy() for name, a in zip(names, args, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return run


def scenes(count: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three images of crowded boxes, many of equal scores and some of no area; of the second
    hardly any is valid, of the third none."""
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(3, count, 2, generator=generator) * 60
    side = torch.rand(3, count, 2, generator=generator) * 40
    side[:, ::7] = 0
    scores = (torch.rand(3, count, generator=generator) * levels).round() / levels
    valid = torch.rand(3, count, generator=generator) < torch.tensor([[0.9], [0.05], [0.0]])
    valid[1, 3] = True
    return torch.cat([corner, corner + side], dim=2), scores, valid


@pytest.mark.parametrize(("count", "most"), [(60, 6), (10, 25)])
def test_nms_is_torchvisions(exported, count, most):
    boxes, scores, valid = scenes(count, levels=12)
    group = torch.zeros(3, count, dtype=torch.long)

    def function(boxes, scores, group, valid):
        return nms(boxes, scores, group, valid, 0.5, most)

    index, survivors = exported(function, (boxes, scores, group, valid), outputs=2)
    for i in range(3):
        rows = valid[i].nonzero()[:, 0]
        # torchvision's own sort leaves the order of equal scores open: sorted beforehand.
        rows = rows[scores[i, rows].argsort(descending=True, stable=True)]
        keep = rows[torchvision_nms(boxes[i, rows], scores[i, rows], 0.5)][:most]
        assert survivors[i] == len(keep)
        assert index[i].tolist() == keep.tolist() + [0] * (most - len(keep))


def test_bags_and_products_are_sums_of_rows(exported):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(50, 8, generator=generator)
    index = torch.randint(0, 50, (30, 16), generator=generator)
    weight = torch.rand(30, 16, generator=generator)
    matrix = torch.randn(5, 8, generator=generator)
    bias = torch.randn(5, generator=generator)

    def function(pixels, index, weight, matrix, bias):
        bags = weighted_row_sums(pixels, index, weight)
        return bags, _linear(bags, matrix, bias), _linear(bags, matrix, None)

    bags, with_bias, without = exported(function, (pixels, index, weight, matrix, bias), outputs=3)
    expected = (pixels.double()[index] * weight.double()[..., None]).sum(dim=1)
    torch.testing.assert_close(bags.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without.double(), expected @ matrix.double().T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(with_bias, without + bias, rtol=1e-5, atol=1e-5)


def adaptive(fine: Tensor, coarse: Tensor, rois: Tensor, level: Tensor) -> Tensor:
    here = level == torch.arange(2)[:, None]
    return _native([fine, coarse], rois, here, [0.25, 0.125], 7, 0)


def adaptive_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(2, 4, 24, 32, generator=generator)
    coarse = torch.randn(2, 4, 12, 16, generator=generator)
    image = torch.arange(10)[:, None] % 2
    corner = torch.rand(10, 2, generator=generator) * 60
    side = 1 + torch.rand(10, 2, generator=generator) * 70
    return fine, coarse, torch.cat([image, corner, corner + side], dim=1), torch.arange(10) // 5


def test_adaptive_roi_align_is_torchvisions_in_onnx(tmp_path):
    args = fine, coarse, rois, level = adaptive_inputs()
    program = torch.export.export(Calls(adaptive), args, strict=False)
    write_onnx(program, tmp_path / "made.onnx", {}, ["fine", "coarse", "rois", "level"], ["out"])
    session = onnxruntime.InferenceSession(tmp_path / "made.onnx")
    names = ("fine", "coarse", "rois", "level")
    given = {name: a.numpy() for name, a in zip(names, args, strict=True)}
    (aligned,) = (torch.from_numpy(value) for value in session.run(None, given))
    for i, (features, scale) in enumerate(((fine, 0.25), (coarse, 0.125))):
        own = level == i
        expected = torchvision_roi_align(features, rois[own], 7, scale, -1, aligned=True)
        torch.testing.assert_close(aligned[own], expected, rtol=1e-4, atol=1e-5)


def test_adaptive_roi_align_has_no_plain_form():
    program = torch.export.export(Calls(adaptive), adaptive_inputs(), strict=False)
    with pytest.raises(UserError, match="--format onnx, or --roi-align fixed"):
        plain(program)
