"""Detections as COCO results: the device's padded tensors become boxes, scores and RLE masks.

Legend: B images of a batch, D detections of an image, M x M a mask inside its box.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from casc.detector import Detections
from casc.errors import UserError
from casc.ground_truth import read_json, write_json
from casc.paste import encode_masks

Result = dict[str, Any]
"""One detection: `image_id`, `category_id`, `bbox` [x, y, w, h], `score`, `segmentation` RLE."""


class Results(NamedTuple):
    """Detections of some images, in COCO's format."""

    detections: list[Result]
    image_ids: list[int]
    """The images that were looked at, also those in which nothing was found."""


def collect_results(
    outputs: Iterable[tuple[Detections, Tensor, Tensor]],
    category_ids: Sequence[int],
    *,
    threads: int = 1,
) -> Results:
    """Turn the detections of batches into COCO results, masks pasted at the stored size.

    Pasting (17 ms for 100 masks on a 640 x 480 image, one core) runs in a thread while the
    device computes the next batch. Rows that only fill up a batch (image id below 0) are
    dropped; of an image that occurs twice the first counts.

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

    def images() -> Iterator[Callable[[], list[Result]]]:
        for found, image_id, size in outputs:
            # One copy per tensor and batch, not one per image.
            found = Detections(*(torch.as_tensor(t).cpu() for t in found))
            sizes = torch.as_tensor(size).round().int().tolist()
            for row, identity in enumerate(torch.as_tensor(image_id).tolist()):
                if identity >= 0 and identity not in seen:
                    seen[identity] = None
                    yield _deferred(found, row, identity, sizes[row], category_ids)

    for results in _in_threads(images(), threads):
        detections += results
    return Results(detections, list(seen))


def coco_results(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    masks: Tensor | None,
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
    return results


def merge_results(parts: Iterable[Results]) -> Results:
    """Join the results of several processes; of an image that occurs twice the first counts."""
    detections: list[Result] = []
    seen: dict[int, None] = {}
    for part in parts:
        fresh = set(part.image_ids).difference(seen)
        seen.update(dict.fromkeys(part.image_ids))
        detections += [d for d in part.detections if d["image_id"] in fresh]
    return Results(detections, list(seen))


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read a COCO results file.

    Raises:
        UserError: naming the file, when it can't be read or isn't a list of objects.
    """
    data = read_json(path)
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise UserError(f"{path}: expected a list of objects; is this a COCO results file?")
    return data


def write_results(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Save detections as a COCO results file, so that a reader never sees half of it."""
    write_json(list(results), path, indent=None)


def _deferred(
    found: Detections, row: int, image_id: int, size: Sequence[int], category_ids: Sequence[int]
) -> Callable[[], list[Result]]:
    def convert() -> list[Result]:
        keep = found.valid[row]
        return coco_results(
            found.boxes[row][keep],
            found.scores[row][keep],
            found.labels[row][keep],
            found.masks[row][keep],
            image_id=image_id,
            height=size[0],
            width=size[1],
            category_ids=category_ids,
        )

    return convert


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
