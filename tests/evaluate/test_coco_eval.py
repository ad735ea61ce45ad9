import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from casc.errors import UserError
from casc.evaluate.coco_eval import EvalShard, join, match
from casc.evaluate.coco_results import ImageDetections, image_results
from casc.evaluate.ground_truth import usable_objects
from casc.evaluate.metrics import Evaluation, accumulate, evaluate
from casc.evaluate.workers import Truth, by_image, evaluate_images

CATEGORIES = {3: "cat", 5: "dog", 9: "nothing"}


def made_up(images: int, seed: int = 0) -> tuple[dict[str, Any], list[ImageDetections]]:
    """Ellipses at random, and detections that are near them or anywhere."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": i * 7 + 1, "width": 120, "height": 90} for i in range(images)],
        "annotations": [],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    every = []
    angle = np.linspace(0, 2 * np.pi, 13)[:-1]
    for image in truth["images"]:
        boxes, labels = [], []
        for _ in range(int(rng.integers(0, 5))):
            side = rng.uniform(8, 70, 2)
            corner = rng.uniform(0, [120, 90] - side)
            label = int(rng.integers(0, 2))
            points = corner + side / 2 * (1 + np.stack([np.cos(angle), np.sin(angle)], axis=1))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": image["id"],
                    "category_id": [3, 5][label],
                    "bbox": [*corner.tolist(), *side.tolist()],
                    "area": float(side.prod()),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": [points.ravel().tolist()],
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                first, second = corner + rng.normal(0, 2, 2), corner + side + rng.normal(0, 2, 2)
                boxes.append([*first.tolist(), *second.tolist()])
                labels.append(label if rng.random() < 0.8 else 1 - label)
        count = len(boxes)
        scores = rng.integers(1, 20, count) / 20  # with ties
        every.append(
            ImageDetections(
                image_id=image["id"],
                height=90,
                width=120,
                boxes=np.array(boxes, np.float32).reshape(-1, 4),
                scores=scores.astype(np.float32),
                labels=np.array(labels, np.int64),
                masks=rng.uniform(0.3, 1, (count, 28, 28)).astype(np.float32),
            )
        )
    return truth, every


def at_once(truth: dict[str, Any], found: list[ImageDetections]) -> Evaluation:
    results = [r for each in found for r in image_results(each, list(CATEGORIES))]
    return evaluate(truth, results)


def ready(truth: Truth) -> Future[Truth]:
    future: Future[Truth] = Future()
    future.set_result(truth)
    return future


def tally_of(truth: dict[str, Any], found: list[ImageDetections]) -> EvalShard:
    images = {i["id"]: i for i in truth["images"] if i["id"] in {f.image_id for f in found}}
    objects, skipped = usable_objects(truth, images, CATEGORIES)
    results = [r for each in found for r in image_results(each, list(CATEGORIES))]
    return match(images, CATEGORIES, objects, results, ["bbox", "segm"], skipped)


@pytest.mark.parametrize("seed", range(6))
def test_parts_in_any_order_give_the_figures_of_the_whole(seed: int):
    truth, found = made_up(23, seed)
    expected = at_once(truth, found)
    assert expected.figures["segm"]["AP"]
    rng = np.random.default_rng(seed)
    shuffled = [found[i] for i in rng.permutation(len(found))]
    cuts = [0, *sorted(rng.integers(0, len(found), 4).tolist()), len(found)]
    parts = [tally_of(truth, shuffled[a:b]) for a, b in pairwise(cuts)]
    joined = join([join(parts[:2]), join(parts[2:])])
    assert accumulate(joined, CATEGORIES) == expected


def test_a_tally_is_small():
    truth, found = made_up(23)
    tally = tally_of(truth, found)
    results = [r for each in found for r in image_results(each, list(CATEGORIES))]
    assert tally.detections == len(results)
    for matches in tally.matches.values():
        assert (matches.scores.nbytes + matches.matched.nbytes + matches.ignored.nbytes) == (
            18 * len(results)
        )
    assert len(pickle.dumps(tally)) < len(pickle.dumps(results)) / 2


def test_images_are_counted_once():
    truth, found = made_up(4)
    with pytest.raises(UserError, match="image 8 was evaluated 2 times"):
        join([tally_of(truth, found[:2]), tally_of(truth, found[1:])])
    with pytest.raises(UserError, match="image 8 was evaluated 2 times"):
        evaluate_images([*found, found[1]], ready(by_image(truth)), processes=0)
    truth["images"].pop()
    with pytest.raises(UserError, match="image 22 is not in the ground truth"):
        evaluate_images(found, ready(by_image(truth)), processes=0)


def test_no_images_and_nothing_found():
    truth, found = made_up(3)
    none = evaluate_images([], ready(by_image(truth)), processes=0)
    assert (none.image_ids, none.detections, none.instances) == ([], 0, Counter())
    blind = [f._replace(boxes=f.boxes[:0], scores=f.scores[:0], labels=f.labels[:0]) for f in found]
    blind = [f._replace(masks=f.masks[:0]) for f in blind]
    tally = evaluate_images(blind, ready(by_image(truth)), processes=0)
    assert accumulate(join([none, tally]), CATEGORIES) == evaluate(truth, [])


def test_processes_give_the_same_figures():
    truth, found = made_up(40)
    expected = at_once(truth, found)
    for processes in (0, 1):
        tally = evaluate_images(iter(found), ready(by_image(truth)), processes=processes)
        assert accumulate(tally, CATEGORIES) == expected


def test_what_goes_wrong_in_a_process_is_told():
    truth, found = made_up(17)
    bad = next(i for i, f in enumerate(found) if len(f.scores))
    found[bad].scores[0] = np.nan
    with pytest.raises(UserError, match=rf"image {found[bad].image_id}: detection 0 .*diverged"):
        evaluate_images(found, ready(by_image(truth)), processes=1)


def test_a_killed_process_is_noticed():
    truth, found = made_up(64)

    def until_killed():
        yield from found[:20]
        while not (children := active_children()):
            time.sleep(0.01)
        for child in children:
            child.kill()
        yield from found[20:]

    with pytest.raises(UserError, match="process that evaluates was killed"):
        evaluate_images(until_killed(), ready(by_image(truth)), processes=1)


ORPHANS = """
import os, time
from casc.evaluate.workers import _workers

if __name__ == "__main__":
    with _workers(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(500):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists():  # dead, though nobody has asked for its status
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                return
        time.sleep(0.02)
    pytest.fail("the worker outlives its parent")
