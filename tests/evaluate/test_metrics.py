import contextlib
import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from casc.errors import UserError
from casc.evaluate.coco_results import read_results
from casc.evaluate.errors import KINDS, confused, find_errors
from casc.evaluate.ground_truth import read_coco
from casc.evaluate.metrics import (
    FIGURES,
    Evaluation,
    IouType,
    evaluate,
    evaluate_detections,
    format_table,
    read_evaluation,
    write_evaluation,
)
from casc.model.forward_detect import Detections

EVALFIX = Path(__file__).parents[1] / "goldens" / "evalfix"


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def rle(segmentation: Any, height: int = 100, width: int = 100) -> dict[str, Any]:
    merged: Any = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": merged["size"], "counts": merged["counts"].decode()}


def annotation(number: int, image: int, category: int, x: float, y: float, side: float, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": square(x, y, side),
        **more,
    }


def result(image: int, category: int, x: float, y: float, side: float, score: float) -> dict:
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "score": score,
        "segmentation": rle(square(x, y, side)),
    }


def data_set(annotations: list[dict], images: int = 2, categories: int = 2) -> dict[str, Any]:
    return {
        "images": [
            {"id": i + 1, "file_name": f"{i}.jpg", "width": 100, "height": 100}
            for i in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": c + 1, "name": f"class {c + 1}"} for c in range(categories)],
    }


@pytest.fixture(scope="module")
def noisy() -> tuple[dict[str, Any], list[dict]]:
    """Squares of three sizes, crowds among them, and what a mediocre detector makes of them."""
    rng = np.random.default_rng(5)
    annotations, results = [], []
    truth = data_set(annotations, images=12, categories=4)
    for image in truth["images"]:
        image["width"] = image["height"] = 300
        for _ in range(int(rng.integers(0, 7))):
            side = float(rng.choice([20, 60, 130]) + rng.uniform(0, 9))
            x, y = rng.uniform(0, 300 - side, 2).tolist()
            category = int(rng.integers(1, 4))  # the fourth class has no object
            crowd = int(rng.random() < 0.15)
            new = annotation(len(annotations) + 1, image["id"], category, x, y, side)
            if crowd:
                new |= {"iscrowd": 1, "segmentation": rle(square(x, y, side), 300, 300)}
            annotations.append(new)
            for _ in range(int(rng.integers(0, 3))):
                dx, dy, grow = rng.normal(0, side / 12, 3).tolist()
                x1, y1, size = max(x + dx, 0), max(y + dy, 0), max(side + grow, 2)
                guess = category if rng.random() < 0.8 else int(rng.integers(1, 5))
                found = result(image["id"], guess, x1, y1, size, float(rng.random()))
                results.append(found | {"segmentation": rle(square(x1, y1, size), 300, 300)})
    return truth, results


def by_pycocotools(
    truth: dict,
    results: list[dict],
    iou_type: Any,
    category: int | None = None,
    max_dets: int | None = None,
):
    """The plain way, with pycocotools' own loader of results."""
    field = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    kept: Any = [
        {k: r[k] for k in ("image_id", "category_id", "score", field)}
        for r in copy.deepcopy(results)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        data: Any = {"info": {}, **copy.deepcopy(truth)}
        coco.dataset = data
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(kept), iou_type)
        if category is not None:
            evaluator.params.catIds = [category]
        if max_dets is not None:
            evaluator.params.maxDets = [1, 10, max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        if max_dets is not None:  # its AP is that of 100 detections, and there is none
            precision = evaluator.eval["precision"][:, :, :, 0, -1]
            evaluator.stats[0] = precision[precision > -1].mean()
    return [None if s < 0 else s for s in evaluator.stats]


@pytest.mark.parametrize(
    ("iou_type", "published"),
    [("bbox", (0.504581, 0.696973, 0.572982)), ("segm", (0.319545, 0.562288, 0.298927))],
)
def test_published_figures_are_reproduced(iou_type: IouType, published: tuple[float, ...], capsys):
    truth = read_coco(EVALFIX / "instances_val2014_100.json")
    results = read_results(EVALFIX / f"instances_val2014_fake{iou_type}100_results.json")
    evaluation = evaluate(truth, results, [iou_type])
    figures = evaluation.figures[iou_type]
    assert [round(figures[k] or 0, 6) for k in ("AP", "AP50", "AP75")] == list(published)
    assert evaluation.images == 100
    assert evaluation.detections == 734
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(noisy, iou_type: IouType):
    truth, results = noisy
    evaluation = evaluate(truth, results, [iou_type])
    expected = by_pycocotools(truth, results, iou_type)
    assert list(evaluation.figures[iou_type].values()) == expected
    assert list(evaluation.figures[iou_type]) == list(FIGURES)
    assert 0.05 < (expected[0] or 0) < 0.95

    for entry in evaluation.classes:
        assert entry.ap[iou_type] == by_pycocotools(truth, results, iou_type, entry.id)[0]
        crowdless = [
            a for a in truth["annotations"] if a["category_id"] == entry.id and not a["iscrowd"]
        ]
        assert entry.instances == len(crowdless)


def test_masks_with_scores_of_their_own_are_ranked_by_them(noisy):
    """pycocotools, given each kind's scores; some detections have the one score alone."""
    truth, results = noisy
    rng = np.random.default_rng(6)
    scored = [
        r | {"mask_score": float(rng.random())} if i % 5 else r for i, r in enumerate(results)
    ]
    as_masks = [r | {"score": r.get("mask_score", r["score"])} for r in scored]
    evaluation = evaluate(truth, scored)
    expected = by_pycocotools(truth, as_masks, "segm")
    assert list(evaluation.figures["segm"].values()) == expected
    assert expected != by_pycocotools(truth, results, "segm")
    assert list(evaluation.figures["bbox"].values()) == by_pycocotools(truth, results, "bbox")
    errors = find_errors(truth, scored, ["segm"])["segm"]
    assert errors["ap50"] == pytest.approx(expected[1], abs=1e-12)
    with pytest.raises(UserError, match=r"detection 0 .*: mask_score: expected a number, got 'x'"):
        evaluate(truth, [results[0] | {"mask_score": "x"}, *scored])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_classs_figures_are_those_of_pycocotools_for_it_alone(noisy, iou_type: IouType):
    truth, results = noisy
    for entry in evaluate(truth, results, [iou_type]).classes:
        alone = by_pycocotools(truth, results, iou_type, entry.id)
        assert [entry.ap[iou_type], *entry.more[iou_type].values()] == alone[:6]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_errors_are_of_these_detections(noisy, iou_type: IouType):
    """The other evaluator's AP50 is pycocotools', to the last digit or the one before."""
    truth, results = noisy
    errors = find_errors(truth, results, [iou_type])[iou_type]
    expected = by_pycocotools(truth, results, iou_type)[1]
    assert errors["ap50"] == pytest.approx(expected, abs=1e-12)
    assert set(errors["count"]) == set(errors["lost"]) == set(KINDS)


def test_each_kind_of_error_is_told():
    """By hand: one right, doubled, on background, of the other class, badly placed; one missed."""
    annotations: list = []
    truth = data_set(annotations, images=1, categories=2)
    truth["images"][0] |= {"width": 200, "height": 100}
    for i, (category, x) in enumerate(((1, 0), (1, 50), (2, 100), (2, 150)), 1):
        annotations.append(annotation(i, 1, category, x, 0, 20))
    found = [(1, 0, 0, 0.9), (1, 0, 0, 0.8), (2, 50, 0, 0.7), (2, 110, 0, 0.6), (1, 50, 60, 0.95)]
    results = [result(1, c, x, y, 20, score) for c, x, y, score in found]
    errors = find_errors(truth, results, ["bbox"])["bbox"]
    assert errors["count"] == {"Cls": 1, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 1}
    # Rows: of class 1 one found as such and one as class 2; both of class 2 not found.
    assert errors["confusion"] == [[1, 1, 0], [0, 0, 2], [2, 1, 0]]
    assert confused(errors, ["cat", "dog"]) == [("cat taken for dog", 1)]
    assert find_errors(truth, results, ["bbox"], threshold=0.85)["bbox"]["confusion"][0][1] == 0
    evaluation = replace(evaluate(truth, results, ["bbox"]), errors={"bbox": errors})
    table = [line.split() for line in format_table(evaluation).splitlines()]
    assert ["true,", "found", "class", "1", "class", "2", "missed"] in table
    assert ["class", "1", "1", "1", "0"] in table
    assert ["background", "2", "1", "0"] in table
    assert find_errors(truth, [], ["bbox"])["bbox"]["count"]["Miss"] == 4


@pytest.mark.parametrize("max_dets", [11, 17, 300])
def test_other_counts_of_detections_are_pycocotools_and_named_by_them(noisy, max_dets: int):
    truth, results = noisy
    # Many to an image and class, so that each count counts.
    crowded = [
        {**result, "image_id": 1, "category_id": 1}
        for result in results
        if "segmentation" in result
    ]
    size = next([i["height"], i["width"]] for i in truth["images"] if i["id"] == 1)
    crowded = [r for r in crowded if r["segmentation"]["size"] == size] * 9
    evaluation = evaluate(truth, crowded, ["bbox"], max_dets=max_dets)
    expected = by_pycocotools(truth, crowded, "bbox", max_dets=max_dets)
    assert list(evaluation.figures["bbox"].values()) == expected
    assert list(evaluation.figures["bbox"])[:2] == [f"AP@{max_dets}", f"AP50@{max_dets}"]
    assert list(evaluation.figures["bbox"])[6:9] == ["AR1", "AR10", f"AR{max_dets}"]
    assert f"AP@{max_dets} IoU .50:.95" in format_table(evaluation)


def test_both_types_at_once_and_masks_by_their_own_area(noisy):
    truth, results = noisy
    # Masks that are much smaller than the boxes beside them.
    results = [{**r, "bbox": [0.0, 0.0, 299.0, 299.0]} for r in results]
    both = evaluate(truth, results)
    assert list(both.figures) == ["bbox", "segm"]
    alone = evaluate(
        truth, [{k: v for k, v in r.items() if k != "bbox"} for r in results], ["segm"]
    )
    assert both.figures["segm"] == alone.figures["segm"]


def test_nothing_given_is_changed(noisy):
    before = copy.deepcopy(noisy)
    evaluate(*noisy)
    assert noisy == before


def test_perfect_missing_and_half():
    truth = data_set([annotation(1, 1, 1, 10, 10, 40), annotation(2, 2, 1, 50, 50, 40)])
    hits = [result(1, 1, 10, 10, 40, 0.9), result(2, 1, 50, 50, 40, 0.8)]
    assert evaluate(truth, hits).figures["segm"]["AP"] == pytest.approx(1)
    # Recall stops at a half: 51 of the 101 recall points have precision 1.
    assert evaluate(truth, hits[:1]).figures["bbox"]["AP"] == pytest.approx(51 / 101)
    wrong = [result(1, 2, 10, 10, 40, 0.9)]
    assert evaluate(truth, wrong).figures["bbox"]["AP"] == 0


def test_no_detections_score_nothing_rather_than_failing():
    evaluation = evaluate(data_set([annotation(1, 1, 1, 10, 10, 40)]), [])
    assert evaluation.figures["bbox"]["AP"] == 0
    assert evaluation.figures["segm"]["AR100"] == 0
    assert evaluation.detections == 0


def test_what_cant_be_measured_is_none():
    evaluation = evaluate(data_set([annotation(1, 1, 1, 10, 10, 40)]), [])
    assert evaluation.figures["bbox"]["APs"] is None  # no small object
    assert [c.ap["bbox"] for c in evaluation.classes] == [0, None]
    nothing = evaluate(data_set([]), [result(1, 1, 10, 10, 40, 0.9)])
    assert set(nothing.figures["bbox"].values()) == {None}
    assert set(evaluate(data_set([], images=0), []).figures["segm"].values()) == {None}


def test_false_alarms_on_empty_images_count():
    truth = data_set([annotation(1, 1, 1, 10, 10, 40)])
    hit, alarm = result(1, 1, 10, 10, 40, 0.5), result(2, 1, 10, 10, 40, 0.9)
    assert evaluate(truth, [hit, alarm]).figures["bbox"]["AP"] == pytest.approx(0.5)
    on_first = evaluate(truth, [hit, alarm], image_ids=[1])
    assert on_first.figures["bbox"]["AP"] == pytest.approx(1)
    assert (on_first.images, on_first.detections) == (1, 1)


def test_annotation_ids_0_and_double_ids_do_no_harm():
    truth = data_set(
        [
            annotation(0, 1, 1, 10, 10, 40),
            annotation(7, 2, 1, 10, 10, 40),
            annotation(7, 2, 1, 55, 55, 40),
        ]
    )
    hits = [
        result(1, 1, 10, 10, 40, 0.9),
        result(2, 1, 10, 10, 40, 0.8),
        result(2, 1, 55, 55, 40, 0.7),
    ]
    assert evaluate(truth, hits).figures["bbox"]["AP"] == pytest.approx(1)


def test_damaged_annotations_are_repaired_or_counted():
    fine = annotation(1, 1, 1, 10, 10, 40)
    bare = {
        k: v for k, v in annotation(2, 2, 1, 50, 50, 40).items() if k not in ("area", "iscrowd")
    }
    boxless = annotation(3, 2, 1, 0, 0, 9, bbox=[1, 2, None, 4])
    stranger = annotation(4, 2, 99, 0, 0, 9)
    elsewhere = annotation(5, 1234, 1, 0, 0, 9)
    truth = data_set([fine, bare, boxless, stranger, elsewhere])
    hits = [result(1, 1, 10, 10, 40, 0.9), result(2, 1, 50, 50, 40, 0.8)]
    evaluation = evaluate(truth, hits)
    assert evaluation.figures["bbox"]["AP"] == pytest.approx(1)
    assert evaluation.figures["segm"]["AP"] == pytest.approx(1)
    assert (evaluation.instances, evaluation.skipped) == (2, 2)
    assert "2 annotations left out" in format_table(evaluation)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        [],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [["a", 1, 2, 3, 4, 5]],
        {"size": [7, 7], "counts": [49]},
        {"counts": "abc"},
        "nonsense",
    ],
)
def test_objects_without_a_mask_are_ignored_by_mask_ap(mask):
    fine = annotation(1, 1, 1, 10, 10, 40)
    truth = data_set([fine, annotation(2, 2, 1, 50, 50, 40, segmentation=mask)])
    hits = [result(1, 1, 10, 10, 40, 0.8), result(2, 1, 50, 50, 40, 0.9)]
    evaluation = evaluate(truth, hits)
    assert evaluation.unmasked == 1
    assert evaluation.figures["segm"]["AP"] == pytest.approx(1)
    assert evaluate(truth, hits[:1]).figures["segm"]["AP"] == pytest.approx(1)
    assert evaluate(truth, hits[:1]).figures["bbox"]["AP"] == pytest.approx(51 / 101)
    assert "1 objects have no usable mask" in format_table(evaluation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "no such image"),
        ({"category_id": 99}, "no category 99"),
        ({"score": float("nan")}, "score"),
        ({"score": None}, "score"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"segmentation": square(1, 1, 5)}, "segmentation"),
        ({"segmentation": rle(square(1, 1, 5), 9, 9)}, r"size \[100, 100\]"),
    ],
)
def test_results_that_cant_be_used_are_named(change: dict, message: str):
    truth = data_set([annotation(1, 1, 1, 10, 10, 40)])
    good = result(1, 1, 10, 10, 40, 0.9)
    with pytest.raises(UserError, match=f"detection 1 .*{message}"):
        evaluate(truth, [good, {**good, **change}])
    del good["segmentation"]
    with pytest.raises(UserError, match="segmentation is missing"):
        evaluate(truth, [good])
    assert evaluate(truth, [good], ["bbox"]).figures["bbox"]["AP"] == pytest.approx(1)


