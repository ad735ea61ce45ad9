"""Each of the step's operators beside the straightforward way of doing it."""

import pytest
import torch
from operator_cases import Case, cases, largest, unequal
from operator_inputs import Sizes

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


def differences(case: Case, *, compile: bool = False) -> list[float]:
    """Between ours and the usual way: of results and, where there are leaves, of gradients."""

    def run(way):
        with torch.set_grad_enabled(bool(case.leaves)):
            result = way()
        if not case.leaves:
            return result, ()
        # Any gradient will do that isn't the same everywhere: the result's own values.
        return result.detach(), torch.autograd.grad(result, case.leaves, result.detach().clone())

    ours = torch.compile(case.ours, fullgraph=True, dynamic=False) if compile else case.ours
    (result, gradients), (expected, wanted) = run(ours), run(case.usual)
    found = [case.difference(result, expected)]
    return [*found, case.difference(gradients, wanted)] if case.leaves else found


def agree(case: Case, *, compile: bool = False) -> bool:
    return all(each <= case.tolerance for each in differences(case, compile=compile))  # not NaN


@pytest.mark.parametrize("name", NAMES)
def test_ours_equals_the_usual_way(name):
    assert agree(cases(TINY, torch.float32, CPU)[name]())


@pytest.mark.parametrize("name", ["roi_align_box", "roi_align_mask", "mask_capacity_4"])
def test_ours_equals_the_usual_way_in_bfloat16(name):
    case = cases(TINY, torch.bfloat16, CPU)[name]()
    assert case.leaves
    assert agree(case)


@pytest.mark.parametrize("name", ["roi_align_box", "match_anchors", "nms_classes"])
def test_ours_compiled_equals_the_usual_way(name):
    torch.compiler.reset()
    case = cases(TINY, torch.float32, CPU)[name]()
    assert case.compiles
    assert agree(case, compile=True)


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


def test_what_is_wrong_is_found():
    wrong = Case(lambda: torch.ones(3), lambda: torch.zeros(3), 0.5, unequal)
    assert not agree(wrong)
    assert not agree(wrong._replace(ours=lambda: torch.full((3,), torch.nan), difference=largest))
    x = torch.ones(3, requires_grad=True)
    gradient = Case(lambda: x * 2, lambda: x + x.detach(), 0.1, largest, (x,))
    result, backward = differences(gradient)
    assert result <= 0.1 < backward
