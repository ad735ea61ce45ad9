import json
import shlex
import subprocess
import sys

import pytest
import torch

from casc.bench import flops, worker
from casc.bench.against import Timed, ratio, run_command
from casc.bench.batch import Load, made_up_batch
from casc.bench.peers import images_of, targets_of
from casc.cli.bench import as_table, with_default
from casc.cli.main import main
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig

PROMISED = {
    *("img_per_s", "step_s", "mfu", "flops", "peak_flops", "graphs", "graph_breaks"),
    *("recompiles", "host_reads", "peak_rss_gib", "compile_cold_s", "compile_warm_s"),
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "casc", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report():
    peer = "import json; print('hello'); print(json.dumps({'img_per_s': 2.0}))"
    done = bench(
        *("--json", "--no-compile", "--canvas", "64", "64", "--objects", "1", "--steps", "1"),
        *("--dtype", "fp32", "--positives", "5"),
        *("--against", "torchvision", f"{sys.executable} -c {shlex.quote(peer)}"),
    )
    assert done.returncode == 0, done.stderr
    # One object and nothing else, whatever libraries print.
    return json.loads(done.stdout)


def test_the_report_of_a_training_step(report):
    eager = {"compile_cold_s", "compile_warm_s"}
    assert PROMISED - eager <= set(report)
    assert report["what"] == "train"
    assert report["canvas"] == [64, 64]
    assert report["img_per_s"] == pytest.approx(2 / report["step_s"])
    assert min(report["forward_s"], report["backward_s"]) > 0
    assert report["mfu"] == pytest.approx(
        report["flops"] / report["step_s"] / report["peak_flops"], rel=1e-6
    )
    assert report["graphs"] == report["graph_breaks"] == report["recompiles"] == 0
    assert report["host_reads"] == 1
    assert 0.3 < report["peak_rss_gib"] < 8
    # The count that was asked for is what every stage had, or a few more.
    assert all(5 <= positives < 12 for positives in report["positives"])


def test_peers_stand_beside_it(report):
    theirs = report["against"]["torchvision float32"]
    faster = theirs["times_faster"]
    assert faster["low"] <= faster["median"] <= faster["high"]
    assert theirs["peak_rss_gib"] > 0.3
    (command,) = (v for k, v in report["against"].items() if "torchvision" not in k)
    assert command["img_per_s"] == 2.0
    assert command["times_faster"]["median"] == pytest.approx(report["img_per_s"] / 2.0)


def test_the_report_reads_well(report):
    # A command may have any sign in it.
    table = as_table(report | {"against": {}})
    assert "img_per_s" in table
    assert table.startswith("what ")
    assert not any(sign in table for sign in "{}[]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--canvas", "65", "64"], "multiples of 32"),
        (["--batch", "0"], "--batch"),
        (["--objects", "3", "--capacity", "2"], "--capacity 2: must be at least 3"),
        (["--objects", "0", "--capacity", "0"], "--capacity 0: must be at least 1"),
        (["--positives", "9", "--capacity", "8"], "--capacity 8: must be at least 9"),
        (["--positives", "-4"], "--positives -4: must be at least 0"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--profile", "trace.txt"], "--profile trace.txt"),
        (["--against", "no-such-program"], "no-such-program"),
    ],
)
def test_what_cant_be_measured_is_said_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", *arguments])
    assert end.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_worker_traces_its_own_steps(tmp_path):
    class Product:
        def step(self):
            return {"step_s": float(torch.ones(3, 4).mm(torch.ones(4, 5)).sum())}

        def facts(self):
            return {}

    worker.trace(Product(), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events].count("aten::mm") == 3


@pytest.mark.parametrize(
    "script", ["raise SystemExit(3)", "print('no json')", "print('{}')", "pass"]
)
def test_a_peer_that_gives_no_figure_is_refused(script):
    with pytest.raises(UserError, match="--against"):
        run_command(f"{sys.executable} -c {shlex.quote(script)}")


def test_ratios_are_taken_round_by_round():
    ours = Timed({}, [{"step_s": 1.0}, {"step_s": 10.0}, {"step_s": 1.0}])
    theirs = Timed({}, [{"step_s": 3.0}, {"step_s": 20.0}, {"step_s": 4.0}])
    assert ratio(ours, theirs) == (3.0, 2.0, 4.0)


def test_training_is_what_is_timed_by_default():
    assert with_default(["bench"]) == ["bench", "train"]
    assert with_default(["bench", "--json"]) == ["bench", "train", "--json"]
    assert with_default(["bench", "loader"]) == ["bench", "loader"]
    assert with_default(["bench", "--help"]) == ["bench", "--help"]
    assert with_default(["eval", "a", "b"]) == ["eval", "a", "b"]


def test_operations_are_those_that_detectron2_counts():
    """2.09 and 0.93 T: Detectron2's Cascade Mask R-CNN, R50-FPN, two images, 8 objects each.

    Its images weren't padded, ours are.
    """
    config = DetectorConfig()
    large, small = (
        flops.reference_step(config, Load(canvas), [18, 16, 16])
        for canvas in ((800, 1088), (512, 512))
    )
    assert large == pytest.approx(2.09e12, rel=0.08)
    assert small == pytest.approx(0.93e12, rel=0.08)
    own = flops.own_step(config, Load((512, 512)), [18, 16, 16])
    # The RPN's dense backward pass is what is saved, padded masks what is added.
    assert 0.8 < own / small < 1


def test_a_made_up_batch_is_what_its_load_says():
    load = Load((96, 128), batch=3, objects=4, positives=30, capacity=40)
    batch = made_up_batch(load, 80)
    assert batch.image.shape == (3, 96, 128, 3)
    assert (batch.valid.sum(dim=1) == 30).all()
    boxes = batch.boxes[batch.valid]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([128, 96, 128, 96])).all()
    # Repetitions lie on the object that they repeat.
    assert ((batch.boxes[:, 4:8] - batch.boxes[:, :4]).abs() <= 1).all()
    with pytest.raises(UserError, match="capacity"):
        made_up_batch(Load(objects=3, capacity=2), 80)


def test_a_peer_gets_the_same_objects():
    batch = made_up_batch(Load((96, 128), objects=3), 80)
    images, targets = images_of(batch), targets_of(batch)
    assert [tuple(i.shape) for i in images] == [(3, 96, 128)] * 2
    for i, target in enumerate(targets):
        assert torch.equal(target["boxes"], batch.boxes[i])
        assert torch.equal(target["labels"], batch.labels[i] + 1)
        widths, heights = (batch.boxes[i, :, 2:] - batch.boxes[i, :, :2]).unbind(-1)
        area = target["masks"].sum(dim=(1, 2))
        torch.testing.assert_close(area.float(), widths * heights, rtol=0.15, atol=20)
