"""How a device is to compute: what the table and the settings come to, decided once.

That includes which RoIAlign and which suppression run: the device's own or casc's Triton kernels,
if they compute the same as plain ATen in one small comparison before the first step, RoIAlign
forward and backward.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from casc.device.compilers import choose_compiler
from casc.device.compute import Compute
from casc.device.devices import CompileBackend, choose_dtype, is_accelerator, traits, triton_missing
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.ops.nms import batched_nms
from casc.ops.pyramid import flatten_pyramid
from casc.ops.roi_align import RoiKernel, Sampling, roi_align

# Of values around 1. Another convention (no half pixel, another grid) is off by 0.1 and more.
TOLERANCE = 1e-3
_STRIDES = (4, 8, 16, 32)


def choose_compute(
    config: DetectorConfig,
    device: torch.device,
    *,
    dtype: str = "auto",
    compile: bool = True,
    backend: CompileBackend = "auto",
    programs: Path | None = None,
) -> tuple[Compute, list[str]]:
    """How to compute a detector on a device, and what there is to say of it.

    Args:
        config: the detector.
        device: from `choose_device`.
        dtype: as for `choose_dtype`.
        compile: whether to compile.
        backend: as for `choose_compiler`.
        programs: folder from `use_cache`, where compiled programs are kept, and which compilers
            work.

    Raises:
        UserError: the device can't do what is asked for.
    """
    row = traits(device)
    kernel, notes = choose_roi_kernel(config.roi_kernel, config.roi_align, device)
    nms_kernel, nms_notes = choose_nms_kernel(config, device)
    notes += nms_notes
    chosen = None
    if compile:
        chosen, failed = choose_compiler(backend, device, programs)
        name = f"compiling with {chosen.name}" if chosen else "warning: not compiling"
        notes.append("; ".join([name, *map(str, failed)]))
    return Compute(
        choose_dtype(dtype, device),
        row.memory_format,
        chosen is not None,
        row.dynamic_shapes,
        programs if chosen and chosen.kept else None,
        chosen.backend if chosen else "inductor",
        kernel,
        "full" if is_accelerator(device) else "counted",
        nms_kernel,
    ), notes


def choose_roi_kernel(
    setting: RoiKernel, sampling: Sampling, device: torch.device
) -> tuple[Literal["aten", "native", "triton"], list[str]]:
    """What `roi_kernel` stands for on a device, and what there is to say of it.

    Args:
        setting: the config's `roi_kernel`.
        sampling: the config's `roi_align`; "adaptive" is always native.
        device: where to run.

    Raises:
        UserError: the device's own or Triton was asked for, or is the only one, and it isn't
            there or differs.
    """
    row = traits(device)
    if setting == "triton" and sampling == "adaptive":
        raise UserError(
            "--model.roi-kernel triton: has the fixed grid only; use --model.roi-align fixed"
        )
    must = setting in ("native", "triton") or (sampling == "adaptive" and row.native_roi_align)
    kernel = _roi_candidate(setting, sampling, device)
    if kernel == "aten":
        return "aten", []
    name = "Triton" if kernel == "triton" else row.roi_align
    found = triton_missing(device) if kernel == "triton" else None
    if found is None:
        try:
            worst = roi_difference(device, kernel)
        except Exception as error:  # whatever a compiler or driver may raise
            found = f"{name}'s RoIAlign doesn't run on {device} ({_in_short(error)})"
        else:
            if worst <= TOLERANCE:
                return kernel, [f"RoIAlign by {name}: {worst:.1g} from plain ATen's"]
            found = (
                f"{name}'s RoIAlign on {device} is {worst:.3g} off plain ATen's, more than"
                f" {TOLERANCE:g}"
            )
    if must:
        flag = "--model.roi-align fixed" if sampling == "adaptive" else "--model.roi-kernel aten"
        raise UserError(f"{found}; use {flag}")
    return "aten", [f"warning: {found}, so RoIAlign is computed in plain ATen"]


def _roi_candidate(
    setting: RoiKernel, sampling: Sampling, device: torch.device
) -> Literal["aten", "native", "triton"]:
    """What would be used, should it prove right."""
    row = traits(device)
    if sampling == "adaptive":
        return "native" if row.native_roi_align or setting == "native" else "aten"
    if setting != "auto":
        return setting
    if not triton_missing(device):
        return "triton"
    return "native" if row.native_roi_align else "aten"


def choose_nms_kernel(
    config: DetectorConfig, device: torch.device
) -> tuple[Literal["auto", "triton"], list[str]]:
    """What "auto" of both `nms_kernel`s stands for on a device, and what there is to say of it.

    Raises:
        UserError: Triton was asked for, and it isn't there or differs from plain ATen.
    """
    settings = {"rpn": config.rpn.nms_kernel, "inference": config.inference.nms_kernel}
    asked = [f"--model.{part}.nms-kernel" for part, name in settings.items() if name == "triton"]
    wrong = triton_missing(device)
    if not asked and (wrong or "auto" not in settings.values()):
        return "auto", []
    wrong = wrong or _wrong_survivors(device)
    if wrong and asked:
        raise UserError(f"{asked[0]} triton: {wrong}; use {asked[0]} fixed")
    if wrong:
        return "auto", [f"warning: {wrong}, so suppression is computed in plain ATen"]
    return "triton", ["suppression by Triton: the same as plain ATen's"]


def _wrong_survivors(device: torch.device) -> str | None:
    """What is wrong with suppression by Triton on a device, next to plain ATen on it."""
    corner = _wave((2, 200, 2)).mul(40).round()
    boxes = torch.cat([corner, corner + 20 + _wave((2, 200, 2)).mul(10).round()], dim=2).to(device)
    scores = _wave((2, 200)).mul(9).round().to(device)  # many ties
    group = torch.arange(200, device=device) % 3
    valid = scores > -7
    try:
        made, right = (
            batched_nms(
                boxes, scores, group, valid, iou=0.5, count=80, groups=3, largest=67, kernel=kernel
            )
            for kernel in ("triton", "fixed")
        )
    except Exception as error:  # whatever a compiler or driver may raise
        return f"suppression by Triton doesn't run on {device} ({_in_short(error)})"
    if all(torch.equal(a, b) for a, b in zip(made, right, strict=True)):
        return None
    return f"suppression by Triton on {device} keeps other boxes than plain ATen"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def roi_difference(device: torch.device, kernel: Literal["native", "triton"]) -> float:
    """The largest difference from plain ATen, of values and of gradients, float32."""
    boxes = _boxes().to(device)
    image = torch.arange(boxes.shape[0], device=device) % 2
    made = []
    for one in ("aten", kernel):
        levels = [level.to(device).requires_grad_() for level in _levels()]
        aligned = roi_align(flatten_pyramid(levels, _STRIDES), boxes, image, 7, "fixed", one)
        weight = _wave(aligned.shape).to(device)
        made.append((aligned.detach(), *torch.autograd.grad(aligned, levels, weight)))
    return max((a - b).abs().max().item() for a, b in zip(*made, strict=True))


def _levels() -> list[Tensor]:
    return [_wave((2, 16, 128 // stride, 160 // stride)) for stride in _STRIDES]


def _wave(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Numbers in [-1, 1] that no two neighbours share."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul(0.7).sin().view(shape)


def _boxes() -> Tensor:
    """RoIs of every level: inside, across each border, outside, thin and empty."""
    centre = _wave((24, 2)) * 90 + 70
    side = torch.exp(_wave((24, 2)).flip(1) * 2 + 3.5)
    extra = [[0.0, 0, 160, 128], [30, 20, 30, 60], [-400, -400, -300, -300]]
    extra += [[-100.0, -100, 200, 200], [-200, -200, 300, 300]]
    return torch.cat(
        [torch.cat([centre - side / 2, centre + side / 2], dim=1), torch.tensor(extra)]
    )
