"""torch.compile for the emulated device.

`register` is what Dynamo asks of any device, enough for the backends that generate no code
("eager", "aot_eager"). `register_inductor` lets Inductor emit its C++ for it, in the place of
triton-ascend; it hangs on torch's private interfaces, so only what counts kernels uses it.
"""

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


def register_inductor() -> None:
    """Let Inductor generate C++ for the device, whose memory is the host's."""
    import torch._inductor.config as config
    from torch._inductor.codegen.common import (
        DeviceOpOverrides,
        register_backend_for_device,
        register_device_op_overrides,
    )
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    class Wrapper(PythonWrapperCodegen):
        @staticmethod
        def create(is_subgraph, subgraph_name, parent_wrapper, partition_signatures=None):
            if is_subgraph:
                return PythonWrapperCodegen.create(
                    is_subgraph, subgraph_name, parent_wrapper, partition_signatures
                )
            return Wrapper()

        def _generate_kernel_call_helper(self, name, args, *, device=None, **rest):
            super()._generate_kernel_call_helper(name, args, device=torch.device("cpu"), **rest)

    class Overrides(DeviceOpOverrides):
        def import_get_raw_stream_as(self, name):
            return f"def {name}(_): return 0"

        def set_device(self, index):
            return f"torch.npu.set_device({index})"

        def synchronize(self):
            return "torch.npu.synchronize()"

        def device_guard(self, index):
            return f"torch.npu.device({index})"

    # What torch answers when asked for the backend of a device that it doesn't know.
    config.cuda_backend = "cpp"
    # It asks whether the device is the CPU, not whether C++ is generated.
    config.loop_reindexing_after_fusion = False
    register_device_op_overrides("npu", Overrides())
    register_backend_for_device("npu", CppScheduling, Wrapper, CppWrapperCpu)
