import json

import numpy as np
import pytest
import tyro

from casc.bench.detections import made_up_detections
from casc.bench.evaluation import EvaluationCommand, EvaluationReport
from casc.errors import UserError

SMALL = ["--images", "3", "--detections", "6", "--size", "60", "80"]


def bench(*arguments: str) -> int:
    return tyro.cli(EvaluationCommand, args=[*SMALL, *arguments]).run()


def test_one_json_object_with_every_figure(capsys: pytest.CaptureFixture[str]):
    assert bench("--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == set(EvaluationReport._fields)
    assert figures["masks_differing"] == 0
    assert figures["processes_img_per_s"] is None
    assert figures["size"] == [60, 80]
    assert 0 < figures["pycocotools_share"] < 1
    assert figures["encode_ratio_low"] <= figures["encode_ratio"] <= figures["encode_ratio_high"]
    parts = ("encode_ms", "results_ms", "match_box_ms", "match_mask_ms")
    assert figures["core_share_at_1_img_per_s"] == pytest.approx(
        sum(figures[part] for part in parts) / 1000
    )


def test_a_line_per_figure(capsys: pytest.CaptureFixture[str]):
    assert bench() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EvaluationReport._fields)


@pytest.mark.parametrize("wrong", [["--images", "0"], ["--size", "0", "5"], ["--processes", "-1"]])
def test_nonsense_is_refused(wrong: list[str]):
    with pytest.raises(UserError, match=wrong[0]):
        bench(*wrong)


def test_the_load_is_like_cocos():
    truth, found = made_up_detections(100, 100, (480, 640), 0)
    boxes = np.concatenate([each.boxes for each in found])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 0).all()
    areas = np.array([a["area"] for each in truth.annotations.values() for a in each])
    # COCO: 41 % small, 34 % medium, 24 % large; trained detections are like that too.
    assert 0.25 < (areas < 32**2).mean() < 0.5
    assert 0.15 < (areas > 96**2).mean() < 0.35
    masks = np.concatenate([each.masks for each in found[:5]])
    assert ((masks > 0) & (masks < 1)).all()
    assert 0.3 < (masks >= 0.5).mean() < 0.9
    again = made_up_detections(2, 100, (480, 640), 0)[1]
    assert (again[0].masks == found[0].masks).all()
