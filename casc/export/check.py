"""Whether two programs find the same objects, and by how much they differ.

Detections are paired by class and place, not by rank: equal scores may come in any order.
Where a decision hangs on a rounding (a score at the threshold, an overlap at the limit of
suppression, the last of a full list), either outcome is right; all else has to have a partner.

Legend: B images, D detections.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from casc.model.boxes import iou_matrix
from casc.model.detector_config import InferenceConfig
from casc.model.forward_detect import Detections

Run = Callable[[Tensor, Tensor], Detections]
"""(pixels, size) to detections."""

_NEAR = 1.0
"""Pixels. Boxes of a class that differ by more aren't the same detection; two of one list
overlap too little to lie so near."""
_OVERLAP = 1e-3
"""Two roundings of an overlap differ by less."""


@dataclass(frozen=True)
class Tolerances:
    """The largest differences that rounding explains, between two float32 programs."""

    boxes: float = 0.05
    """Pixels of the input, of each coordinate."""
    scores: float = 5e-4
    """Of a score."""
    masks: float = 2e-3
    """Of a mask's probability."""


@dataclass(frozen=True)
class Agreement:
    """How two programs' detections compare, over all images."""

    images: int = 0
    empty: int = 0
    """Images in which neither found anything."""
    paired: int = 0
    borderline: int = 0
    """Detections of one program only, where a rounding decides."""
    unpaired: int = 0
    """Detections of one program only, without that excuse."""
    boxes: float = 0.0
    """Greatest difference of a coordinate, in pixels of the input."""
    scores: float = 0.0
    masks: float = 0.0

    def within(self, tolerances: Tolerances) -> bool:
        """Whether the programs agree."""
        pairs = (
            (self.boxes, tolerances.boxes),
            (self.scores, tolerances.scores),
            (self.masks, tolerances.masks),
        )
        # Not `>`: what isn't a number agrees with nothing.
        return self.unpaired == 0 and all(found <= most for found, most in pairs)

    def table(self, tolerances: Tolerances) -> str:
        """The greatest differences beside what is tolerated."""
        lines = [
            f"{self.images} images, {self.empty} without detections; {self.paired} detections in"
            f" both, {self.borderline} in one only by a rounding, {self.unpaired} in one only"
        ]
        for name, found, most, unit in (
            ("boxes", self.boxes, tolerances.boxes, " pixels"),
            ("scores", self.scores, tolerances.scores, ""),
            ("masks", self.masks, tolerances.masks, ""),
        ):
            lines.append(f"  {name:6}  differ by {found:.2g}{unit} at most, tolerated {most:g}")
        return "\n".join(lines)


def compare(
    batches: Iterable[tuple[Tensor, Tensor, int]],
    first: Run,
    second: Run,
    config: InferenceConfig,
    tolerances: Tolerances,
) -> Agreement:
    """Run two programs on the same images.

    Args:
        batches: pixels [B, Hi, Wi, C], sizes [B, 2], and how many rows count.
        first: one program.
        second: the other.
        config: the thresholds of both.
        tolerances: what a rounding is.
    """
    total = Agreement()
    for pixels, size, count in batches:
        a, b = first(pixels, size), second(pixels, size)
        for i in range(count):
            one, other = (_rows(found, i) for found in (a, b))
            total = _add(total, compare_image(one, other, config, tolerances))
    return total


def compare_image(
    a: Detections, b: Detections, config: InferenceConfig, tolerances: Tolerances
) -> Agreement:
    """Compare the detections of one image, fields [D, ...]."""
    full = a.valid.all() | b.valid.all()
    a, b = (_rows(found, found.valid) for found in (a, b))
    left, right = _pairs(a, b)
    alone = [
        _alone(a, left, b, config, tolerances, bool(full)),
        _alone(b, right, a, config, tolerances, bool(full)),
    ]
    return Agreement(
        images=1,
        empty=int(len(a.scores) == 0 == len(b.scores)),
        paired=len(left),
        borderline=sum(excused for excused, _ in alone),
        unpaired=sum(rest for _, rest in alone),
        boxes=_greatest(a.boxes[left] - b.boxes[right]),
        scores=_greatest(
            torch.cat(
                [
                    one[left] - other[right]
                    for one, other in ((a.scores, b.scores), (a.mask_scores, b.mask_scores))
                    if one is not None and other is not None
                ]
            )
        ),
        masks=0.0
        if a.masks is None or b.masks is None
        else _greatest(a.masks[left] - b.masks[right]),
    )


def _rows(found: Detections, rows: int | Tensor) -> Detections:
    return Detections._make(t if t is None else t[rows] for t in found)


def _pairs(a: Detections, b: Detections) -> tuple[Tensor, Tensor]:
    """Rows of `a` and of `b` that are the same detection, the nearest pairs first."""
    distance = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=-1)
    distance = torch.where(a.labels[:, None] == b.labels[None], distance, torch.inf)
    pairs: list[tuple[int, int]] = []
    while distance.numel() and distance.min() <= _NEAR:
        row, column = divmod(int(distance.argmin()), distance.shape[1])
        pairs.append((row, column))
        distance[row], distance[:, column] = torch.inf, torch.inf
    rows = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _alone(
    found: Detections,
    paired: Tensor,
    other: Detections,
    config: InferenceConfig,
    tolerances: Tolerances,
    full: bool,
) -> tuple[int, int]:
    """Detections without a partner in `other`: how many a rounding explains, and the rest."""
    rest = torch.ones(len(found.scores), dtype=torch.bool)
    rest[paired] = False
    scores, boxes, labels = found.scores[rest], found.boxes[rest], found.labels[rest]
    excused = scores <= config.score_threshold + tolerances.scores
    if full:
        everything = torch.cat([found.scores, other.scores])
        excused |= scores <= everything.min() + tolerances.scores
    overlap = iou_matrix(boxes, other.boxes)
    rival = (labels[:, None] == other.labels) & (
        scores[:, None] <= other.scores + tolerances.scores
    )
    excused |= (rival & ((overlap - config.nms_iou).abs() <= _OVERLAP)).any(dim=1)
    return int(excused.sum()), int((~excused).sum())


def _greatest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def _add(a: Agreement, b: Agreement) -> Agreement:
    # nan is neither larger nor smaller; torch's maximum keeps it, max() wouldn't.
    def worst(x: float, y: float) -> float:
        return float(torch.tensor([x, y], dtype=torch.float64).max())

    return Agreement(
        a.images + b.images,
        a.empty + b.empty,
        a.paired + b.paired,
        a.borderline + b.borderline,
        a.unpaired + b.unpaired,
        worst(a.boxes, b.boxes),
        worst(a.scores, b.scores),
        worst(a.masks, b.masks),
    )
