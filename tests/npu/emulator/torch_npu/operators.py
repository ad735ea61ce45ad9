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
_BCE = "binary_cross_entropy_with_logits"
_BCE_BACKWARD = (
    "npu_binary_cross_entropy_with_logits_backward(Tensor grad_output, Tensor input,"
    " Tensor target, Tensor? weight_opt, Tensor? pos_weight_opt, int reduction) -> Tensor"
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
_aten = Library("aten", "IMPL")


def register() -> None:
    """Give the device its kernels."""
    _C.implement(aliased(_IMPLEMENTED.read_text().split()))
    _C.deny_fallbacks(os.environ.get("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1", [])
    kernels = {_ALIGN: _roi_align, _BACKWARD: _roi_align_backward, _BCE_BACKWARD: _bce_backward}
    for schema, function in kernels.items():
        _library.define(schema)
        _library.impl(schema.partition("(")[0], function, "PrivateUse1")
    _aten.impl(_BCE, _cross_entropy, "AutogradPrivateUse1")


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


class _CrossEntropy(torch.autograd.Function):
    """torch_npu's own gradient of this loss, by an operator that can't be traced."""

    @staticmethod
    def forward(ctx, x, target, weight, pos_weight, reduction):
        ctx.save_for_backward(x, target, weight, pos_weight)
        ctx.reduction = reduction
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.aten, _BCE)(x, target, weight, pos_weight, reduction)

    @staticmethod
    def backward(ctx, *grads):
        operator = getattr(torch.ops.npu, _BCE_BACKWARD.partition("(")[0])
        return operator(*grads, *ctx.saved_tensors, ctx.reduction), None, None, None, None


def _cross_entropy(x, target, weight=None, pos_weight=None, reduction=1) -> Tensor:
    return _CrossEntropy.apply(x, target, weight, pos_weight, reduction)


def _bce_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
) -> Tensor:
    if weight is not None or pos_weight is not None:
        raise RuntimeError("npu emulator: weights are not known")

    def kernel(grad: Tensor, x: Tensor, target: Tensor) -> Tensor:
        made = grad * (x.sigmoid() - target)
        return made / x.numel() if reduction == 1 else made

    return _launch("npu::" + _BCE_BACKWARD.partition("(")[0], kernel, grad, x, target)


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
    given = [_C.cpu_alias(arg) for arg in args]
    result = kernel(*given)
    if _C.capturing():
        _C.capture(lambda: result.copy_(kernel(*given)))
    made = _C.npu_alias(result, args[0].device.index)
    _C.record(name, [*args, made])
    return made