def test_unknown_image_ids_are_refused():
    with pytest.raises(UserError, match="no image 5"):
        evaluate(data_set([]), [], image_ids=[1, 5])


def test_evaluations_are_saved_and_loaded(tmp_path: Path, noisy):
    evaluation = evaluate(*noisy)
    write_evaluation(evaluation, tmp_path / "eval.json")
    assert read_evaluation(tmp_path / "eval.json") == evaluation
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert stored["figures"]["bbox"]["AP"] == evaluation.figures["bbox"]["AP"]
    assert stored["classes"][3]["ap"] == {"bbox": None, "segm": None}
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
    (tmp_path / "eval.json").write_text("[1]")
    with pytest.raises(UserError, match=r"eval\.json"):
        read_evaluation(tmp_path / "eval.json")


def test_table_is_aligned_and_complete(noisy):
    evaluation = evaluate(*noisy)
    text = format_table(evaluation, per_class=True)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for key in FIGURES:
        row = next(line for line in lines if line.split()[:1] == [key])
        for iou_type, shown in zip(("bbox", "segm"), row.split()[-2:], strict=True):
            value = evaluation.figures[iou_type][key]
            assert shown == ("n/a" if value is None else f"{100 * value:.1f}")
    table = lines[lines.index("") + 1 :][:13]
    assert len({len(line) for line in table}) == 1
    classes = [line for line in lines if line.startswith("class ")]
    assert len(classes) == 2 * 4  # of boxes and of masks
    for row, iou_type in ((0, "bbox"), (4, "segm")):
        ap = evaluation.classes[0].ap[iou_type]
        assert ap is not None
        assert classes[row].split()[3] == f"{100 * ap:.1f}"
        assert classes[row + 3].split()[-2:] == ["n/a", "n/a"]
    assert "class 1" not in format_table(evaluation)


