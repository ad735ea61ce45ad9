"""What each kind of device wants: precision, layout, compiler, communication. One table.

The rest of the code asks this table, and never names an accelerator nor the package that
brings it.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from casc.errors import UserError

CompileBackend = Literal["auto", "dvm", "inductor", "aot_eager"]


class Setting(NamedTuple):
    """An environment variable that a device's software reads."""

    name: str
    value: str
    """What suits casc."""
    why: str
    deterministic: bool = False
    """Whether --deterministic can't do without."""


class Compiler(NamedTuple):
    """What can compile a step for a device."""

    name: CompileBackend
    """The recipe's name for it."""
    backend: str
    """torch.compile's."""
    fix: str
    """What may help where it doesn't work."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables by which the device's package is told to load it, before anything is compiled."""
    kept: bool = False
    """Whether compiled programs can outlast the process."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """How to run on one kind of device."""

    dtype: torch.dtype = torch.bfloat16
    """Of convolutions and matrix products; boxes, losses and targets stay float32. Where the
    chip lacks bfloat16 `choose_dtype` takes float16, whose loss scale is in the state."""
    memory_format: torch.memory_format
    """Of images and convolution weights."""
    compilers: tuple[Compiler, ...]
    """What can compile a step, in the order in which they are tried."""
    triton_kernels: tuple[str, ...] = ()
    """Triton's backends of which casc's own kernels need one. They are used if they prove right;
    else, and where this is empty, plain ATen."""
    backend: str
    """torch.distributed's: for objects on the host, and for tensors on the device."""
    pin_memory: bool
    """Whether batches are copied to the device from pinned memory."""
    copy_stream: bool = False
    """Whether they are copied in a stream of their own, beside the step that is running. Not
    yet tried on any accelerator, so off: the copy then lies between two steps."""
    dynamic_shapes: bool
    """Whether one compiled graph may serve any number of RoIs; otherwise one per capacity."""
    roi_align: str
    """The package whose RoIAlign kernels run here."""
    native_roi_align: bool = False
    """Whether they are used for the fixed grid too, if they prove right; else plain ATen."""
    select_rois: bool
    """Whether a level's RoIs are picked out for such a kernel, which reads their number."""
    reads_wait_for_nothing: bool = False
    """Whether the host may read a tensor inside an operator without waiting for a device."""
    sorts_taps: bool
    """Whether the gradient of bags is summed from sorted taps; else one tap after the other."""
    replay_missing: Callable[[], str | None] = lambda: None
    """Why steps can't be replayed here as things are, in a few words; None if they can."""
    ready: Callable[[], None] = lambda: None
    """What to switch on once per process."""
    visible: str = ""
    """Variable that says which devices a program sees, where it is read at the first use of one,
    not when torch is imported."""
    toolkits: tuple[str, ...] = ()
    """Variables that say where the device's software is."""
    environment: tuple[Setting, ...] = ()
    """What may be set before the program starts; `casc doctor` shows what is."""
    unsupported: tuple[str, ...] = ()
    """What can't be had here, for people."""


_AOT_EAGER = Compiler("aot_eager", "aot_eager", "train with --no-compile")


def is_accelerator(device: torch.device) -> bool:
    """Whether the host launches what the device does, which wants few and large launches."""
    return device.type != "cpu"


def _replay_missing_npu() -> str | None:
    mode = os.environ.get("TASK_QUEUE_ENABLE", "1")
    return None if mode in ("0", "1") else f"TASK_QUEUE_ENABLE={mode} forbids it; set it to 1"


def _ready_cuda() -> None:
    # Shapes are fixed, so trying cuDNN's algorithms once pays; and float32 means float32: torch
    # would let convolutions alone round to TF32. bfloat16 is what is for speed.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _ready_npu() -> None:
    # Else operators are compiled for each new shape, while the step waits.
    torch.get_device_module("npu").set_compile_mode(jit_compile=False)


class _CudaGraph:
    """What `torch.accelerator.Graph` is for other devices; of CUDA's it says "not supported"."""

    def __init__(self, *, pool: tuple[int, int] | None = None):
        self.graph, self.given = torch.cuda.CUDAGraph(), pool

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # What other threads do meanwhile, such as pinning batches, must not spoil it.
        self.graph.capture_begin(
            pool=self.given,  # type: ignore[arg-type]
            capture_error_mode="thread_local",
        )

    def __exit__(self, kind: object, *_: object) -> None:
        # An error inside says more than the one that the recording is spoilt.
        with suppress(RuntimeError) if kind else nullcontext():
            self.graph.capture_end()

    def replay(self) -> None:
        self.graph.replay()

    def pool(self) -> tuple[int, int]:
        return self.graph.pool()


