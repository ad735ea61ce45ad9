"""What is lowered for a card that isn't there."""

import json
import subprocess
import sys

import pytest
import torch

from casc.bench.cards import CARDS
from casc.cli.main import main

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
}
"""All that isn't a Triton kernel."""
# A small detector, so that lowering takes seconds rather than minutes.
PROGRAM = """
import json
import torch
from casc.bench import graph
from casc.model.box_head import BoxHeadConfig
from casc.model.detector import DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.model.detector import STAGES

config = DetectorConfig(
    classes=3,
    backbone=ResNetConfig(depth=18, width=16),
    fpn=FPNConfig(channels=32),
    rpn=RPNConfig(channels=32, train_pre_nms=50, train_proposals=50),
    stages=STAGES[:1],
    box_head=BoxHeadConfig(channels=32, samples=16),
    mask_head=MaskHeadConfig(channels=32, convs=1),
)
print(json.dumps(graph.report(graph.GraphJob("train", (64, 64), 2, 2, "h100"), config)))
"""


@pytest.fixture(scope="module")
def report() -> dict:
    if torch.version.cuda is None:
        pytest.skip("this torch isn't built for CUDA")
    pytest.importorskip("triton", reason="Triton isn't installed")
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_is_one_graph_each_way_and_stays_on_the_card(report):
    assert report["graphs"] == 2
    assert report["on_host"] == 0


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


@pytest.mark.slow
def test_the_reference_models_training_step_is_within_its_budget(capsys, report):
    """On a small canvas, which is lowered sooner and has about as many launches as a large one."""
    with pytest.raises(SystemExit) as left:
        main(["bench", "graph", "--canvas", "128", "160", "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["graphs"] == 2
    assert found["on_host"] == 0
    assert found["launches"] <= LAUNCHES
    assert set(found["fallbacks"]) == FALLBACKS
