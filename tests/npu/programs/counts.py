"""Count what steps ask of an NPU: `counts.py OUT.json`. Needs the emulator.

casc's step and that of torchvision's Mask R-CNN, which nobody wrote with NPUs in mind, run on the
same pictures. Widths and canvas are small. Bytes depend on them, launches only through suppression:
of 2,000 boxes a level, as in the reference, it takes 442 more than of the 200 here. casc may
use no operator that falls back to the CPU, except those listed.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from casc.bench.batch import Load, made_up_batch
from casc.data.batch import Batch
from casc.data.stream import to_device
from casc.device.devices import choose_device
from casc.distributed import ALONE, Exchange
from casc.model import detector
from casc.model.box_head import BoxHeadConfig
from casc.model.choose_compute import choose_compute
from casc.model.detector_config import DetectorConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.model.steps import make_detect_step, make_loss_step
from casc.train.accumulate import backward
from casc.train.guard import IN_A_ROW
from casc.train.meter import Meter
from casc.train.optim import Optim, make_optimizer, update
from casc.train.state import new_state

if TYPE_CHECKING:
    from torch_npu.recording import Recording

# Operators that torch_npu has no kernel for: why casc uses them all the same, and what happens.
MISSING: dict[str, str] = {}

CANVAS = (96, 128)
CLASSES = 4
# Every step has another number of objects per image; there is room for the most of them.
OBJECTS = (3, 5, 1, 4)
MODEL = DetectorConfig(
    classes=CLASSES,
    backbone=ResNetConfig(width=16),
    fpn=FPNConfig(channels=32),
    rpn=RPNConfig(
        channels=32, samples=32, train_pre_nms=200, train_proposals=50, test_pre_nms=100,
        test_proposals=50,
    ),
    box_head=BoxHeadConfig(samples=32, channels=64),
    mask_head=MaskHeadConfig(channels=16),
)  # fmt: skip
IMAGE = ImageConfig(short=CANVAS[0], long=CANVAS[1])


def batches() -> list[Batch]:
    loads = [Load(CANVAS, batch=2, objects=count, capacity=max(OBJECTS)) for count in OBJECTS]
    return [made_up_batch(load, CLASSES, seed) for seed, load in enumerate(loads)]


def pinned(batch: Batch) -> Batch:
    return Batch(*[column.pin_memory() for column in batch if column is not None])


def casc_step(capacity: str, dtype: str = "float32") -> Callable[[int], Tensor]:
    """The loop's step: batch to the device, losses, gradients, update, figures for the log."""
    device = choose_device("npu:0")
    mask_head = replace(MODEL.mask_head, capacity=capacity)
    model = replace(MODEL, mask_head=mask_head)
    compute, _ = choose_compute(model, device, dtype=dtype, compile=False)
    # Also where kernels are counted but compute nothing, and so don't prove right.
    compute = compute._replace(roi_kernel="native")
    params, buffers = detector.init(model, torch.Generator().manual_seed(0))
    state = new_state(model, params, buffers, device, compute.memory_format)
    loss_step = make_loss_step(model, IMAGE, CANVAS, compute)
    optimizer = make_optimizer(Optim(), state)
    rate, done = (
        torch.full((), 1e-4, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    exchange = Exchange([state.params[name] for name in state.momentum], ALONE)
    meter = Meter(device, ALONE)
    given = [pinned(batch) for batch in batches()]

    def step(number: int) -> Tensor:
        batch = to_device(given[number], device)
        loss, measures = backward(loss_step, state, batch, exchange, ALONE, 1)
        norm = update(optimizer, rate, state.guard, loss)
        measures = {"loss": loss, "grad_norm": norm, **measures}
        meter.add(measures, state.guard[IN_A_ROW], done)
        return loss

    return step


def casc_inference() -> Callable[[int], Tensor]:
    """Batch to the device, detections left there."""
    device = choose_device("npu:0")
    compute, _ = choose_compute(MODEL, device, dtype="float32", compile=False)
    params, buffers = detector.init(MODEL, torch.Generator().manual_seed(0))
    state = new_state(MODEL, params, buffers, device, compute.memory_format)
    detect = make_detect_step(MODEL, IMAGE, CANVAS, compute)
    given = [pinned(batch) for batch in batches()]

    def step(number: int) -> Tensor:
        found = detect(state.params, state.buffers, to_device(given[number], device))
        assert found.masks is not None
        return found.scores.sum() + found.masks.sum()

    return step


def torchvision_step() -> Callable[[int], Tensor]:
    """Its own model and sampling, torch's SGD, one number for the log left on the device."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    device = torch.device("npu:0")
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=CANVAS[0],
        max_size=CANVAS[1], rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=32,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    given = []
    for batch in batches():
        images = [image.permute(2, 0, 1).float().div(255).pin_memory() for image in batch.image]
        targets = []
        for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True):
            boxes = boxes[valid]
            masks = torch.zeros(len(boxes), *CANVAS, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            target = {"boxes": boxes, "labels": labels[valid] + 1, "masks": masks}
            targets.append({name: value.pin_memory() for name, value in target.items()})
        given.append((images, targets))

    def move(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    def step(number: int) -> Tensor:
        images, targets = given[number]
        losses = model(
            [move(image) for image in images],
            [{name: move(value) for name, value in target.items()} for target in targets],
        )
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def counts(step: Callable[[int], Tensor]) -> dict:
    """Of every step; how many shapes each is the first to have.

    A shape here is a launch's: operator, dtypes and sizes of all operands.
    """
    # The emulator's; by_operator.py takes the steps to the real package, which has no such file.
    from torch_npu.recording import recording

    losses = [step(0)]
    with recording() as first:
        losses.append(step(0))
    seen, later = set(first.signatures), []
    for number in range(1, len(OBJECTS)):
        with recording() as found:
            losses.append(step(number))
        later.append(summary(found) | {"new_shapes": len(found.signatures - seen)})
        seen |= found.signatures
    assert torch.stack(losses).isfinite().all()
    return {"shapes": len(first.signatures), "steps": later}


def summary(found: "Recording") -> dict:
    from torch_npu.recording import places

    return {
        "launches": sum(found.launches.values()),
        "bytes": found.bytes,
        "doubles": found.doubles,
        "reads": places(found.reads),
        "fallbacks": places(found.fallbacks),
        "copies": [[copy.name, copy.bytes, copy.where] for copy in found.copies],
        "operators": dict(found.launches),
    }


if __name__ == "__main__":
    from torch_npu.recording import without_fallbacks

    torch.set_num_threads(1)
    batch = [column for column in batches()[0] if column is not None]
    result: dict = {"batch": [column.nbytes for column in batch]}
    with without_fallbacks(MISSING):
        result["casc"] = counts(casc_step("full"))
        result["casc, bfloat16"] = counts(casc_step("full", "bfloat16"))
        result["casc, counted"] = counts(casc_step("counted"))
        result["casc, inference"] = counts(casc_inference())
    result["torchvision"] = counts(torchvision_step())
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