def graph_class(device: torch.device) -> Any:
    """What records a device's launches: `with GRAPH(pool=...)`, then `replay()`; None without."""
    return _CudaGraph if device.type == "cuda" else getattr(torch.accelerator, "Graph", None)


TRAITS = {
    "cpu": Traits(
        memory_format=torch.channels_last,
        compilers=(
            Compiler(
                "inductor", "inductor", "install a C++ compiler (apt-get install g++)", kept=True
            ),
            _AOT_EAGER,
        ),
        backend="gloo",
        pin_memory=False,
        dynamic_shapes=True,
        roi_align="torchvision",
        select_rois=True,
        reads_wait_for_nothing=True,
        sorts_taps=True,
    ),
    "cuda": Traits(
        memory_format=torch.channels_last,
        compilers=(
            Compiler(
                "inductor", "inductor", "reinstall torch with the triton that it names", kept=True
            ),
            _AOT_EAGER,
        ),
        triton_kernels=("nvidia", "amd"),
        backend="cpu:gloo,cuda:nccl",
        pin_memory=True,
        dynamic_shapes=True,
        roi_align="torchvision",
        select_rois=True,
        sorts_taps=True,
        ready=_ready_cuda,
        visible="CUDA_VISIBLE_DEVICES",
        environment=(Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "for --deterministic", True),),
    ),
    "npu": Traits(
        # Ascend refuses channels_last; its own formats are chosen inside the kernels.
        memory_format=torch.contiguous_format,
        compilers=(
            Compiler(
                "dvm",
                "inductor",
                "install CANN's and torch-npu's releases that belong together",
                (("TORCHINDUCTOR_NPU_BACKEND", "dvm"),),
            ),
            Compiler(
                "inductor",
                "inductor",
                "install the triton-ascend that names this torch-npu, if there is one",
                (("TORCHINDUCTOR_NPU_BACKEND", "default"),),
            ),
            _AOT_EAGER,
        ),
        backend="cpu:gloo,npu:hccl",
        pin_memory=True,
        dynamic_shapes=False,
        roi_align="torch_npu",
        native_roi_align=True,
        select_rois=False,
        sorts_taps=False,
        replay_missing=_replay_missing_npu,
        ready=_ready_npu,
        toolkits=("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"),
        environment=(
            Setting("TASK_QUEUE_ENABLE", "1", "launches have a thread; 2 forbids graphs"),
            Setting("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "less fragmentation"),
            Setting("CPU_AFFINITY_CONF", "1", "each process keeps to the cores near its card"),
            Setting("HCCL_CONNECT_TIMEOUT", "7200", "ranks wait for one to compile first"),
            Setting("HCCL_EXEC_TIMEOUT", "7200", "the same, for a collective under way"),
            Setting("HCCL_DETERMINISTIC", "true", "for --deterministic; slower", True),
            Setting("TORCH_NPU_FALLBACK_CPU_DISABLE", "1", "an operator without kernel raises"),
        ),
        unsupported=(
            "channels_last: refused by the device",
            "graphs with dynamic shapes: one graph per mask capacity is compiled instead",
            "keeping compiled programs on disk: every run compiles",
        ),
    ),
}

COMPILER_PACKAGES = ("torch", "torch-npu", "triton", "triton-ascend")
"""Whose versions decide whether a compiler works."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on, made ready.

    Args:
        name: `auto` takes the accelerator where there is one and else the CPU; or a kind
            (`cuda`), or one device (`cuda:1`).

    Raises:
        UserError: unknown kind, or this machine has no such device.
    """
    _see_own_device(name)
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    kind, _, index = name.partition(":")
    if name == "auto":
        device = accelerator or torch.device("cpu")
    elif kind not in TRAITS or not re.fullmatch(r"[a-z]+(:[0-9]+)?", name):
        raise UserError(f"--device {name}: expected auto or one of {', '.join(TRAITS)}")
    elif kind != "cpu" and (accelerator is None or accelerator.type != kind):
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds no {kind} device on this machine;"
            " `casc doctor` says why. Use --device cpu, or install what is missing"
        )
    elif index and int(index) >= (there := _device_count(kind)):
        raise UserError(f"--device {name}: there are {there}, from {kind}:0 on")
    else:
        device = torch.device(name)
    traits(device).ready()
    return device


def _device_count(kind: str) -> int:
    return 1 if kind == "cpu" else torch.accelerator.device_count()


