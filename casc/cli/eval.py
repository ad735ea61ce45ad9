"""`casc eval`: a checkpoint's AP on shards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from casc.data.loader_config import EvalLoaderConfig, check_loading
from casc.errors import UserError


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
    compile: Literal["auto", "on", "off"] = "auto"
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


def _say(text: str) -> None:
    print(text, flush=True)
