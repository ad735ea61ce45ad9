"""Writing programs in each form, and running what was written.

Legend: see `casc.export.program`.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from casc.errors import UserError
from casc.export.metadata import INPUTS, KEY
from casc.export.onnx import OPSET, OPSETS, write_onnx
from casc.export.operators import plain
from casc.export.program import Shape
from casc.export.runner import open_program
from casc.model.forward_detect import Detections

Form = Literal["onnx", "pt2", "aoti"]
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}


def check_form(form: Form, *, check: bool) -> None:
    """Refuse a form that this machine can't write, before any work is done.

    Args:
        form: which.
        check: whether what is written will also be run.

    Raises:
        UserError: a package or the C++ compiler is missing.
    """
    if form == "onnx":
        for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--format onnx: the package {package} is missing;"
                    " python -m pip install 'casc[export]'"
                )
    if form == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "--format aoti: no C++ compiler; install g++, or set CXX to the compiler"
            ) from None


def check_opset(opset: int | None, form: Form) -> None:
    """Refuse an operator set that can't be honoured.

    Raises:
        UserError: naming the flag.
    """
    if opset is None:
        return
    if form != "onnx":
        raise UserError(f"--opset {opset}: --format {form} has none; leave it out")
    if opset not in OPSETS:
        raise UserError(f"--opset {opset}: must be from {OPSETS[0]} to {OPSETS[-1]}")


def write(
    program: ExportedProgram,
    path: Path,
    form: Form,
    metadata: dict[str, Any],
    shape: Shape,
    opset: int | None = None,
) -> None:
    """Write a captured program.

    Args:
        program: from `casc.export.program.capture`.
        path: of the file, with the form's suffix.
        form: onnx, pt2 (torch.export) or aoti (compiled by AOTInductor for this machine).
        metadata: goes into the file.
        shape: the program's sizes.
        opset: ONNX's; by default `casc.export.onnx.OPSET`.

    Raises:
        UserError: the form can't hold this program.
    """
    text = json.dumps(metadata)
    if form == "onnx":
        outputs = [output["name"] for output in metadata["outputs"]]
        any_batch = shape.batch is None
        write_onnx(
            program, path, {KEY: text}, INPUTS, outputs, opset=opset or OPSET, any_batch=any_batch
        )
    elif form == "pt2":
        torch.export.save(plain(program), path, extra_files={f"{KEY}.json": text})
    else:
        torch._inductor.aoti_compile_and_package(
            plain(program),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {KEY: text, **plain_metadata(metadata)}},
        )


def plain_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    """What a C++ program needs to call a package, where it has no parser of JSON.

    casc.pixels: the sides of `pixels`; casc.class.0, ...: the classes' names by label.
    """
    sides = " ".join(str(side) for side in metadata["inputs"][0]["shape"])
    names = {f"{KEY}.class.{i}": each["name"] for i, each in enumerate(metadata["classes"])}
    return {f"{KEY}.pixels": sides, **names}


def load(path: Path) -> Callable[[Tensor, Tensor], Detections]:
    """Run a written program on the CPU: (pixels, size) to detections."""
    program = open_program(path, threads=torch.get_num_threads())

    def detect(pixels: Tensor, size: Tensor) -> Detections:
        found = program.run(pixels.numpy(), size.numpy())
        return Detections(**{name: torch.from_numpy(value) for name, value in found.items()})

    return detect