def _see_own_device(name: str) -> None:
    """Of several ranks on a machine each sees its own device only.

    It is number 0 to all of them, so what one of them compiles the others can load, and none
    leaves a context on another's device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return
    rank = int(os.environ["LOCAL_RANK"])
    for kind, row in TRAITS.items():
        if not row.visible or name not in ("auto", kind):
            continue
        listed = os.environ.get(row.visible)
        mine = [str(rank)] if listed is None else listed.split(",")[rank : rank + 1]
        # A list of one was made for this rank, by this function or by a launcher.
        if mine and (listed is None or "," in listed):
            os.environ[row.visible] = mine[0]


def traits(device: torch.device) -> Traits:
    """The table's row for a device."""
    if device.type not in TRAITS:
        raise UserError(f"--device {device}: expected one of {', '.join(TRAITS)}")
    return TRAITS[device.type]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The recipe's dtype: `auto` takes what the device computes with, else the one of that name.

    Raises:
        UserError: the device can't compute with it.
    """
    if name == "auto":
        dtype = traits(device).dtype
        return dtype if dtype != torch.bfloat16 or has_bfloat16(device) else torch.float16
    dtype = DTYPES[name]
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise UserError(f"--dtype {name}: {device} hasn't got it; use --dtype float16 or float32")
    if dtype == torch.float16 and device.type == "cpu":  # accelerators all have it
        x = torch.ones(1, 8, 4, 4, dtype=dtype)
        try:
            torch.nn.functional.conv2d(x, x)
        except RuntimeError as error:
            raise UserError(
                f"--dtype {name}: torch {torch.__version__} has no kernels for it on this"
                f" processor ({error}); use --dtype bfloat16 or float32"
            ) from None
    return dtype


def has_bfloat16(device: torch.device) -> bool:
    """Whether the chip computes in bfloat16. On the CPU torch always can."""
    if device.type == "cpu":
        return True
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def triton_missing(device: torch.device) -> str | None:
    """Why casc's own Triton kernels can't run on a device; None where they can."""
    wanted = traits(device).triton_kernels
    if not wanted:
        return f"there are no Triton kernels for {device.type}"
    # Without them in one package, a `triton` for other devices would count.
    if any(_installed(f"triton.backends.{name}") for name in wanted):
        return None
    return f"Triton with its backend for {device.type} isn't installed"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def make_deterministic(device: torch.device) -> None:
    """Take the same path every time: operators that can't will raise.

    Raises:
        UserError: a variable has to be set before the program starts, and isn't.
    """
    for setting in traits(device).environment:
        # CUDA has two values that do, so one that doesn't isn't told by not being ours.
        off = os.environ.get(setting.name, "").lower() in ("", "0", "false")
        if setting.deterministic and off:
            raise UserError(
                f"--deterministic: set {setting.name}={setting.value} in the environment first"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # the fastest algorithm may be another every time


class RoiKernels(NamedTuple):
    """A device's RoIAlign (aligned, average) on one feature map; `grid` 0 is adaptive."""

    forward: Callable[[Tensor, Tensor, float, int, int], Tensor]
    """(features [B, C, H, W], rois [R, 5], scale, cells, grid) -> [R, C, cells, cells]."""
    backward: Callable[[Tensor, Tensor, list[int], float, int, int], Tensor]
    """(gradient, rois, shape of the features, scale, cells, grid) -> [B, C, H, W]."""


def roi_kernels(device: torch.device) -> RoiKernels:
    """The RoIAlign kernels that run on a device; float32.

    Raises:
        UserError: they aren't installed.
    """
    package = traits(device).roi_align
    try:
        importlib.import_module(package)  # which registers its operators
    except ImportError as error:
        raise UserError(f"RoIAlign on {device.type} needs {package}: {error}") from None
    return {"torchvision": _TORCHVISION, "torch_npu": _TORCH_NPU}[package]


def _torchvision_forward(
    features: Tensor, rois: Tensor, scale: float, cells: int, grid: int
) -> Tensor:
    return torch.ops.torchvision.roi_align(features, rois, scale, cells, cells, grid, True)


def _torchvision_backward(
    gradient: Tensor, rois: Tensor, shape: list[int], scale: float, cells: int, grid: int
) -> Tensor:
    return torch.ops.torchvision._roi_align_backward(
        gradient, rois, scale, cells, cells, *shape, grid, True
    )


# torch_npu's roi_end_mode: corners shifted by half a pixel, no least size, as `aligned` is.
_ALIGNED = 2


def _npu_forward(features: Tensor, rois: Tensor, scale: float, cells: int, grid: int) -> Tensor:
    return torch.ops.npu.npu_roi_align(features, rois, scale, cells, cells, grid, _ALIGNED)


def _npu_backward(
    gradient: Tensor, rois: Tensor, shape: list[int], scale: float, cells: int, grid: int
) -> Tensor:
    return torch.ops.npu.npu_roi_alignbk(gradient, rois, shape, cells, cells, scale, grid, _ALIGNED)


_TORCHVISION = RoiKernels(_torchvision_forward, _torchvision_backward)
_TORCH_NPU = RoiKernels(_npu_forward, _npu_backward)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the device's allocator, or on the CPU of this process."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work; nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
