"""Small checks that a device computes what casc needs; for `casc doctor`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from casc.checkpoints.state import State
from casc.device.compile_cache import use_cache
from casc.device.compilers import tried
from casc.device.devices import choose_dtype, traits
from casc.model.choose_compute import TOLERANCE, roi_difference
from casc.ops.nms import batched_nms
from casc.ops.row_sums import weighted_row_sums
from casc.train.flat import flatten
from casc.train.guard import new_guard
from casc.train.optim import Optim, make_optimizer, update


class Check(NamedTuple):
    """What one check found."""

    name: str
    passed: bool
    found: str
    fix: str = ""
    """What to do about it, where it didn't pass."""
    needed: bool = True
    """Whether casc can't train without it."""


def check_device(device: torch.device) -> list[Check]:
    """Run every check on a device; whatever a check raises is what it found."""
    checks: tuple[tuple[str, Callable[[torch.device], Check]], ...] = (
        ("convolution", _convolution),
        ("weighted bags", _bags),
        ("suppression", _suppression),
        ("native RoIAlign", _roi_align),
        ("optimizer", _optimizer),
        ("compiler", _compiler),
        ("collectives", _collectives),
    )
    found = []
    for name, check in checks:
        try:
            found.append(check(device))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            optional = name in ("native RoIAlign", "compiler", "collectives")
            found.append(Check(name, False, text, needed=not optional))
    return found


def _convolution(device: torch.device) -> Check:
    dtype = choose_dtype("auto", device)
    x, weight = _wave(2, 16, 24, 24), _wave(8, 16, 3, 3)
    right = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    row = traits(device)
    made = torch.nn.functional.conv2d(
        x.to(device, dtype).contiguous(memory_format=row.memory_format),
        weight.to(device, dtype).contiguous(memory_format=row.memory_format),
        padding=1,
    )
    worst = _relative(made, right)
    return Check("convolution", worst < 0.02, f"{dtype}: relative error {worst:.1g}")


def _bags(device: torch.device) -> Check:
    pixels = _wave(50, 8)
    index = torch.arange(160).view(10, 16) * 7 % 50
    weight = _wave(10, 16)
    leaf = pixels.to(device).requires_grad_()
    made = weighted_row_sums(leaf, index.to(device), weight.to(device))
    right = (pixels[index] * weight[..., None]).sum(dim=1)
    (grad,) = torch.autograd.grad(made, leaf, _wave(10, 8).to(device))
    spread = (_wave(10, 8)[:, None] * weight[..., None]).reshape(160, 8)
    right_grad = torch.zeros(50, 8).index_add(0, index.flatten(), spread)
    worst = max(_relative(made, right), _relative(grad, right_grad))
    return Check("weighted bags", worst < 1e-3, f"relative error {worst:.1g}, gradient included")


def _suppression(device: torch.device) -> Check:
    corner = _wave(200, 2) * 40 + 40
    boxes = torch.cat([corner, corner + 12 + 8 * _wave(200, 2).flip(0)], dim=1)[None]
    scores = (torch.arange(200) * 37 % 200 / 200.0)[None]
    group, valid = torch.arange(200) % 3, torch.ones(1, 200, dtype=torch.bool)
    right = batched_nms(boxes, scores, group, valid, iou=0.5, count=80, kernel="greedy")
    made = batched_nms(
        boxes.to(device), scores.to(device), group.to(device), valid.to(device),
        iou=0.5, count=80, groups=3, largest=67, kernel="fixed",
    )  # fmt: skip
    same = all(torch.equal(a.cpu(), b) for a, b in zip(made, right, strict=True))
    return Check("suppression", same, f"{'as' if same else 'not as'} torchvision's on the CPU")


def _roi_align(device: torch.device) -> Check:
    worst = roi_difference(device, "native")
    return Check(
        "native RoIAlign",
        worst <= TOLERANCE,
        f"{traits(device).roi_align}'s is {worst:.1g} from plain ATen's",
        "training takes plain ATen's: --model.roi-kernel aten",
        needed=False,
    )


def _optimizer(device: torch.device) -> Check:
    values = {"weight": _wave(6, 5), "bias": _wave(7)}
    theirs = [value.clone().requires_grad_() for value in values.values()]
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=1e-4)
    ours = flatten({name: value.to(device) for name, value in values.items()})
    momentum = flatten({name: torch.zeros_like(value) for name, value in ours.items()})
    state = State(0, ours, {}, momentum, new_guard(device, scaled=False))
    update_ours, rate = make_optimizer(Optim(), state), torch.full((), 0.1, device=device)
    for _ in range(2):
        for value in (*theirs, *ours.values()):
            value.requires_grad_().grad = torch.ones_like(value)
        optimizer.step()
        update(update_ours, rate, state.guard)
    worst = max(
        _relative(a.detach(), b.detach()) for a, b in zip(ours.values(), theirs, strict=True)
    )
    return Check("optimizer", worst < 1e-5, f"SGD: relative error {worst:.1g}")


def _compiler(device: torch.device) -> Check:
    """As a run chooses, but nothing that is known is taken for granted; runs then know it."""
    folder = use_cache()
    failed = []
    for compiler in traits(device).compilers:
        trial = tried(compiler, device, folder, again=True)
        if not trial.fault:
            found = "; ".join([compiler.name, *map(str, failed)])
            fix = failed[0].compiler.fix if failed else ""
            return Check("compiler", not failed, found, fix, needed=False)
        failed.append(trial)
    return Check(
        "compiler", False, "; ".join(map(str, failed)), failed[0].compiler.fix, needed=False
    )


def _collectives(device: torch.device) -> Check:
    wanted = [part.rpartition(":")[2] for part in traits(device).backend.split(",")]
    available = {
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
    }
    missing = [
        name
        for name in wanted
        if not available.get(name, dist.is_available() and name in dist.Backend.backend_list)
    ]
    return Check(
        "collectives",
        not missing,
        f"{', '.join(missing)} isn't in this torch" if missing else ", ".join(wanted),
        "one device trains all the same; for more, install a build of torch that has it",
        needed=False,
    )


def _wave(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul(0.7).sin().view(shape)


def _relative(made: Tensor, right: Tensor) -> float:
    return ((made.cpu().double() - right).abs().max() / right.abs().max()).item()
