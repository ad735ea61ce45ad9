"""What kinds of errors detections have: TIDE's (Bolya et al., 2020), and a confusion matrix.

hotcoco computes both; the figures that they are compared with stay pycocotools'.
"""

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from casc.errors import UserError
from casc.evaluate.coco_eval import IouType, only
from casc.evaluate.ground_truth import CocoDict, usable_objects, with_masks

KINDS = {
    "Cls": "of another class",
    "Loc": "badly placed (IoU .10 to .50)",
    "Both": "both",
    "Dupe": "doubled",
    "Bkg": "on background",
    "Miss": "missed",
}
"""TIDE's kinds of errors, and what a table calls them."""

Errors = dict[str, dict[str, Any]]
"""By IoU type: `count` and `lost` (of AP50, in [0, 1]) by kind, `ap50`, and `confusion`: rows of
the true class and columns of the found one, ascending by id, with the background as the last."""


def find_errors(
    ground_truth: CocoDict,
    results: Sequence[Mapping[str, Any]],
    iou_types: Sequence[IouType],
    *,
    threshold: float = 0.5,
) -> Errors:
    """Sort the errors of detections at an IoU of .50.

    Args:
        ground_truth: a COCO data set; it isn't changed.
        results: detections with `bbox` and `segmentation`.
        iou_types: what to look at.
        threshold: detections with a lower score aren't in the confusion matrix.

    Raises:
        UserError: hotcoco isn't installed.
    """
    check_hotcoco()
    from hotcoco import COCO, COCOeval

    images = {image["id"]: image for image in ground_truth["images"]}
    categories = {c["id"]: c["name"] for c in ground_truth["categories"]}
    objects, _ = usable_objects(ground_truth, images, categories)
    found: Errors = {}
    for iou_type in iou_types:
        measured = with_masks(objects, images)[0] if iou_type == "segm" else objects
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO({**ground_truth, "annotations": [dict(entry) for entry in measured]})
            detections = truth.loadRes(only(results, iou_type))
            evaluator = COCOeval(truth, detections, iou_type)
            evaluator.evaluate()
            tide = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)
            confusion = evaluator.confusion_matrix(iou_thr=0.5, min_score=threshold)
        found[iou_type] = {
            "count": {kind: int(tide["counts"][kind]) for kind in KINDS},
            "lost": {kind: float(tide["delta_ap"][kind]) for kind in KINDS},
            "ap50": float(tide["ap_base"]),
            "confusion": np.asarray(confusion["matrix"]).tolist(),
        }
    return found


def check_hotcoco() -> None:
    """See that error kinds can be found, before hours are spent on what they are found in.

    Raises:
        UserError: hotcoco isn't installed.
    """
    if importlib.util.find_spec("hotcoco") is None:
        raise UserError("--errors: needs `pip install 'casc[errors]'`")


def confusion_rows(errors: dict[str, Any], names: Sequence[str]) -> list[list[str | int]]:
    """Give the confusion matrix with its heads: what is true down, what was found across.

    Args:
        errors: of one IoU type.
        names: of the classes, ascending by id.
    """
    heads: list[list[str | int]] = [["true, found", *names, "missed"]]
    rows = zip([*names, "background"], errors["confusion"], strict=True)
    return heads + [[name, *row] for name, row in rows]


def confused(errors: dict[str, Any], names: Sequence[str], most: int = 10) -> list[tuple[str, int]]:
    """Give the pairs of classes that are taken for each other most often, and how often.

    Args:
        errors: of one IoU type.
        names: of the classes, ascending by id.
        most: how many pairs.
    """
    matrix = np.array(errors["confusion"])[:-1, :-1]
    matrix[np.diag_indices(len(matrix))] = 0
    order = np.argsort(-matrix, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(order, matrix.shape), strict=True)
    pairs = [(f"{names[row]} taken for {names[column]}", int(matrix[row, column]))
             for row, column in places]  # fmt: skip
    return [(text, count) for text, count in pairs if count]
