"""How fast detections become COCO AP: `casc bench evaluation`.

The detections are made up at the load of a trained detector on COCO: a hundred per image, box
sides from a few pixels to the image's, masks that are smooth blobs, a few objects among them.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

from casc.errors import UserError


class EvaluationReport(NamedTuple):
    """What was measured; milliseconds are medians over images, of one core."""

    images: int
    detections: int
    """Per image."""
    size: tuple[int, int]
    encode_ms: float
    """Masks of an image from 28 x 28 probabilities to compressed run lengths."""
    encode_plain_ms: float
    """The same by pasting each mask into a whole image, then pycocotools' encode."""
    encode_ratio: float
    """Median over images of plain / ours, both timed one right after the other."""
    encode_ratio_low: float
    """Lower quartile."""
    encode_ratio_high: float
    """Upper quartile."""
    masks_differing: int
    """Of all masks, those whose run lengths aren't the same to the byte."""
    results_ms: float
    """Boxes, scores and labels of an image to COCO's entries, without masks."""
    match_box_ms: float
    """pycocotools' matching of an image's boxes."""
    match_mask_ms: float
    """pycocotools' matching of an image's masks."""
    pycocotools_share: float
    """Of all the time per image; encoding's last step, a tenth of it, not counted."""
    core_share_at_1_img_per_s: float
    """Of one core, beside a device that does one image per second."""
    core_share_at_50_img_per_s: float
    one_go_s_per_1000: float
    """pycocotools after the last image, nothing done before: matching and summing up."""
    sum_up_s_per_1000: float
    """What is left after the last image if matching ran alongside."""
    tally_bytes: float
    """Sent to rank 0 per detection."""
    pickled_results_bytes: float
    """Of a detection if COCO's entries were sent as they are."""
    processes: int
    processes_img_per_s: float | None
    """Images that the processes finish per second, once they are up; None without any."""


@dataclass(frozen=True)
class EvaluationCommand:
    """Time the way from detections to COCO AP, part by part, beside the straightforward way."""

    images: int = 32
    """Made-up images; 400 for figures that hold."""
    detections: int = 100
    """Per image."""
    size: tuple[int, int] = (480, 640)
    """Height and width of the images in pixels."""
    processes: int = 0
    """Also time so many processes at work together, start-up not counted; about 30 s."""
    seed: int = 0
    """Of the made-up detections."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Measure."""
        from casc.bench.evaluation_parts import bench_evaluation

        if min(self.images, self.detections, *self.size) < 1 or self.processes < 0:
            raise UserError(
                "--images, --detections and --size must be at least 1, --processes at least 0"
            )
        print(format_report(bench_evaluation(self), as_json=self.json), flush=True)
        return 0


def format_report(report: EvaluationReport, *, as_json: bool) -> str:
    """One JSON object, or a line per figure."""
    if as_json:
        return json.dumps(report._asdict())
    lines = []
    for name, value in report._asdict().items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"{name:<27} {shown}")
    return "\n".join(lines)
