"""What exchanging gradients costs, and how much of it the backward pass hides.

    torchrun --standalone --nproc-per-node 2 -m casc.bench.exchange [SECONDS]

The parameters are the reference model's. The backward pass is two waits, for the mask heads and
then for the rest, after which those gradients are there: as with compiled graphs on an
accelerator, where the processor has nothing to do meanwhile. Nothing is written.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from casc import detector
from casc.detector import DetectorConfig
from casc.train.distributed import Exchange, Ranks, process_group, ranks_from_environment

ROUNDS = 3
MASK_SHARE = 0.2
"""Of the backward pass, that is the mask heads'; they come first."""
BUCKET = 25 * 2**20


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


def main() -> None:
    """Time each way, in turns, on the ranks that torchrun started; rank 0 prints."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    ranks = ranks_from_environment()
    config = DetectorConfig()
    params, _ = detector.init(config, torch.Generator().manual_seed(0))
    trained = {k: v.requires_grad_() for k, v in detector.trainable(config, params).items()}
    masks = [v for k, v in trained.items() if "mask_head" in k]
    rest = [v for k, v in trained.items() if "mask_head" not in k]
    everything = [*rest, *masks]

    def loss() -> Tensor:
        first = _Later.apply(MASK_SHARE * seconds, *masks)
        return _Later.apply((1 - MASK_SHARE) * seconds, *rest) + first

    with process_group(ranks, torch.device("cpu")):
        exchange = Exchange(everything, ranks)
        ways: dict[str, Callable[[], object]] = {
            "backward alone": lambda: loss().backward(),
            "one flat all-reduce after it": lambda: _after(loss(), everything, ranks, 2**62),
            "asynchronous buckets after it": lambda: _after(loss(), everything, ranks, BUCKET),
            "DistributedDataParallel": lambda: exchange.backward(loss()),
            "accumulating, nothing sent": lambda: exchange.backward(loss(), last=False),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, way in ways.items():
                for param in everything:
                    param.grad = None
                dist.barrier()
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    if ranks.main:
        size = 4 * sum(p.numel() for p in everything)
        print(f"{ranks.world} ranks, {size / 1e6:.1f} MB of gradients, {seconds} s of backward")
        for name, found in times.items():
            print(f"{name:31s}{sorted(found[1:])[ROUNDS // 2]:8.3f} s")


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
