from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_mask

from casc.errors import UserError
from casc.evaluate.coco_results import (
    Results,
    coco_results,
    collect_results,
    found_in,
    read_results,
    write_results,
)
from casc.model.forward_detect import Detections

IDS = [3, 17, 90]


def batch(image_ids: list[int], seed: int = 0, slots: int = 6):
    generator = torch.Generator().manual_seed(seed)
    count = len(image_ids)
    corner = torch.rand(count, slots, 2, generator=generator) * 30
    size = torch.rand(count, slots, 2, generator=generator) * 20 + 2
    found = Detections(
        boxes=torch.cat([corner, corner + size], dim=2),
        scores=torch.rand(count, slots, generator=generator),
        labels=torch.randint(0, 3, (count, slots), generator=generator),
        valid=torch.rand(count, slots, generator=generator) < 0.7,
        masks=torch.rand(count, slots, 28, 28, generator=generator),
    )
    sizes = torch.tensor([[40.0 + i, 50.0 + i] for i in range(count)])
    return found, torch.tensor(image_ids), sizes


def test_valid_rows_become_coco_results():
    found, ids, sizes = batch([5, -1, 8])
    results = collect_results([(found, ids, sizes)], IDS)
    assert results.image_ids == [5, 8]
    assert len(results.detections) == int(found.valid[0].sum() + found.valid[2].sum())
    rows = [(r, i) for r in (0, 2) for i in range(6) if found.valid[r, i]]
    for result, (row, i) in zip(results.detections, rows, strict=True):
        x0, y0, x1, y1 = found.boxes[row, i].tolist()
        assert result["image_id"] == ids[row]
        assert result["category_id"] == IDS[int(found.labels[row, i])]
        assert result["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert result["score"] == found.scores[row, i].item()
        assert result["segmentation"]["size"] == sizes[row].tolist()
        x, y, w, h = coco_mask.toBbox(result["segmentation"])
        assert x >= int(x0) - 1
        assert y >= int(y0) - 1
        assert x + w <= x1 + 1
        assert y + h <= y1 + 1


def test_scores_of_masks_go_along():
    found, ids, sizes = batch([5, -1, 8])
    own = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    results = collect_results([(found._replace(mask_scores=own), ids, sizes)], IDS).detections
    right = [own[row, i].item() for row in (0, 2) for i in range(6) if found.valid[row, i]]
    assert [r.pop("mask_score") for r in results] == right
    assert results == collect_results([(found, ids, sizes)], IDS).detections
    with pytest.raises(UserError, match="image 5: detection 0: its mask's score is not finite"):
        collect_results([(found._replace(mask_scores=own / 0 - own / 0), ids, sizes)], IDS)


def test_threads_dont_change_the_results():
    batches = [batch([2 * i, 2 * i + 1], seed=i) for i in range(40)]
    alone = collect_results(batches, IDS, threads=0)
    assert collect_results(batches, IDS, threads=1) == alone
    assert collect_results(batches, IDS, threads=3) == alone


def test_an_image_that_occurs_twice_counts_once():
    first, second = batch([5, 6], seed=1), batch([6, 7], seed=2)
    results = collect_results([first, second], IDS)
    assert results.image_ids == [5, 6, 7]
    of_first = collect_results([first], IDS).detections
    assert [r for r in results.detections if r["image_id"] < 7] == of_first


def test_nothing_found_is_remembered():
    found, ids, sizes = batch([5])
    found.valid[:] = False
    assert collect_results([(found, ids, sizes)], IDS) == Results([], [5])


def test_boxes_alone_need_no_masks():
    found, _, _ = batch([5])
    results = coco_results(
        found.boxes[0],
        found.scores[0],
        found.labels[0],
        None,
        image_id=5,
        height=40,
        width=50,
        category_ids=IDS,
    )
    assert len(results) == 6
    assert all("segmentation" not in r for r in results)


@pytest.mark.parametrize("threads", [0, 1])
def test_diverged_parameters_are_named(threads: int):
    found, ids, sizes = batch([5])
    found.valid[:] = True
    found.scores[0, 2] = float("nan")
    with pytest.raises(UserError, match=r"image 5: detection 2 .*diverged"):
        collect_results([(found, ids, sizes)], IDS, threads=threads)
    found.valid[0, 2] = False  # padding may hold anything
    collect_results([(found, ids, sizes)], IDS, threads=threads)


def test_labels_without_a_category_are_refused():
    found, ids, sizes = batch([5])
    found.valid[:] = True
    found.labels[0, 0] = 3
    with pytest.raises(UserError, match="label 3, but there are 3 categories"):
        collect_results([(found, ids, sizes)], IDS)


def test_results_files(tmp_path: Path):
    results = collect_results([batch([5, 6])], IDS).detections
    write_results(results, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results
    for text in ("{}", "[1]", "nonsense", ""):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(UserError, match=r"r\.json"):
            read_results(tmp_path / "r.json")
    with pytest.raises(UserError, match="not found"):
        read_results(tmp_path / "none.json")


def test_a_batch_is_read_when_the_next_is_under_way(monkeypatch: pytest.MonkeyPatch):
    # As on an accelerator: batches are launched, and their copies are there some time later.
    happened: list[str] = []

    class Copied:
        def __init__(self, name: str):
            self.name = name

        def synchronize(self):
            happened.append(f"wait {self.name}")

    batches = {name: batch([2 * i, 2 * i + 1], seed=i) for i, name in enumerate("abc")}

    def start_copy(found: Detections):
        name = next(n for n, (other, _, _) in batches.items() if other.boxes is found.boxes)
        return found, Copied(name)

    def outputs():
        for name, each in batches.items():
            happened.append(f"launch {name}")
            yield each

    monkeypatch.setattr("casc.evaluate.coco_results._start_copy", start_copy)
    ids = [found.image_id for found in found_in(outputs())]
    assert ids == [0, 1, 2, 3, 4, 5]
    assert happened == ["launch a", "launch b", "wait a", "launch c", "wait b", "wait c"]
