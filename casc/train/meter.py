"""Figures of the steps since the last log record, kept on the device until they are asked for."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from casc.distributed import Ranks, gather, mean
from casc.errors import UserError

T = TypeVar("T")

_NEVER = 2**62
_MOST_FIGURES = 256
"""Of a step. The sums are there before the first one, which may be recorded to be replayed."""


class Meter:
    """Sums on the device, times on the host; nothing waits for the device in between."""

    def __init__(
        self,
        device: torch.device,
        ranks: Ranks,
        *,
        max_skips: int = 20,
        warn: Callable[[str], object] = lambda text: None,
    ):
        self.ranks, self.max_skips, self.warn = ranks, max_skips, warn
        self.names: list[str] = []
        self.sums = torch.zeros(_MOST_FIGURES, device=device)
        # First step that was skipped, how many were, the most in a row.
        self.flags = torch.zeros(3, dtype=torch.int64, device=device)
        self.speeds: list[float] = []
        self.cold_speeds: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far and begin an interval."""
        # In place: a step that is replayed adds to these very tensors.
        self.sums.zero_()
        self.flags.zero_()
        self.flags[0].fill_(_NEVER)
        self.count = self.images = 0
        self.first = _NEVER
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

    def add(self, measures: dict[str, Tensor], in_a_row: Tensor, number: Tensor) -> None:
        """Add a step's figures on the device, in place.

        Args:
            measures: scalars on the device, the same names at every step.
            in_a_row: int64 scalar on the device, the updates skipped up to and with this
                one; 0 if it was made. The same on all ranks.
            number: int64 scalar on the device, the step's number, from 0.
        """
        self.names = list(measures)
        values = torch.stack([value.detach().float() for value in measures.values()])
        bad = in_a_row > 0
        self.sums[: len(values)] += torch.where(bad, 0.0, values)
        first, skipped, worst = self.flags.unbind()
        first.copy_(torch.where(bad, torch.minimum(first, number), first))
        skipped += bad
        worst.copy_(torch.maximum(worst, in_a_row))

    def add_images(self, step: int, image_id: Tensor) -> None:
        """Count a step's images.

        Args:
            step: the step's number, from 0.
            image_id: [B] int64 on the CPU.
        """
        self.ids[step] = image_id
        self.count += 1
        self.images += len(image_id) * self.ranks.world

    def check(self) -> int:
        """Read the device's flags.

        Returns:
            How many updates were skipped since the last `read`.

        Raises:
            UserError: too many in a row; the first one's images are named.
        """
        self.first, skipped, worst = self.flags.tolist()
        if worst >= self.max_skips:
            raise UserError(
                f"step {self.first}: the loss or its gradient is not finite, and {worst} updates"
                f" in a row were skipped for that; images of the step: {self._bad_images()}."
                " These updates left the weights alone, but one before may have ruined them: go on"
                " from an earlier checkpoint with --resume-from STEP --allow optim and a lower"
                " --optim.lr or --optim.clip-norm, or look at the images with `data_tools show`;"
                " --optim.max-skips sets how many are borne"
            )
        return skipped

    def _bad_images(self) -> list[int]:
        ids = self.ids.get(self.first)
        parts = gather([] if ids is None else ids.tolist(), self.ranks)
        return [image_id for part in parts for image_id in part]

    def read(self) -> dict[str, float]:
        """Means over the interval and the ranks, with speed and share of waiting; then restart.

        Skipped updates are warned of and left out of the means.

        Raises:
            UserError: as `check`.
        """
        skipped = self.check()
        if skipped:
            self.warn(
                f"step {self.first}: the loss or its gradient is not finite; {skipped} of the last"
                f" {self.count} updates were skipped; images of the step: {self._bad_images()}"
            )
        # Nothing but nan is known where all of them were.
        made = self.count - skipped or float("nan")
        means = mean(self.sums[: len(self.names)] / made, self.ranks).tolist()
        elapsed = time.perf_counter() - self.began
        result = dict(zip(self.names, means, strict=True))
        result["images_per_second"] = self.images / elapsed
        result["data_wait"] = self.waited / elapsed
        result["skipped"] = skipped
        (self.cold_speeds if self.cold else self.speeds).append(result["images_per_second"])
        self.restart()
        return result


def watch_positives(warn: Callable[[str], None]) -> Callable[[dict[str, float]], None]:
    """Make a function that warns when a head has had no positive in a whole interval.

    It warns once until the head has had one again.
    """
    silent: set[str] = set()

    def watch(values: dict[str, float]) -> None:
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

    return watch
