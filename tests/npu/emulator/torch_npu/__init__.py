"""A stand-in for torch_npu: a device named npu that computes on the CPU.

With this package's folder on PYTHONPATH `import torch` loads it, as it does the real one. One
process can have but one device of this kind, so tests that need it run in processes of their own.

torch calls its device module by many names; here are those that it or casc needs.
"""

import sys
import types
from typing import Any

import torch
from torch.utils import backend_registration

from torch_npu.building import extension

__version__ = "2.14.0+emulator"

_C = extension()
npu: Any = types.ModuleType("torch_npu.npu")
sys.modules["torch_npu.npu"] = npu


def _index(device=None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _C.current_device() if index is None else index


def _generator(device=None) -> torch.Generator:
    return npu.default_generators[_index(device)]


class _Device:
    """`with torch.npu.device(1):`."""

    def __init__(self, device):
        self.index = _index(device)

    def __enter__(self):
        self.before = _C.current_device()
        _C.set_device(self.index)

    def __exit__(self, *_):
        _C.set_device(self.before)


def _fill_module() -> None:
    accelerator = torch.accelerator
    npu.default_generators = tuple(_C.default_generator(i) for i in range(_C.device_count()))
    npu.compile_mode = {}
    named = {
        "device": _Device,
        "Stream": torch.Stream,
        "Event": torch.Event,
        # Which devices there are.
        "device_count": _C.device_count,
        "is_available": lambda: _C.device_count() > 0,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "current_device": _C.current_device,
        "set_device": lambda device: _C.set_device(_index(device)),
        "get_device_name": lambda device=None: "emulated",
        "synchronize": lambda device=None: accelerator.synchronize(_index(device)),
        "current_stream": lambda device=None: accelerator.current_stream(_index(device)),
        "set_stream": lambda stream: None,
        # What they can do.
        "is_bf16_supported": lambda including_emulation=False: True,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16, torch.float32],
        "set_compile_mode": lambda jit_compile=False: npu.compile_mode.update(
            jit_compile=jit_compile
        ),
        # torch_npu's defaults: off for matrix products, on for convolutions.
        "matmul": types.SimpleNamespace(allow_hf32=False),
        "conv": types.SimpleNamespace(allow_hf32=True),
        # Random numbers.
        "manual_seed": lambda seed: _generator().manual_seed(seed),
        "manual_seed_all": lambda seed: [g.manual_seed(seed) for g in npu.default_generators],
        "initial_seed": lambda: _generator().initial_seed(),
        "get_rng_state": lambda device="npu": _generator(device).get_state(),
        "set_rng_state": lambda state, device="npu": _generator(device).set_state(state),
        "get_rng_state_all": lambda: [g.get_state() for g in npu.default_generators],
        "set_rng_state_all": lambda states: [
            g.set_state(s) for g, s in zip(npu.default_generators, states, strict=True)
        ],
        # Memory.
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: accelerator.memory_allocated(_index(device)),
        "max_memory_allocated": lambda device=None: accelerator.max_memory_allocated(
            _index(device)
        ),
        "reset_peak_memory_stats": lambda device=None: accelerator.reset_peak_memory_stats(
            _index(device)
        ),
    }
    for name, value in named.items():
        setattr(npu, name, value)


def _autoload() -> None:
    """What torch calls on import; importing this package has done it all."""


backend_registration.rename_privateuse1_backend("npu")
_fill_module()
torch._register_device_module("npu", npu)
backend_registration.generate_methods_for_privateuse1_backend(
    for_tensor=True, for_module=True, for_storage=True, for_packed_sequence=True
)

# These need the device.
from torch_npu import compiling, graphs, hccl, operators  # noqa: E402
from torch_npu.operators import npu_roi_align  # noqa: E402,F401

operators.register()
compiling.register()
graphs.register()
if torch.distributed.is_available():
    hccl.register()
