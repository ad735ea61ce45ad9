"""What a process sees of a machine's devices, and what of a step they read."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from casc.device.compute import Compute
from casc.device.devices import choose_device
from casc.errors import UserError
from casc.model import steps
from casc.model.detector_config import DetectorConfig, reference_settings

CUDA: Any = torch.device("cuda")
# torch knows the name only where the package of these devices is.
NPU: Any = SimpleNamespace(type="npu")
FULL = Compute(mask_capacity="full")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it would be used")
@pytest.mark.parametrize(
    ("before", "rank", "after"),
    [
        (None, 3, "3"),
        ("4,5,6,7", 1, "5"),
        ("6", 1, "6"),
        ("2,3", 2, "2,3"),
        ("GPU-a,GPU-b", 0, "GPU-a"),
    ],
)
def test_each_rank_sees_its_own_device(monkeypatch, before, rank, after):
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "1")
    choose_device("auto")
    assert os.environ.get(name) == before
    monkeypatch.setenv("WORLD_SIZE", "8")
    choose_device("cpu")
    assert os.environ.get(name) == before
    monkeypatch.delenv("LOCAL_RANK")  # some schedulers set the other one alone
    choose_device("cpu")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    for _ in range(2):  # the second time there is nothing left to choose
        with pytest.raises(UserError, match="finds no cuda device"):
            choose_device("cuda")
        assert os.environ[name] == after


def test_what_reads():
    config = DetectorConfig()
    mask = replace(config.mask_head, target="bitmap")
    greedy = replace(config, inference=replace(config.inference, nms_kernel="greedy"))
    for device in (CUDA, NPU):
        assert steps.reads_back(config, FULL, device) is None
        assert "--model.mask-head.capacity full" in str(steps.reads_back(config, Compute(), device))
        assert steps.reads_back(config, Compute(), device, training=False) is None
        assert steps.reads_back(greedy, FULL, device) is None
        assert "greedy" in str(steps.reads_back(greedy, FULL, device, training=False))
    reference = reference_settings(config)
    for reading in (reference, replace(config, roi_kernel="native")):
        assert "torchvision's RoIAlign" in str(steps.reads_back(reading, FULL, CUDA))
    assert "bitmaps" in str(steps.reads_back(replace(config, mask_head=mask), FULL, CUDA))
    # torch_npu's runs on all RoIs of all levels instead.
    assert steps.reads_back(reference, FULL, NPU) is None


def test_operators_that_read_are_marked():
    """Inductor's own graphs leave such operators out."""
    unsafe = torch.Tag.cudagraph_unsafe
    casc = torch.ops.casc
    reading = (
        casc.nms, casc.bitmap_coverage, casc.roi_align_adaptive, casc.roi_align_adaptive_backward,
    )  # fmt: skip
    assert all(unsafe in operator.default.tags for operator in reading)
    assert unsafe not in casc.fixed_nms.default.tags
