"""Any annotation file and its shards are the same ground truth, which is pycocotools' own."""

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from casc.data.index import Category
from casc.data.record import AnnotationRecord
from casc.data.sample import annotation_edges
from casc.evaluate.ground_truth import ground_truth_from_samples, ground_truth_from_shards
from casc.evaluate.metrics import evaluate
from data_tools.coco import check_annotations
from data_tools.instances import Frame, make_record

WIDTH, HEIGHT = 40, 32
CATEGORIES = [Category(1, "ant"), Category(3, "cat")]

coordinates = st.integers(-4, 44) | st.floats(-4, 44, width=32)
parts = st.lists(coordinates, min_size=6, max_size=16).filter(lambda part: len(part) % 2 == 0)
bad_parts = st.lists(coordinates, max_size=5) | st.just([float("nan")] * 6) | st.just([1.0] * 7)


@st.composite
def rles(draw: st.DrawFn) -> Any:
    cuts = sorted(draw(st.lists(st.integers(0, WIDTH * HEIGHT), max_size=6)))
    counts = np.diff([0, *cuts, WIDTH * HEIGHT]).tolist()
    if draw(st.booleans()):
        return {"size": [HEIGHT, WIDTH], "counts": counts}
    packed: Any = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)  # type: ignore[arg-type]
    return {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}


segmentations = (
    st.none()
    | st.lists(parts | bad_parts, max_size=3)
    | rles()
    | st.sampled_from(
        [
            {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
            {"size": [HEIGHT, WIDTH], "counts": "nonsense"},
            {"size": [WIDTH, HEIGHT + 1], "counts": [WIDTH * (HEIGHT + 1)]},
        ]
    )
)


@st.composite
def data_sets(draw: st.DrawFn) -> dict[str, Any]:
    annotations = []
    for i in range(draw(st.integers(1, 6))):
        x, y = draw(st.integers(0, 30)), draw(st.integers(0, 22))
        annotation = {
            "id": i + 1,
            "image_id": draw(st.integers(1, 2)),
            "category_id": draw(st.sampled_from([1, 3, 3, 9])),
            "bbox": [x, y, draw(st.integers(0, 10)), draw(st.integers(1, 10))],
            "area": draw(st.none() | st.integers(0, 2000)),
            "iscrowd": draw(st.sampled_from([0, 0, 0, 1])),
            "segmentation": draw(segmentations),
        }
        lacking = draw(st.sets(st.sampled_from(["area", "iscrowd", "segmentation"])))
        annotations.append({k: v for k, v in annotation.items() if k not in lacking})
    images = [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2)]
    categories = [{"id": c.id, "name": c.name} for c in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}


def through_shards(data: dict[str, Any]) -> tuple[dict[str, Any], list[AnnotationRecord]]:
    checked = check_annotations(json.loads(json.dumps(data)), "test")
    frame, labels = Frame(WIDTH, HEIGHT, WIDTH, HEIGHT), {1: 0, 3: 1}
    samples = [
        {
            "image_id": image.id,
            "file_name": image.file_name,
            "width": WIDTH,
            "height": HEIGHT,
            "annotations": [
                make_record(a, frame, labels).entry for a in checked.by_image[image.id]
            ],
        }
        for image in checked.images
    ]
    samples = json.loads(json.dumps(samples))
    entries = [entry for sample in samples for entry in sample["annotations"]]
    return ground_truth_from_samples(samples, CATEGORIES), entries


def raster(segmentation: Any) -> np.ndarray:
    """Pycocotools' own reading."""
    rle: Any = segmentation
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)
    return coco_mask.decode(rle).astype(bool)


