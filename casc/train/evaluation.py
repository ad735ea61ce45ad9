"""Evaluation of a run between its steps."""

import time

from casc.checkpoints import format as checkpoint
from casc.checkpoints.state import State
from casc.data.workers import BatchStream
from casc.distributed import from_main
from casc.evaluate.metrics import Evaluation, format_table, write_evaluation
from casc.evaluate.run import evaluate_split
from casc.inference.detector import Detector
from casc.model.steps import reads_back
from casc.train.meter import Meter
from casc.train.patience import out_of_patience
from casc.train.results import figures_of
from casc.train.run import EVALUATIONS, Run
from casc.train.saving import Saver
from casc.train.stopping import SafePoints, Stopping
from casc.train.validation import TOTAL, Validation
from casc.train.watching import Activity


class Evaluator:
    """Evaluates a run's state; its figures go into the log, a file and the checkpoint."""

    def __init__(
        self,
        run: Run,
        state: State,
        activity: Activity,
        stopping: Stopping,
        saver: Saver,
        meter: Meter,
    ):
        self.run, self.activity, self.stopping = run, activity, stopping
        self.saver, self.meter = saver, meter
        shown = {**state.params, **state.ema} if run.recipe.ema.evaluate else state.params
        self.detector = Detector(
            params=shown,
            buffers=state.buffers,
            model=run.recipe.model,
            image=run.recipe.image,
            compute=run.compute,
            device=run.device,
            categories=run.index.categories,
            # Whatever keeps training from it is said there.
            replay=run.replay
            and reads_back(run.recipe.model, run.compute, run.device, training=False) is None,
        )
        self.validation = Validation(run, self.detector) if run.recipe.validation_loss else None
        self.latest: Evaluation | None = None
        """The main rank's alone, so it can't tell the others whether there was one."""
        self.done = False
        """Whether there was one, on all ranks."""
        self.ending = self._ending(state.step)
        """Why the run is to end before its last step, on all ranks."""

    def missed(self, step: int) -> bool:
        """Whether a run that goes on ended between a checkpoint and its evaluation."""
        run = self.run
        saved = checkpoint.path_of(run.checkpoints, step) / checkpoint.METRICS
        missed = step > 0 and run.due(step, run.recipe.evaluate_every) and not saved.exists()
        return from_main(missed if run.ranks.main else None, run.ranks)

    def evaluate(self, state: State) -> None:
        """Evaluate the state, all ranks together.

        Raises:
            StoppedError: on a signal.
        """
        points = self.stopping.between_steps()
        with self.meter.paused():
            points.pass_by()
            began = time.perf_counter()
            latest = self._detect(state.step, points)
            losses = self._losses(state.step)
            self.latest, self.done = latest, True
            if latest is not None:
                self._record(latest, losses, state.step, time.perf_counter() - began)
            self.ending = self._ending(state.step)
            if self.ending:
                self._end(state)

    def _ending(self, step: int) -> str | None:
        """Why the run ends here, before its last step; all ranks ask and are told the same."""
        run = self.run
        if run.recipe.patience is None or step == run.facts.steps:
            return None
        return from_main(out_of_patience(run.recipe, step) if run.ranks.main else None, run.ranks)

    def _end(self, state: State) -> None:
        run = self.run
        run.log.say(f"{self.ending}; the run ends at step {state.step:,} of {run.facts.steps:,}")
        self.activity.set("saving", state.step)
        self.saver.save_async(state)
        self.saver.wait(raise_on_error=True)
        if self.latest is not None:
            self._attach(figures_of(self.latest), state.step)

    def _losses(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        run, activity, training = self.run, self.activity, self.activity.detail
        points = self.stopping.between_steps()
        images = run.index.splits[run.recipe.val_split].samples
        with run.log.progress(images, "validation loss") as shown:

            def watch(count: int) -> None:
                activity.set("computing the validation loss", step)
                shown(count)
                points.pass_by()

            def opened(stream: BatchStream) -> None:
                activity.detail = stream.stuck_report

            losses = self.validation(watch, opened, points.meet)
        activity.detail = training
        return losses

    def _detect(self, step: int, points: SafePoints) -> Evaluation | None:
        run, recipe, activity = self.run, self.run.recipe, self.activity
        images = run.index.splits[recipe.val_split].samples
        run.log.say(f"evaluating on {recipe.val_split}, {images:,} images")
        training = activity.detail
        with run.log.progress(images, "evaluating") as shown:

            def watch(count: int) -> None:
                activity.set("evaluating", step)
                shown(count)
                points.pass_by()

            def opened(stream: BatchStream) -> None:
                activity.detail = stream.stuck_report

            evaluation = evaluate_split(
                self.detector,
                recipe.data,
                run.index,
                recipe.val_split,
                batch=recipe.batch,
                ranks=run.ranks,
                loading=recipe.loading,
                watch=watch,
                opened=opened,
                warn=run.log.warn,
                point=points.pass_by,
                meet=points.meet,
            )
        activity.detail = training
        return evaluation

    def _record(
        self, evaluation: Evaluation, losses: dict[str, float], step: int, seconds: float
    ) -> None:
        run, figures = self.run, figures_of(evaluation)
        text = format_table(evaluation)
        if losses:
            text += f"\nvalidation loss {losses[TOTAL]:.4f}"
        run.log.say(
            text,
            "evaluation",
            step=step,
            seconds=round(seconds, 1),
            figures=figures,
            **({"losses": losses} if losses else {}),
        )
        folder = run.recipe.folder / EVALUATIONS
        write_evaluation(evaluation, folder / f"step-{step:08d}.json")
        self.saver.wait()
        self._attach(figures, step)

    def _attach(self, figures: dict[str, float | None], step: int) -> None:
        """Keep the figures beside the step's checkpoint, if there is one."""
        run = self.run
        saved = checkpoint.path_of(run.checkpoints, step)
        if saved.is_dir():
            checkpoint.add_metrics(saved, figures)
            run.prune(saved)
