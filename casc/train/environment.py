"""What a run's figures depend on beside its recipe: versions and machine, for the log."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import casc


def environment(device: torch.device) -> dict[str, str | int]:
    """Versions, the device's name and the number of processors, as the log keeps them."""
    return {
        "casc": casc.__version__,
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": _device_name(device),
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
