"""Verification: does this device compute what the reference computed?

`casc verify GOLDENS_DIR` runs a training step and inference on every golden set of a
folder, with the reference's settings, and compares every recorded tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casc.device.compute import Compute
from casc.errors import UserError
from casc.evaluate.mask_rle import paste_masks
from casc.model.choose_compute import choose_compute
from casc.model.detector import Inputs, trainable
from casc.model.detector_config import DetectorConfig, reference_settings
from casc.model.layers import Params
from casc.model.losses import mean_losses
from casc.model.rpn import Proposals
from casc.model.steps import anchor_count, make_detect_step, make_loss_step
from casc.ops.probe import Recorder, map_tensors
from casc.verify.compare import Comparison, Row
from casc.verify.compare_detections import compare_detections
from casc.verify.compare_inputs import compare_inputs
from casc.verify.compare_training import (
    compare_fixed_grid,
    compare_gradients,
    compare_training,
)
from casc.verify.goldens import (
    GoldenSet,
    digest,
    golden_weights,
    image_config,
    read_sets,
    sampling_noise,
    test_batch,
    test_inputs,
    train_batch,
    train_inputs,
)
from casc.verify.record import Record, detection_record, training_record

__all__ = ["Row", "format_rows", "verify", "verify_set"]


def verify(
    folder: Path,
    device: torch.device,
    *,
    compile: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Check every golden set of a folder and print a table of worst errors.

    Args:
        folder: holds NAME.safetensors and NAME.json of each set.
        device: where to compute.
        compile: whether to run compiled; eager otherwise.
        log: where the table goes, a line at a time.

    Returns:
        Whether everything is within tolerance.

    Raises:
        UserError: if the folder holds no golden set, or one can't be read.
    """
    passed = True
    reference = reference_settings(DetectorConfig())
    compute, notes = choose_compute(reference, device, dtype="float32", compile=compile)
    for note in notes:
        log(note)
    for golden in read_sets(folder, log):
        mode = "compiled" if compile else "eager"
        log(f"{golden.name}: reference settings, float32, {mode}, {device}")
        rows = verify_set(golden, device, compute)
        for line in format_rows(rows):
            log(line)
        passed = passed and all(row.passed for row in rows)
    log("passed" if passed else "FAILED: this device doesn't compute what the reference does")
    return passed


def verify_set(golden: GoldenSet, device: torch.device, compute: Compute) -> list[Row]:
    """Every comparison of one golden set: what the steps themselves come by on the way."""
    config = reference_settings(DetectorConfig())
    params, buffers = golden_weights(config)
    ours, recorded = digest(params | buffers), golden.facts["weights_digest"]
    if ours != recorded:
        raise UserError(
            f"{golden.name}: made with weights of digest {recorded}, these are {ours}: "
            "it belongs to another weight recipe"
        )
    params = {k: v.to(device) for k, v in params.items()}
    buffers = {k: v.to(device) for k, v in buffers.items()}
    table = Comparison(golden.tensors)
    for _ in compare_parts(golden, config, params, buffers, device, compute, table):
        pass
    for key in golden.tensors.keys() - table.seen:
        # Stored images are what all begins with, and the steps make masks of one class only.
        if not key.startswith(("raw.", "test")) and ".mask_pred." not in key:
            table.add("left over", key, float("inf"), 0, "not compared")
    return table.rows


def compare_parts(
    golden: GoldenSet,
    config: DetectorConfig,
    params: Params,
    buffers: Params,
    device: torch.device,
    compute: Compute,
    table: Comparison,
) -> Iterator[None]:
    """Fill the table part by part, quick parts first, for who stops at the first that fails."""
    made, record, loss, leaves = run_training(golden, config, params, buffers, device, compute)
    compare_inputs(golden, "train", made, table)
    compare_training(golden, config, record, table)
    yield
    detections = run_detections(golden, config, params, buffers, device, compute)
    for image, (made, record, masks) in enumerate(detections):
        compare_inputs(golden, f"test{image}", made, table)
        compare_detections(golden, config, image, record, masks, table)
        yield
    fixed = replace(config, roi_align="fixed")
    with torch.no_grad():
        _, record, _, _ = run_training(golden, fixed, params, buffers, device, compute)
    compare_fixed_grid(fixed, record, table)
    yield
    loss.backward()
    compare_gradients(golden, {k: v.grad for k, v in leaves.items()}, table)
    yield


