"""COCO's average precision in two steps, so that the long one can run in parts.

match: detections of some images against their ground truth, by pycocotools -> a tally.
sum up: the tallies of all images, from however many processes -> the figures.

Legend: P pairs of an image and a category that occurs in it, D detections, G objects,
A areas (all, small, medium, large), T IoU thresholds.
"""

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from casc.errors import UserError
from casc.evaluate.ground_truth import with_masks

IouType = Literal["bbox", "segm"]
MAX_DETS = 100
"""Detections that COCO counts per image and category."""
TWICE = "is it in the shards more than once?"


class Matches(NamedTuple):
    """Which detections met an object, for one IoU type; pair by pair.

    Thirty bytes of a detection do for the figures where its mask takes hundreds.
    """

    image: np.ndarray
    """`[P]` int64, COCO's ids."""
    category: np.ndarray
    """`[P]` int64, COCO's ids."""
    detections: np.ndarray
    """`[P]` int64, how many of the D are the pair's."""
    objects: np.ndarray
    """`[P]` int64, how many of the G are the pair's."""
    scores: np.ndarray
    """`[D]` float64, falling within a pair."""
    matched: np.ndarray
    """`[A * T / 8, D]` uint8: a bit per area and threshold."""
    ignored: np.ndarray
    """`[A * T / 8, D]` uint8: detections that count neither way."""
    objects_ignored: np.ndarray
    """`[A, G]` bool: crowds, and what is of another area."""


class EvalShard(NamedTuple):
    """What some images contribute to the figures."""

    image_ids: list[int]
    detections: int
    skipped: int
    """Annotations left out for want of a box or a known category."""
    unmasked: int
    """Objects without a usable mask."""
    instances: Counter[int]
    """Objects by category id, crowds not counted."""
    matches: dict[IouType, Matches]
    max_dets: int = MAX_DETS
    """Detections that count per image and category."""
    results: Sequence[Mapping[str, Any]] = ()
    """The detections themselves, where they are asked for."""


def match(
    images: Mapping[int, Any],
    categories: Mapping[int, str],
    objects: Sequence[dict[str, Any]],
    results: Sequence[Mapping[str, Any]],
    iou_types: Sequence[IouType],
    skipped: int = 0,
    max_dets: int = MAX_DETS,
) -> EvalShard:
    """Match the detections of some images with the objects in them.

    Args:
        images: COCO's entries by id.
        categories: names by id.
        objects: as `usable_objects` gives them.
        results: detections that were checked.
        iou_types: by which overlap.
        skipped: how many annotations `usable_objects` left out.
        max_dets: how many detections count per image and category, best first.
    """
    matches: dict[IouType, Matches] = {}
    unmasked = 0
    for iou_type in iou_types:
        measured = objects
        if iou_type == "segm":
            measured, unmasked = with_masks(objects, images)
        matches[iou_type] = _match(images, categories, measured, results, iou_type, max_dets)
    instances = Counter(o["category_id"] for o in objects if not o["iscrowd"])
    return EvalShard(list(images), len(results), skipped, unmasked, instances, matches, max_dets)


