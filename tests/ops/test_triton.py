"""casc's Triton kernels without a GPU: their numbers by interpretation, their code by compiling.

No test here has run on a GPU. The interpreter runs the kernels' own source on the CPU, and ptxas
makes the machine code that a GPU would load.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from casc.device.versions import ISOLATES

HERE = Path(__file__).parent
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton isn't installed")


@needs_triton
@pytest.mark.skipif(not ISOLATES, reason="this torch takes no kernel that is interpreted")
def test_numbers_by_the_interpreter():
    # Whether a kernel is interpreted is decided when its file is imported.
    files = ["interpreted_nms.py", "interpreted_roi_align.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


# ---- what the compiler sees ----


def traced(function, *inputs) -> list[torch.fx.Node]:
    """The nodes of a function once it is compiled, its gradient included.

    It is traced as one graph with tensors that have no values: a read would raise.
    """
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch.compiler.reset()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) for value in inputs]
        backend = aot_autograd(fw_compiler=record, bw_compiler=record)
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*fakes)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    return [node for graph in graphs for node in graph.graph.nodes]


def kernels(nodes) -> int:
    return sum("triton_kernel_wrapper" in str(node.target) for node in nodes)


@needs_triton
def test_suppression_is_two_launches_and_reads_nothing():
    from casc.ops.nms import batched_nms

    def suppress(boxes, scores, group, valid):
        return batched_nms(
            boxes, scores, group, valid, iou=0.5, count=100, groups=5, largest=200, kernel="triton"
        )

    boxes, scores = torch.rand(2, 700, 4), torch.rand(2, 700)
    group, valid = torch.arange(700) // 150, torch.ones(2, 700, dtype=torch.bool)
    assert kernels(traced(suppress, boxes, scores, group, valid)) == 2


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
def test_roi_align_allocates_nothing_that_grows_with_taps(deterministic):
    from casc.ops.pyramid import flatten_pyramid
    from casc.ops.roi_align import roi_align

    rois, channels, cells = 300, 4, 7

    def align(fine, coarse, boxes, image):
        pyramid = flatten_pyramid([fine, coarse], (4, 8))
        return roi_align(pyramid, boxes, image, cells, "fixed", "triton")

    fine, coarse = (torch.rand(2, channels, s, s).requires_grad_() for s in (32, 16))
    boxes, image = torch.rand(rois, 4), torch.zeros(rois, dtype=torch.long)
    torch.use_deterministic_algorithms(deterministic)
    try:
        nodes = traced(align, fine, coarse, boxes, image)
    finally:
        torch.use_deterministic_algorithms(False)
    # Forward, and backward once, or once a level.
    assert kernels(nodes) == (3 if deterministic else 2)
    made = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(value.numel() for value in made) == rois * cells**2 * channels


# ---- machine code ----


def cubin(kernel, capability: int, signature: dict[str, str], constants: dict, warps: int = 4):
    """A kernel's compiled forms by name; pointers and sizes as aligned as torch's are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): aligned for name, kind in signature.items() if kind[0] == "*"},
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    return made.asm


def _ptxas() -> bool:
    if not TRITON or not importlib.util.find_spec("triton.backends.nvidia"):
        return False
    spec = importlib.util.find_spec("triton.backends.nvidia")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "bin" / "ptxas").exists()


needs_ptxas = pytest.mark.skipif(not _ptxas(), reason="this Triton has no CUDA backend with ptxas")
capabilities = pytest.mark.parametrize("capability", [80, 90, 100])


