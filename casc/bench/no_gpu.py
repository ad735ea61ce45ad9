# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateUsage=false
"""Lower a program for a card that isn't there: nothing is ever launched.

Inductor writes Triton code from shapes and from what it knows about the card. Here it is told
instead of asking a driver. It changes torch for the whole process, so it runs in one of its own.

Autograd's engine wants a driver for tensors on `cuda`. So Dynamo, which chooses the branches of
our code, sees CUDA tensors; autograd then sees the same graph with CPU tensors; and Inductor gets
what comes out of that for CUDA again.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch._inductor.codecache
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config
import torch._inductor.graph as inductor_graph
import torch._inductor.scheduler as inductor_scheduler
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codegen.simd import SIMDScheduling
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from casc.bench.cards import Card

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Lowered(types.SimpleNamespace):
    """One graph: `backward`, `graph` (ATen), `launches` (of `Launch`), `code`."""


class Launch(NamedTuple):
    """What is launched at once."""

    nodes: list
    """Inductor's, as they were made: several where they are fused."""
    bytes: int
    """Read and written."""


def pretend(card: Card) -> None:
    """Let torch believe that it has this card, as far as lowering goes."""
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = divmod(card.architecture, 10)
    properties = types.SimpleNamespace(
        name=card.name, major=major, minor=minor, multi_processor_count=card.processors,
        total_memory=80 * 2**30, warp_size=32, max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536, max_threads_per_block=1024, gcnArchName="",
        shared_memory_per_block=49152, shared_memory_per_block_optin=card.shared_memory,
        shared_memory_per_multiprocessor=card.shared_memory + 1024, L2_cache_size=40 * 2**20,
        is_integrated=0, is_multi_gpu_board=0, clock_rate=1_000_000, uuid="0", pci_bus_id=0,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_properties": properties, "get_device_capability": (major, minor),
        "get_device_name": card.name, "is_bf16_supported": True, "is_tf32_supported": True,
        "is_initialized": True, "synchronize": None, "exchange_device": 0,
        "maybe_exchange_device": 0, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "_lazy_init": None, "get_raw_stream": 0, "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0, device=CUDA),
    }  # fmt: skip
    for name, answer in answers.items():
        if hasattr(torch.cuda, name):
            setattr(torch.cuda, name, _says(answer))
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(_says(answer)))
        if hasattr(CudaInterface.Worker, name):
            setattr(CudaInterface.Worker, name, staticmethod(_says(answer)))
    torch._C._cuda_getDevice = _says(0)
    torch._C._cuda_setDevice = _says(None)
    torch._C._cuda_getCurrentRawStream = _says(0)
    fake_tensor.FakeTensorMode.avoid_device_init = property(_says(True))
    target = GPUTarget("cuda", card.architecture, 32)
    limits = {
        "max_shared_mem": card.shared_memory, "multiprocessor_count": card.processors,
        "max_num_regs": 65536, "warpSize": 32,
    }  # fmt: skip
    driver = types.SimpleNamespace(
        utils=types.SimpleNamespace(get_device_properties=_says(limits)),
        get_current_target=_says(target), get_current_device=_says(0),
        set_current_device=_says(None), get_current_stream=_says(0),
        get_active_torch_device=_says(CUDA), get_device_interface=_says(torch.cuda),
        get_device_capability=_says((major, minor)), get_benchmarker=_says(None),
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    torch._inductor.config.shape_padding = False  # would time products on the card
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1


def lowering(found: list[Lowered], options: dict[str, Any]) -> Callable:
    """A backend for `torch.compile` that appends each graph, forward and backward, to `found`.

    `options` are inductor's.

    What it makes gives fake tensors like the outputs.
    """
    seen: list[Lowered] = []
    codegen = inductor_scheduler.Scheduler._codegen
    combine = SIMDScheduling.generate_combo_kernel_code

    def schedule(self: Any, nodes: list) -> Any:
        for node in nodes:
            if not isinstance(node, inductor_scheduler.ForeachKernelSchedulerNode):
                seen[-1].launches.append(launch([node]))
        return codegen(self, nodes)

    def combined(self: Any, nodes: list, *args: Any, **settings: Any) -> Any:
        # What is scheduled side by side becomes one kernel or several.
        made = combine(self, nodes, *args, **settings)
        if not settings.get("only_gen_src_code"):
            seen[-1].launches.extend(launch(list(group)) for _, _, group in made)
        return made

    def launch(nodes: list) -> Launch:
        # A node knows its bytes only while its graph is being lowered.
        size = sum(node.get_read_write_buffers_sizes() for node in nodes)
        return Launch([sub for node in nodes for sub in node.get_nodes()], size)

    def load(self: Any, code: Any) -> Any:
        seen[-1].code = code.value
        self.cache_key, self.cache_path, self.cache_linemap = "none", __file__, []
        return types.SimpleNamespace(call=lambda args: None, __file__=__file__, key="none")

    inductor_scheduler.Scheduler._codegen = schedule
    SIMDScheduling.generate_combo_kernel_code = combined
    inductor_graph.GraphLowering._compile_to_module_lines = load

    def inner(graph: fx.GraphModule, inputs: list, **settings: Any) -> Any:
        mode = torch._guards.detect_fake_mode(inputs)
        assert mode is not None
        move(graph, CUDA, mode)
        inputs = [_moved(value, CUDA, mode) for value in inputs]
        backward = bool(settings.get("is_backward"))
        seen.append(Lowered(backward=backward, graph=graph, launches=[], code=""))
        found.append(seen[-1])
        with torch._inductor.config.patch(options):
            return compile_fx.compile_fx_inner(graph, inputs, **settings)

    def backend(graph: fx.GraphModule, inputs: list) -> Callable:
        mode = torch._guards.detect_fake_mode(inputs)
        assert mode is not None
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        made = tree_map(lambda node: node.meta["example_value"], output.args[0])
        move(graph, CPU, mode)
        inputs = [_moved(value, CPU, mode) for value in inputs]
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            compile_fx.compile_fx(graph, inputs, inner_compile=inner)
        return lambda *args: tree_map(lambda leaf: _again(leaf, args), made)

    return backend


def move(graph: fx.GraphModule, device: torch.device, mode: FakeTensorMode) -> None:
    """Let a graph compute on another device: constants, and what is known of each value."""
    for module in graph.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            node.args = _moved(node.args, device, mode)
            node.kwargs = _moved(node.kwargs, device, mode)
            for key in ("val", "example_value"):
                if key in node.meta:
                    node.meta[key] = _moved(node.meta[key], device, mode)
        module.recompile()


def _moved(value: Any, device: torch.device, mode: FakeTensorMode) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return device if leaf.type in ("cpu", "cuda") else leaf
        if isinstance(leaf, Tensor) and leaf.device != device:
            with mode, torch.no_grad():
                made = torch.empty_strided(
                    leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device
                )
            if leaf.requires_grad:
                made.requires_grad_()
            return made
        return leaf

    return fx.node.map_aggregate(value, one)


def _again(leaf: Any, args: tuple) -> Any:
    """A tensor like it, of the mode in which the arguments are: what follows mixes them."""
    mode = torch._guards.detect_fake_mode(args)
    if mode is None or not isinstance(leaf, Tensor):
        return leaf
    with mode, torch.no_grad():
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return made.requires_grad_(leaf.requires_grad)


def _says(answer: Any) -> Callable:
    return lambda *args, **kwargs: answer
