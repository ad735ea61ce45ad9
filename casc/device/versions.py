"""What differs between the releases of torch that casc runs on, 2.11 and newer.

- Recompilations counted per call of `torch.compile`. From 2.14: `isolate_recompiles=True`. Before:
  a copy of the function for each call, as Dynamo counts per code object.
- How many graphs such a function may have. From 2.14: `recompile_limit=`. Before: Dynamo's setting
  of this name, while the function is called.
- Graphs of what a device launches. From 2.12: `torch.accelerator.Graph`, for any of them. Before:
  the device module's own (`graph_class` of casc/device/devices.py).
- The time-out of a process group that exists. From 2.14: `dist.set_timeout`. Before:
  `distributed_c10d._set_pg_timeout`.
- `_replace` of a named tuple that a compiled function returns. Before 2.14 Dynamo may fail on it:
  what is compiled makes a new one by its fields.
- A convolution's bias that is a part of a computed vector. Before 2.14 Inductor may fail on it.
- Lowering for a card that isn't there, and Triton's interpreter under `torch.library.triton_op`.
  From 2.14. Before, the one asks for a driver and the other is refused.
- How many kernels Inductor launches as one. From 2.14: `combo_kernel_max_num_nodes`. Before: 8.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
PARTS_AS_BIAS = ISOLATES
"""Whether Inductor takes a part of a computed vector for a convolution's bias."""
LOWERS_WITHOUT_A_CARD = ISOLATES
"""Whether Inductor lowers for a GPU without its driver, which `casc bench graph` does."""
_copies = itertools.count()


def compile_apart(
    function: Callable,
    *,
    backend: str = "inductor",
    dynamic: bool | None = False,
    recompile_limit: int | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """`torch.compile` as one graph, whose recompilations don't count for any other function.

    Args:
        function: a Python function; the same one may be compiled many times, as each canvas's is.
        backend: as of `torch.compile`.
        dynamic: as of `torch.compile`.
        recompile_limit: how many graphs it may have; torch's default if None.
        options: as of `torch.compile`.
    """
    if ISOLATES:
        return torch.compile(  # type: ignore[call-overload]  # its stubs lack the last two
            function,
            backend=backend,
            fullgraph=True,
            dynamic=dynamic,
            isolate_recompiles=True,
            recompile_limit=recompile_limit,
            options=options,
        )
    compiled = torch.compile(
        copied(function), backend=backend, fullgraph=True, dynamic=dynamic, options=options
    )
    if recompile_limit is None:
        return compiled
    return _Limited(compiled, recompile_limit)


def combining_options() -> dict[str, Any]:
    """Inductor's options to launch kernels that don't depend on each other as one, on a GPU."""
    import torch._inductor.config as known  # takes a while

    wanted = {"combo_kernels": True, "combo_kernel_max_num_nodes": 64}
    return {name: value for name, value in wanted.items() if hasattr(known, name)}


class _Limited:
    """A compiled function that is called under a limit of its own."""

    def __init__(self, compiled: Callable, limit: int):
        self.compiled, self.limit = compiled, limit

    def __call__(self, *args):
        with torch._dynamo.config.patch(recompile_limit=self.limit):
            return self.compiled(*args)

    def __getattr__(self, name: str):
        return getattr(self.compiled, name)


def copied(function: Callable) -> Callable:
    """The same function with a code object of its own."""
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__
    made = types.FunctionType(
        code.replace(co_name=f"{code.co_name}_{next(_copies)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)


def set_timeout(timeout: timedelta) -> None:
    """How long the default process group's collectives may take from now on."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout)