def format_rows(rows: Iterable[Row]) -> list[str]:
    """The table: per part the worst error of each unit, then every row that failed."""
    rows = list(rows)
    worst: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        worst.setdefault((row.part, row.unit, row.tolerance), []).append(row)
    lines = [f"  {'part':<14} {'checks':>6}  {'worst error':>11} {'allowed':>9}  unit"]
    for (part, unit, tolerance), group in worst.items():
        # NaN must win over any number.
        top = max(group, key=lambda row: (row.error != row.error, row.error))
        mark = "" if all(row.passed for row in group) else "  FAILED"
        lines.append(
            f"  {part:<14} {len(group):>6}  {top.error:>11.3g} {tolerance:>9.3g}  "
            f"{unit} ({top.name}){mark}"
        )
    failed = [row for row in rows if not row.passed]
    for row in failed:
        lines.append(
            f"  FAILED {row.part}: {row.name}: {row.error:.3g} {row.unit}, "
            f"allowed {row.tolerance:.3g}"
        )
    lines.append(f"  {len(rows) - len(failed)} of {len(rows)} checks passed")
    return lines


def run_training(
    golden: GoldenSet,
    config: DetectorConfig,
    params: Params,
    buffers: Params,
    device: torch.device,
    compute: Compute,
) -> tuple[Inputs, Record, Tensor, Params]:
    """The training step on a set's batch.

    Its network is given the reference's inputs, its sampling what draws the same samples, and
    its cascade the reference's proposals, so that two anchors whose scores differ in the last
    bit can't change what later parts are compared with. What it would have gone on with itself
    is recorded.

    Returns:
        The step's own inputs, its record, the loss, and the parameters that it leads back to.
    """
    inputs = train_inputs(golden)
    height, width = inputs.image.shape[2:]
    stored = [golden.tensors[f"rpn.proposals.{i}"] for i in range(inputs.image.shape[0])]
    given = {
        "inputs": inputs,
        "noise": sampling_noise(golden, config, anchor_count(config.anchors, (height, width))),
        "proposals": _proposals(stored, config.rpn.train_proposals),
    }
    recorder = Recorder({k: _to(v, device) for k, v in given.items()})
    params = {k: v.detach() for k, v in params.items()}
    for value in trainable(config, params).values():
        value.requires_grad_()
    step = make_loss_step(config, image_config(golden), (height, width), compute, recorder=recorder)
    loss, losses = mean_losses(step(params, buffers, _to(train_batch(golden), device)))
    record = training_record(recorder.seen, loss, losses)
    return recorder.seen["inputs"][0], record, loss, params


def run_detections(
    golden: GoldenSet,
    config: DetectorConfig,
    params: Params,
    buffers: Params,
    device: torch.device,
    compute: Compute,
) -> Iterator[tuple[Inputs, Record, Tensor]]:
    """Inference on each of a set's test images, from the reference's inputs and proposals.

    Yields:
        The step's own inputs, its record, and masks at original size.
    """
    image = 0
    while f"test{image}.img" in golden.tensors:
        inputs = test_inputs(golden, image)
        height, width = inputs.image.shape[2:]
        stored = golden.tensors[f"test{image}.proposals"]
        given = {
            "inputs": inputs,
            "proposals": _proposals([stored], config.rpn.test_proposals),
        }
        recorder = Recorder({k: _to(v, device) for k, v in given.items()})
        step = make_detect_step(config, image_config(golden), (height, width), compute, recorder)
        found = step(params, buffers, _to(test_batch(golden, image), device))
        record = detection_record(recorder.seen, found)
        height, width = golden.facts[f"test{image}.meta"]["ori_shape"][:2]
        boxes = found.boxes[0].cpu()
        assert found.masks is not None  # the reference has mask heads
        masks = paste_masks(found.masks[0].cpu(), boxes, height, width)
        yield recorder.seen["inputs"][0], record, masks
        image += 1


def _proposals(stored: list[Tensor], count: int) -> Proposals:
    """Recorded proposals [n, 5] of each image, padded to a count."""
    boxes, scores = torch.zeros(len(stored), count, 4), torch.zeros(len(stored), count)
    valid = torch.zeros(len(stored), count, dtype=torch.bool)
    for i, rows in enumerate(stored):
        boxes[i, : len(rows)], scores[i, : len(rows)] = rows[:, :4], rows[:, 4]
        valid[i, : len(rows)] = True
    return Proposals(boxes, scores, valid)


def _to(values: Any, device: torch.device) -> Any:
    """Nested tuples of tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device), values)
