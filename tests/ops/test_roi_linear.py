"""RoIAlign and a fully connected layer in one, against torchvision's and torch's in a row."""

import platform
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align as torchvision_roi_align

from casc.ops import roi_linear as module
from casc.ops.heap import MAPPED
from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import RoiKernel, detach_unread
from casc.ops.roi_linear import roi_linear

STRIDES = (4, 8)
CELLS, OUTPUTS, CHANNELS = 3, 4, 5


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, CHANNELS, 96 // s, 128 // s, generator=generator) for s in STRIDES]
    matrix = torch.randn(OUTPUTS, CHANNELS * CELLS**2, generator=generator) / 5
    bias = torch.randn(OUTPUTS, generator=generator)
    # Read the first level, the second one, a part outside the image, and nothing.
    boxes = torch.tensor(
        [[3.0, 5, 40, 50], [0, 0, 128, 96], [-20, 60, 30, 120], [-90, -90, -50, -50]]
    )
    boxes = torch.cat([boxes, boxes.roll(7) + 1.5, boxes * 0.8])
    made = [t.to(dtype).requires_grad_() for t in (*levels, matrix, bias)]
    return made, boxes, torch.arange(len(boxes)) % 2


def _by_torchvision(levels, boxes, image, matrix, bias):
    rois = torch.cat([image[:, None], boxes], dim=1).to(levels[0].dtype)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=0).sqrt()
    first, second = (
        torchvision_roi_align(f, rois, CELLS, 1 / s, 2, aligned=True)
        for f, s in zip(levels, STRIDES, strict=True)
    )
    features = torch.where((side >= 112)[:, None, None, None], second, first)
    return F.linear(features.flatten(1), matrix, bias)


def _run(first, second, matrix, bias, boxes, image, kernel: RoiKernel = "aten", stages=2):
    """Stages in a chain, as in the cascade, and one more reader of the pyramid."""
    pyramid = flatten_pyramid([first, second], STRIDES)
    results = []
    for stage in range(stages):
        made, pyramid = roi_linear(
            pyramid, boxes + stage, image, CELLS, "fixed", kernel, matrix * (stage + 1), bias
        )
        results.append(made)
    return torch.stack(results), pyramid.pixels.square().mean()


@pytest.mark.parametrize(("name", "value"), [("CELLS", 1), ("CHANNELS", 1)])
def test_a_single_cell_or_channel(monkeypatch, name, value):
    monkeypatch.setattr(sys.modules[__name__], name, value)
    test_values_and_gradients_are_torchvisions(lambda f: f, monkeypatch, "aten")


@pytest.mark.parametrize("kernel", ["aten", "native"])
def test_values_and_gradients_are_torchvisions(mode, monkeypatch, kernel):
    monkeypatch.setattr(module, "BLOCK", 5)  # the last block is smaller
    (first, second, matrix, bias), boxes, image = _inputs()
    made, rest = mode(_run)(first, second, matrix, bias, boxes, image, kernel)
    exact, _, _ = _inputs(torch.float64)
    right = torch.stack(
        [
            _by_torchvision(exact[:2], boxes + stage, image, exact[2] * (stage + 1), exact[3])
            for stage in range(2)
        ]
    )
    torch.testing.assert_close(made.double(), right, rtol=1e-4, atol=1e-4)
    side = flatten_pyramid(list(exact[:2]), STRIDES).pixels.square().mean()
    factor = torch.cos(torch.arange(made.numel(), dtype=torch.float64)).view(made.shape)
    ours = torch.autograd.grad((made * factor).sum() + rest, (first, second, matrix, bias))
    theirs = torch.autograd.grad((right * factor).sum() + side, exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "are_kept"), [("aten", False), ("native", True)])
def test_the_features_are_kept_by_native_kernels_only(kernel, are_kept):
    (first, second, matrix, bias), boxes, image = _inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        _run(first, second, matrix, bias, boxes, image, kernel, stages=1)
    features = len(boxes) * CELLS**2 * CHANNELS
    assert (features in [shape.numel() for shape in kept]) is are_kept


def test_the_operators_are_what_they_say_to_the_compiler():
    generator = torch.Generator().manual_seed(1)
    pixels, matrix = (
        torch.randn(20, 3, generator=generator),
        torch.randn(4, 12, generator=generator),
    )
    index = torch.randint(0, 20, (5 * 4, 16), generator=generator)
    weight, grad = (
        torch.rand(5 * 4, 16, generator=generator),
        torch.randn(5, 4, generator=generator),
    )
    operators = torch.ops.casc
    for operator, inputs in (
        (operators.roi_linear, (pixels, index, weight, matrix, torch.zeros(4))),
        (operators.roi_linear_pixels, (pixels, grad, index, weight, matrix)),
        (operators.roi_linear_matrix, (grad, pixels, index, weight, 4)),
    ):
        # They have no formula of their own: `_Chained` has it.
        torch.library.opcheck(
            operator.default, inputs, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(("kernel", "levels"), [("aten", False), ("native", True)])
def test_only_what_is_read_has_a_gradient(kernel, levels):
    made, _, _ = _inputs()
    pyramid = detach_unread(flatten_pyramid(list(made[:2]), STRIDES), "fixed", kernel)
    assert pyramid.pixels.requires_grad is not levels
    assert all(level.requires_grad is levels for level in pyramid.levels)


HOLES = """
import resource, sys, torch
from casc.ops.heap import trim_heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

# Freeing one of this size tells glibc to take the next ones from its heap.
torch.ones(2**22)
blocks = [torch.ones(2**18) for _ in range(200)]
del blocks[:-1:2]
before = resident()
trim_heap(int(sys.argv[1]), torch.empty(1))
print(round(before - resident()))
assert all(block.sum() == 2**18 for block in blocks)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is looked at"
)
def test_holes_in_the_heap_are_given_back_before_large_blocks_only():
    def given_back(size: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(HOLES), str(size)],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout)

    # A hundred holes of 1 MiB.
    assert given_back(MAPPED) > 80
    assert given_back(MAPPED - 1) < 20
