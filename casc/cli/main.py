"""The command line: `casc eval | predict | verify | bench`.

Training is `python -m casc.recipes.NAME`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from casc.arguments import parse_arguments
from casc.bench.evaluation import EvaluationCommand
from casc.bench.loader import LoaderCommand
from casc.bench.operators import OperatorsCommand
from casc.cli.bench import InferenceCommand, TrainCommand, with_default
from casc.cli.convert import ConvertCommand
from casc.cli.doctor import DoctorCommand
from casc.cli.export import ExportCommand
from casc.cli.report import ReportCommand
from casc.data.loader_config import EvalLoaderConfig, check_loading
from casc.errors import UserError

Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class EvalCommand:
    """Measure a checkpoint's box and mask AP on shards, as COCO does.

    Prints pycocotools' twelve figures of each.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a checkpoint's folder, a .safetensors file, or the reference's .pth."""
    shards: tyro.conf.Positional[Path]
    """Folder made by `data_tools shard`, or its URL."""
    split: str | None = None
    """Which split; by default the one that the run evaluated on, or val2017."""
    batch: int = 2
    """Images per step."""
    per_class: bool = False
    """Also print each class's AP."""
    out: Path | None = None
    """Save all figures, also each class's, as JSON."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto takes what suits the device."""
    compile: Compile = "auto"
    """Compile with torch.compile, once per canvas; auto does so on accelerators."""
    loading: EvalLoaderConfig = field(default_factory=EvalLoaderConfig)

    def run(self) -> int:
        """Evaluate."""
        from tqdm import tqdm

        from casc.checkpoints.model import load_trained
        from casc.checkpoints.read import check_classes
        from casc.data.index import read_index
        from casc.data.remote import location
        from casc.evaluate.metrics import format_table, write_evaluation
        from casc.evaluate.run import evaluate_split
        from casc.inference.load import ready_detector

        if self.batch < 1:
            raise UserError("--batch must be at least 1")
        check_loading(self.loading)
        index, shards = read_index(self.shards, self.loading), location(self.shards)
        trained = load_trained(self.checkpoint)
        recipe = trained.weights.recipe or {}
        split = self.split or recipe.get("val_split", "val2017")
        if split not in index.splits:
            known = ", ".join(index.splits)
            raise UserError(f"--split {split}: {shards} has no such split; it has {known}")
        check_classes(trained.weights, index.categories, shards)
        if trained.model.classes != len(index.categories):
            raise UserError(
                f"{trained.weights.source}: trained on {trained.model.classes} classes,"
                f" {shards} has {len(index.categories)}"
            )
        detector = ready_detector(trained, self.device, self.dtype, self.compile)
        _say(f"{trained.weights.source} on {split} of {shards}, {detector.device}")
        total = index.splits[split].samples
        with tqdm(total=total, unit="image", disable=None, leave=False) as bar:
            evaluation = evaluate_split(
                detector,
                shards,
                index,
                split,
                batch=self.batch,
                loading=self.loading,
                watch=bar.update,
            )
        assert evaluation is not None  # there is only this process
        _say(format_table(evaluation, per_class=self.per_class))
        if self.out:
            write_evaluation(evaluation, self.out)
            _say(f"all figures are in {self.out}")
        return 0


@dataclass(frozen=True)
class PredictCommand:
    """Detect objects in images: annotated pictures, and COCO-format JSON of all detections."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a checkpoint's folder, a .safetensors file, or the reference's .pth."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of them, or patterns."""
    out: Path = Path("predictions")
    """Folder for the pictures and predictions.json."""
    threshold: float = 0.5
    """Leave out detections with a score below."""
    shards: Path | None = None
    """Take the names of classes from this folder, where the checkpoint doesn't know them."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto takes what suits the device."""
    compile: Compile = "off"
    """Compile with torch.compile, which pays for many images only."""

    def run(self) -> int:
        """Predict; 1 if an image had to be skipped."""
        from casc.checkpoints.model import class_names, load_trained
        from casc.checkpoints.read import check_classes
        from casc.data.index import read_index
        from casc.inference.load import ready_detector
        from casc.inference.predict import canvas_chooser, predict

        if not self.images:
            raise UserError("no images given")
        trained = load_trained(self.checkpoint)
        categories = class_names(trained)
        if self.shards:
            categories = read_index(self.shards).categories
            check_classes(trained.weights, categories, str(self.shards))
            if trained.model.classes != len(categories):
                raise UserError(
                    f"--shards {self.shards}: has {len(categories)} classes, the checkpoint was"
                    f" trained on {trained.model.classes}"
                )
        detector = ready_detector(trained, self.device, self.dtype, self.compile)
        done = predict(
            lambda batch: detector(batch, (batch.image.shape[1], batch.image.shape[2])),
            self.images,
            self.out,
            categories,
            canvas_for=canvas_chooser(trained.image.short, trained.image.long),
            score_threshold=self.threshold,
            device=detector.device,
            log=_say,
        )
        _say(f"{len(done.pictures)} pictures and {done.results_file.name} are in {self.out}")
        return done.exit_code


@dataclass(frozen=True)
class VerifyCommand:
    """Check that this device computes what the reference computed.

    Runs the steps that train and predict on recorded inputs and compares every recorded
    tensor; exits with 1 if one is out of tolerance. For a new device, driver or compiler.
    """

    goldens: tyro.conf.Positional[Path]
    """Folder of golden files, such as the project's tests/goldens."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    compile: bool = False
    """Check the compiled functions."""

    def run(self) -> int:
        """Verify; 1 if anything is out of tolerance."""
        from casc.device.devices import choose_device
        from casc.verify import verify

        return not verify(self.goldens, choose_device(self.device), compile=self.compile, log=_say)


Bench = (
    Annotated[TrainCommand, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[InferenceCommand, tyro.conf.subcommand("inference", prefix_name=False)]
    | Annotated[LoaderCommand, tyro.conf.subcommand("loader", prefix_name=False)]
    | Annotated[OperatorsCommand, tyro.conf.subcommand("operators", prefix_name=False)]
    | Annotated[EvaluationCommand, tyro.conf.subcommand("evaluation", prefix_name=False)]
)


@dataclass(frozen=True)
class BenchCommand:
    """Time a part on this machine; `casc bench --json` means `casc bench train --json`."""

    part: tyro.conf.OmitArgPrefixes[Bench]

    def run(self) -> int:
        """Measure."""
        return self.part.run()


Command = (
    Annotated[EvalCommand, tyro.conf.subcommand("eval")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 if all is well, 1 if not, 2 on wrong usage."""
    command = parse_arguments(
        Command,
        with_default(sys.argv[1:] if arguments is None else arguments),
        prog="casc",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        code = command.run()
    except (UserError, OSError) as error:
        print(f"casc: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _say(text: str) -> None:
    print(text, flush=True)
