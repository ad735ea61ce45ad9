"""How fast the training step is here: images per second, and how much of the machine that is.

The batch is made up (noise for images, squares for objects), so nothing has to be on disk
and the load is known.
"""

import json
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from casc.bench.batch import Load, made_up_batch
from casc.data.augment import ImageConfig
from casc.data.batch import Batch
from casc.data.stream import to_device
from casc.detector import DetectorConfig, init, trainable
from casc.devices import peak_memory, synchronize
from casc.train.step import Compute, LossStep, make_loss_step, to_format


class Report(NamedTuple):
    """What was measured; times are medians."""

    device: str
    dtype: str
    compiled: bool
    canvas: tuple[int, int]
    batch: int
    objects: int
    img_per_s: float
    step_s: float
    """Losses and gradients of a batch; without reading data or updating weights."""
    forward_s: float
    backward_s: float
    first_step_s: float
    """With compilation, from whatever caches there are."""
    flops: int
    """Of convolutions and matrix products in a step, as run (padding included)."""
    peak_flops: float
    """Per second: forward and backward of a 3x3 convolution, measured in this run."""
    mfu: float
    """flops / step_s / peak_flops."""
    graphs: int
    graph_breaks: int
    recompiles: int
    peak_memory_gib: float
    positives: tuple[float, ...]
    """RoIs per image and stage that had a mask loss."""


def bench_train(
    config: DetectorConfig, load: Load, compute: Compute, device: torch.device
) -> Report:
    """Time the training step of a detector with fresh weights."""
    from torch._dynamo.utils import counters

    params, buffers = init(config, torch.Generator().manual_seed(0))
    params = {k: v.to(device) for k, v in to_format(params, compute.memory_format).items()}
    buffers = {k: v.to(device) for k, v in buffers.items()}
    for value in trainable(config, params).values():
        value.requires_grad_()
    batch = to_device(made_up_batch(config, load), device)
    image = ImageConfig(short=min(load.canvas), long=max(load.canvas))
    step = make_loss_step(config, image, load.canvas, compute)

    counters.clear()
    first = _time(step, params, buffers, batch, device)
    _time(step, params, buffers, batch, device)
    timed = [_time(step, params, buffers, batch, device) for _ in range(load.steps)]
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    recompiles = len(counters["recompiles"])
    memory = peak_memory(device) / 2**30
    seconds = statistics.median(t.forward + t.backward for t in timed)
    peak = convolution_rate(compute, device)
    flops = _count_flops(config, image, load, compute, params, buffers, batch)
    measures = timed[-1].measures
    return Report(
        device=str(device),
        dtype=str(compute.dtype).removeprefix("torch."),
        compiled=compute.compile,
        canvas=load.canvas,
        batch=load.batch,
        objects=load.objects,
        img_per_s=load.batch / seconds,
        step_s=seconds,
        forward_s=statistics.median(t.forward for t in timed),
        backward_s=statistics.median(t.backward for t in timed),
        first_step_s=first.forward + first.backward,
        flops=flops,
        peak_flops=peak,
        mfu=flops / seconds / peak,
        graphs=graphs,
        graph_breaks=breaks,
        recompiles=recompiles,
        peak_memory_gib=memory,
        positives=tuple(measures[f"s{i}.positives"].item() for i in range(len(config.stages))),
    )


def format_report(report: Report, *, as_json: bool) -> str:
    """One JSON object, or a line per figure."""
    if as_json:
        return json.dumps(report._asdict())
    lines = []
    for name, value in report._asdict().items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"{name:<16} {shown}")
    return "\n".join(lines)


def convolution_rate(compute: Compute, device: torch.device) -> float:
    """Operations per second of a 3x3 convolution with 256 channels, forward and backward."""
    x = torch.randn(2, 256, 200, 272, device=device, dtype=compute.dtype)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=compute.dtype) * 0.01
    x = x.contiguous(memory_format=compute.memory_format).requires_grad_()
    weight = weight.contiguous(memory_format=compute.memory_format).requires_grad_()
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), y.detach())
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 3 * 2 * x.numel() * weight.numel() / weight.shape[1] / statistics.median(times[1:])


class _Timing(NamedTuple):
    forward: float
    backward: float
    measures: dict[str, Tensor]


def _time(
    step: LossStep,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    batch: Batch,
    device: torch.device,
) -> _Timing:
    synchronize(device)
    start = time.perf_counter()
    total, measures = step(params, buffers, batch)
    synchronize(device)
    middle = time.perf_counter()
    total.backward()
    synchronize(device)
    end = time.perf_counter()
    for value in params.values():
        value.grad = None
    return _Timing(middle - start, end - middle, measures)


def _count_flops(
    config: DetectorConfig,
    image: ImageConfig,
    load: Load,
    compute: Compute,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    batch: Batch,
) -> int:
    """Counted on the eager step, which runs the same operations."""
    step = make_loss_step(config, image, load.canvas, compute._replace(compile=False))
    with FlopCounterMode(display=False) as counter:
        total, _ = step(params, buffers, batch)
        total.backward()
    for value in params.values():
        value.grad = None
    return counter.get_total_flops()