def filled(edges: np.ndarray) -> np.ndarray:
    """Brute force: pixels whose centre the edges wind round."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    x0, y0, x1, y1 = edges.astype(np.float64).T
    crossed = (y0 <= y[..., None]) != (y1 <= y[..., None])
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x0 + (y[..., None] - y0) * (x1 - x0) / (y1 - y0)
    return ((crossed & (at <= x[..., None])) * np.sign(y0 - y1)).sum(-1) != 0


def distance(edges: np.ndarray) -> np.ndarray:
    """From each pixel's centre to the nearest edge, in pixels."""
    points = np.moveaxis(np.mgrid[:HEIGHT, :WIDTH][::-1] + 0.5, 0, -1)[:, :, None]
    start, along = edges[:, :2].astype(np.float64), edges[:, 2:] - edges[:, :2].astype(np.float64)
    share = ((points - start) * along).sum(-1) / (along**2).sum(-1)
    nearest = start + share.clip(0, 1)[..., None] * along
    return np.hypot(*np.moveaxis(points - nearest, -1, 0)).min(-1)


@settings(max_examples=40, deadline=None)
@given(data=data_sets(), seed=st.integers(0, 99))
def test_shards_and_their_annotation_file_give_the_same_figures(data: dict[str, Any], seed: int):
    rng = np.random.default_rng(seed)
    results = []
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        box = [x, y, x + w, y, x + w, y + h + 1, x, y + h + 1]
        mask = raster([box])
        given = entry.get("segmentation")
        if isinstance(given, list) and given and all(len(p) % 2 == 0 and len(p) > 5 for p in given):
            mask = raster(given) if np.isfinite(np.concatenate(given)).all() else mask
        packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}
        score = float(rng.uniform())
        result = {"image_id": entry["image_id"], "category_id": entry["category_id"]}
        if entry["category_id"] != 9:
            results.append({**result, "bbox": [x, y, w, h], "score": score})
            results[-1]["segmentation"] = segmentation
    shards, _ = through_shards(data)
    ours, theirs = evaluate(shards, results), evaluate(data, results)
    assert ours.figures == theirs.figures
    assert ours.classes == theirs.classes
    assert (ours.unmasked, ours.skipped) == (theirs.unmasked, theirs.skipped)


@settings(max_examples=100, deadline=None)
@given(data=data_sets())
def test_what_is_trained_on_is_what_pycocotools_reads(data: dict[str, Any]):
    listed = {entry["id"]: entry for entry in data["annotations"]}
    for entry in through_shards(data)[1]:
        given = listed[entry["id"]]
        assert entry["bbox"] == given["bbox"]
        true = raster(entry["segmentation"])
        usable = isinstance(given.get("segmentation"), dict) or entry["train"]
        if given.get("area") is not None:
            assert entry["area"] == given["area"]
        elif usable and true.any():
            assert entry["area"] == true.sum()
        if entry["train"]:
            assert true.any()
            # Pycocotools rounds outlines to a fifth of a pixel: they may differ along them only.
            wrong = filled(annotation_edges(entry)) != true
            assert not wrong.any() or distance(annotation_edges(entry))[wrong].max() <= 1