@needs_ptxas
@capabilities
def test_suppression_compiles(capability, monkeypatch, tmp_path):
    from casc.ops import nms_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tables = {"overlaps": "*i64", "valid": "*fp32", "size": "i32", "words": "i32"}
    asm = cubin(
        nms_triton._overlaps,
        capability,
        tables | {"boxes": "*fp32", "area": "*fp32", "iou": "fp32"},
        {"BLOCK": 64},
    )
    # A fused product would round an overlap otherwise than the CPU does.
    assert "fma" not in asm["ptx"]
    assert "div.rn.f32" in asm["ptx"]
    for words in (32, 256):
        cubin(
            nms_triton._sweep,
            capability,
            tables | {"keep": "*fp32", "count": "i32"},
            {"BLOCK": 64, "WORDS": words, "ROWS": 8192 // max(words, 128)},
        )


@needs_ptxas
@capabilities
def test_roi_align_compiles_with_wide_loads(capability, monkeypatch, tmp_path):
    from casc.ops import roi_align_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    grid = {"start": "*i64", "first": "*fp32", "step": "*fp32"}
    constants = {"SIDE": 7, "GRID": 2, "C": 256}
    by_cell = constants | {"CELLS": 8, "CHANNELS": 256}
    sized = grid | {"size": "*i64"}
    read = cubin(kernels._read, capability, sized | {"pixels": "*bf16", "made": "*bf16"}, by_cell)
    # 8 cells, 16 taps: each thread reads 8 channels at once, twice a tap.
    assert len(re.findall(r"ld\.global\S*v4\.b32", read["ptx"])) == 2 * 16
    add = cubin(kernels._add, capability, sized | {"grad": "*bf16", "total": "*fp32"}, by_cell)
    if capability >= 90:
        assert "add.v4.f32" in add["ptx"]
    names = ("rois", "height", "width", "skip", "per_image")
    cubin(
        kernels._gather,
        capability,
        grid | {"grad": "*bf16", "later": "*bf16", "total": "*fp32"} | dict.fromkeys(names, "i32"),
        constants | {"TILE": 8, "ROIS": 32, "CELLS": 32, "CHANNELS": 64},
    )


@needs_ptxas
def test_no_index_overflows_32_bits_at_64_images_per_device(monkeypatch, tmp_path):
    """What grows with the batch is 64 bits wide from its first use; all else stays small."""
    from casc.ops import nms_triton
    from casc.ops import roi_align_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    images, side, channels, cells = 64, 1344, 256, 14 * 14
    pixels = images * sum((side // stride) ** 2 for stride in (4, 8, 16, 32))
    assert pixels * channels > 2**31  # so it matters
    grid = {"start": "*i64", "first": "*fp32", "step": "*fp32"}
    maps = {"pixels": "*bf16", "made": "*bf16", "grad": "*bf16", "later": "*bf16", "total": "*fp32"}
    sizes = dict.fromkeys(("rois", "height", "width", "skip", "per_image", "words", "count"), "i32")
    nms = {"boxes": "*fp32", "area": "*fp32", "valid": "*fp32", "keep": "*fp32", "iou": "fp32"}
    known = grid | maps | sizes | nms | {"overlaps": "*i64"}
    by_cell = {"SIDE": 14, "GRID": 2, "C": channels, "CELLS": 8, "CHANNELS": 256}
    by_tile = by_cell | {"TILE": 8, "ROIS": 32, "CELLS": 32, "CHANNELS": 64}
    walk = {"BLOCK": 64, "WORDS": 32, "ROWS": 64}
    # The axis of the grid that counts RoIs, images or sets of boxes; most programs on the others.
    most = {"x": (side // 4 // 8) ** 2, "y": cells // 8 + 1, "z": channels // 64}
    for kernel, axis, constants, size in (
        (kernels._read, "x", by_cell, "*i64"),
        (kernels._add, "x", by_cell, "*i64"),
        (kernels._gather, "y", by_tile, "i32"),
        (nms_triton._overlaps, "x", {"BLOCK": 64}, "i32"),
        (nms_triton._sweep, "x", walk, "i32"),
    ):
        taken = {name: kind for name, kind in known.items() if name in kernel.arg_names}
        taken |= {"size": size} if "size" in kernel.arg_names else {}
        lines = cubin(kernel, 90, taken, constants)["ttir"].splitlines()
        (made,) = (line for line in lines if f"get_program_id {axis} " in line)
        name = re.escape(made.split("=")[0].strip())
        uses = [line for line in lines if re.search(rf"{name}\b", line) and line != made]
        assert [("arith.extsi" in use, "to i64" in use) for use in uses] == [(True, True)]
        # What is left in 32 bits: a program's number on another axis by a block, within a row.
        for other in set("xyz") - {axis}:
            assert most[other] * 256 * channels < 2**31
