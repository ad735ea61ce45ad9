"""Figures of the steps since the last log record, kept on the device until they are asked for."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from casc.errors import UserError
from casc.train.distributed import Ranks, gather, mean, smallest

T = TypeVar("T")

_NEVER = 2**62


class Meter:
    """Sums on the device, times on the host; nothing waits for the device in between."""

    def __init__(self, device: torch.device, ranks: Ranks):
        self.ranks = ranks
        self.names: list[str] = []
        self.sums = torch.zeros((), device=device)
        self.first_bad = torch.full((), _NEVER, dtype=torch.int64, device=device)
        self.speeds: list[float] = []
        self.cold_speeds: list[float] = []
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros((), device=self.sums.device)
        self.count = self.images = 0
        self.waited = 0.0
        self.cold = False
        self.ids: dict[int, Tensor] = {}
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is none of the steps' time."""
        before = time.perf_counter()
        yield
        self.began += time.perf_counter() - before

    def warming_up(self) -> None:
        """Keep this interval out of `typical_speed`: something was compiled in it."""
        self.cold = True

    def typical_speed(self) -> float:
        """Images per second over all ranks: the median of the intervals."""
        return statistics.median(self.speeds or self.cold_speeds or [0.0])

    def waiting(self, stream: Iterator[T]) -> T:
        """The next of a stream; the time that it takes counts as waiting for data."""
        before = time.perf_counter()
        item = next(stream)
        self.waited += time.perf_counter() - before
        return item

    def add(self, step: int, image_id: Tensor, measures: dict[str, Tensor]) -> None:
        """Add a step's figures.

        Args:
            step: the step's number, from 0.
            image_id: [B] int64 on the CPU.
            measures: scalars on the device; among them `loss` and `grad_norm`.
        """
        self.names = list(measures)
        values = torch.stack([value.detach().float() for value in measures.values()])
        self.sums = self.sums + values
        bad = ~(measures["loss"].detach() * measures["grad_norm"]).isfinite()
        self.first_bad = torch.where(bad, self.first_bad.clamp(max=step), self.first_bad)
        self.ids[step] = image_id
        self.count += 1
        self.images += len(image_id) * self.ranks.world

    def check(self) -> None:
        """Read the device's flag.

        Raises:
            UserError: a loss or gradient since the last check wasn't finite; the images are
                named.
        """
        step = int(smallest(self.first_bad.clone(), self.ranks))
        if step == _NEVER:
            return
        ids = self.ids.get(step)
        parts = gather([] if ids is None else ids.tolist(), self.ranks)
        named = [image_id for part in parts for image_id in part]
        raise UserError(
            f"step {step}: the loss or its gradient is not finite; images of the step: {named}."
            " Nothing was saved after it. Lower --optim.lr, set --optim.clip-norm, or look at"
            " the images with `data_tools show`"
        )

    def read(self) -> dict[str, float]:
        """Means over the interval and the ranks, with speed and share of waiting; then restart.

        Raises:
            UserError: as `check`.
        """
        self.check()
        means = mean(self.sums / self.count, self.ranks).tolist()
        elapsed = time.perf_counter() - self.began
        result = dict(zip(self.names, means, strict=True))
        result["images_per_second"] = self.images / elapsed
        result["data_wait"] = self.waited / elapsed
        (self.cold_speeds if self.cold else self.speeds).append(result["images_per_second"])
        self._restart()
        return result


def watch_positives(warn: Callable[[str], None]) -> Callable[[dict[str, float]], None]:
    """Make a function that warns when a head has had no positive in a whole interval.

    It warns once until the head has had one again.
    """
    silent: set[str] = set()

    def look(values: dict[str, float]) -> None:
        for name, value in values.items():
            head, _, kind = name.rpartition(".")
            if kind != "positives":
                continue
            if value == 0 and head not in silent:
                silent.add(head)
                warn(
                    f"{head} had no positive sample since the last record: its losses teach it"
                    " nothing. Are boxes and anchors of a size (--model.anchors.scale,"
                    " --image.short), and does first_batch.png show the objects?"
                )
            elif value > 0:
                silent.discard(head)

    return look
