"""`casc report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from casc.data.loader_config import EvalLoaderConfig, check_loading
from casc.errors import UserError
from casc.printing import say

if TYPE_CHECKING:  # torch takes seconds to import, which --help needn't wait for
    from casc.report.error_analysis import ErrorAnalysis
    from casc.report.history import History

REPORT = "report.html"


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page about a run, finished or not, that needs no network.

    It has the log's curves, the evaluations, the recipe and the environment. The newest
    checkpoint is run over the validation split once more, for precision by recall and for the
    images on which it did worst and best.

    Examples: `casc report runs/coco_1x`; `casc report runs/coco_1x --limit 500 --out
    page.html`.
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run's folder."""
    out: Path | None = None
    """The page to write; by default report.html in the run's folder."""
    images: bool = True
    """Show precision by recall and images, for which the checkpoint is run over the split."""
    count: int = 6
    """How many of the worst images, and of the best."""
    limit: int | None = None
    """Run over about so many images of the split only: whole shards, spread evenly over it."""
    threshold: float = 0.5
    """On images, leave out detections with a score below."""
    errors: bool = False
    """Also show what kinds of errors there are (TIDE, Bolya et al., 2020) and which classes are
    taken for each other. Needs casc[errors]."""
    shards: str | None = None
    """Folder or URL of the shards; by default where the run read them."""
    split: str | None = None
    """Which split; by default the one that the run evaluates on."""
    batch: int = 2
    """Images per step."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto: as it was trained, if the device can."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile with torch.compile, once per canvas; auto does so on accelerators."""
    loading: EvalLoaderConfig = field(default_factory=EvalLoaderConfig)

    def run(self) -> int:
        """Write the page."""
        from casc.report.history import newest_evaluation, read_history
        from casc.report.page import report_page

        for flag, value in (("batch", self.batch), ("count", self.count), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: must be at least 1")
        check_loading(self.loading)
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must be in [0, 1]")
        if self.errors and not self.images:
            raise UserError("--errors: the checkpoint isn't run with --no-images; drop one of them")
        history = read_history(self.folder)
        evaluated = newest_evaluation(history)
        analysis, without = None, "--no-images was given."
        if self.images:
            analysis = self._analyse(history)
            without = "the run has no checkpoint yet."
            if analysis is None:
                say(f"{self.folder}: no checkpoint yet, so the page has no images")
        page = report_page(history, evaluated, analysis, threshold=self.threshold, without=without)
        out = self.out or self.folder / REPORT
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
        say(f"the report is in {out}")
        return 0

    def _analyse(self, history: "History") -> "tuple[int, ErrorAnalysis] | None":
        from tqdm import tqdm

        from casc.checkpoints.format import list_checkpoints
        from casc.checkpoints.model import load_trained
        from casc.data.index import read_index
        from casc.data.remote import location
        from casc.evaluate.run import check_split
        from casc.inference.load import ready_detector
        from casc.report.error_analysis import analyse, part_of
        from casc.train.start import CHECKPOINTS

        if not list_checkpoints(self.folder / CHECKPOINTS):
            return None
        trained = load_trained(str(self.folder))
        root = location(self.shards or str(history.recipe.get("data", "")))
        try:
            index = read_index(root, self.loading)
        except UserError as error:
            raise UserError(
                f"{error}; say where the shards are with --shards, or use --no-images"
            ) from None
        split = self.split or str(history.recipe.get("val_split", ""))
        check_split(index, split, root)
        detector = ready_detector(trained, self.device, self.dtype, self.compile)
        detector.check_classes(index.categories, root)
        total = part_of(index.splits[split], self.limit).samples
        say(f"{trained.weights.source} on {total:,} images of {split} of {root}")
        with tqdm(total=total, unit="image", disable=None, leave=False) as bar:
            analysis = analyse(
                detector,
                root,
                index,
                split,
                batch=self.batch,
                loading=self.loading,
                threshold=self.threshold,
                count=self.count,
                limit=self.limit,
                errors=self.errors,
                watch=bar.update,
            )
        return trained.weights.step or 0, analysis
