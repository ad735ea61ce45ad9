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
from casc.export.onnx import write_onnx
from casc.export.operators import plain
from casc.model.detector import Detections

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


def write(program: ExportedProgram, path: Path, form: Form, metadata: dict[str, Any]) -> None:
    """Write a captured program.

    Args:
        program: from `casc.export.program.capture`.
        path: of the file, with the form's suffix.
        form: onnx, pt2 (torch.export) or aoti (compiled by AOTInductor for this machine).
        metadata: goes into the file.

    Raises:
        UserError: the form can't hold this program.
    """
    text = json.dumps(metadata)
    if form == "onnx":
        write_onnx(program, path, {KEY: text}, INPUTS, [o["name"] for o in metadata["outputs"]])
    elif form == "pt2":
        torch.export.save(plain(program), path, extra_files={f"{KEY}.json": text})
    else:
        torch._inductor.aoti_compile_and_package(
            plain(program),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {KEY: text}},
        )


def load(path: Path, form: Form) -> Callable[[Tensor, Tensor], Detections]:
    """Run a written program on the CPU: (pixels, size) to detections."""
    if form == "onnx":
        return _load_onnx(path)
    if form == "pt2":
        # The signature's guards are the program's own; nothing of casc is needed here.
        run: Callable = torch.export.load(path).module()
    else:
        run = torch._inductor.aoti_load_package(str(path))

    def detect(pixels: Tensor, size: Tensor) -> Detections:
        with torch.no_grad():
            return Detections(*run(pixels, size))

    return detect


def _load_onnx(path: Path) -> Callable[[Tensor, Tensor], Detections]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def detect(pixels: Tensor, size: Tensor) -> Detections:
        given = dict(zip(INPUTS, (pixels.numpy(), size.numpy()), strict=True))
        found = zip(names, session.run(names, given), strict=True)
        return Detections(**{name: torch.from_numpy(value) for name, value in found})

    return detect
