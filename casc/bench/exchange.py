"""What exchanging gradients costs, and how much of it the backward pass hides.

    torchrun --standalone --nproc-per-node 2 -m casc.bench.exchange
    torchrun --standalone --nproc-per-node 2 -m casc.bench.exchange --steps 20

The first compares ways to exchange. The parameters are the reference model's; the backward pass is
two waits, for the mask heads and then for the rest, after which those gradients are there: as with
compiled graphs on an accelerator, where the processor has nothing to do meanwhile.

The second trains a small detector for real, eager, with the same load on every rank: compare its
figures with those of 1 and 4 processes. Both print on rank 0; nothing is written.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from casc.bench.batch import Load, made_up_batch
from casc.device.compute import Compute
from casc.distributed import Exchange, Ranks, process_group, ranks_from_environment
from casc.errors import UserError
from casc.model import detector
from casc.model.box_head import BoxHeadConfig
from casc.model.detector import DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.model.steps import make_loss_step
from casc.train.accumulate import backward
from casc.train.optim import Optim, make_optimizer, update
from casc.train.state import new_state

CPU = torch.device("cpu")
MASK_SHARE = 0.2
"""Of the backward pass, that is the mask heads'; they come first."""
CLASSES, CANVAS = 5, (128, 160)


@dataclass(frozen=True)
class Settings:
    """What to time, on the ranks that torchrun started."""

    steps: int = 0
    """Train a small detector for so many steps instead of comparing ways to exchange."""
    batch: int = 2
    """Images per rank and step, with --steps."""
    seconds: float = 1.0
    """Of the backward pass, when ways are compared."""
    rounds: int = 3
    """How often each way is timed, after a first time."""
    ddp_bucket_mb: tuple[int, ...] = (25, 100)
    """Sizes of DistributedDataParallel's buckets in MiB; with --steps only the first is used."""


Way = Callable[[dict[str, Tensor]], object]
"""Computes the gradients of leaves, by name, and exchanges them."""


class _Later(torch.autograd.Function):
    """Gradients of ones, after a while."""

    @staticmethod
    def forward(ctx: Any, seconds: float, *params: Tensor) -> Tensor:
        ctx.seconds = seconds
        ctx.save_for_backward(*params)
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        time.sleep(ctx.seconds)
        return None, *(torch.ones_like(p) for p in ctx.saved_tensors)


def main(args: list[str] | None = None) -> None:
    """Time, and print on rank 0."""
    settings = tyro.cli(Settings, description=__doc__, args=args)
    if settings.rounds < 1 or settings.steps < 0 or not settings.ddp_bucket_mb:
        raise UserError("--rounds must be at least 1, --steps 0, --bucket-mb one number or more")
    ranks = ranks_from_environment()
    with process_group(ranks, CPU):
        measured = time_steps if settings.steps else time_ways
        lines = measured(settings, ranks)
    if ranks.main:
        print("\n".join(lines))


def time_ways(settings: Settings, ranks: Ranks) -> list[str]:
    """Time a backward pass with each way to exchange its gradients, in turns."""
    config = DetectorConfig()
    params, _ = detector.init(config, torch.Generator().manual_seed(0))
    trained = detector.trainable(config, params)
    masks = [name for name in trained if "mask_head" in name]

    def leaves() -> dict[str, Tensor]:
        # Of each way's own, since DistributedDataParallel leaves hooks on them.
        return {name: value.detach().requires_grad_() for name, value in trained.items()}

    def loss(own: dict[str, Tensor]) -> Tensor:
        first = _Later.apply(MASK_SHARE * settings.seconds, *(own[name] for name in masks))
        rest = (value for name, value in own.items() if name not in masks)
        return _Later.apply((1 - MASK_SHARE) * settings.seconds, *rest) + first

    def after(mib: int) -> Way:
        return lambda own: _after(loss(own), list(own.values()), ranks, mib * 2**20)

    def parallel(exchange: Exchange, last: bool) -> Way:
        return lambda own: exchange.backward(loss(own), last=last)

    ways: list[tuple[str, dict[str, Tensor], Way]] = [
        ("backward alone", leaves(), lambda own: loss(own).backward())
    ]
    if ranks.world > 1:
        ways.append(("one flat all-reduce after it", leaves(), after(2**30)))
        for mib in settings.ddp_bucket_mb:
            own = leaves()
            exchange = Exchange(own.values(), ranks, mib)
            ways.append((f"asynchronous {mib} MiB after it", leaves(), after(mib)))
            ways.append((f"DistributedDataParallel, {mib} MiB", own, parallel(exchange, True)))
            if mib == settings.ddp_bucket_mb[0]:
                ways.append(("accumulating, nothing sent", own, parallel(exchange, False)))
    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(settings.rounds + 1):
        for name, own, way in ways:
            times[name].append(_timed(lambda own=own, way=way: way(own), ranks))
            for value in own.values():
                value.grad = None
    size = 4 * sum(value.numel() for value in trained.values()) / 1e6
    return [
        f"{ranks.world} ranks, {size:.1f} MB of gradients, {settings.seconds} s of backward",
        *(f"{name:34s}{statistics.median(found[1:]):8.3f} s" for name, found in times.items()),
    ]