def join(tallies: Sequence[EvalShard]) -> EvalShard:
    """One tally of them all.

    Raises:
        UserError: when an image was counted twice.
    """
    image_ids = [key for tally in tallies for key in tally.image_ids]
    twice = [key for key, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise UserError(
            f"image {twice[0]} was evaluated {image_ids.count(twice[0])} times; {TWICE}"
        )
    matches: dict[IouType, Matches] = {}
    for iou_type in tallies[0].matches if tallies else ():
        columns = zip(*(tally.matches[iou_type] for tally in tallies), strict=True)
        matches[iou_type] = Matches(*(np.concatenate(c, axis=-1) for c in columns))
    return EvalShard(
        image_ids,
        sum(t.detections for t in tallies),
        sum(t.skipped for t in tallies),
        sum(t.unmasked for t in tallies),
        sum((t.instances for t in tallies), Counter()),
        matches,
        tallies[0].max_dets if tallies else MAX_DETS,
        [result for tally in tallies for result in tally.results],
    )


def average_precision(
    matches: Matches, category_ids: Sequence[int], iou_type: IouType, max_dets: int = MAX_DETS
) -> tuple[list[float | None], dict[int, dict[str, float | None]]]:
    """Give pycocotools' twelve figures in its order, and some by category; None where nothing is.

    Of each category AP, AP50, AP75, APs, APm and APl.
    """
    evaluator: Any = _evaluator(iou_type, [], category_ids, max_dets)
    params = evaluator.params
    parts = [_accumulate(matches, category_ids, iou_type, limit) for limit in params.maxDets]
    evaluator.eval = {
        key: np.concatenate([part[key] for part in parts], axis=-1)
        for key in ("precision", "recall", "scores")
    }
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    # [T thresholds, R recalls, K classes, A areas, M detection limits]
    precision: np.ndarray = evaluator.eval["precision"][:, :, :, 0, -1]
    # Its AP is that of 100 detections, whatever `maxDets` says.
    evaluator.stats[0] = precision[precision > -1].mean() if (precision > -1).any() else -1
    every: np.ndarray = evaluator.eval["precision"][..., -1]
    parts = {"AP": (slice(None), 0), "AP50": (slice(0, 1), 0), "AP75": (slice(5, 6), 0)}
    parts |= {f"AP{size}": (slice(None), area) for area, size in enumerate("sml", 1)}
    by_category: dict[int, dict[str, float | None]] = {}
    for k, key in enumerate(params.catIds):
        by_category[key] = {}
        for name, (thresholds, area) in parts.items():
            values = every[thresholds, :, k, area]
            values = values[values > -1]
            by_category[key][name] = float(values.mean()) if values.size else None
    # pycocotools says -1 where there is nothing to measure.
    return [None if value < 0 else float(value) for value in evaluator.stats], by_category


def precision_at_recall(
    matches: Matches, category_ids: Sequence[int], iou_type: IouType
) -> np.ndarray:
    """Give the curves that AP is the mean of: `[T, 101, K]` precision at recalls 0, .01 to 1.

    As pycocotools computes them: at most 100 detections of an image and class, objects of all
    sizes, categories ascending by id, -1 where a category has no object.
    """
    limit = _evaluator(iou_type, [], category_ids).params.maxDets[-1]
    return _accumulate(matches, category_ids, iou_type, limit)["precision"][:, :, :, 0, 0]


def only(results: Sequence[Mapping[str, Any]], iou_type: IouType) -> list[dict[str, Any]]:
    """Copies of COCO results with boxes or masks alone, and their own scores.

    pycocotools writes into what it is given, and with a box at hand it would take the box's area
    for the mask's.
    """
    field = "bbox" if iou_type == "bbox" else "segmentation"
    kept = ("image_id", "category_id", "score", field)
    made = [{key: result[key] for key in kept} for result in results]
    if iou_type == "segm":
        for one, result in zip(made, results, strict=True):
            one["score"] = result.get("mask_score", result["score"])
    return made


def _match(
    images: Mapping[int, Any],
    categories: Mapping[int, str],
    objects: Sequence[dict[str, Any]],
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    max_dets: int,
) -> Matches:
    detections = only(results, iou_type)
    evaluator = _evaluator(iou_type, list(images), list(categories), max_dets)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        dataset: Any = {
            "info": {},
            "images": list(images.values()),
            "annotations": [dict(entry) for entry in objects],
            "categories": [{"id": key, "name": name} for key, name in categories.items()],
        }
        truth.dataset = dataset
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)  # type: ignore[arg-type]
        else:
            # loadRes looks at the first detection to tell boxes from masks.
            found = COCO()
            nothing: Any = {**dataset, "annotations": []}
            found.dataset = nothing
            found.createIndex()
        evaluator.cocoGt, evaluator.cocoDt = truth, found
        evaluator.evaluate()
    return _compact(evaluator)


def _evaluator(
    iou_type: IouType,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_dets: int = MAX_DETS,
) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(iouType=iou_type)
    evaluator.params.imgIds = sorted(image_ids)
    evaluator.params.catIds = sorted(category_ids)
    evaluator.params.maxDets = [1, 10, max_dets]
    return evaluator


