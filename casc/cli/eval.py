"""`casc eval`: a checkpoint's AP on shards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from casc.data.loader_config import EvalLoaderConfig
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

        from casc.data.remote import location
        from casc.evaluate.metrics import format_table, write_evaluation
        from casc.evaluate.run import evaluate
        from casc.inference.load import load

        if self.batch < 1:
            raise UserError("--batch must be at least 1")
        detector = load(self.checkpoint, device=self.device, dtype=self.dtype, compile=self.compile)
        split = self.split or detector.split
        dtype = str(detector.compute.dtype).removeprefix("torch.")
        where = location(self.shards)
        _say(f"{detector.source} on {split} of {where}, {detector.device}, {dtype}")
        with tqdm(unit="image", disable=None, leave=False) as bar:
            evaluation = evaluate(
                detector, where, split, batch=self.batch, loading=self.loading, watch=bar.update
            )
        _say(format_table(evaluation, per_class=self.per_class))
        if self.out:
            write_evaluation(evaluation, self.out)
            _say(f"all figures are in {self.out}")
        return 0


def _say(text: str) -> None:
    print(text, flush=True)