def with_empty_runs(mask: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Run lengths of a mask by brute force, among them some of 0, which tools write in the middle.

    Two begin the list, which is an empty mask's place for a pixel.
    """
    pixels = mask.reshape(-1, order="F")
    ends = np.flatnonzero(np.diff(pixels.astype(int), prepend=0, append=pixels[-1] ^ 1))
    counts = [int(n) for n in np.diff(ends, prepend=0)]
    for _ in range(3):
        at = int(rng.integers(0, len(counts)))
        first = int(rng.integers(0, counts[at] + 1))
        counts[at : at + 1] = [first, 0, counts[at] - first]
    return [0, 0, *counts]


def packed_by_hand(counts: list[int]) -> str:
    """COCO's packing, whatever the counts: 5 bits a character, each less the last but one."""
    text = ""
    for i, count in enumerate(counts):
        left, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text += chr((bits | 32 * more) + 48)
    return text


@pytest.mark.parametrize("compressed", [False, True])
def test_runs_of_no_pixel_give_pycocotools_own_figures(compressed: bool):
    """Against COCOeval on the file itself."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(8):
        annotations, results = [], []
        for i in range(1, 7):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            for x, y in zip(rng.integers(0, 28, 2), rng.integers(0, 22, 2), strict=True):
                mask[y : y + rng.integers(3, 10), x : x + rng.integers(3, 12)] = True
            counts = with_empty_runs(mask, rng)
            packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            about = {"image_id": 1 + i % 2, "category_id": 1 + i % 3 // 2 * 2}
            about["bbox"] = coco_mask.toBbox(packed).tolist()
            written = packed_by_hand(counts) if compressed else counts
            shape: Any = {"size": [HEIGHT, WIDTH], "counts": written}
            np.testing.assert_array_equal(raster(shape), mask)
            more = {"id": i, "area": int(mask.sum()), "iscrowd": int(i == 6)}
            annotations.append({**about, **more, "segmentation": shape})
            near = np.roll(mask, int(rng.integers(0, 3)), 0)
            found: Any = coco_mask.encode(np.asfortranarray(near.astype(np.uint8)))
            found = {"size": [HEIGHT, WIDTH], "counts": found["counts"].decode()}
            results.append({**about, "score": float(rng.uniform()), "segmentation": found})
        sizes = {"width": WIDTH, "height": HEIGHT}
        images = [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in (1, 2)]
        categories = [{"id": c.id, "name": c.name} for c in CATEGORIES]
        data: Any = {"images": images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = copy.deepcopy(data)
            truth.createIndex()
            own = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "segm")  # type: ignore[arg-type]
            own.evaluate()
            own.accumulate()
            own.summarize()
        figures = [None if value < 0 else float(value) for value in own.stats]
        shards, entries = through_shards(data)
        for known in (data, shards):
            assert list(evaluate(known, results).figures["segm"].values()) == figures
        seen.add(figures[0])
        for entry, listed in zip(
            sorted(entries, key=lambda entry: entry["id"]), annotations, strict=True
        ):
            assert entry["train"] == (not listed["iscrowd"])
            if entry["train"]:
                true = raster(listed["segmentation"])
                np.testing.assert_array_equal(filled(annotation_edges(entry)), true)
    assert len(seen) > 4


RING = [5, 5, 25, 5, 25, 25, 5, 25, 5, 5, 10, 10, 20, 10, 20, 20, 10, 20, 10, 10]
BOW = [5, 5, 25, 25, 25, 5, 5, 25]
PENTAGRAM = [20, 2, 28, 28, 4, 11, 36, 11, 12, 28]


@pytest.mark.parametrize("outline", [RING, BOW, PENTAGRAM])
@pytest.mark.parametrize("turned", [False, True])
def test_outlines_that_overlap_themselves_are_trained_as_pycocotools_fills_them(
    outline: list[float], turned: bool
):
    points = np.reshape(outline, (-1, 2))
    part = (points[::-1] if turned else points).reshape(-1).tolist()
    other = [1, 1, 9, 1, 9, 9, 1, 9]
    for parts_given in ([part], [part, other]):
        annotation = {"id": 5, "category_id": 1, "bbox": [4, 2, 32, 26], "area": None}
        annotation |= {"iscrowd": 0, "segmentation": parts_given}
        record = make_record(annotation, Frame(WIDTH, HEIGHT, WIDTH, HEIGHT), {1: 0})
        assert "self_overlap" in [finding.kind for finding in record.findings]
        true = raster(parts_given)
        assert record.entry["train"]
        assert record.entry["area"] == true.sum()
        assert record.entry.get("mask_iou") == 1
        np.testing.assert_array_equal(filled(annotation_edges(record.entry)), true)
        assert record.entry["segmentation"] == parts_given


def test_an_outline_that_pycocotools_loses_is_not_trained_on():
    """Brute force over slivers: some hold a pixel's centre, but no pixel for pycocotools."""
    rng, lost = np.random.default_rng(0), 0
    for _ in range(3000):
        start, along = rng.uniform(5, 25, 2), rng.uniform(-4, 4, 2)
        part = np.concatenate([start, start + along, start + along + rng.uniform(-0.6, 0.6, 2)])
        annotation = {"id": 5, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 9}
        annotation |= {"iscrowd": 0, "segmentation": [part.tolist()]}
        record = make_record(annotation, Frame(WIDTH, HEIGHT, WIDTH, HEIGHT), {1: 0})
        assert record.entry["train"] == raster([part.tolist()]).any()
        lost += filled(annotation_edges(record.entry)).any() and not record.entry["train"]
    assert lost


def test_a_contour_given_twice_has_no_pixel():
    square = [5, 5, 25, 5, 25, 25, 5, 25]
    annotation = {"id": 5, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400}
    annotation |= {"iscrowd": 0, "segmentation": [[*square, *square]]}
    record = make_record(annotation, Frame(WIDTH, HEIGHT, WIDTH, HEIGHT), {1: 0})
    assert not raster([[*square, *square]]).any()
    assert [finding.kind for finding in record.findings] == ["self_overlap", "no_mask"]
    assert not record.entry["train"]


def test_holes_and_bridges_without_width_stay_as_they_are():
    hole = [5, 5, 25, 5, 25, 25, 5, 25, 5, 5, 10, 10, 10, 20, 20, 20, 20, 10, 10, 10]
    annotation = {"id": 5, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 300}
    annotation |= {"iscrowd": 0, "segmentation": [hole]}
    record = make_record(annotation, Frame(WIDTH, HEIGHT, WIDTH, HEIGHT), {1: 0})
    assert record.findings == []
    assert "rings" not in record.entry


def test_coordinates_without_the_list_of_outlines_are_one_outline(coco):
    """As VIA exports them; of the wrong form they are no mask, and told."""
    number, ring = coco.image(), [10, 10, 30, 10, 30, 25, 10, 20]
    coco.object(number, segmentation=ring, area=None)
    coco.object(number, segmentation=[ring], area=None)
    coco.object(number, segmentation=ring[:-1], area=None)
    index, out = coco.shard()
    found = index.splits["train"].report["findings"]
    assert found["flat_outline"]["ids"] == "100 102"
    assert (found["no_mask"]["ids"], found["bad_polygon_part"]["ids"]) == ("102", "102")
    flat, nested, _ = ground_truth_from_shards(out, index, "train")["annotations"]
    rle: Any = coco_mask.merge(coco_mask.frPyObjects([ring], 50, 60))
    pixels = int(coco_mask.area(rle))
    mask = {"size": [50, 60], "counts": rle["counts"].decode()}
    assert flat["segmentation"] == nested["segmentation"] == [ring]
    assert flat["area"] == nested["area"] == pixels
    results = [
        {**{key: e[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9 - i / 9,
         "segmentation": mask}
        for i, e in enumerate(coco.annotations)
    ]  # fmt: skip
    data = json.loads(coco.file.read_text())
    figures = [evaluate(truth, results).figures for truth in
               (data, ground_truth_from_shards(out, index, "train"))]  # fmt: skip
    assert figures[0] == figures[1]
    assert figures[0]["segm"]["AP"] == 1


@pytest.mark.parametrize("masks", ["none", "some"])
def test_objects_without_a_mask_are_ignored_by_mask_ap_from_shards_too(coco, masks: str):
    number = coco.image()
    for i in range(4):
        box = [5 + 12 * i, 10, 10, 20]
        x, y, w, h = box
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        coco.object(number, bbox=box, segmentation=[] if i % 2 or masks == "none" else polygon)
    index, out = coco.shard()
    truth = ground_truth_from_shards(out, index, "train")
    found = []
    for entry in coco.annotations:
        x, y, w, h = entry["bbox"]
        rle: Any = coco_mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], 50, 60)[0]
        mask = {"size": [50, 60], "counts": rle["counts"].decode()}
        result = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        found.append({**result, "score": 0.9, "segmentation": mask})
    evaluation = evaluate(truth, found)
    assert evaluation.figures["bbox"]["AP"] == 1
    assert evaluation.figures["segm"]["AP"] == (None if masks == "none" else 1)
    assert evaluation.unmasked == (4 if masks == "none" else 2)
