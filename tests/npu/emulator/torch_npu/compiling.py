"""What Dynamo asks of a device: enough for the backends that generate no code ("aot_eager")."""

# torch names the same parameters otherwise.
# pyright: reportIncompatibleMethodOverride=false
import types
from typing import Any

import torch
from torch._dynamo.device_interface import (
    DeviceInterface,
    caching_worker_current_devices,
    register_interface_for_device,
)

from torch_npu import _C, npu

_PROPERTIES = types.SimpleNamespace(
    name="emulated", type="npu", index=0, major=0, minor=0, multi_processor_count=1,
    max_threads_per_multi_processor=1, warp_size=1, total_memory=1 << 36,
)  # fmt: skip


class _Worker:
    @staticmethod
    def set_device(device):
        caching_worker_current_devices["npu"] = device

    @staticmethod
    def current_device():
        return caching_worker_current_devices.get("npu", _C.current_device())

    @staticmethod
    def get_device_properties(device=None):
        return _PROPERTIES


class _Interface(DeviceInterface):
    Worker = _Worker  # type: ignore[assignment]
    Event, Stream = torch.Event, torch.Stream  # type: ignore[assignment]
    device = staticmethod(npu.device)  # type: ignore[assignment]
    current_device = staticmethod(_C.current_device)
    set_device = staticmethod(npu.set_device)
    device_count = staticmethod(_C.device_count)
    is_available = staticmethod(npu.is_available)
    synchronize = staticmethod(npu.synchronize)
    current_stream = staticmethod(npu.current_stream)

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return _PROPERTIES

    @staticmethod
    def get_raw_stream(device: int) -> int:
        return 0

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True

    @staticmethod
    def is_dtype_supported(dtype: torch.dtype, including_emulation: bool = False) -> bool:
        return True

    @staticmethod
    def get_compute_capability(device: Any = None) -> Any:
        return None

    @staticmethod
    def exchange_device(device: int) -> int:
        before = _C.current_device()
        if device >= 0:
            _C.set_device(device)
        return before

    maybe_exchange_device = exchange_device


def register() -> None:
    """Tell Dynamo of the device."""
    register_interface_for_device("npu", _Interface)
    for i in range(_C.device_count()):
        register_interface_for_device(f"npu:{i}", _Interface)
