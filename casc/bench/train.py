"""The training step: losses and gradients, and the update beside them."""

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casc.bench import budgets, flops
from casc.bench.batch import CLASSES, Job, Load, made_up_batch
from casc.data.batch import Batch
from casc.data.stream import to_device
from casc.device.compile_cache import use_cache
from casc.device.compute import Compute
from casc.device.devices import choose_device, synchronize
from casc.device.replay import Pool, Replay
from casc.model.choose_compute import choose_compute
from casc.model.detector import init, trainable
from casc.model.detector_config import DetectorConfig
from casc.model.losses import mean_losses
from casc.model.preprocess import ImageConfig
from casc.model.steps import make_loss_step, resolve_auto, to_format
from casc.train.optim import Optim, make_optimizer, update
from casc.train.state import new_state


class Training:
    """casc's step with fresh weights, the reference's R50-FPN."""

    def __init__(self, job: Job):
        self.job, self.config = job, DetectorConfig(classes=CLASSES)
        self.device, self.compute = torch.device(job.device), compute_of(job)
        params, self.buffers = init(self.config, torch.Generator().manual_seed(0))
        self.params = to_format(params, self.compute.memory_format)
        self.params, self.buffers = (
            {k: v.to(self.device) for k, v in tensors.items()}
            for tensors in (self.params, self.buffers)
        )
        for value in trainable(self.config, self.params).values():
            value.requires_grad_()
        self.batch = to_device(made_up_batch(job.load, CLASSES), self.device)
        self.image = image_config(job.load)
        canvas = job.load.canvas
        self.loss_step = make_loss_step(self.config, self.image, canvas, self.compute)
        self.measures: dict[str, Tensor] = {}

    def step(self) -> dict[str, float]:
        """Losses and gradients."""
        seconds = self._gradients()
        for value in self.params.values():
            value.grad = None
        return seconds

    def facts(self) -> dict[str, Any]:
        """The update's time, budgets, operations, and the machine's peak."""
        config = resolve_auto(self.config, self.compute)
        stages = range(len(config.stages))
        positives = [self.measures[f"s{i}.positives"].item() for i in stages]
        counts = [round(p * self.job.load.batch) for p in positives]
        return {
            "update_s": self._update(),
            "positives": positives,
            **budgets.audit_training(config)._asdict(),
            "flops": flops.reference_step(config, self.job.load, counts),
            "flops_run": flops.own_step(config, self.job.load, counts),
            "peak_flops": convolution_rate(self.compute, self.device),
        }

    def _gradients(self) -> dict[str, float]:
        start = time.perf_counter()
        found = self.loss_step(self.params, self.buffers, self.batch)
        total, self.measures = mean_losses(found)
        synchronize(self.device)
        middle = time.perf_counter()
        total.backward()
        synchronize(self.device)
        end = time.perf_counter()
        return {"step_s": end - start, "forward_s": middle - start, "backward_s": end - middle}

    def _update(self) -> float:
        """Seconds of the optimizer's step, the median of three."""
        state = new_state(
            self.config, self.params, self.buffers, self.device, self.compute.memory_format
        )
        optimizer = make_optimizer(Optim(), state, compute=self.compute)
        rate, times = torch.zeros((), device=self.device), []
        for _ in range(3):
            for value in trainable(self.config, state.params).values():
                value.grad = torch.zeros_like(value)
            synchronize(self.device)
            start = time.perf_counter()
            update(optimizer, rate, state.guard)
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class WholeStep(Training):
    """The same with its update, as training runs it: launched one by one, or replayed."""

    def __init__(self, job: Job):
        super().__init__(job)
        state = new_state(
            self.config, self.params, self.buffers, self.device, self.compute.memory_format
        )
        self.params, self.state = state.params, state
        self.optimizer = make_optimizer(Optim(), state, compute=self.compute)
        self.rate = torch.zeros((), device=self.device)
        self.columns = {k: v for k, v in self.batch._asdict().items() if v is not None}
        self.replay = Replay(self._run, self._changed, Pool()) if job.replay else None

    def step(self) -> dict[str, float]:
        """Losses, gradients, update."""
        start = time.perf_counter()
        (self.replay or self._run)(*self.columns.values())
        synchronize(self.device)
        return {"step_s": time.perf_counter() - start}

    def _run(self, *columns: Tensor) -> None:
        batch = Batch(**dict(zip(self.columns, columns, strict=True)))
        total, _ = mean_losses(self.loss_step(self.params, self.buffers, batch))
        total.backward()
        update(self.optimizer, self.rate, self.state.guard, total.detach())

    def _changed(self) -> list[Tensor]:
        parts = (self.optimizer.trained, self.state.momentum, self.state.guard)
        return [value for part in parts for value in part.values()]


def compute_of(job: Job) -> Compute:
    """How the device computes, with the job's dtype."""
    programs = use_cache(job.cache) if job.compile else None
    config = DetectorConfig(classes=CLASSES)
    compute, _ = choose_compute(
        config, choose_device(job.device), dtype=job.dtype, compile=job.compile, programs=programs
    )
    return compute


def image_config(load: Load) -> ImageConfig:
    """A resize that leaves images of the canvas's size as they are."""
    return ImageConfig(short=min(load.canvas), long=max(load.canvas))


def convolution_rate(compute: Compute, device: torch.device) -> float:
    """Operations per second of a 3x3 convolution with 256 channels, forward and backward."""
    x = torch.randn(2, 256, 200, 272, device=device, dtype=compute.dtype)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=compute.dtype) * 0.01
    x = x.contiguous(memory_format=compute.memory_format).requires_grad_()
    weight = weight.contiguous(memory_format=compute.memory_format).requires_grad_()
    times: list[float] = []
    # Three at least, the first of which warms up; a slow machine need not do more.
    while len(times) < 3 or (len(times) < 6 and sum(times) < 2):
        synchronize(device)
        start = time.perf_counter()
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), y.detach())
        synchronize(device)
        times.append(time.perf_counter() - start)
    # The peak is what the machine can do when nothing disturbs it.
    return 3 * 2 * x.numel() * weight.numel() / weight.shape[1] / min(times[1:])
