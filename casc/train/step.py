"""One training step: losses, gradients, the update, the moving averages and the figures."""

import torch
from torch import Tensor

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.device.replay import Pool, Replay
from casc.distributed import Exchange
from casc.model.backbone import layers_above
from casc.model.steps import LossStep, make_loss_step
from casc.train.accumulate import backward
from casc.train.ema import average, decay_at
from casc.train.guard import IN_A_ROW, scale_of
from casc.train.meter import Meter
from casc.train.optim import make_optimizer, update
from casc.train.run import Run


class TrainStep:
    """Updates a run's state in place, without reading anything back.

    All that changes from step to step lies in tensors on the device, so that an accelerator can
    replay it.
    """

    def __init__(self, run: Run, state: State, meter: Meter):
        self.run, self.state, self.meter = run, state, meter
        layers = layers_above(run.recipe.model.backbone, list(state.params))
        self.optimizer = make_optimizer(run.recipe.optim, state, compute=run.compute, layers=layers)
        self.trained = {name: state.params[name] for name in state.momentum}
        self.exchange = Exchange(self.trained.values(), run.ranks, run.recipe.ddp_bucket_mb)
        self.loss_steps: dict[int, LossStep] = {}
        self.replays: dict[int, Replay] = {}
        self.pool = Pool()
        device = run.device
        self.number = torch.full((), state.step, dtype=torch.int64, device=device)
        self.rate, self.share = torch.zeros((), device=device), torch.zeros((), device=device)

    def is_new(self, bucket: int) -> bool:
        """Whether the bucket's first step is still to come, in which its canvas is compiled."""
        return bucket not in self.loss_steps

    def loss_step(self, bucket: int) -> LossStep:
        """The losses of a bucket's batches, compiled when first called."""
        if bucket not in self.loss_steps:
            recipe = self.run.recipe
            canvas = self.run.facts.canvases[recipe.train_split][bucket]
            self.loss_steps[bucket] = make_loss_step(
                recipe.model, recipe.image, canvas, self.run.compute
            )
        return self.loss_steps[bucket]

    def __call__(self, step: int, bucket: int, batch: Batch) -> None:
        """Make one update and add its figures to the meter's.

        Args:
            step: updates made so far.
            bucket: of the batch.
            batch: on the device.
        """
        recipe = self.run.recipe
        self.rate.fill_(self.run.rate(step))
        if recipe.ema.decay is not None:
            self.share.fill_(1 - decay_at(recipe.ema.decay, step))
        columns = [column for column in batch if column is not None]
        if not self.run.replay:
            self._run(bucket, batch)
            return
        if bucket not in self.replays:
            there = [name for name, column in batch._asdict().items() if column is not None]

            def run(*inputs: Tensor) -> None:
                self._run(bucket, Batch(**dict(zip(there, inputs, strict=True))))

            self.loss_step(bucket)
            self.replays[bucket] = Replay(run, self._changed, self.pool)
        self.replays[bucket](*columns)

    def _run(self, bucket: int, batch: Batch) -> None:
        run, recipe, state = self.run, self.run.recipe, self.state
        loss, measures = backward(
            self.loss_step(bucket), state, batch, self.exchange, run.ranks,
            recipe.accumulate, recipe.normalise,
        )  # fmt: skip
        norm = update(self.optimizer, self.rate, state.guard, loss, run.ranks)
        if recipe.ema.decay is not None:
            average(state.ema, self.trained, self.share)
        figures = {"loss": loss, "grad_norm": norm, **scale_of(state.guard), **measures}
        self.meter.add(figures, state.guard[IN_A_ROW], self.number)
        self.number += 1

    def _changed(self) -> list[Tensor]:
        """All that a step changes."""
        state = self.state
        tensors = (self.trained, state.momentum, state.second, state.ema, state.guard)
        values = [value for part in tensors for value in part.values()]
        return [*values, self.meter.sums, self.meter.flags, self.number]
