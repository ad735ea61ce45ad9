"""What a step may cost besides time: graphs, breaks, recompilations, host reads, operators."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from casc.bench.batch import Load, made_up_batch
from casc.device.compute import Compute
from casc.model import detector
from casc.model.detector_config import DetectorConfig
from casc.model.losses import mean_losses
from casc.model.preprocess import ImageConfig
from casc.model.steps import make_detect_step, make_loss_step

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


# On the CPU these take a tensor's content without dispatching anything.
TAKEN = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class Recorder(TorchDispatchMode):
    """Counts the operators that are dispatched, and what the host takes, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.taken = _Taken()

    def __enter__(self) -> "Recorder":
        self.taken.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.taken.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        schema = func._schema
        name = schema.name if not schema.overload_name else f"{schema.name}.{schema.overload_name}"
        if name == "aten::index.Tensor" and any(_is_mask(i) for i in args[1]):
            name = "aten::masked_select"
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def audit(self) -> Audit:
        """What was counted."""
        reads = sum(
            count
            for name, count in self.counts.items()
            if name in READS or name.partition(".")[0] in READS
        )
        return Audit(reads + self.taken.count, sum(self.counts.values()))


class _Taken(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in TAKEN
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


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
        mean_losses(step(params, buffers, batch))[0].backward()
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
