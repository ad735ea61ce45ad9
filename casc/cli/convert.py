"""`casc convert`: checkpoints from and to MMDetection, Detectron2 and torchvision."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from casc.printing import say


@dataclass(frozen=True)
class ConvertCommand:
    """Convert a checkpoint from or to MMDetection, Detectron2 or torchvision.

    Says what was done with each tensor, and how each convention in which the programs differ
    was brought over; what can't be is refused.

    Examples: `casc convert epoch_12.pth r50.safetensors`; `casc convert runs/coco_1x r50.pth
    --to mmdetection`.
    """

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """What to convert: a run's folder, casc's .safetensors, MMDetection's .pth (2.x, 3.x),
    Detectron2's .pkl or .pth, torchvision's .pth. Whose it is follows from its tensors' names."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """File to write: .safetensors for casc, .pth for the others, or .pkl for Detectron2."""
    to: Literal["casc", "mmdetection", "detectron2", "torchvision"] = "casc"
    """For which program."""
    channels: Literal["auto", "rgb", "bgr"] = "auto"
    """The order of colours that the other program's network takes. auto: as its file says, else
    as is usual there (Detectron2 bgr, the others rgb); when writing, as it once came."""
    pixel_mean: tuple[float, float, float] | None = None
    """Subtracted from the source's pixels (0 to 255), in the order of --channels; only where its
    file doesn't say."""
    pixel_std: tuple[float, float, float] | None = None
    """Divides them."""
    stride_in_1x1: Literal["auto", "yes", "no"] = "auto"
    """Where the stride of the source's bottlenecks sits: in the first 1x1 convolution ("caffe"
    style) or not ("pytorch" style). auto: as its file says, else as is usual there (Detectron2
    yes, the others no)."""
    reg_weights: tuple[float, ...] | None = None
    """The source's weights of (dx, dy, dw, dh), four numbers for each cascade stage: one over the
    deltas' standard deviations. By default those of its file, or what is usual there."""
    roi_align: Literal["auto", "fixed", "adaptive"] = "auto"
    """RoIAlign's samples per cell in what is written. auto: as it was trained, which elsewhere is
    adaptive by default. fixed: casc's 2x2, which is faster and runs everywhere."""
    shards: Path | None = None
    """Take class names and ids from this folder of shards, and put labels in its order."""
    mask_stage: int | None = None
    """With --to detectron2, which has one mask head for all stages: keep this stage's (from 0).
    Not needed where all are the same."""
    accept_differences: bool = False
    """Write the file even if the other program can't be made to compute quite the same."""
    overwrite: bool = False
    """Replace OUT if it is there."""
    report: Path | None = None
    """Also save the report as JSON, with a line for each tensor."""

    def run(self) -> int:
        """Convert, and print the report."""
        from casc.checkpoints.converting import convert
        from casc.checkpoints.foreign import Stated
        from casc.data.index import read_index

        stated = Stated(
            self.channels,
            self.pixel_mean,
            self.pixel_std,
            self.stride_in_1x1,
            self.reg_weights,
            self.roi_align,
        )
        report = convert(
            self.source,
            self.out,
            self.to,
            stated,
            categories=None if self.shards is None else read_index(self.shards).categories,
            where=str(self.shards),
            mask_stage=self.mask_stage,
            accept_differences=self.accept_differences,
            overwrite=self.overwrite,
        )
        if self.report:
            self.report.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        say(report)
        return 0
