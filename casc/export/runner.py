"""Run an exported detector on images, and refuse what it can't take.

It needs NumPy, and ONNX Runtime or torch, but nothing else of casc: copy this file to where the
program runs.

Legend: h x w an image, C its channels, Hi x Wi the program's input, B its batch, D an image's
detections.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Program(NamedTuple):
    """An exported detector, ready to run."""

    metadata: dict[str, Any]
    """What travels with the file: inputs, outputs, classes, preprocessing, thresholds."""
    run: Callable[[np.ndarray, np.ndarray], Arrays]
    """pixels `[B, Hi, Wi, C]` uint8 and sizes `[B, 2]` int64 to outputs by name, unchecked."""
    batch: int | None
    """B; None where it takes any number of images."""
    pixels: tuple[int, int]
    """Hi and Wi, the room for an image."""
    channels: int
    """C: 3 for RGB, 1 for grey, or a number of planes."""


def open_program(
    path: str | Path, *, threads: int = 0, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> Program:
    """Load what `casc export` wrote, of any format.

    Args:
        path: the .onnx or .pt2 file.
        threads: that ONNX Runtime uses; 0: as many as there are cores.
        providers: ONNX Runtime's execution providers, best first.

    Raises:
        ValueError: the file isn't an exported detector.
    """
    if Path(path).suffix == ".onnx":
        metadata, run = _onnx(path, threads, list(providers))
    else:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: neither an .onnx file nor a .pt2 package")
        with zipfile.ZipFile(path) as package:
            compiled = any("/data/aotinductor/" in name for name in package.namelist())
        metadata, run = (_aot_inductor if compiled else _torch_export)(path)
    if not metadata:
        raise ValueError(f"{path}: isn't written by `casc export`, or has lost its metadata")
    told = json.loads(metadata)
    batch, height, width, channels = told["inputs"][0]["shape"]
    names = [output["name"] for output in told["outputs"]]

    def named(pixels: np.ndarray, size: np.ndarray) -> Arrays:
        return dict(zip(names, run(pixels, size, names), strict=True))

    fixed = batch if isinstance(batch, int) else None
    return Program(told, named, fixed, (height, width), channels)


def detect(program: Program, images: Sequence[np.ndarray]) -> Iterator[Arrays]:
    """Yield what is found in each image: the program's outputs, of detections alone.

    Args:
        program: from `open_program`.
        images: `[h, w, C]` uint8, upright, each of its own size.

    Raises:
        ValueError: an image has another type or shape, or is larger than the program's input.
    """
    for number, image in enumerate(images):
        check(program, image, f"image {number}")
    step = program.batch or len(images) or 1
    for start in range(0, len(images), step):
        part = images[start : start + step]
        # Rows that only fill up the batch are 1 x 1.
        rows = program.batch or len(part)
        pixels = np.zeros((rows, *program.pixels, program.channels), np.uint8)
        size = np.ones((rows, 2), np.int64)
        for row, image in enumerate(part):
            height, width = size[row] = image.shape[:2]
            pixels[row, :height, :width] = image
        found = program.run(pixels, size)
        for row in range(len(part)):
            valid = found["valid"][row]
            yield {name: value[row][valid] for name, value in found.items() if name != "valid"}


def check(program: Program, image: np.ndarray, name: str = "image") -> None:
    """Refuse an image that the program can't take.

    Raises:
        ValueError: naming what is wrong and how to mend it.
    """
    shape, channels = getattr(image, "shape", ()), program.channels
    if len(shape) != 3 or shape[2] != channels or image.dtype != np.uint8 or 0 in shape:
        kind = f"{list(shape)} {image.dtype}" if shape else type(image).__name__
        wanted = f"[h, w, {channels}] uint8{' RGB' if channels == 3 else ''}"
        raise ValueError(f"{name}: must be {wanted}, not {kind}")
    (height, width), (most_high, most_wide) = shape[:2], program.pixels
    if height > most_high or width > most_wide:
        raise ValueError(
            f"{name}: {height} x {width} pixels (height x width), but the program takes at most"
            f" {most_high} x {most_wide}: reduce it, or export with"
            f" --pixels {max(height, most_high)} {max(width, most_wide)}"
        )


# Each gives the metadata's text, and (pixels, size, names of outputs) to outputs.


def _onnx(path: str | Path, threads: int, providers: list[Any]) -> tuple[str, Callable]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=providers)

    def run(pixels: np.ndarray, size: np.ndarray, names: list[str]) -> list[np.ndarray]:
        return [np.asarray(v) for v in session.run(names, {"pixels": pixels, "size": size})]

    return session.get_modelmeta().custom_metadata_map.get("casc", ""), run


def _torch_export(path: str | Path) -> tuple[str, Callable]:
    import torch

    extra = {"casc.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    return extra["casc.json"], _of_torch(program)


def _aot_inductor(path: str | Path) -> tuple[str, Callable]:
    import torch

    program = torch._inductor.aoti_load_package(str(path))
    return program.get_metadata().get("casc", ""), _of_torch(program)


def _of_torch(program: Callable) -> Callable:
    import torch

    def run(pixels: np.ndarray, size: np.ndarray, names: list[str]) -> list[np.ndarray]:
        with torch.no_grad():
            found = program(torch.from_numpy(pixels), torch.from_numpy(size))
        return [value.numpy() for value in found]

    return run
