"""Looking at an image more than once: in tiles, mirrored, at several sizes.

Each look is an image of its own to the detector. What was found in one image by several looks is
merged afterwards, on the host: pure functions of NumPy arrays.

Legend: h x w the image, D detections of all looks together, M x M a mask inside its box.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from casc.evaluate.coco_results import ImageDetections
from casc.inference.settings import Views
from casc.model.detector_config import InferenceConfig

_MARGIN = 0.01
"""Of a tile's side: what comes so near to a border within the image is taken for cut off there."""
_GRID = 56
"""Points a side at which the masks of two parts are compared."""


class View(NamedTuple):
    """One look at an image."""

    top: int
    """First row that it sees, in pixels of the image."""
    left: int
    height: int
    width: int
    mirrored: bool
    short: int
    """What the shorter side is resized to."""

    def of(self, image: np.ndarray) -> np.ndarray:
        """Give what it sees of an image `[h, w, c]`."""
        seen = image[self.top : self.top + self.height, self.left : self.left + self.width]
        return seen[:, ::-1] if self.mirrored else seen


def views_of(views: Views, short: int, height: int, width: int) -> list[View]:
    """List the looks at an image: the whole first, then tiles from the top left on.

    Args:
        views: what is asked for.
        short: the model's own size of the shorter side.
        height: the image's, in pixels.
        width: the image's, in pixels.
    """
    windows = [(0, 0, height, width)]
    if views.tiles is not None and max(height, width) > views.tiles:
        side, overlap = views.tiles, views.overlap
        windows += [
            (top, left, min(side, height), min(side, width))
            for top in tile_starts(height, side, overlap)
            for left in tile_starts(width, side, overlap)
        ]
    return [
        View(*window, mirrored, scale)
        for window in windows
        for scale in views.scales or (short,)
        for mirrored in ((False, True) if views.flips else (False,))
    ]