def oracle(image_ids: list[int], truth: dict[str, Any]):
    """A batch of detections that are all right; masks fill their boxes."""
    slots = 5
    rows = []
    for image in image_ids:
        mine = [a for a in truth["annotations"] if a["image_id"] == image]
        boxes = torch.zeros(slots, 4)
        labels = torch.zeros(slots, dtype=torch.int64)
        for i, a in enumerate(mine):
            x, y, w, h = a["bbox"]
            boxes[i] = torch.tensor([x, y, x + w, y + h])
            labels[i] = a["category_id"] - 1
        valid = torch.arange(slots) < len(mine)
        rows.append(Detections(boxes, valid * 0.9, labels, valid, torch.ones(slots, 28, 28)))
    batch = Detections(*(torch.stack(t) for t in zip(*(row[:5] for row in rows), strict=True)))
    return batch, torch.tensor(image_ids), torch.full((len(image_ids), 2), 100.0)


def test_batches_are_evaluated_without_their_filling():
    truth = data_set(
        [
            annotation(1, 1, 1, 10, 10, 40),
            annotation(2, 1, 2, 60, 60, 30),
            annotation(3, 3, 2, 50, 50, 40),
        ],
        images=3,
    )
    batches = [oracle([1, 2], truth), oracle([3, -1], truth)]
    batches[1][0].valid[1] = True  # whatever a filling row holds must not count
    evaluation = evaluate_detections(batches, truth, [1, 2])
    assert evaluation.figures["bbox"]["AP"] == pytest.approx(1)
    assert evaluation.figures["segm"]["AP"] == pytest.approx(1)
    assert evaluation.detections == 3


def test_images_that_were_left_out_are_noticed():
    truth = data_set([annotation(1, 1, 1, 10, 10, 40), annotation(2, 2, 1, 10, 10, 40)])
    with pytest.raises(UserError, match="missing for 1 of 2 images"):
        evaluate_detections([oracle([1], truth)], truth, [1, 2])
    part = evaluate_detections([oracle([1], truth)], truth, [1, 2], partial=True)
    assert isinstance(part, Evaluation)
    assert part.images == 1
    assert part.figures["bbox"]["AP"] == pytest.approx(1)
