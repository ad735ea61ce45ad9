"""What a step may cost besides time: graphs, breaks, recompilations, host reads, operators."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from casc import detector
from casc.bench.batch import Load, made_up_batch
from casc.data.augment import ImageConfig
from casc.detector import DetectorConfig
from casc.train.step import Compute, make_detect_step, make_loss_step

AUDIT_CANVAS = (128, 128)
"""Where operators are counted: neither they nor reads depend on the canvas."""

READS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::is_nonzero",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::bincount",
        "aten::repeat_interleave.Tensor",
        "torchvision::nms",
    }
)
"""Operators that make the host wait for a value or for a shape that depends on values."""


class Audit(NamedTuple):
    """What one eager step dispatched."""

    host_reads: int
    """Values or shapes that the host waits for."""
    operators: int
    """Operators dispatched, forward and backward; casc's own count as one."""


class Recorder(TorchDispatchMode):
    """Counts the operators that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        schema = func._schema
        name = schema.name if not schema.overload_name else f"{schema.name}.{schema.overload_name}"
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def audit(self) -> Audit:
        """What was counted."""
        reads = sum(
            count
            for name, count in self.counts.items()
            if name in READS or name.partition(".")[0] in READS
        )
        return Audit(reads, sum(self.counts.values()))


def record_training(config: DetectorConfig) -> Recorder:
    """Dispatch one eager step, losses and gradients, on the CPU."""
    load, compute = Load(AUDIT_CANVAS, objects=2), Compute(compile=False)
    image = ImageConfig(short=128, long=128)
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    for value in detector.trainable(config, params).values():
        value.requires_grad_()
    step = make_loss_step(config, image, load.canvas, compute)
    batch = made_up_batch(load, config.classes)
    with Recorder() as recorder:
        total, _ = step(params, buffers, batch)
        total.backward()
    return recorder


def audit_training(config: DetectorConfig) -> Audit:
    """Reads and operators of one step, losses and gradients."""
    return record_training(config).audit()


def audit_inference(config: DetectorConfig) -> Audit:
    """Reads and operators of one detection step."""
    load, compute = Load(AUDIT_CANVAS, batch=1), Compute(compile=False)
    image = ImageConfig(short=128, long=128)
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    step = make_detect_step(config, image, load.canvas, compute)
    batch = made_up_batch(load, config.classes)
    with Recorder() as recorder:
        step(params, buffers, batch)
    return recorder.audit()


def compilations() -> dict[str, int]:
    """Graphs, graph breaks and recompilations of this process so far."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": len(counters["recompiles"]),
    }


def with_capacity(config: DetectorConfig, capacity: Any) -> DetectorConfig:
    """The same detector with another mask capacity."""
    return replace(config, mask_head=replace(config.mask_head, capacity=capacity))


def count_reads(function: Callable[[], object]) -> Audit:
    """Audit any function."""
    with Recorder() as recorder:
        function()
    return recorder.audit()
