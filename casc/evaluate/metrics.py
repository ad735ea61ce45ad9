"""COCO's average precision, for boxes and for masks, as pycocotools computes it.

detections on the device -> COCO results -> against the ground truth -> 12 figures of each.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from casc.config import from_json
from casc.errors import UserError
from casc.evaluate.coco_eval import MAX_DETS, EvalShard, IouType, average_precision, match
from casc.evaluate.coco_results import Result, collect_results
from casc.evaluate.errors import KINDS, confused, confusion_rows
from casc.evaluate.ground_truth import CocoDict, are_numbers, is_key, is_rle, usable_objects
from casc.json_files import read_json, write_json
from casc.model.forward_detect import Detections

IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")

FIGURES = {
    "AP": "AP    IoU .50:.95",
    "AP50": "AP50  IoU .50",
    "AP75": "AP75  IoU .75",
    "APs": "APs   area < 32^2",
    "APm": "APm   32^2 to 96^2",
    "APl": "APl   area > 96^2",
    "AR1": "AR1   1 detection per image",
    "AR10": "AR10  10 detections",
    "AR100": "AR100 100 detections",
    "ARs": "ARs   area < 32^2",
    "ARm": "ARm   32^2 to 96^2",
    "ARl": "ARl   area > 96^2",
}
"""pycocotools' twelve figures in its order, and what a table calls them."""


_MOST_IN_MATRIX = 12
"""Classes of which a terminal has room for a confusion matrix."""


def figure_names(max_dets: int = MAX_DETS) -> dict[str, str]:
    """Give `FIGURES` as they are called where so many detections count per image and class."""
    if max_dets == MAX_DETS:
        return FIGURES
    named = {}
    for key, text in FIGURES.items():
        # All but these two are of that many.
        name = key if key in ("AR1", "AR10") else f"{key}@{max_dets}"
        what = text[len(key) :].strip().replace("100", str(max_dets))
        if key == "AR100":
            name = f"AR{max_dets}"
        named[name] = f"{name} {what}"
    return named


@dataclass(frozen=True)
class ClassFigures:
    """What was measured of one class."""

    id: int
    name: str
    instances: int
    """Objects in the ground truth, crowds not counted."""
    ap: dict[str, float | None]
    """AP over IoU .50:.95 by IoU type; None where the class has no ground truth."""
    more: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By IoU type AP50, AP75, APs, APm and APl."""


@dataclass(frozen=True)
class Evaluation:
    """COCO's figures in [0, 1]; None where there is nothing to measure."""

    figures: dict[str, dict[str, float | None]]
    """By IoU type ("bbox", "segm") and name, as `figure_names` has them."""
    classes: tuple[ClassFigures, ...]
    images: int
    instances: int
    """Objects in the ground truth, crowds not counted."""
    detections: int
    skipped: int = 0
    """Annotations left out because they have no usable box or an unknown category."""
    unmasked: int = 0
    """Objects without a usable mask, whose boxes mask AP ignores as it does crowds."""
    max_dets: int = MAX_DETS
    """Detections that count per image and class; figures are named by it if it isn't 100."""
    errors: dict[str, Any] | None = None
    """As `casc.evaluate.errors.find_errors` gives them, where they were asked for."""


def evaluate_detections(
    outputs: Iterable[tuple[Detections, Tensor, Tensor]],
    ground_truth: CocoDict,
    category_ids: Sequence[int],
    *,
    iou_types: Sequence[IouType] = IOU_TYPES,
    partial: bool = False,
    threads: int = 1,
) -> Evaluation:
    """Evaluate a stream of batches against the ground truth.

    Args:
        outputs: as for `collect_results`.
        ground_truth: as for `evaluate`.
        category_ids: COCO's id of each label.
        iou_types: what to measure.
        partial: evaluate only on the images that `outputs` covers.
        threads: how many paste masks.

    Raises:
        UserError: as the parts do, and when images are missing from `outputs` though
            `partial` is false: they would count as if nothing had been found in them.
    """
    results = collect_results(outputs, category_ids, threads=threads)
    if partial:
        return evaluate(ground_truth, results.detections, iou_types, image_ids=results.image_ids)
    missing = sorted(
        {image["id"] for image in ground_truth["images"]}.difference(results.image_ids)
    )
    if missing:
        raise UserError(
            f"detections are missing for {len(missing)} of {len(ground_truth['images'])} images "
            f"of the ground truth, the first {missing[:5]}; "
            "to evaluate on a part of the images say so with partial=True"
        )
    return evaluate(ground_truth, results.detections, iou_types)