def tile_starts(length: int, side: int, overlap: float) -> list[int]:
    """Give where tiles begin along an axis, so that they reach from end to end.

    Args:
        length: the image's, in pixels.
        side: a tile's, in pixels.
        overlap: what neighbours share at least, as a share of `side`.
    """
    if length <= side:
        return [0]
    step = max(1, int(side * (1 - overlap)))
    gaps = math.ceil((length - side) / step)
    return [i * (length - side) // gaps for i in range(gaps + 1)]


def merged(
    views: Sequence[View],
    found: Sequence[ImageDetections],
    image: tuple[int, int],
    inference: InferenceConfig,
) -> ImageDetections:
    """Merge what several looks found in one image.

    Best score first, a detection takes those of its class from other looks that are the same
    object, and keeps its score. Two are the same if their boxes overlap by more than
    `inference.nms_iou`; where a tile cuts one of them off, if their masks do within what both
    looks see. That is 1 for the parts of an object, which cover little of the whole, and little
    for a small object before a large one, of which the small box is a part. Of a model without
    masks it is the boxes within what both see.

    The box is the best one's (as of Detectron2's GeneralizedRCNNWithTTA), unless a tile cuts it
    off: then it bounds all parts. The mask's probability is the mean over those looks that see the
    cell, so that parts are joined.

    Args:
        views: the looks, of the same image.
        found: what each has found, in pixels of what it sees, mirrored if it is.
        image: height and width in pixels.
        inference: the overlap, whether classes suppress each other, and the most detections: so
            many for the whole image and for each tile.

    Returns:
        Detections in pixels of the image, best first.
    """
    height, width = image
    whole = View(0, 0, height, width, False, 0)
    if len(views) == 1 and views[0]._replace(short=0) == whole:
        return found[0]
    all_ = _together(views, found)
    free = np.ones(len(all_.scores), bool)
    kept: list[tuple[np.ndarray, float, int]] = []
    kept_masks: list[np.ndarray] = []
    fits: list[float] = []
    for best in range(len(all_.scores)):
        if free[best]:
            group = _group(all_, best, free, inference)
            box = all_.boxes[best]
            if all_.cut[best] and len(group) > 1:
                boxes = all_.boxes[group]
                box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            kept.append((box, all_.scores[best], all_.labels[best]))
            if all_.masks is not None:
                alone = len(group) == 1
                kept_masks.append(all_.masks[best] if alone else _joined(all_, group, box))
            if all_.mask_scores is not None:
                fits.append(all_.mask_scores[best])
    most = inference.detections * len({view[:4] for view in views})
    boxes, scores, labels = zip(*kept[:most], strict=True) if kept else ([], [], [])
    masks = None
    if all_.masks is not None:
        masks = np.array(kept_masks[:most], np.float32).reshape(-1, *all_.masks.shape[1:])
    return found[0]._replace(
        height=height,
        width=width,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        masks=masks,
        mask_scores=None if all_.mask_scores is None else np.array(fits[:most], np.float32),
    )


class _All(NamedTuple):
    """Detections of all looks, best first, in pixels of the image."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    mask_scores: np.ndarray | None
    view: np.ndarray
    """`[D]` which look found it."""
    window: np.ndarray
    """`[D, 4]` x0, y0, x1, y1 of what that look sees."""
    cut: np.ndarray
    """`[D]` bool, whether the window's border, where it isn't the image's, may cut it off."""


def _together(views: Sequence[View], found: Sequence[ImageDetections]) -> _All:
    bottom = max(view.top + view.height for view in views)
    right = max(view.left + view.width for view in views)
    parts = []
    for number, (view, each) in enumerate(zip(views, found, strict=True)):
        boxes, masks = each.boxes.astype(np.float32), each.masks
        if view.mirrored:
            x0, y0, x1, y1 = boxes.T
            boxes = np.stack([view.width - x1, y0, view.width - x0, y1], axis=1)
            masks = None if masks is None else masks[..., ::-1]
        boxes = boxes + np.array([view.left, view.top] * 2, np.float32)
        edges = view.left, view.top, view.left + view.width, view.top + view.height
        x0, y0, x1, y1 = edges
        near = _MARGIN * max(view.height, view.width)
        cut = (boxes[:, 0] <= x0 + near) & (x0 > 0)
        cut |= (boxes[:, 1] <= y0 + near) & (y0 > 0)
        cut |= (boxes[:, 2] >= x1 - near) & (x1 < right)
        cut |= (boxes[:, 3] >= y1 - near) & (y1 < bottom)
        count = len(boxes)
        window = np.tile(np.array(edges, np.float32), (count, 1))
        heads = boxes, each.scores, each.labels, masks, each.mask_scores
        parts.append((*heads, np.full(count, number), window, cut))
    columns = list(zip(*parts, strict=True))
    order = np.argsort(-np.concatenate(columns[1]), kind="stable")
    return _All(*(None if c[0] is None else np.concatenate(c)[order] for c in columns))  # type: ignore[arg-type]


def _group(all_: _All, best: int, free: np.ndarray, inference: InferenceConfig) -> list[int]:
    """Rows of the same object, the best first; they are free no longer."""
    free[best] = False
    group = [best]
    for member in group:  # which grows
        same = _same(all_, member, free, inference)
        free[same] = False
        group += same.tolist()
        if not all_.cut[member]:
            break  # it was compared as a whole; what else its parts overlap with is another object
    return group


def _same(all_: _All, row: int, free: np.ndarray, inference: InferenceConfig) -> np.ndarray:
    """Free rows that are the same object as `row`."""
    candidate = free & (all_.view != all_.view[row])
    if not inference.class_agnostic:
        candidate &= all_.labels == all_.labels[row]
    rows = candidate.nonzero()[0]
    box, boxes = all_.boxes[row], all_.boxes[rows]
    shared = _area(_common(boxes, box))
    overlap = shared / np.maximum(_area(boxes) + _area(box[None]) - shared, 1e-6)
    for at in ((all_.cut[rows] | all_.cut[row]) & (shared > 0)).nonzero()[0]:
        overlap[at] = _part_overlap(all_, row, rows[at])
    return rows[overlap > inference.nms_iou]


def _part_overlap(all_: _All, a: int, b: int) -> float:
    """IoU of two masks, or else of two boxes, within what both looks see."""
    boxes = all_.boxes[[a, b]]
    both = _common(all_.window[a], all_.window[b])
    if all_.masks is None:
        boxes = _common(boxes, both)
        shared = _area(_common(boxes[0], boxes[1]))
        return float(shared / max(1e-6, _area(boxes).sum() - shared))
    # On a grid of points.
    bounds = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    x0, y0, x1, y1 = _common(both, bounds)
    points = (np.arange(_GRID) + 0.5) / _GRID
    x, y = x0 + (x1 - x0) * points, y0 + (y1 - y0) * points
    one, other = (_sampled(all_.masks[row], all_.boxes[row], x, y) >= 0.5 for row in (a, b))
    return float((one & other).sum() / max(1, (one | other).sum()))


def _joined(all_: _All, group: Sequence[int], box: np.ndarray) -> np.ndarray:
    """Mean of the looks' masks over the cells of a box, `[M, M]`."""
    assert all_.masks is not None
    cells = all_.masks.shape[1]
    points = (np.arange(cells) + 0.5) / cells
    x, y = box[0] + (box[2] - box[0]) * points, box[1] + (box[3] - box[1]) * points
    by_view: dict[int, np.ndarray] = {}
    for row in group:
        mask = _sampled(all_.masks[row], all_.boxes[row], x, y)
        view = int(all_.view[row])
        # Two parts that one tile sees apart are both of the object.
        by_view[view] = np.maximum(by_view[view], mask) if view in by_view else mask
    total, seen = np.zeros((cells, cells)), np.zeros((cells, cells))
    for row in group:
        if (mask := by_view.pop(int(all_.view[row]), None)) is not None:
            x0, y0, x1, y1 = all_.window[row]
            sees = ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
            total += mask * sees
            seen += sees
    return (total / np.maximum(seen, 1)).astype(np.float32)


def _sampled(mask: np.ndarray, box: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate a mask `[M, M]` bilinearly at points of the image, 0 outside: `[Y, X]`."""
    cells = len(mask)
    around = np.pad(mask.astype(np.float64), 1)

    def axis(at: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        place = (at - low) / max(high - low, 1e-6) * cells + 0.5
        place = place.clip(0, cells + 1)
        first = np.minimum(place.astype(np.int64), cells)
        return first, place - first

    (column, right), (row, down) = axis(x, box[0], box[2]), axis(y, box[1], box[3])
    rows = around[row] * (1 - down)[:, None] + around[row + 1] * down[:, None]
    return rows[:, column] * (1 - right) + rows[:, column + 1] * right


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What boxes `[..., 4]` share; turned inside out where they share nothing."""
    return np.concatenate(
        [np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], axis=-1
    )


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod((boxes[..., 2:] - boxes[..., :2]).clip(min=0), axis=-1)
