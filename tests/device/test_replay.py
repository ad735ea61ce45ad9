"""What decides whether steps are replayed. That replayed ones are right is shown in tests/npu."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from casc.device import devices, replay
from casc.device.compute import Compute
from casc.device.devices import graph_class, make_deterministic
from casc.device.replay import choose_replay
from casc.errors import UserError
from casc.model.detector_config import DetectorConfig
from casc.model.steps import reads_back

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def card_that_records(monkeypatch):
    """There is none here."""
    monkeypatch.setattr(replay, "refused", lambda device: None)


def test_a_card_that_refuses_is_told_apart(monkeypatch):
    """A first-series NPU, say: what it answers is only known by asking."""

    class Graph:
        def __init__(self, pool):
            pass

        def __enter__(self):
            raise RuntimeError("not supported on this SoC\n[ERROR] second line")

        def __exit__(self, *_):
            pass

    monkeypatch.undo()
    monkeypatch.setattr(replay, "graph_class", lambda device: Graph)
    monkeypatch.setattr(replay, "is_accelerator", lambda device: True)
    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: _NoStream(device))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    found = choose_replay("auto", CPU, None)
    assert not found.replay
    assert found.note.endswith("cpu refused to record an addition (not supported on this SoC)")
    with pytest.raises(UserError, match="--replay on: cpu refused"):
        choose_replay("on", CPU, None)


class _NoStream:
    """Of a CPU, which has none."""

    def __init__(self, device):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_a_cpu_replays_nothing_and_says_so():
    assert choose_replay("auto", CPU, None) == (
        False,
        "steps are launched one by one: a CPU launches nothing",
    )
    assert not choose_replay("off", CPU, None).replay
    with pytest.raises(UserError, match=r"^--replay on: a CPU launches nothing; use --replay auto"):
        choose_replay("on", CPU, None)


def test_an_accelerator_does_unless_something_reads():
    assert choose_replay("auto", CUDA, None).replay
    assert choose_replay("on", CUDA, None).replay
    assert not choose_replay("off", CUDA, None).replay
    reads = reads_back(DetectorConfig(), Compute(mask_capacity="counted"), CUDA)
    assert reads is not None
    found = choose_replay("auto", CUDA, reads)
    assert not found.replay
    assert "--model.mask-head.capacity full" in found.note
    with pytest.raises(UserError, match="--replay on: mask heads run on a counted number"):
        choose_replay("on", CUDA, reads)
    assert reads_back(DetectorConfig(), Compute(mask_capacity="full"), CUDA) is None


def test_the_queue_mode_that_forbids_it_is_named(monkeypatch):
    row = devices.TRAITS["npu"]
    for mode, allowed in (("0", True), ("1", True), ("2", False)):
        monkeypatch.setenv("TASK_QUEUE_ENABLE", mode)
        missing = row.replay_missing()
        assert (missing is None) == allowed
        assert allowed or "set it to 1" in str(missing)
    monkeypatch.delenv("TASK_QUEUE_ENABLE")
    assert row.replay_missing() is None


def test_a_torch_without_graphs_says_so(monkeypatch):
    monkeypatch.setattr(replay, "graph_class", lambda device: None)
    assert "records no graphs of cuda" in choose_replay("auto", CUDA, None).note


def test_gpus_have_a_class_of_their_own(monkeypatch):
    """torch.accelerator.Graph of torch 2.14 says "Graph is not supported on device type: cuda"."""
    if hasattr(torch.accelerator, "Graph"):
        assert graph_class(CUDA) is not torch.accelerator.Graph
        other: Any = SimpleNamespace(type="npu")
        assert graph_class(other) is torch.accelerator.Graph
    begun, ended = [], []

    class Recorder:
        def capture_begin(self, **how):
            begun.append(how)

        def capture_end(self):
            ended.append(True)
            raise RuntimeError("the recording is spoilt")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    with pytest.raises(RuntimeError, match="it reads"), graph_class(CUDA)(pool=(0, 1)):
        raise RuntimeError("it reads")
    with pytest.raises(RuntimeError, match="spoilt"), graph_class(CUDA)():
        pass
    # Loaders pin batches meanwhile, in threads that a global recording would fail in.
    assert begun[0] == {"pool": (0, 1), "capture_error_mode": "thread_local"}
    assert len(ended) == 2


def test_an_older_torch_has_cudas_own(monkeypatch):
    monkeypatch.delattr(torch.accelerator, "Graph", raising=False)
    assert graph_class(CUDA) is not None
    assert graph_class(CPU) is None


def test_float32_is_float32_and_shapes_are_tuned(monkeypatch):
    backends = torch.backends
    monkeypatch.setattr(backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(backends.cudnn, "benchmark", False)
    backends.cuda.matmul.allow_tf32 = True
    devices.TRAITS["cuda"].ready()
    assert backends.cudnn.benchmark
    assert not backends.cudnn.allow_tf32
    assert not backends.cuda.matmul.allow_tf32
    try:
        make_deterministic(CPU)
        assert not backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
