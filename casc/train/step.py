"""One training step: losses, gradients, the update and the moving averages."""

from torch import Tensor

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.distributed import Exchange
from casc.model.steps import LossStep, make_loss_step
from casc.train.accumulate import backward
from casc.train.ema import average, decay_at
from casc.train.guard import scale_of
from casc.train.optim import make_optimizer, update
from casc.train.run import Run


class TrainStep:
    """Updates a run's state in place, without reading anything back."""

    def __init__(self, run: Run, state: State):
        self.run = run
        self.optimizer = make_optimizer(run.recipe.optim, state)
        trained = [state.params[name] for name in state.momentum]
        self.exchange = Exchange(trained, run.ranks, run.recipe.ddp_bucket_mb)
        self.loss_steps: dict[int, LossStep] = {}

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

    def __call__(self, state: State, bucket: int, batch: Batch) -> dict[str, Tensor]:
        """Make one update.

        Args:
            state: whose tensors change; its counter is the caller's.
            bucket: of the batch.
            batch: on the device.

        Returns:
            Scalars on the device for the log, by name.
        """
        recipe = self.run.recipe
        loss, measures = backward(
            self.loss_step(bucket), state, batch, self.exchange, self.run.ranks,
            recipe.accumulate, recipe.normalise,
        )  # fmt: skip
        rate = self.run.rate(state.step)
        norm = update(self.optimizer, rate, recipe.optim.clip_norm, state.guard, loss)
        if recipe.ema.decay is not None:
            average(state.ema, state.params, decay_at(recipe.ema.decay, state.step))
        return {"loss": loss, "grad_norm": norm, **scale_of(state.guard), **measures}
