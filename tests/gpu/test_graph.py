"""What is lowered for a card that isn't there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casc.bench.cards import CARDS
from casc.cli.main import main
from casc.device.versions import LOWERS_WITHOUT_A_CARD

LAUNCHES = 450
"""The most that a training step may launch, forward and backward."""
FALLBACKS = {
    # Left to cuDNN and cuBLAS.
    "aten.convolution.default",
    "aten.convolution_backward.default",
    "aten.mm.out",
    "aten.addmm.out",
    "aten.bmm.out",
    # Sorting, for which Inductor has no code.
    "aten.topk.default",
    "aten.sort.stable",
    # Ours: the neighbourhoods of sampled anchors, opaque on purpose.
    "casc.bag.default",
    "casc.bag_backward_onto.default",
    # Places of detections, at inference.
    "aten.scatter_.src",
}
"""All that isn't a Triton kernel."""
STEPS = {
    "training": (2, 225),
    "counted": (4, 235),
    "inference": (1, 140),
    "inference, upright": (1, 140),
}
"""Of the small detector's steps in `lower_steps.py`: graphs, forward and backward (counted mask
heads have one of their own), and the most that they may launch."""
HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lowered(tmp_path_factory) -> dict[str, Path]:
    """What `lower_steps.py` wrote of each step."""
    if torch.version.cuda is None:
        pytest.skip("this torch isn't built for CUDA")
    if not LOWERS_WITHOUT_A_CARD:
        pytest.skip("this torch asks for a driver where it lowers")
    pytest.importorskip("triton", reason="Triton isn't installed")
    folder = tmp_path_factory.mktemp("gpu")
    files = {name: folder / f"{name}.json" for name in STEPS}
    run(*(["lower_steps.py", file, name] for name, file in files.items()))
    return files


@pytest.fixture(scope="module")
def reports(lowered) -> dict[str, dict]:
    return {name: json.loads(file.read_text()) for name, file in lowered.items()}


@pytest.fixture(scope="module")
def report(reports) -> dict:
    return reports["training"]


def run(*commands: list) -> None:
    """Run programs of this folder side by side; none may fail."""
    started = [
        subprocess.Popen(
            [sys.executable, HERE / program, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        )
        for program, *arguments in commands
    ]
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said[-6000:]


@pytest.mark.parametrize("name", STEPS)
def test_every_kernel_becomes_machine_code_for_three_generations_of_cards(reports, name):
    found = reports[name]
    total = found["kernels"]["in all"]
    assert found["kernels"] == {"in all": total, "sm_80": total, "sm_90": total, "sm_100": total}
    assert found["named"] == found["matched"] >= total > 20


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_on_the_card_within_its_budget(reports, name):
    graphs, launches = STEPS[name]
    assert reports[name]["graphs"] == graphs
    assert reports[name]["on_host"] == 0
    assert set(reports[name]["fallbacks"]) <= FALLBACKS
    assert launches / 2 < reports[name]["launches"] <= launches


def test_sums_are_those_of_the_parts(report):
    for name in ("launches", "bytes"):
        assert report[name] == sum(report[f"{name}_by_part"].values())
    assert report["bound_ms"] == pytest.approx(sum(report["bound_ms_by_part"].values()))


def test_the_bound_is_no_less_than_memory_and_every_part_is_there(report):
    assert report["bound_ms"] >= report["bytes"] / CARDS["h100"].bytes_per_s * 1e3 * (1 - 1e-9)
    for part in ("resnet", "fpn", "rpn", "matching", "mask_head", "box_head"):
        assert report["launches_by_part"][part] > 0
        assert any(name.startswith(part) for name in report["bytes_by_part"])


def test_a_canvas_that_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "graph", "--canvas", "100", "100"])
    assert "multiples of 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "coco_2x"], "--recipe coco_2x: there is coco_1x, coco_20e"),
        (["--recipe", "coco_lsj", "--canvas", "800", "1088"], "that of coco_lsj is 1024 1024"),
    ],
)
def test_a_recipe_is_one_that_there_is_on_its_own_canvas(flags, message, capsys):
    if torch.version.cuda is None:
        pytest.skip("this torch isn't built for CUDA")
    if not LOWERS_WITHOUT_A_CARD:
        pytest.skip("this torch asks for a driver where it lowers")
    pytest.importorskip("triton", reason="Triton isn't installed")
    with pytest.raises(SystemExit):
        main(["bench", "graph", *flags])
    assert message in capsys.readouterr().err


def test_the_reference_models_training_step_is_within_its_budget(capsys, report):
    """On a small canvas, which is lowered sooner and has about as many launches as a large one."""
    with pytest.raises(SystemExit) as left:
        main(["bench", "graph", "--canvas", "128", "160", "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["graphs"] == 2
    assert found["on_host"] == 0
    assert found["launches"] <= LAUNCHES
    assert set(found["fallbacks"]) <= FALLBACKS
