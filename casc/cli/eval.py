"""`casc eval`: a checkpoint's AP on shards."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from casc.data.loader_config import EvalLoaderConfig
from casc.errors import UserError
from casc.inference.settings import Settings, Views
from casc.printing import say


@dataclass(frozen=True)
class EvalCommand:
    """Measure a checkpoint's box and mask AP on shards, as COCO does.

    Prints pycocotools' twelve figures of each.

    Examples: `casc eval runs/coco_1x shards --per-class`; `casc eval model.pth shards --results
    found.json`.
    """

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's folder, a checkpoint's folder, a .safetensors file, a checkpoint of MMDetection or
    Detectron2, its URL, or a published one's name (`casc weights`)."""
    shards: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SHARDS")]]
    """Folder made by `data_tools shard`, or its URL."""
    split: str | None = None
    """Which split; by default the one that the run evaluated on, or val2017."""
    batch: int = 2
    """Images per step."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    views: Annotated[Views, tyro.conf.arg(name="")] = field(default_factory=Views)
    max_dets: int = 100
    """Detections that count per image and class, pycocotools' maxDets. Other than 100, figures are
    named by it, and --detections has to be as many at least."""
    per_class: bool = False
    """Also print each class's AP, also by size."""
    errors: bool = False
    """Also print what kinds of errors there are (TIDE, Bolya et al., 2020) and which classes are
    taken for each other. Needs casc[errors]."""
    results: Path | None = None
    """Save all detections in COCO's results format, as pycocotools reads it."""
    out: Path | None = None
    """Save all figures, also each class's, as JSON."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto: as it was trained, if the device can."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile with torch.compile, once per canvas; auto does so on accelerators."""
    replay: Literal["auto", "on", "off"] = "auto"
    """Record the step on the device at a canvas's first batch and replay it; auto: where the
    device can."""
    loading: EvalLoaderConfig = field(default_factory=EvalLoaderConfig)

    def run(self) -> int:
        """Evaluate."""
        from tqdm import tqdm

        from casc.data.remote import location
        from casc.device.replay import choose_replay
        from casc.evaluate.metrics import format_table, write_evaluation
        from casc.evaluate.run import evaluate
        from casc.inference.load import load
        from casc.model.steps import reads_back

        if self.batch < 1:
            raise UserError("--batch must be at least 1")
        for flag, file in (("--results", self.results), ("--out", self.out)):
            _check_file(flag, file)
        detector = load(self.checkpoint, device=self.device, dtype=self.dtype, compile=self.compile)
        detector = detector.with_settings(self.settings).with_views(self.views)
        reads = reads_back(detector.model, detector.compute, detector.device, training=False)
        replay = choose_replay(self.replay, detector.device, reads).replay
        detector = replace(detector, replay=replay)
        split = detector.split if self.split is None else self.split
        dtype = str(detector.compute.dtype).removeprefix("torch.")
        where = location(self.shards)
        say(f"{detector.source} on {split} of {where}, {detector.device}, {dtype}")
        with tqdm(unit="image", disable=None, leave=False) as bar:
            evaluation = evaluate(
                detector,
                where,
                split,
                batch=self.batch,
                max_dets=self.max_dets,
                results=self.results,
                errors=self.errors,
                loading=self.loading,
                watch=bar.update,
            )
        say(format_table(evaluation, per_class=self.per_class))
        if self.out:
            write_evaluation(evaluation, self.out)
            say(f"all figures are in {self.out}")
        return 0


def _check_file(flag: str, file: Path | None) -> None:
    """Refuse what can't be written to before anything is measured."""
    if file is not None and file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; give a file's name")
    if file is not None and not file.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {file.parent}")
