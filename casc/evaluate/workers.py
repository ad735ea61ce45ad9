"""Detections to tallies, in processes that work while the device computes the next batches.

Pasting, run lengths and pycocotools' matching take some 20 ms of a core per image, most of
it in Python: a thread would hold up the one that feeds the device.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

import torch

from casc.device.signals import end_with_parent
from casc.errors import UserError
from casc.evaluate.coco_eval import MAX_DETS, TWICE, EvalShard, IouType, join, match
from casc.evaluate.coco_results import ImageDetections, image_results
from casc.evaluate.ground_truth import CocoDict, is_key, usable_objects
from casc.evaluate.metrics import IOU_TYPES

T = TypeVar("T")

_POINTS = 0.5
"""Seconds between two points at which waiting may be left."""
_CHUNK = 16
"""Images of a task: enough that its overhead doesn't count."""
_AHEAD = 4
"""Tasks that may wait per process: with 100 masks an image, 20 MB of memory."""


class Truth(NamedTuple):
    """The ground truth of a data set, by image."""

    images: dict[int, Any]
    """COCO's entries by id."""
    annotations: dict[int, list[dict[str, Any]]]
    """COCO's entries by image id."""
    categories: dict[int, str]
    """Names by id, in the order of the model's labels."""


def by_image(ground_truth: CocoDict) -> Truth:
    """Sort a data set by image."""
    images = {image["id"]: image for image in ground_truth["images"]}
    annotations: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
    for annotation in ground_truth["annotations"]:
        if is_key(annotation.get("image_id"), annotations):
            annotations[annotation["image_id"]].append(annotation)
    categories = {c["id"]: c["name"] for c in ground_truth["categories"]}
    return Truth(images, annotations, categories)


def evaluate_images(
    found: Iterable[ImageDetections],
    truth: Future[Truth],
    *,
    processes: int,
    iou_types: Sequence[IouType] = IOU_TYPES,
    max_dets: int = MAX_DETS,
    keep_results: bool = False,
    point: Callable[[], object] = lambda: None,
) -> EvalShard:
    """Match what was found in a stream of images with what is there.

    Args:
        found: image by image; it is read no further ahead than memory allows.
        truth: of all these images. It may still be on its way: it is needed only when the
            first images are there.
        processes: that work beside this one; 0 does all in this one. They are spawned, so
            the program's main module must be safe to import.
        iou_types: what to measure.
        max_dets: detections that count per image and category.
        keep_results: give the detections too, in COCO's format.
        point: is called every half a second while this waits, and may raise to end it.

    Raises:
        UserError: when a detection isn't finite, its label has no category, or an image
            occurs twice.
    """

    def needed(chunk: Sequence[ImageDetections]) -> Truth:
        return _part(_awaited(truth, point), [each.image_id for each in chunk])

    tasks = (
        partial(_tally, chunk, needed(chunk), iou_types, max_dets, keep_results)
        for chunk in _chunks(found, _CHUNK)
    )
    tallies = _in_processes(tasks, processes, point) if processes else [task() for task in tasks]
    return join(tallies or [_tally([], needed([]), iou_types, max_dets, keep_results)])


def _awaited(future: Future[T], point: Callable[[], object]) -> T:
    while not wait([future], _POINTS).done:
        point()
    return future.result()


def _in_processes(
    tasks: Iterable[Callable[[], EvalShard]], processes: int, point: Callable[[], object]
) -> list[EvalShard]:
    tallies: list[EvalShard] = []
    waiting: deque[Future[EvalShard]] = deque()
    try:
        with _workers(processes) as pool:
            for task in tasks:
                waiting.append(pool.submit(task))
                # Errors show as early as they can, and memory stays bounded.
                while waiting and (waiting[0].done() or len(waiting) > _AHEAD * processes):
                    tallies.append(_awaited(waiting.popleft(), point))
            tallies += [_awaited(future, point) for future in waiting]
    except BrokenExecutor:
        raise UserError(
            "a process that evaluates was killed, perhaps for want of memory; "
            "evaluate with fewer processes"
        ) from None
    return tallies


def _tally(
    found: Sequence[ImageDetections],
    truth: Truth,
    iou_types: Sequence[IouType],
    max_dets: int,
    keep_results: bool,
) -> EvalShard:
    results = [r for each in found for r in image_results(each, list(truth.categories))]
    annotations = [a for each in truth.annotations.values() for a in each]
    objects, skipped = usable_objects({"annotations": annotations}, truth.images, truth.categories)
    tally = match(truth.images, truth.categories, objects, results, iou_types, skipped, max_dets)
    return tally._replace(results=results) if keep_results else tally


def _part(truth: Truth, image_ids: Collection[int]) -> Truth:
    for key, count in Counter(image_ids).items():
        if key not in truth.images:
            raise UserError(f"image {key} is not in the ground truth; are they of the same split?")
        if count > 1:
            raise UserError(f"image {key} was evaluated {count} times; {TWICE}")

    def pick(column: Mapping[int, Any]) -> dict[int, Any]:
        return {key: column[key] for key in image_ids}

    return Truth(pick(truth.images), pick(truth.annotations), truth.categories)


def _chunks(found: Iterable[ImageDetections], size: int) -> Iterator[list[ImageDetections]]:
    stream = iter(found)
    while chunk := list(islice(stream, size)):
        yield chunk


@contextmanager
def _workers(processes: int) -> Iterator[Executor]:
    # Forking a process that has threads, or an accelerator, is asking for a deadlock.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()