def time_steps(settings: Settings, ranks: Ranks) -> list[str]:
    """Train a small detector: seconds of its steps, and of steps that send nothing."""
    config = DetectorConfig(
        classes=CLASSES,
        backbone=ResNetConfig(depth=18, norm="gn", width=32, frozen_stages=-1),
        fpn=FPNConfig(channels=64, norm="gn"),
        rpn=RPNConfig(channels=64, train_pre_nms=256, train_proposals=128),
        box_head=BoxHeadConfig(samples=64, channels=256),
        mask_head=MaskHeadConfig(convs=1, channels=32, norm="gn"),
    )
    image = ImageConfig(short=CANVAS[0], long=CANVAS[1])
    params, buffers = detector.init(config, torch.Generator().manual_seed(0))
    state = new_state(config, params, buffers, CPU, torch.contiguous_format)
    batch = made_up_batch(Load(CANVAS, settings.batch, objects=3), CLASSES, seed=ranks.rank)
    loss_step = make_loss_step(config, image, CANVAS, Compute(compile=False))
    optimizer = make_optimizer(Optim(), state)
    trained = [state.params[name] for name in state.momentum]
    exchange = Exchange(trained, ranks, settings.ddp_bucket_mb[0])

    def step() -> None:
        loss, _ = backward(loss_step, state, batch, exchange, ranks, 1)
        update(optimizer, 1e-4, None, state.guard, loss)

    def alone() -> None:
        loss, _ = loss_step(state.params, state.buffers, batch)
        exchange.backward(loss, last=False)
        optimizer.zero_grad()

    times: dict[str, list[float]] = {"step": [], "nothing sent, no update": []}
    for _ in range(settings.steps + 1):
        for name, way in zip(times, (step, alone), strict=True):
            times[name].append(_timed(way, ranks))
    size = 4 * sum(value.numel() for value in trained) / 1e6
    images = ranks.world * settings.batch / statistics.median(times["step"][1:])
    return [
        f"{ranks.world} ranks, {settings.batch} images each, {size:.1f} MB of gradients",
        *(f"{name:34s}{statistics.median(found[1:]):8.3f} s" for name, found in times.items()),
        f"{'images per second of all ranks':34s}{images:8.2f}",
    ]


def _timed(way: Callable[[], object], ranks: Ranks) -> float:
    """Seconds until the last rank is through, from when all have come."""
    if ranks.world > 1:
        dist.barrier()
    began = time.perf_counter()
    way()
    if ranks.world > 1:
        dist.barrier()
    return time.perf_counter() - began


def _after(loss: Tensor, params: list[Tensor], ranks: Ranks, bucket: int) -> None:
    loss.backward()
    groups: list[list[Tensor]] = [[]]
    size = 0
    for param in reversed(params):
        if size > bucket:
            groups.append([])
            size = 0
        assert param.grad is not None
        groups[-1].append(param.grad)
        size += 4 * param.numel()
    sent = []
    for group in groups:
        flat = torch.cat([gradient.flatten() for gradient in group])
        sent.append((group, flat, dist.all_reduce(flat, async_op=True)))
    for group, flat, work in sent:
        work.wait()
        flat /= ranks.world
        parts = flat.split([gradient.numel() for gradient in group])
        for gradient, part in zip(group, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


if __name__ == "__main__":
    main()
