"""Ground truth as the detector sees it: padded, in pixels of the canvas.

Legend: B images, G ground-truth capacity, E edge capacity, R capacity for regions to ignore,
H x W canvas.
"""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Padded ground truth of a batch, resized and flipped with its images."""

    boxes: Tensor
    """[B, G, 4] float32 xyxy, 0 where padded."""
    labels: Tensor
    """[B, G] int64 in [0, classes), 0 where padded."""
    valid: Tensor
    """[B, G] bool."""
    edges: Tensor
    """[B, E, 4] float32 polygon edges (x0, y0, x1, y1) of all objects; padding has zero length."""
    edge_gt: Tensor
    """[B, E] int64 in [0, G), the object whose edge it is."""
    bitmaps: Tensor | None = None
    """[B, G, H, W] uint8 masks, only for `mask_target="bitmap"`."""
    regions: Tensor | None = None
    """[B, R, 4] float32 xyxy, of no area where padded, only for `ignore="crowds"`."""
    pasted: Tensor | None = None
    """[B, H, W] bool, only with copy-paste: pixels that show objects pasted from another image.
    These are the second half of G, and hide what the first half's polygons have there."""