def _compact(evaluator: COCOeval) -> Matches:
    """The parts of `evalImgs` that the figures are made of."""
    params = evaluator.params
    ids, areas = params.imgIds, len(params.areaRng)
    pairs: list[tuple[int, int, int, int]] = []
    entries: list[Any] = []
    for k, category in enumerate(params.catIds):
        begin = k * areas * len(ids)
        for i, image in enumerate(ids):
            entry: Any = evaluator.evalImgs[begin + i]
            if entry is not None:
                sizes = len(entry["dtScores"]), len(entry["gtIgnore"])
                pairs.append((int(image), int(category), *sizes))
                entries.append(evaluator.evalImgs[begin + i :: len(ids)][:areas])
    bits = areas * len(params.iouThrs)

    def side_by_side(field: str, rows: int) -> np.ndarray:
        """`[rows, D or G]` bool of all pairs."""
        values = [np.stack([e[field] for e in each]).reshape(rows, -1) != 0 for each in entries]
        return np.concatenate([np.zeros((rows, 0), bool), *values], axis=1)

    image, category, detections, objects = np.array(pairs, np.int64).reshape(-1, 4).T
    return Matches(
        image=image,
        category=category,
        detections=detections,
        objects=objects,
        scores=np.concatenate([np.zeros(0), *(each[0]["dtScores"] for each in entries)]),
        matched=np.packbits(side_by_side("dtMatches", bits), axis=0),
        ignored=np.packbits(side_by_side("dtIgnore", bits), axis=0),
        objects_ignored=side_by_side("gtIgnore", areas),
    )


def _accumulate(
    matches: Matches, category_ids: Sequence[int], iou_type: IouType, limit: int
) -> dict[str, np.ndarray]:
    """Give pycocotools' precision and recall with so many detections per image and category.

    Its loops over images take longest, and do no more than lay their columns end to end; so
    it is given those of each category as if they were of one image, cut to the limit here.
    """
    evaluator: Any = _evaluator(iou_type, [0], category_ids)
    params = evaluator.params
    params.maxDets = [sys.maxsize]
    evaluator._paramsEval = params
    areas, thresholds = len(params.areaRng), len(params.iouThrs)
    by_category = _by_category(matches, limit)
    matched, ignored = (
        np.unpackbits(bits[:, by_category.detections], axis=0, count=areas * thresholds)
        .view(bool)
        .reshape(areas, thresholds, -1)
        for bits in (matches.matched, matches.ignored)
    )
    scores = matches.scores[by_category.detections]
    objects_ignored = matches.objects_ignored[:, by_category.objects]
    detections_of = _slices(by_category.detection_categories, params.catIds)
    objects_of = _slices(by_category.object_categories, params.catIds)
    evaluator.evalImgs = [
        {
            "dtScores": scores[detections],
            "dtMatches": matched[area][:, detections],
            "dtIgnore": ignored[area][:, detections],
            "gtIgnore": objects_ignored[area][objects],
        }
        for detections, objects in zip(detections_of, objects_of, strict=True)
        for area in range(areas)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    return evaluator.eval


class _ByCategory(NamedTuple):
    """The columns of `Matches` by category, then by image: equal scores keep that order."""

    detections: np.ndarray
    """Columns of detections, the best `limit` of each image and category."""
    detection_categories: np.ndarray
    objects: np.ndarray
    object_categories: np.ndarray


def _by_category(matches: Matches, limit: int) -> _ByCategory:
    order = np.lexsort((matches.image, matches.category))
    category, found, objects = (
        values[order] for values in (matches.category, matches.detections, matches.objects)
    )
    first_found = (np.cumsum(matches.detections) - matches.detections)[order]
    first_object = (np.cumsum(matches.objects) - matches.objects)[order]
    within = np.minimum(found, limit)
    return _ByCategory(
        detections=_ranges(first_found, within),
        detection_categories=np.repeat(category, within),
        objects=_ranges(first_object, objects),
        object_categories=np.repeat(category, objects),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of some ranges, one after the other."""
    shift = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return shift + np.arange(len(shift))


def _slices(ascending: np.ndarray, values: Sequence[int]) -> list[slice]:
    """Where each value stands."""
    begin = np.searchsorted(ascending, values, side="left")
    end = np.searchsorted(ascending, values, side="right")
    return list(map(slice, begin.tolist(), end.tolist()))
