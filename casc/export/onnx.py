"""The detector as ONNX, of standard operators only.

Legend: B images, N boxes, K kept, P pixels, T taps, C channels, R RoIs, L levels.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from casc.errors import UserError
from casc.export.metadata import ANY

OPSET = 20
"""Of the default domain, unless another is asked for."""
OPSETS = range(18, 22)
"""Those that torch writes and ONNX Runtime 1.32 has all of: it lacks the RoIAlign of 22."""
_ONE = "one."
"""Before the names of a program of one image that is repeated."""
_MOST_BYTES = 2**31 - 2**20
"""What protobuf can hold in a file, less some room for the graph."""


def write_onnx(
    program: ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int = OPSET,
    any_batch: bool = False,
) -> None:
    """Write a program as one ONNX file.

    Args:
        program: from `casc.export.program.capture`.
        path: of the file.
        metadata: becomes `metadata_props`.
        inputs: names of the inputs.
        outputs: names of the outputs.
        opset: of the default domain.
        any_batch: the program is of one image; make it one of any number.

    Raises:
        UserError: the program is too large for one file.
    """
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if weights > _MOST_BYTES:
        raise UserError(f"{path}: ONNX holds 2 GiB in a file, the weights take {weights} bytes")
    prefix = _ONE if any_batch else ""
    with _quiet():
        made = torch.onnx.export(
            program,
            input_names=[prefix + name for name in inputs],
            output_names=[prefix + name for name in outputs],
            opset_version=opset,
            custom_translation_table=_translations(),
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    made.model.metadata_props.update(metadata)
    made.save(path, external_data=False)
    if any_batch:
        _repeat(path, inputs, outputs)


def _repeat(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Make a file's program of one image a loop over any number of them: ONNX's Scan.

    With a symbolic batch instead, each shape of the graph would have to be reasoned about, which
    takes half an hour for a large detector.
    """
    import onnx
    from onnx import helper

    model = onnx.load(path)
    graph = model.graph

    def described(values: Any, first: str | None) -> dict[str, Any]:
        """The shapes of one image, by name; with a first side if there is to be one."""
        found = {}
        for value in values:
            kind, name = value.type.tensor_type, value.name.removeprefix(_ONE)
            sides = [side.dim_value for side in kind.shape.dim[1:]]
            shape, prefix = ([first, *sides], "") if first else (sides, "image.")
            found[name] = helper.make_tensor_value_info(prefix + name, kind.elem_type, shape)
        return found

    zero = helper.make_tensor("image.axis", onnx.TensorProto.INT64, [1], [0])
    enter = [
        helper.make_node("Unsqueeze", [f"image.{n}", zero.name], [_ONE + n], f"enter_{n}")
        for n in inputs
    ]
    leave = [
        helper.make_node("Squeeze", [_ONE + n, zero.name], [f"image.{n}"], f"leave_{n}")
        for n in outputs
    ]
    inside = (described(graph.input, None), described(graph.output, None))
    body = helper.make_graph(
        [*enter, *graph.node, *leave],
        "image",
        [inside[0][n] for n in inputs],
        [inside[1][n] for n in outputs],
        value_info=graph.value_info,
    )
    outside = (described(graph.input, ANY), described(graph.output, ANY))
    scan = helper.make_node(
        "Scan", list(inputs), list(outputs), "images", body=body, num_scan_inputs=len(inputs)
    )
    # Weights stay outside, where the body sees them.
    whole = helper.make_graph(
        [scan],
        graph.name,
        [outside[0][n] for n in inputs],
        [outside[1][n] for n in outputs],
        initializer=[*graph.initializer, zero],
    )
    model.graph.CopyFrom(whole)
    onnx.save(model, path)


def _translations() -> dict[Callable, Callable]:
    operators = torch.ops.casc
    return {
        operators.nms.default: _nms,
        operators.bag.default: _bags,
        operators.linear.default: _linear,
        operators.roi_align_adaptive.default: _roi_align,
    }


def _opset() -> Any:
    from onnxscript import opset18  # the oldest of OPSETS; torch converts what is written

    return opset18


# What follows is traced by onnxscript: arguments are values of the ONNX graph, and each
# call of `op` adds a node to it.


def _nms(boxes: Any, scores: Any, group: Any, valid: Any, iou: float, count: int) -> Any:
    """`casc::nms`; boxes of different groups lie apart, so that they are of one class here."""
    op = _opset()

    one, zero = op.Constant(value_ints=[1]), op.Constant(value_ints=[0])
    masked = op.Where(valid, scores, op.Constant(value_float=-1.0))
    chosen = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(masked, one),
        op.Constant(value_ints=[count]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[-0.5]),
    )
    # Rows (image, class, box), as many as there are: back to places of fixed shape.
    where = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    kept = op.ScatterND(
        op.ConstantOfShape(op.Shape(masked)),
        where,
        op.Expand(op.Constant(value_float=1.0), op.Slice(op.Shape(where), zero, one)),
    )
    ranked = op.Where(op.Cast(kept, to=9), masked, op.Constant(value_float=-1.0))
    most = min(count, int(scores.shape[1]))
    values, index = op.TopK(ranked, op.Constant(value_ints=[most]))
    found = op.Cast(op.GreaterOrEqual(values, op.Constant(value_float=0.0)), to=7)
    index = op.Mul(index, found)
    if most < count:
        index = op.Pad(index, op.Constant(value_ints=[0, 0, 0, count - most]))
    return index, op.ReduceSum(found, one, keepdims=0)


def _bags(pixels: Any, index: Any, weight: Any) -> Any:
    """`casc::bag`, a tap at a time: all at once would take T times the memory."""
    op = _opset()

    total = None
    for tap in range(int(index.shape[1])):
        rows = op.Gather(index, op.Constant(value_int=tap), axis=1)
        share = op.Gather(weight, op.Constant(value_ints=[tap]), axis=1)
        read = op.Mul(op.Gather(pixels, rows, axis=0), share)
        total = read if total is None else op.Add(total, read)
    return total


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    op = _opset()

    return op.Gemm(x, weight, transB=1) if bias is None else op.Gemm(x, weight, bias, transB=1)


def _roi_align(
    levels: Sequence[Any],
    rois: Any,
    here: Any,
    scales: Sequence[float],
    cells: int,
    grid: int = 0,
) -> Any:
    """`casc::roi_align_adaptive`: each level aligns the RoIs that are its own."""
    op = _opset()

    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)
    boxes = op.Slice(rois, one, op.Constant(value_ints=[5]), one)
    sides = op.Constant(value_ints=[int(levels[0].shape[1]), cells, cells])
    count = op.Slice(op.Shape(rois), zero, one)
    result = op.ConstantOfShape(op.Concat(count, sides, axis=0))
    for i, (features, scale) in enumerate(zip(levels, scales, strict=True)):
        own = op.NonZero(op.Gather(here, op.Constant(value_int=i), axis=0))
        own = op.Transpose(own, perm=[1, 0])
        flat = op.Squeeze(own, one)
        aligned = op.RoiAlign(
            features,
            op.Gather(boxes, flat, axis=0),
            op.Gather(image, flat, axis=0),
            coordinate_transformation_mode="half_pixel",
            mode="avg",
            output_height=cells,
            output_width=cells,
            sampling_ratio=grid,
            spatial_scale=scale,
        )
        result = op.ScatterND(result, own, aligned)
    return result


@contextmanager
def _quiet():
    """Keep what torch.onnx says of its own insides from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|onnx)")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
