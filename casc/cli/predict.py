"""`casc predict`: annotated pictures and COCO-format JSON."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from casc.errors import UserError
from casc.inference.settings import Settings, Views
from casc.printing import say


@dataclass(frozen=True)
class PredictCommand:
    """Detect objects in images: annotated pictures, and COCO-format JSON of all detections.

    Videos and animations become annotated mp4 files with a line of JSON for each frame; that
    needs casc[video].

    Examples: `casc predict runs/coco_1x photo.jpg`; `casc predict runs/coco_1x photos
    --threshold 0.3`.
    """

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's folder, a checkpoint's folder, a .safetensors file, a checkpoint of MMDetection or
    Detectron2, its URL, or a published one's name (`casc weights`)."""
    images: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGES...")]]
    """Image and video files, folders with all below them, patterns or URLs; - reads a list of such
    from standard input, one to a line."""
    out: Path = Path("predictions")
    """Folder for the pictures and predictions.json."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Settings(threshold=0.5)
    )
    views: Annotated[Views, tyro.conf.arg(name="")] = field(default_factory=Views)
    ids: str | None = None
    """Take the images' ids, by file name, from this COCO annotation file or folder of shards; by
    default they are 1, 2, ... in the images' order."""
    shards: Path | None = None
    """Take the names of classes from this folder, where the checkpoint doesn't know them."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto: as it was trained, if the device can."""
    compile: Literal["auto", "on", "off"] = "off"
    """Compile with torch.compile, which pays for many images only."""

    def run(self) -> int:
        """Predict; 1 if an image had to be skipped."""
        from casc.data.index import read_index
        from casc.inference.image_files import listed_ids
        from casc.inference.load import load
        from casc.inference.predict import predict

        images = [*self.images]
        if "-" in images:
            place = images.index("-")
            images[place : place + 1] = filter(None, map(str.strip, sys.stdin))
        if not images:
            raise UserError("no images given")
        ids = None if self.ids is None else listed_ids(self.ids)
        detector = load(self.checkpoint, device=self.device, dtype=self.dtype, compile=self.compile)
        if self.shards:
            categories = read_index(self.shards).categories
            detector.check_classes(categories, f"--shards {self.shards}")
            detector = replace(detector, categories=categories)
        threshold = self.settings.threshold
        # The model's own threshold stays in the step, so that evaluation does the same.
        detector = detector.with_settings(replace(self.settings, threshold=None))
        detector = detector.with_views(self.views)
        if threshold is None:
            threshold = detector.model.inference.score_threshold
        done = predict(detector, images, self.out, threshold=threshold, ids=ids, log=say)
        say(f"{len(done.pictures)} pictures and {done.results_file.name} are in {self.out}")
        return done.exit_code
