"""That the emulated NPU refuses and counts what it is there to refuse and count."""

import json

import pytest


@pytest.fixture(scope="module")
def found(emulator, run_ranks, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("npu") / "device.json"
    run_ranks("device.py", path, environment=emulator)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two NPUs", "two devices, npu:0 and npu:1"),
        ("an NPU and the CPU", "two devices, npu:0 and cpu"),
        ("channels_last", "Only contiguous_format or preserve_format is supported"),
        ("an operator without kernel", "falling back to the CPU is disabled"),
        ("RoIAlign in bfloat16", "float32 or float16"),
        ("cross entropy, compiled", "npu_binary_cross_entropy_with_logits_backward"),
        ("SGD without momentum", "momentum must be positive"),
    ],
)
def test_it_refuses(found, what, message):
    assert message in found["refused"][what]


def test_it_counts_each_read_once(found):
    assert found["reads"] == {"item": 1, "tolist": 1, "cpu": 1, "nonzero": 1, "mask": 1, "sum": 0}


def test_it_tells_copies_apart(found):
    assert found["copies"] == ["copy from pinned memory", "copy that waits"]


def test_it_does_on_the_host_what_torch_npu_does(found):
    """Measured with the real package over stub libraries; `by_operator.py` compares the two."""
    assert found["fused SGD"] == ["found_inf of aten::_fused_sgd_"]
    assert found["shifts"] == ["scalar argument of aten::__rshift__.Scalar"]
    assert found["cross entropy"] < 1e-6


def test_it_knows_launches_from_views(found):
    assert found["launches"] == {"aten::mul.Tensor": 1}


def test_it_computes_what_the_cpu_does(found):
    assert found["roi_align"] == 0
    assert found["gradient"] == 0
    assert found["random"] is True
