"""Rows of the verification table: a golden tensor and how far ours is from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest errors allowed. Relative ones are to the largest magnitude of the golden tensor.
RELATIVE = 1e-4
GRADIENT = 1e-3
BOX_PIXELS = 0.05
ANCHOR_PIXELS = 1e-3
SCORE = 1e-4
MASK = 1e-3
# The reference rounds a resized image to whole grey levels; we don't.
GREY_LEVELS, MEAN_GREY_LEVELS = 1.0, 0.3
# Moved boxes differ by rounding only.
MOVED_PIXELS = 1e-4
# Share of a pasted mask's pixels that may fall on the other side of one half.
MASK_PIXELS = 1e-4


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    """features, rpn, stage 0, ..."""
    name: str
    """Key of the golden tensor."""
    error: float
    """The worst difference, in the tolerance's unit."""
    tolerance: float
    """The largest error allowed; 0 where only equality will do."""
    unit: str
    """relative, pixels, score, mismatches, ..."""

    @property
    def passed(self) -> bool:
        """Whether the error is within tolerance; NaN is not."""
        return self.error <= self.tolerance


class Comparison:
    """Collects rows for the keys that a golden set holds, and remembers which it saw."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.rows: list[Row] = []
        self.seen: set[str] = set()

    def golden(self, key: str) -> Tensor | None:
        """The golden tensor, or None where the set leaves it out."""
        self.seen.add(key)
        return self.tensors.get(key)

    def add(self, part: str, name: str, error: float | Tensor, tolerance: float, unit: str) -> None:
        """Append a row."""
        self.rows.append(Row(part, name, float(error), tolerance, unit))

    def relative(self, part: str, key: str, ours: Tensor, tolerance: float = RELATIVE) -> None:
        """Largest difference over the golden tensor's largest magnitude."""
        golden = self._same_shape(part, key, ours)
        if golden is not None and golden.numel():
            error = (golden.double() - ours.double()).abs().max()
            scale = golden.double().abs().max().clamp(min=1e-12)
            self.add(part, key, error / scale, tolerance, "relative")

    def relative_rows(self, part: str, key: str, ours: Tensor, rows: Tensor) -> None:
        """`relative` of some rows; none is a failure, as nothing would have been compared."""
        golden = self._same_shape(part, key, ours)
        if golden is not None:
            golden, ours = golden[rows].double(), ours[rows].double()
            error = (golden - ours).abs().max() if len(golden) else float("inf")
            scale = golden.abs().max().clamp(min=1e-12) if len(golden) else 1.0
            self.add(part, f"{key} ({len(golden)} rows)", error / scale, RELATIVE, "relative")

    def absolute(self, part: str, key: str, ours: Tensor, tolerance: float, unit: str) -> None:
        """Largest difference."""
        golden = self._same_shape(part, key, ours)
        if golden is not None and golden.numel():
            error = (golden.double() - ours.double()).abs().max()
            self.add(part, key, error, tolerance, unit)

    def equal(self, part: str, key: str, ours: Tensor) -> None:
        """Number of entries that differ."""
        golden = self._same_shape(part, key, ours)
        if golden is not None:
            different = golden.to(torch.int64) != ours.to(torch.int64)
            self.add(part, key, different.sum(), 0, "mismatches")

    def box_set(self, part: str, key: str, golden: Tensor | None, ours: Tensor) -> None:
        """Boxes with scores [N, 5] in any order: worst distance to the nearest of ours."""
        if golden is None:
            return
        self.add(part, f"{key} (count)", abs(len(golden) - len(ours)), 0, "mismatches")
        if not len(golden) or not len(ours):
            return
        # Clipped boxes of different scores can coincide, so both make the distance.
        unit = golden.new_tensor([BOX_PIXELS] * 4 + [SCORE])
        nearest = torch.cdist(golden / unit, ours / unit, p=float("inf")).argmin(dim=1)
        boxes, scores = (golden - ours[nearest]).abs().split([4, 1], dim=1)
        self.add(part, f"{key} (boxes)", boxes.max(), BOX_PIXELS, "pixels")
        self.add(part, f"{key} (scores)", scores.max(), SCORE, "score")

    def _same_shape(self, part: str, key: str, ours: Tensor) -> Tensor | None:
        golden = self.golden(key)
        if golden is not None and golden.shape != ours.shape:
            self.add(part, f"{key}: {list(ours.shape)}", float("inf"), 0, "shape")
            return None
        return golden
