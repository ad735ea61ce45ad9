"""How a device is to compute: what is chosen, what is said of it, and what is refused."""

from dataclasses import replace

import pytest
import torch

from casc.device import compilers, devices
from casc.device.compute import Compute
from casc.device.devices import RoiKernels, choose_dtype
from casc.errors import UserError
from casc.model import choose_compute as kernels
from casc.model import detector
from casc.model.choose_compute import (
    choose_compute,
    choose_nms_kernel,
    choose_roi_kernel,
    roi_difference,
)
from casc.model.detector_config import DetectorConfig
from casc.model.losses import mean_losses
from casc.model.steps import make_loss_step, resolve_auto
from casc.ops import nms
from casc.ops.fixed_nms import fixed_nms
from casc.ops.roi_align import roi_levels

CPU = torch.device("cpu")


def like_npu_row() -> devices.Traits:
    """What is particular of an NPU's row, its choices, on kernels that run here."""
    return replace(
        devices.TRAITS["npu"], roi_align="torchvision", ready=lambda: None, backend="gloo"
    )


@pytest.fixture
def like_npu(monkeypatch):
    monkeypatch.setitem(devices.TRAITS, "cpu", like_npu_row())


def broken(patch: pytest.MonkeyPatch) -> None:
    """A native RoIAlign of another convention: it doesn't shift by half a pixel."""

    def forward(features, rois, scale, cells, grid):
        return torch.ops.torchvision.roi_align(features, rois, scale, cells, cells, grid, False)

    patch.setattr(devices, "_TORCHVISION", RoiKernels(forward, devices._torchvision_backward))


def test_native_and_aten_agree_where_both_are_right():
    assert roi_difference(CPU, "native") < 1e-4


def test_all_levels_are_compared():
    assert roi_levels(kernels._boxes(), 4).unique().tolist() == [0, 1, 2, 3]


def test_without_native_preference_aten_it_is():
    assert choose_roi_kernel("auto", "fixed", CPU) == ("aten", [])


def test_native_when_it_proves_right(like_npu):
    kernel, notes = choose_roi_kernel("auto", "fixed", CPU)
    assert kernel == "native"
    assert "from plain ATen's" in notes[0]
    assert choose_roi_kernel("aten", "fixed", CPU) == ("aten", [])


def test_a_native_kernel_of_another_convention_is_not_used_and_said(like_npu, monkeypatch):
    broken(monkeypatch)
    kernel, notes = choose_roi_kernel("auto", "fixed", CPU)
    assert kernel == "aten"
    assert notes[0].startswith("warning: torchvision's RoIAlign on cpu is 0.")
    with pytest.raises(UserError, match=r"use --model.roi-kernel aten"):
        choose_roi_kernel("native", "fixed", CPU)
    with pytest.raises(UserError, match=r"use --model.roi-align fixed"):
        choose_roi_kernel("auto", "adaptive", CPU)


def test_triton_where_there_is_none_is_refused():
    with pytest.raises(UserError, match=r"no Triton kernels for cpu; use --model.roi-kernel aten"):
        choose_roi_kernel("triton", "fixed", CPU)
    with pytest.raises(UserError, match=r"--model.roi-kernel triton: .*--model.roi-align fixed"):
        choose_roi_kernel("triton", "adaptive", CPU)


def test_a_kernel_that_raises_is_not_used_and_said(like_npu, monkeypatch):
    def forward(*_):
        raise RuntimeError("no such kernel on this chip")

    monkeypatch.setattr(devices, "_TORCHVISION", RoiKernels(forward, forward))
    kernel, notes = choose_roi_kernel("auto", "fixed", CPU)
    assert kernel == "aten"
    assert "no such kernel on this chip" in notes[0]


# ---- suppression by Triton ----


@pytest.fixture
def like_gpu(monkeypatch):
    """The CPU's row with Triton kernels, whose compiler looks as if it were there."""
    row = replace(devices.TRAITS["cpu"], triton_kernels=("any",))
    monkeypatch.setitem(devices.TRAITS, "cpu", row)
    monkeypatch.setattr(devices, "_installed", lambda module: module == "triton.backends.any")


def with_nms(rpn="auto", inference="auto") -> DetectorConfig:
    config = DetectorConfig()
    return replace(
        config,
        rpn=replace(config.rpn, nms_kernel=rpn),
        inference=replace(config.inference, nms_kernel=inference),
    )


def replaced(monkeypatch, survivors):
    """Stands in for suppression by Triton."""
    monkeypatch.setattr(nms, "_triton_nms", lambda: survivors)


def test_no_triton_where_the_table_has_none(monkeypatch):
    def never(*_):
        raise AssertionError("tried")

    replaced(monkeypatch, never)
    assert choose_nms_kernel(with_nms(), CPU) == ("auto", [])
    with pytest.raises(UserError, match=r"--model.inference.nms-kernel triton: there are no Tri"):
        choose_nms_kernel(with_nms(inference="triton"), CPU)
    with pytest.raises(UserError, match=r"use --model.rpn.nms-kernel fixed"):
        choose_compute(with_nms(rpn="triton"), CPU, compile=False)