def evaluate(
    ground_truth: CocoDict,
    results: Sequence[Result],
    iou_types: Sequence[IouType] = IOU_TYPES,
    *,
    image_ids: Collection[int] | None = None,
    max_dets: int = MAX_DETS,
) -> Evaluation:
    """Measure detections with pycocotools.

    The ground truth may be less than perfect: what `usable_objects` and `with_masks` repair
    is counted. Areas of masks, not of boxes, decide between mask APs, APm and APl.

    Args:
        ground_truth: a COCO data set; it isn't changed.
        results: detections with `bbox`, `segmentation` or both, as `iou_types` needs.
        iou_types: what to measure.
        image_ids: evaluate on these images only.
        max_dets: detections that count per image and class, more than 10.

    Raises:
        UserError: naming the annotation or detection and the field that can't be used.
    """
    every = {image["id"]: image for image in ground_truth["images"]}
    images = every
    if image_ids is not None:
        unknown = sorted(set(image_ids).difference(every))
        if unknown:
            raise UserError(f"image_ids: the ground truth has no image {unknown[0]}")
        images = {key: every[key] for key in image_ids}
    categories = {c["id"]: c["name"] for c in ground_truth["categories"]}
    _check_results(results, every, categories.keys(), iou_types)
    results = [result for result in results if result["image_id"] in images]
    objects, skipped = usable_objects(ground_truth, images, categories)
    tally = match(images, categories, objects, results, iou_types, skipped, max_dets)
    return accumulate(tally, categories)


def accumulate(tally: EvalShard, categories: Mapping[int, str]) -> Evaluation:
    """Give the figures of all images that were tallied.

    Args:
        tally: of the images.
        categories: names by id.
    """
    figures: dict[str, dict[str, float | None]] = {}
    by_class: dict[str, dict[int, dict[str, float | None]]] = {}
    for iou_type, matches in tally.matches.items():
        values, by_class[iou_type] = average_precision(
            matches, list(categories), iou_type, tally.max_dets
        )
        figures[iou_type] = dict(zip(figure_names(tally.max_dets), values, strict=True))
    return Evaluation(
        figures=figures,
        classes=tuple(
            ClassFigures(
                key,
                name,
                tally.instances[key],
                {t: ap[key]["AP"] for t, ap in by_class.items()},
                {t: {k: v for k, v in ap[key].items() if k != "AP"} for t, ap in by_class.items()},
            )
            for key, name in categories.items()
        ),
        images=len(tally.image_ids),
        instances=tally.instances.total(),
        detections=tally.detections,
        skipped=tally.skipped,
        unmasked=tally.unmasked,
        max_dets=tally.max_dets,
    )


