"""The losses of a run's weights on the split that it evaluates on."""

from collections.abc import Callable
from contextlib import closing

import torch

from casc.data.batch import Batch
from casc.data.stream import evaluation_batches, to_device
from casc.data.workers import BatchStream
from casc.device.devices import traits
from casc.distributed import gather
from casc.inference.detector import Detector
from casc.model.losses import LossSums
from casc.model.preprocess import without_randomness
from casc.model.steps import LossStep, make_loss_step
from casc.train.derived import split_canvases
from casc.train.recipe import reads_bitmaps
from casc.train.recipe_checks import validation_split
from casc.train.run import Run

TOTAL = "loss"


class Validation:
    """Computes losses without gradient, the same numbers whenever the weights are the same.

    Images are seen as they are evaluated, neither flipped nor scaled at random, and an image's
    sampling noise follows from the run's seed and its id alone. A loss is its sum over all
    images divided by the number of its samples in all of them, so that neither the batch nor the
    number of processes has a part in it.
    """

    def __init__(self, run: Run, detector: Detector):
        recipe = run.recipe
        self.run, self.detector = run, detector
        self.image = without_randomness(recipe.image)
        self.split = validation_split(recipe, run.index)
        self.canvases = split_canvases(self.split, self.image)
        self.steps: dict[int, LossStep] = {}
        self.eager: dict[int, LossStep] = {}

    def __call__(
        self,
        watch: Callable[[int], object],
        opened: Callable[[BatchStream], object],
        meet: Callable[[], object],
    ) -> dict[str, float]:
        """All losses by name, and their sum as "loss"; other ranks than the main one get none.

        Args:
            watch: is told how many images each batch had, and may raise.
            opened: gets the stream of batches that are going to be read.
            meet: is called before ranks exchange anything, and may raise.
        """
        run, recipe, detector = self.run, self.run.recipe, self.detector
        stream = evaluation_batches(
            recipe.data, self.split, batch=recipe.batch,
            world=run.ranks.world, rank=run.ranks.rank, loading=recipe.loading,
            pin_memory=traits(run.device).pin_memory, warn=run.log.warn, seed=recipe.seed,
            bitmaps=reads_bitmaps(recipe), masks=recipe.model.masks != "none",
            regions=recipe.model.ignore == "crowds",
        )  # fmt: skip
        opened(stream)
        sums: dict[str, list[float]] = {}
        with closing(stream), stream.explained(), torch.no_grad():
            for bucket, batch in stream:
                rows = int((batch.image_id >= 0).sum())
                step = self._step(bucket, whole=rows == len(batch.image_id))
                part = to_device(_first(batch, rows), run.device)
                _add(sums, step(detector.params, detector.buffers, part))
                watch(rows)
        meet()
        losses: dict[str, float] = {}
        gathered = gather(sums, run.ranks)
        for name in dict.fromkeys(name for part in gathered for name in part):
            parts = [part[name] for part in gathered if name in part]
            total, count = (sum(column) for column in zip(*parts, strict=True))
            losses[name] = total / max(count, 1.0)
        return {TOTAL: sum(losses.values()), **losses} if losses else {}

    def _step(self, bucket: int, *, whole: bool) -> LossStep:
        """The losses of a bucket's batches; those that aren't full aren't worth compiling for."""
        known = self.steps if whole else self.eager
        if bucket not in known:
            compute = self.run.compute if whole else self.run.compute._replace(compile=False)
            known[bucket] = make_loss_step(
                self.run.recipe.model, self.image, self.canvases[bucket], compute
            )
        return known[bucket]


def _first(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch."""
    return Batch(**{k: v[:rows] for k, v in batch._asdict().items() if v is not None})


def _add(sums: dict[str, list[float]], found: LossSums) -> None:
    """Add a batch's losses and counts, in double precision; this waits for the device."""
    columns = [torch.stack(list(column.values())) for column in (found.sums, found.counts)]
    for name, *values in zip(found.sums, *(c.tolist() for c in columns), strict=True):
        before = sums.setdefault(name, [0.0, 0.0])
        sums[name] = [a + b for a, b in zip(before, values, strict=True)]