def test_triton_where_it_keeps_the_same_boxes(like_gpu, monkeypatch):
    replaced(monkeypatch, fixed_nms)
    kernel, notes = choose_nms_kernel(with_nms(), CPU)
    assert kernel == "triton"
    assert len(notes) == 1
    assert choose_nms_kernel(with_nms("fixed", "greedy"), CPU) == ("auto", [])
    compute, _ = choose_compute(with_nms("fixed"), CPU, compile=False)
    resolved = resolve_auto(with_nms("fixed"), compute)
    assert resolved.rpn.nms_kernel == "fixed"
    assert resolved.inference.nms_kernel == "triton"


@pytest.mark.parametrize("fault", ["another order of ties", "raises", "not installed"])
def test_no_triton_that_differs_or_does_not_run(like_gpu, monkeypatch, fault):
    def survivors(boxes, scores, *rest):
        if fault == "raises":
            raise ValueError("no machine code for this chip\nsecond line")
        turned = [t.flip(1) for t in (boxes, scores, *rest[:2])]
        index, count = fixed_nms(*turned, *rest[2:])
        return boxes.shape[1] - 1 - index, count

    replaced(monkeypatch, survivors)
    if fault == "not installed":
        row = replace(devices.TRAITS["cpu"], triton_kernels=("no_such_backend",))
        monkeypatch.setitem(devices.TRAITS, "cpu", row)
        assert choose_nms_kernel(with_nms(), CPU) == ("auto", [])
    else:
        kernel, notes = choose_nms_kernel(with_nms(), CPU)
        assert kernel == "auto"
        assert notes[0].startswith("warning: suppression by Triton")
        assert "\n" not in notes[0]
    with pytest.raises(UserError, match=r"--model.rpn.nms-kernel triton: .*; use"):
        choose_nms_kernel(with_nms("triton"), CPU)


def test_what_compiles_is_what_works(monkeypatch, tmp_path):
    faults = {"inductor": "InvalidCxxCompiler: none", "aot_eager": ""}
    monkeypatch.setattr(compilers, "find_fault", lambda compiler, device: faults[compiler.name])
    compute, notes = choose_compute(DetectorConfig(), CPU, programs=tmp_path)
    assert compute.backend == "aot_eager"
    assert compute.compile
    assert compute.programs is None
    assert "compiling with aot_eager; inductor doesn't work: InvalidCxxCompiler: none" in notes
    with pytest.raises(UserError, match=r"--compile-backend inductor: Inv.*; install a C\+\+ comp"):
        choose_compute(DetectorConfig(), CPU, backend="inductor", programs=tmp_path)


def test_eager_where_nothing_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "find_fault", lambda compiler, device: "no way")
    compute, notes = choose_compute(DetectorConfig(), CPU, programs=tmp_path)
    assert not compute.compile
    assert any(note.startswith("warning: not compiling; inductor doesn't") for note in notes)


def test_float16_where_bfloat16_is_missing(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert choose_dtype("auto", CPU) == torch.float16
    assert choose_dtype("float32", CPU) == torch.float32
    with pytest.raises(UserError, match=r"--dtype bfloat16: cpu hasn't got it"):
        choose_dtype("bfloat16", CPU)


def test_deterministic_needs_its_variables(like_npu, monkeypatch):
    monkeypatch.delenv("HCCL_DETERMINISTIC", raising=False)
    for value in (None, "", "false"):
        if value is not None:
            monkeypatch.setenv("HCCL_DETERMINISTIC", value)
        with pytest.raises(UserError, match=r"--deterministic: set HCCL_DETERMINISTIC=true"):
            devices.make_deterministic(CPU)


def test_deterministic_is_switched_on():
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        devices.make_deterministic(CPU)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_row_can_train_and_says_how():
    for kind, row in devices.TRAITS.items():
        assert row.backend.endswith(("gloo", "nccl", "hccl"))
        assert kind == "cpu" or f"{kind}:" in row.backend
        assert all(setting.why for setting in row.environment)


def test_a_step_with_the_rows_choices_gives_the_same_losses(monkeypatch, tiny, tiny_batch):
    """Matrix suppression, native RoIAlign without picking, tap by tap gradients: one step."""
    config, image, canvas = tiny
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    batch, results = tiny_batch((3, 2)), []
    matrix = replace(
        config,
        roi_kernel="native",
        rpn=replace(config.rpn, nms_kernel="fixed"),
        inference=replace(config.inference, nms_kernel="fixed"),
    )
    for chosen, row in ((config, devices.TRAITS["cpu"]), (matrix, like_npu_row())):
        monkeypatch.setitem(devices.TRAITS, "cpu", row)
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        step = make_loss_step(chosen, image, canvas, Compute(compile=False))
        total, _ = mean_losses(step(leaves, buffers, batch))
        total.backward()
        grads = [v.grad for k, v in leaves.items() if v.grad is not None]
        results.append((total.detach(), torch.cat([g.flatten() for g in grads])))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    difference = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert difference < 1e-3
