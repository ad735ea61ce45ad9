"""The parts of the way from detections to AP, timed one by one."""

import pickle
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from casc.bench.detections import made_up_detections
from casc.bench.evaluation import EvaluationCommand, EvaluationReport
from casc.evaluate.coco_eval import EvalShard, IouType, join, match
from casc.evaluate.coco_results import ImageDetections, coco_results, image_results
from casc.evaluate.ground_truth import usable_objects
from casc.evaluate.mask_rle import encode_masks
from casc.evaluate.metrics import accumulate
from casc.evaluate.workers import Truth, evaluate_images

T = TypeVar("T")
_CHUNK = 16


def bench_evaluation(command: EvaluationCommand) -> EvaluationReport:
    """Time each part on one core; ours and the plain way take turns, image by image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _bench(command)
    finally:
        torch.set_num_threads(threads)


def _bench(command: EvaluationCommand) -> EvaluationReport:
    height, width = command.size
    truth, found = made_up_detections(
        command.images, command.detections, command.size, command.seed
    )
    ids = list(truth.categories)
    ours, plain, entries, differing = [], [], [], 0
    for each in found:
        boxes, scores, labels, masks = map(
            torch.from_numpy, (each.boxes, each.scores, each.labels, each.masks)
        )
        encode_masks(masks, boxes, height, width)  # warms caches
        quick_s, quick = _timed(lambda m=masks, b=boxes: encode_masks(m, b, height, width))
        plain_s, slow = _timed(lambda m=masks, b=boxes: encode_plainly(m, b, height, width))
        entries_s, _ = _timed(
            lambda b=boxes, s=scores, k=labels, i=each.image_id: coco_results(
                b, s, k, None, image_id=i, height=height, width=width, category_ids=ids
            )
        )
        ours.append(quick_s)
        plain.append(plain_s)
        entries.append(entries_s)
        differing += sum(a != b for a, b in zip(quick, slow, strict=True))

    box_ms, mask_ms = (1000 * _match_seconds(truth, found, t) for t in ("bbox", "segm"))
    ready: Future[Truth] = Future()
    ready.set_result(truth)
    tally = evaluate_images(found, ready, processes=0)
    copies = -(-1000 // command.images)
    many = join([_moved(tally, i * command.images) for i in range(copies)])
    sum_up_s = _timed(lambda: accumulate(many, truth.categories))[0] * 1000 / len(many.image_ids)

    encode_ms, results_ms = (1000 * statistics.median(v) for v in (ours, entries))
    host_ms = encode_ms + results_ms + box_ms + mask_ms
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    results = [r for each in found for r in image_results(each, ids)]
    return EvaluationReport(
        images=command.images,
        detections=command.detections,
        size=command.size,
        encode_ms=encode_ms,
        encode_plain_ms=1000 * statistics.median(plain),
        encode_ratio=statistics.median(ratios),
        encode_ratio_low=low,
        encode_ratio_high=high,
        masks_differing=differing,
        results_ms=results_ms,
        match_box_ms=box_ms,
        match_mask_ms=mask_ms,
        pycocotools_share=(box_ms + mask_ms) / host_ms,
        core_share_at_1_img_per_s=host_ms / 1000,
        core_share_at_50_img_per_s=50 * host_ms / 1000,
        one_go_s_per_1000=box_ms + mask_ms + sum_up_s,
        sum_up_s_per_1000=sum_up_s,
        tally_bytes=len(pickle.dumps(tally)) / len(results),
        pickled_results_bytes=len(pickle.dumps(results)) / len(results),
        processes=command.processes,
        processes_img_per_s=_rate(found, truth, command.processes) if command.processes else None,
    )


def encode_plainly(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """The usual way: sample every pixel of the image for each mask, then encode the bitmap."""
    encoded = []
    y = torch.arange(height, dtype=torch.float32) + 0.5
    x = torch.arange(width, dtype=torch.float32) + 0.5
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        across, down = (x - x0) / (x1 - x0) * 2 - 1, (y - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(across[None, :], down[:, None]), dim=-1)
        pasted = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
        rle: Any = coco_mask.encode(np.asfortranarray(pasted.numpy().astype(np.uint8)))
        encoded.append({"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")})
    return encoded


def _match_seconds(truth: Truth, found: list[ImageDetections], iou_type: IouType) -> float:
    """Per image, in the parts in which evaluation does it."""
    seconds = []
    for start in range(0, len(found), _CHUNK):
        chunk = found[start : start + _CHUNK]
        images = {each.image_id: truth.images[each.image_id] for each in chunk}
        results = [r for each in chunk for r in image_results(each, list(truth.categories))]
        objects, _ = usable_objects(
            {"annotations": [a for key in images for a in truth.annotations[key]]},
            images,
            truth.categories,
        )
        whole, _ = _timed(
            lambda i=images, o=objects, r=results: match(i, truth.categories, o, r, [iou_type])
        )
        seconds.append(whole / len(chunk))
    return statistics.median(seconds)


def _moved(tally: EvalShard, by: int) -> EvalShard:
    """The same of other images."""
    matches = {t: m._replace(image=m.image + by) for t, m in tally.matches.items()}
    return tally._replace(image_ids=[key + by for key in tally.image_ids], matches=matches)


def _rate(found: list[ImageDetections], truth: Truth, processes: int) -> float:
    """Images per second: how much longer five times the work takes, so that starting cancels."""

    def seconds(copies: int) -> float:
        step = len(found)
        stream = (f._replace(image_id=f.image_id + c * step) for c in range(copies) for f in found)
        images = {key + c * step: v for c in range(copies) for key, v in truth.images.items()}
        images = {key: {**value, "id": key} for key, value in images.items()}
        annotations = {
            key + c * step: [{**a, "image_id": key + c * step} for a in each]
            for c in range(copies)
            for key, each in truth.annotations.items()
        }
        ready: Future[Truth] = Future()
        ready.set_result(truth._replace(images=images, annotations=annotations))
        return _timed(lambda: evaluate_images(stream, ready, processes=processes))[0]

    return 4 * len(found) / (seconds(5) - seconds(1))


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value
