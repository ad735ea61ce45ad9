"""Which operators have kernels, and torch_npu's own for RoIAlign.

Of torch's operators those that torch_npu implements are implemented here, by the CPU's kernels.
RoIAlign is torchvision's, under the schemas that libtorch_npu 2.14.0 registers. As there,
neither has a Meta kernel: to be traced they need an operator around them that has one.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

from torch_npu import _C

_ALIGN = (
    "npu_roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height,"
    " int pooled_width, int sample_num, int roi_end_mode) -> Tensor"
)
_BACKWARD = (
    "npu_roi_alignbk(Tensor input, Tensor rois, int[] xdiff_shape, int pooled_width,"
    " int pooled_height, float spatial_scale, int sample_num, int? roi_end_mode=None) -> Tensor"
)
_IMPLEMENTED = Path(__file__).parents[2] / "implemented_operators.txt"
# The device defines these itself, or leaves them to torch, which ends in those that it defines.
_NOT_ALIASED = frozenset(
    (
        "_convolution", "_copy_from_and_resize", "_lazy_clone", "_local_scalar_dense",
        "_pin_memory", "_to_copy", "clone", "convolution", "convolution_backward",
        "convolution_backward_overrideable", "convolution_overrideable", "copy_", "empty",
        "empty_like", "empty_strided", "is_pinned", "record_stream", "resize_as_", "set_",
    )
)  # fmt: skip
# Lives as long as the process: its end would take the operators away.
_library = Library("npu", "DEF")


def register() -> None:
    """Give the device its kernels."""
    _C.implement(aliased(_IMPLEMENTED.read_text().split()))
    _C.deny_fallbacks(os.environ.get("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1", [])
    for schema, function in ((_ALIGN, _roi_align), (_BACKWARD, _roi_align_backward)):
        _library.define(schema)
        _library.impl(schema.partition("(")[0], function, "PrivateUse1")


def aliased(names: list[str]) -> list[str]:
    """The operators among these that the CPU's kernels stand in for, as dispatched to backends."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    chosen = []
    for name in names:
        space, _, rest = name.partition("::")
        if space != "aten" or rest.partition(".")[0] in _NOT_ALIASED:
            continue
        # What torch takes apart itself, gradients included, never reaches a backend.
        if torch._C._dispatch_has_kernel(name) and not has_kernel(
            name, "CompositeImplicitAutograd"
        ):
            chosen.append(rest)
    return chosen


def npu_roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sample_num: int,
    roi_end_mode: int,
) -> Tensor:
    """RoIAlign of [R, 5] RoIs (image, x1, y1, x2, y2); `roi_end_mode` 2 is aligned."""
    return torch.ops.npu.npu_roi_align(
        features, rois, spatial_scale, pooled_height, pooled_width, sample_num, roi_end_mode
    )


def _roi_align(
    x: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int, mode: int
) -> Tensor:
    def kernel(x: Tensor, rois: Tensor) -> Tensor:
        return torch.ops.torchvision.roi_align(
            x.contiguous(), rois, scale, height, width, samples, _aligned(mode)
        )

    return _launch("npu::npu_roi_align", kernel, x, rois)


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    shape: list[int],
    width: int,
    height: int,
    scale: float,
    samples: int,
    mode: int | None = None,
) -> Tensor:
    def kernel(grad: Tensor, rois: Tensor) -> Tensor:
        return torch.ops.torchvision._roi_align_backward(
            grad.contiguous(), rois, scale, height, width, *shape, samples, _aligned(mode or 0)
        )

    return _launch("npu::npu_roi_alignbk", kernel, grad, rois)


def _aligned(mode: int) -> bool:
    if mode not in (0, 2):
        raise RuntimeError(f"npu emulator: roi_end_mode {mode} is not known")
    return mode == 2


def _launch(name: str, kernel: Callable[..., Tensor], *args: Tensor) -> Tensor:
    import torchvision  # noqa: F401  (registers torch.ops.torchvision)

    for arg in args:
        if arg.dtype not in (torch.float32, torch.float16):
            raise RuntimeError(f"npu emulator: {name} takes float32 or float16, got {arg.dtype}")
        if arg.device != args[0].device:
            raise RuntimeError(f"npu emulator: {name}: operands on two devices")
    made = _C.npu_alias(kernel(*[_C.cpu_alias(arg) for arg in args]), args[0].device.index)
    _C.record(name, [*args, made])
    return made
