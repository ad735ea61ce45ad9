"""The RoIAlign kernels by Triton's interpreter; `test_triton.py` runs this file.

Values against torchvision's operator, level by level, and both backward forms against autograd
of torchvision's and of the form in plain ATen.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align as torchvision_roi_align

from casc.device import devices
from casc.model import choose_compute
from casc.ops import roi_align_triton
from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import roi_align, roi_levels
from casc.ops.roi_linear import roi_linear

STRIDES = (4, 8, 16)
CANVAS = (64, 96)


def make_levels(batch: int, channels: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [(CANVAS[0] // s, CANVAS[1] // s) for s in STRIDES]
    return [
        torch.randn(batch, channels, *side, generator=generator).to(dtype).requires_grad_()
        for side in sides
    ]


BOXES = torch.tensor(
    [
        [0.0, 0, 96, 64],
        [10, 10, 30, 50],
        [-20, 30, 40, 90],
        [90, 60, 180, 200],  # out of the far corner
        [-90, -90, -50, -50],  # outside
        [7, 7, 7, 7],  # empty
        [20, 40, 10, 30],  # turned round
        [-300, -300, 400, 400],  # the coarsest level, much larger than the image
        [-1e6, -1e6, 1e6, 1e6],
        [-2, -2, 6, 6],  # samples exactly on the border
        [-6, -6, 2, 2],
        [31.3, 5.9, 32.1, 60.2],
    ]
)


def by_torchvision(levels, boxes, image, cells):
    rois = torch.cat([image[:, None].float(), boxes], dim=1)
    level = roi_levels(boxes, len(levels))
    every = [
        torchvision_roi_align(f.float(), rois, cells, 1 / s, 2, aligned=True)
        for f, s in zip(levels, STRIDES, strict=True)
    ]
    return torch.stack(every)[level, torch.arange(len(boxes))]


def run(levels, boxes, image, cells, kernel):
    return roi_align(flatten_pyramid(levels, STRIDES), boxes, image, cells, "fixed", kernel)


@pytest.fixture(params=[False, True], ids=["atomics", "in order"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "allowed", "channels", "cells"),
    [(torch.float32, 1e-5, 16, 5), (torch.bfloat16, 2**-8, 5, 3)],
)
def test_values_and_gradients_are_torchvisions(
    deterministic, monkeypatch, dtype, allowed, channels, cells
):
    monkeypatch.setattr(roi_align_triton, "CELLS_AT_ONCE", 16)  # more than one turn
    levels = make_levels(2, channels, dtype)
    image = torch.arange(len(BOXES)) % 2
    made = run(levels, BOXES, image, cells, "triton")
    assert made.dtype == dtype
    right = by_torchvision(levels, BOXES, image, cells)
    torch.testing.assert_close(made.float(), right, rtol=allowed, atol=allowed)
    weight = torch.cos(torch.arange(made.numel()).view(made.shape)).to(dtype)
    ours = torch.autograd.grad(made, levels, weight)
    theirs = torch.autograd.grad(right, levels, weight.float())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2 * allowed, atol=2 * allowed)


@settings(max_examples=4)
@given(st.data())
def test_any_boxes_as_in_plain_aten(data):
    edge = st.one_of(st.integers(-40, 140).map(float), st.floats(-300, 300, width=32))
    boxes = torch.tensor(data.draw(st.lists(st.tuples(*[edge] * 4), min_size=1, max_size=6)))
    boxes = boxes.float()
    image = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(boxes), max_size=6)))
    image = image[: len(boxes)]
    results = []
    for kernel in ("aten", "triton"):
        levels = make_levels(3, 4)
        made = run(levels, boxes, image, 2, kernel)
        weight = torch.cos(torch.arange(made.numel()).view(made.shape))
        results.append((made.detach(), *torch.autograd.grad(made, levels, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_no_rois_at_all(deterministic):
    levels = make_levels(1, 4)
    made = run(levels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 3, "triton")
    assert made.shape == (0, 4, 3, 3)
    for grad in torch.autograd.grad(made.sum(), levels):
        assert not grad.any()


def test_stages_in_a_chain_with_the_layer_behind(deterministic):
    results = []
    for kernel in ("aten", "triton"):
        levels = make_levels(2, 6)
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(4, 6 * 9, generator=generator).requires_grad_()
        bias = torch.randn(4, generator=generator).requires_grad_()
        pyramid = flatten_pyramid(levels, STRIDES)
        image, total = torch.arange(len(BOXES)) % 2, torch.zeros(())
        made = total
        for stage in range(2):
            made, pyramid = roi_linear(
                pyramid, BOXES + stage, image, 3, "fixed", kernel, matrix * (stage + 1), bias
            )
            total = total + made.sin().sum()
        total = total + pyramid.pixels.square().sum()
        results.append((made.detach(), *torch.autograd.grad(total, (*levels, matrix, bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_rows_beyond_32_bits():
    """The last of 64 images at 800 x 1344 and 512 channels: its rows begin past 2**31 numbers."""
    batch, channels, height, width = 64, 512, 200, 336
    rows = batch * height * width
    assert (rows - height * width) * channels > 2**31
    # Never touched but for the pages that are read: memory isn't taken for the rest.
    pixels = torch.empty(rows, channels, dtype=torch.bfloat16)
    last = pixels[-height * width :].view(height, width, channels)
    last[:10, :10] = torch.arange(100.0).view(10, 10, 1)
    pyramid = flatten_pyramid([torch.zeros(1, 1, height, width)], (4,))._replace(pixels=pixels)
    box, image = torch.tensor([[4.0, 4, 32, 32]]), torch.tensor([batch - 1])
    made = roi_align(pyramid, box, image, 2, "fixed", "triton")
    small = last[None, :10, :10].permute(0, 3, 1, 2).float()
    rois = torch.cat([torch.zeros(1, 1), box], dim=1)
    right = torchvision_roi_align(small, rois, 2, 0.25, 2, aligned=True)
    torch.testing.assert_close(made.float(), right, rtol=2**-8, atol=0)


def test_auto_takes_triton_where_it_proves_right(monkeypatch):
    cpu, boxes = torch.device("cpu"), choose_compute._boxes()[26:]
    monkeypatch.setattr(choose_compute, "_boxes", lambda: boxes)
    row = replace(devices.TRAITS["cpu"], triton_kernels=("nvidia",))
    monkeypatch.setitem(devices.TRAITS, "cpu", row)
    kernel, notes = choose_compute.choose_roi_kernel("auto", "fixed", cpu)
    assert kernel == "triton"
    assert notes[0].startswith("RoIAlign by Triton: ")
