"""Try the emulated NPU itself: `device.py OUT.json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch_npu.recording import recording, without_fallbacks

a, b = torch.ones(3, 4, device="npu:0"), torch.ones(3, 4, device="npu:1")
image = torch.rand(2, 3, 16, 16)
rois = torch.tensor([[0, 1.0, 2, 30, 40], [1, 5, 5, 60, 60]])
aligned = (0.25, 7, 7, 2, 2)


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return "not refused"


def denied() -> object:
    with without_fallbacks():
        return torchvision.ops.nms(a, a[:, 0], 0.5)


def reads(function: Callable[[], object]) -> int:
    with recording() as found:
        function()
    return len(found.reads)


def copies() -> list[str]:
    pinned, ordinary = torch.ones(3).pin_memory(), torch.ones(3)
    with recording() as found:
        pinned.to("npu", non_blocking=True)
        ordinary.to("npu", non_blocking=True)
    return [copy.name for copy in found.copies]


def shifts() -> list[str]:
    numbers = torch.arange(4, device="npu")
    with recording() as found:
        _ = numbers >> 3, numbers // 8
    return [copy.name for copy in found.copies]


def fused_sgd(momentum: float) -> list[str]:
    leaf = torch.ones(3, device="npu", requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=0.1, momentum=momentum, fused=True)
    optimizer.found_inf = torch.zeros((), device="npu")  # type: ignore[attr-defined]
    leaf.grad = torch.ones_like(leaf)
    with recording() as found:
        optimizer.step()
    return [read.name for read in found.reads]


def cross_entropy(compile: bool) -> float:
    """How far its gradient is from the formula's."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(x, torch.ones_like(x))

    leaf = torch.arange(4.0, device="npu").requires_grad_()
    (torch.compile(loss, backend="aot_eager", fullgraph=True) if compile else loss)(leaf).backward()
    assert leaf.grad is not None
    return difference(leaf.grad, (leaf.detach().cpu().sigmoid() - 1) / 4)


def launches() -> dict[str, int]:
    with recording() as found:
        _ = a.view(4, 3)[1:].t() * 2
    return found.launches


def seeded() -> bool:
    torch.manual_seed(3)
    first = torch.rand(5, device="npu")
    torch.manual_seed(3)
    return torch.equal(first.cpu(), torch.rand(5, device="npu").cpu())


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (ours.cpu() - expected).abs().max().item()


def roi_align() -> tuple[float, float]:
    leaf = image.clone().requires_grad_()
    expected = torchvision.ops.roi_align(leaf, rois, 7, 0.25, 2, True)
    expected.sum().backward()
    assert leaf.grad is not None
    made = torch.ops.npu.npu_roi_align(image.to("npu"), rois.to("npu"), *aligned)
    gradient = torch.ops.npu.npu_roi_alignbk(
        torch.ones_like(made), rois.to("npu"), list(image.shape), 7, 7, 0.25, 2, 2
    )
    return difference(made, expected.detach()), difference(gradient, leaf.grad)


if __name__ == "__main__":
    values, gradients = roi_align()
    bfloat16 = image.to("npu").bfloat16()
    result = {
        "refused": {
            "two NPUs": refusal(lambda: a + b),
            "an NPU and the CPU": refusal(lambda: torch.cat([a, torch.ones(3, 4)])),
            "channels_last": refusal(
                lambda: image.to("npu").contiguous(memory_format=torch.channels_last)
            ),
            "an operator without kernel": refusal(denied),
            "RoIAlign in bfloat16": refusal(
                lambda: torch.ops.npu.npu_roi_align(bfloat16, rois.to("npu"), *aligned)
            ),
            "cross entropy, compiled": refusal(lambda: cross_entropy(True)),
            "SGD without momentum": refusal(lambda: fused_sgd(0.0)),
        },
        "reads": {
            "item": reads(lambda: a.sum().item()),
            "tolist": reads(a.tolist),
            "cpu": reads(a.cpu),
            "nonzero": reads(a.nonzero),
            "mask": reads(lambda: a[a > 0]),
            "sum": reads(a.sum),
        },
        "fused SGD": fused_sgd(0.9),
        "shifts": shifts(),
        "cross entropy": cross_entropy(False),
        "copies": copies(),
        "launches": launches(),
        "random": seeded(),
        "roi_align": values,
        "gradient": gradients,
    }
    Path(sys.argv[1]).write_text(json.dumps(result))