def write_evaluation(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Save as JSON, so that a reader never sees half of it."""
    write_json(asdict(evaluation), path)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Load what `write_evaluation` saved.

    Raises:
        UserError: when the file can't be read or holds something else.
    """
    try:
        found = from_json(Evaluation, read_json(path), "it")
    except UserError as error:
        raise UserError(f"{path}: not an evaluation written by casc ({error})") from None
    for types in (found.figures, *(each.ap for each in found.classes)):
        if not set(types) <= set(IOU_TYPES):
            raise UserError(f"{path}: not an evaluation written by casc (figures of {set(types)})")
    return found


def format_table(evaluation: Evaluation, *, per_class: bool = False) -> str:
    """Lay the figures out for a terminal, in percent, a column for boxes and one for masks."""
    titles = {"bbox": "box", "segm": "mask"}
    types = list(evaluation.figures)
    head = f"{evaluation.images} images, {evaluation.instances} objects"
    head += f", {evaluation.detections} detections"
    rows = [("in %", *(titles.get(t, t) for t in types))]
    rows += [
        (text, *(_percent(evaluation.figures[t].get(key)) for t in types))
        for key, text in figure_names(evaluation.max_dets).items()
    ]
    if evaluation.skipped:
        head += f"\n{evaluation.skipped} annotations left out: no usable box or unknown category"
    if evaluation.unmasked:
        head += f"\n{evaluation.unmasked} objects have no usable mask: mask AP ignores them"
    blocks = [head, _columns(rows)]
    if per_class:
        blocks += [_class_table(evaluation, t, titles.get(t, t)) for t in evaluation.figures]
    if evaluation.errors:
        blocks += _error_tables(evaluation, titles)
    return "\n\n".join(blocks)


def _class_table(evaluation: Evaluation, iou_type: str, title: str) -> str:
    """Each class's AP, by IoU and by size of objects."""
    more = ("AP50", "APs", "APm", "APl")
    lines: list[Sequence[str]] = [(f"{title}, in %", "objects", "AP", *more)]
    for c in evaluation.classes:
        values = (c.ap[iou_type], *(c.more.get(iou_type, {}).get(key) for key in more))
        lines.append((c.name, str(c.instances), *map(_percent, values)))
    return _columns(lines)


def _error_tables(evaluation: Evaluation, titles: Mapping[str, str]) -> list[str]:
    """What kinds of errors there are, and the classes that are taken for each other."""
    errors = evaluation.errors or {}
    heads = [f"{titles.get(t, t)} {what}" for t in errors for what in ("errors", "AP50 lost")]
    rows = [("at IoU .50", *heads)]
    for kind, text in KINDS.items():
        cells = [(str(e["count"][kind]), _percent(e["lost"][kind])) for e in errors.values()]
        rows.append((text, *(cell for pair in cells for cell in pair)))
    names = [c.name for c in sorted(evaluation.classes, key=lambda c: c.id)]
    first = next(iter(errors.values()))
    pairs = confused(first, names)
    blocks = [_columns(rows)]
    if len(names) <= _MOST_IN_MATRIX:
        blocks.append(_columns([[str(v) for v in row] for row in confusion_rows(first, names)]))
    if pairs:
        blocks.append(_columns([("most confused", "times"), *((t, str(n)) for t, n in pairs)]))
    return blocks


def _check_results(
    results: Sequence[Result],
    images: Mapping[int, Any],
    category_ids: Collection[int],
    iou_types: Sequence[IouType],
) -> None:
    needed = {"bbox": "bbox", "segm": "segmentation"}
    for i, result in enumerate(results):
        place = f"detection {i} (image {result.get('image_id')!r:.60})"
        for name in ("image_id", "category_id", "score", *(needed[t] for t in iou_types)):
            if name not in result:
                raise UserError(f"{place}: {name} is missing")
        if not is_key(result["image_id"], images):
            raise UserError(
                f"{place}: the ground truth has no such image; are they of the same split?"
            )
        if not is_key(result["category_id"], category_ids):
            raise UserError(
                f"{place}: category_id: the ground truth has no category "
                f"{result['category_id']!r:.60}; are they of the same data set?"
            )
        if not are_numbers([result["score"]], 1):
            raise UserError(f"{place}: score: expected a number, got {result['score']!r:.60}")
        if "mask_score" in result and not are_numbers([result["mask_score"]], 1):
            found = result["mask_score"]
            raise UserError(f"{place}: mask_score: expected a number, got {found!r:.60}")
        if "bbox" in iou_types and not are_numbers(result["bbox"], 4):
            raise UserError(f"{place}: bbox: expected 4 numbers, got {result['bbox']!r:.60}")
        if "segm" in iou_types:
            mask = result["segmentation"]
            size = [images[result["image_id"]][side] for side in ("height", "width")]
            if not is_rle(mask) or list(mask["size"]) != size:
                raise UserError(
                    f"{place}: segmentation: expected compressed RLE (size, counts) of size {size}"
                )


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned names, right-aligned figures."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(v.rjust(max(w, 6)) for v, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )
