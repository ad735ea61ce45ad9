import json

import pytest
import torch
import tyro

from casc.bench.operator_cases import Case, cases, largest, unequal
from casc.bench.operator_inputs import Sizes
from casc.bench.operators import OperatorsCommand, Row, Times, format_table, measure
from casc.errors import UserError

CPU = torch.device("cpu")
TINY = Sizes(
    canvas=(160, 224),
    objects=4,
    capacity=9,
    edges=30,
    channels=16,
    box_rois=48,
    mask_rois=32,
    proposals=60,
    detections=6,
    image=(48, 64),
)
NAMES = list(cases(TINY, torch.float32, CPU))


@pytest.mark.parametrize("name", NAMES)
def test_ours_equals_the_usual_way(name):
    rows = measure(name, cases(TINY, torch.float32, CPU)[name](), 1, CPU, compile=False)
    assert all(row.equal for row in rows), format_table(rows)


@pytest.mark.parametrize("name", ["roi_align_box", "roi_align_mask", "mask_capacity_4"])
def test_ours_equals_the_usual_way_in_bfloat16(name):
    rows = measure(name, cases(TINY, torch.bfloat16, CPU)[name](), 1, CPU, compile=False)
    assert [row.part for row in rows] == ["forward", "backward"]
    assert all(row.equal for row in rows), format_table(rows)


@pytest.mark.parametrize("name", ["roi_align_box", "match_anchors", "nms_classes"])
def test_ours_compiled_equals_the_usual_way(name):
    torch.compiler.reset()
    rows = measure(name, cases(TINY, torch.float32, CPU)[name](), 1, CPU, compile=True)
    assert all(row.compiled is not None for row in rows)
    assert all(row.equal for row in rows), format_table(rows)


def test_no_comparison_is_empty():
    """Each case has something to find: objects, survivors, positives, pixels."""
    made = {name: make() for name, make in cases(TINY, torch.float32, CPU).items()}
    assert made["mask_targets"].usual().float().mean() > 0.2
    boxes, _, labels, valid = made["nms_classes"].usual()
    assert 5 < valid.sum() < valid.numel()
    assert labels[valid].unique().numel() > 5
    assert (boxes[~valid] == 0).all()
    _, kept = made["nms_proposals"].usual()
    assert kept.sum() > 20
    for name in ("match_anchors", "match_rois"):
        gt, negative = made[name].usual()
        assert (gt >= 0).sum() >= 2 * TINY.objects
        assert 0 < negative.sum() < (gt < 0).sum() + 1
    positives, negatives = made["sample_anchors"].usual()
    assert (positives + negatives > 0).all()
    assert made["paste"].usual().any(dim=(1, 2)).all()


def test_differences_are_measured():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert largest(a, b) == pytest.approx(0.2)
    assert largest((a, a), (a, b)) == pytest.approx(0.2)
    assert unequal(a, b) == 0.5
    assert unequal((a, a), (a, b)) == 0.25


def test_a_result_out_of_tolerance_fails():
    wrong = Case(lambda: torch.ones(3), lambda: torch.zeros(3), 0.5, unequal)
    (row,) = measure("wrong", wrong, 1, CPU, compile=False)
    assert not row.equal
    assert "1 EXCEEDS 0.5" in format_table([row])
    nan = wrong._replace(ours=lambda: torch.full((3,), torch.nan), difference=largest)
    (row,) = measure("nan", nan, 1, CPU, compile=False)
    assert not row.equal


def test_a_wrong_gradient_fails():
    x = torch.ones(3, requires_grad=True)
    wrong = Case(lambda: x * 2, lambda: x + x.detach(), 0.1, largest, (x,))
    forward, backward = measure("wrong", wrong, 2, CPU, compile=False)
    assert forward.equal
    assert not backward.equal
    assert backward.eager.low <= backward.eager.median <= backward.eager.high


def test_speed_up_counts_the_way_that_the_product_runs():
    one, two, six = (Times(t, t, t) for t in (1.0, 2.0, 6.0))
    assert Row("x", "forward", one, two, six, 0.0, 0.0, 3.0).speedup == 6
    assert Row("x", "forward", None, two, six, 0.0, 0.0, None).speedup == 3


def command(*arguments: str) -> OperatorsCommand:
    return tyro.cli(OperatorsCommand, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def test_the_command_prints_one_json_object(capsys):
    chosen = command("--only", "encode", "match_rois", "--repeat", "2", "--json", "--device", "cpu")
    assert command("--no-compile").compile is False
    assert (
        OperatorsCommand(chosen.only, repeat=2, json=True, compile=False, device="cpu").run() == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "float32"
    assert [o["name"] for o in report["operators"]] == ["encode", "match_rois"]
    first = report["operators"][0]
    assert first["compiled_ms"] is None
    assert first["equal"]
    assert set(first["eager_ms"]) == {"median", "low", "high"}


def test_the_command_prints_a_table(capsys):
    assert OperatorsCommand(("encode",), repeat=1, device="cpu").run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device cpu")
    assert lines[1].split()[:2] == ["operator", "pass"]
    assert lines[2].startswith("encode")


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(UserError, match=r"--only nothing: expected some of roi_align_box"):
        OperatorsCommand(("nothing",)).run()
    with pytest.raises(UserError, match="--repeat"):
        OperatorsCommand(repeat=0).run()
