"""Detections as COCO results: the device's padded tensors become boxes, scores and RLE masks.

Legend: B images of a batch, D detections of an image, M x M a mask inside its box.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from casc.errors import UserError
from casc.evaluate.mask_rle import encode_masks
from casc.json_files import MOST_COCO_BYTES, read_json, write_json
from casc.model.forward_detect import Detections

Result = dict[str, Any]
"""One detection: `image_id`, `category_id`, `bbox` [x, y, w, h], `score`, `segmentation` RLE;
and, where masks are scored, `mask_score`."""


class Results(NamedTuple):
    """Detections of some images, in COCO's format."""

    detections: list[Result]
    image_ids: list[int]
    """The images that were looked at, also those in which nothing was found."""


class ImageDetections(NamedTuple):
    """What was found in one image, in host memory."""

    image_id: int
    height: int
    """Of the stored image, in pixels."""
    width: int
    boxes: np.ndarray
    """`[D, 4]` float32 xyxy in pixels of the stored image."""
    scores: np.ndarray
    """`[D]` float32."""
    labels: np.ndarray
    """`[D]` int64."""
    masks: np.ndarray | None
    """`[D, M, M]` float32, probabilities inside the box; None where boxes are all there is."""
    mask_scores: np.ndarray | None = None
    """`[D]` float32, what masks are ranked by; None where that is `scores`."""


def collect_results(
    outputs: Iterable[tuple[Detections, Tensor, Tensor]],
    category_ids: Sequence[int],
    *,
    threads: int = 1,
) -> Results:
    """Turn the detections of batches into COCO results, masks pasted at the stored size.

    Pasting runs in a thread while the device computes the next batch. Rows that only fill up
    a batch (image id below 0) are dropped; of an image that occurs twice the first counts.

    Args:
        outputs: per batch the detections, `Batch.image_id` [B] and `Batch.size` [B, 2].
        category_ids: COCO's id of each label.
        threads: how many paste; Python lets one do nearly all that several could. 0 pastes
            in the caller's thread.

    Raises:
        UserError: when a detection isn't finite or its label has no category.
    """
    detections: list[Result] = []
    seen: dict[int, None] = {}

    def jobs() -> Iterator[Callable[[], list[Result]]]:
        for found in found_in(outputs):
            if found.image_id not in seen:
                seen[found.image_id] = None
                yield partial(image_results, found, category_ids)

    for results in _in_threads(jobs(), threads):
        detections += results
    return Results(detections, list(seen))


def found_in(outputs: Iterable[tuple[Detections, Tensor, Tensor]]) -> Iterator[ImageDetections]:
    """Copy the detections of batches to the host, image by image, without holding up the device.

    A batch is read when the next one is under way, so that the device never waits for the
    host to ask for more. Rows that only fill up a batch are left out.

    Args:
        outputs: as for `collect_results`.
    """
    waiting: deque[tuple[Detections, torch.Event | None, Tensor, Tensor]] = deque()
    for found, image_id, size in outputs:
        waiting.append((*_start_copy(found), image_id, size))
        # What is in host memory already gains nothing by waiting.
        if len(waiting) > 1 or waiting[0][1] is None:
            yield from _images(*waiting.popleft())
    while waiting:
        yield from _images(*waiting.popleft())


def image_results(found: ImageDetections, category_ids: Sequence[int]) -> list[Result]:
    """As `coco_results`, of all that was found in an image."""
    return coco_results(
        torch.from_numpy(found.boxes),
        torch.from_numpy(found.scores),
        torch.from_numpy(found.labels),
        None if found.masks is None else torch.from_numpy(found.masks),
        None if found.mask_scores is None else torch.from_numpy(found.mask_scores),
        image_id=found.image_id,
        height=found.height,
        width=found.width,
        category_ids=category_ids,
    )


def coco_results(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    mask_scores: Tensor | None = None,
    *,
    image_id: int,
    height: int,
    width: int,
    category_ids: Sequence[int],
) -> list[Result]:
    """Give one image's detections as COCO results.

    Args:
        boxes: `[D, 4]` float xyxy in pixels of the image.
        scores: `[D]` float.
        labels: `[D]` int, positions in `category_ids`.
        masks: `[D, M, M]` float, probabilities inside the box; None where only boxes count.
        mask_scores: `[D]` float, what masks are ranked by in place of `scores`, if not None.
        image_id: COCO's.
        height: the image's, in pixels.
        width: the image's, in pixels.
        category_ids: COCO's id of each label.

    Raises:
        UserError: when a box or score isn't finite or a label has no category.
    """
    corners: list[list[float]] = boxes.tolist()
    certainty: list[float] = scores.tolist()
    for i, (box, score, label) in enumerate(zip(corners, certainty, labels.tolist(), strict=True)):
        if not all(map(math.isfinite, [*box, score])):
            raise UserError(
                f"image {image_id}: detection {i} is not finite (box {box}, score {score}); "
                "the parameters have probably diverged"
            )
        if not 0 <= label < len(category_ids):
            raise UserError(
                f"image {image_id}: label {label}, but there are {len(category_ids)} categories; "
                "the parameters and the data set have different classes"
            )
    results: list[Result] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for (x0, y0, x1, y1), score, label in zip(corners, certainty, labels.tolist(), strict=True)
    ]
    if masks is not None:
        for result, rle in zip(results, encode_masks(masks, boxes, height, width), strict=True):
            result["segmentation"] = rle
    if mask_scores is not None:
        for i, (result, fit) in enumerate(zip(results, mask_scores.tolist(), strict=True)):
            if not math.isfinite(fit):
                raise UserError(
                    f"image {image_id}: detection {i}: its mask's score is not finite;"
                    " the parameters have probably diverged"
                )
            result["mask_score"] = fit
    return results


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read a COCO results file.

    Raises:
        UserError: naming the file, when it can't be read or isn't a list of objects.
    """
    data = read_json(path, list[Any], most_bytes=MOST_COCO_BYTES)
    if not all(isinstance(entry, dict) for entry in data):
        raise UserError(f"{path}: expected a list of objects; is this a COCO results file?")
    return data


def write_results(results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Save detections as a COCO results file, so that a reader never sees half of it."""
    write_json(list(results), path, indent=None)


def _start_copy(found: Detections) -> tuple[Detections, torch.Event | None]:
    """The detections in host memory, and the event after which they are really there."""
    device = found.boxes.device
    if device.type == "cpu":
        return found, None
    # To memory that torch pins for this, so that the copy runs beside the next batch.
    host = Detections._make(t if t is None else t.to("cpu", non_blocking=True) for t in found)
    return host, torch.accelerator.current_stream(device).record_event()


def _images(
    found: Detections, copied: torch.Event | None, image_id: Tensor, size: Tensor
) -> Iterator[ImageDetections]:
    if copied is not None:
        copied.synchronize()
    sizes = size.round().int().tolist()
    for row, identity in enumerate(image_id.tolist()):
        if identity >= 0:
            keep = found.valid[row]
            fields = (found.boxes, found.scores, found.labels, found.masks, found.mask_scores)
            own = (t if t is None else t[row][keep].numpy() for t in fields)
            yield ImageDetections(identity, *sizes[row], *own)


def _in_threads(jobs: Iterable[Callable[[], list[Result]]], threads: int) -> Iterator[list[Result]]:
    """Results of the jobs, in order; few wait at a time, so that memory stays bounded."""
    if not threads:
        yield from (job() for job in jobs)
        return
    waiting: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="paste") as pool:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 16 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
