"""`casc predict`: annotated pictures and COCO-format JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from casc.errors import UserError


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
    compile: Literal["auto", "on", "off"] = "off"
    """Compile with torch.compile, which pays for many images only."""

    def run(self) -> int:
        """Predict; 1 if an image had to be skipped."""
        from dataclasses import replace

        from casc.data.index import read_index
        from casc.inference.load import load
        from casc.inference.predict import predict

        if not self.images:
            raise UserError("no images given")
        detector = load(self.checkpoint, device=self.device, dtype=self.dtype, compile=self.compile)
        if self.shards:
            categories = read_index(self.shards).categories
            detector.check_classes(categories, f"--shards {self.shards}")
            detector = replace(detector, categories=categories)
        done = predict(detector, self.images, self.out, threshold=self.threshold, log=_say)
        _say(f"{len(done.pictures)} pictures and {done.results_file.name} are in {self.out}")
        return done.exit_code


def _say(text: str) -> None:
    print(text, flush=True)
