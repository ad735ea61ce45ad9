"""Detections of steps that are replayed, and of steps that aren't: `replayed_detections.py OUT`.

Batches of two canvases take turns, and the weights change in place between them.
"""

import sys
from dataclasses import replace

import counts
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_npu.recording import recording

from casc.bench.batch import Load, made_up_batch
from casc.data.index import Category
from casc.data.stream import to_device
from casc.device.devices import choose_device
from casc.inference.detector import Detector
from casc.model import detector as detectors
from casc.model.choose_compute import choose_compute
from casc.model.forward_detect import Detections

CANVASES = ((96, 128), (128, 96), (96, 128), (96, 128), (128, 96))


def main(out: str) -> None:
    """Detect both ways; all detections side by side, and the launches of each call."""
    device = choose_device("npu:0")
    inference = replace(counts.MODEL.inference, score_threshold=0.0, detections=20)
    model = replace(counts.MODEL, inference=inference)
    compute, _ = choose_compute(model, device, dtype="float32", compile=False)
    params, buffers = detectors.init(model, torch.Generator().manual_seed(0))
    params = {name: value.to(device) for name, value in params.items()}
    launched = Detector(
        params=params,
        buffers={name: value.to(device) for name, value in buffers.items()},
        model=model,
        image=counts.IMAGE,
        compute=compute,
        device=device,
        categories=tuple(Category(i, str(i)) for i in range(counts.CLASSES)),
    )
    replayed = replace(launched, replay=True)
    made: dict[str, Tensor] = {}
    kept: list[tuple[str, Detections]] = []
    for number, canvas in enumerate(CANVASES):
        batch = made_up_batch(Load(canvas, batch=2, objects=3, capacity=4), counts.CLASSES, number)
        for name, detector in (("launched", launched), ("replayed", replayed)):
            given = to_device(batch, device)
            with recording() as found:
                kept.append((f"{name}.{number}", detector.detect(given, canvas)))
            made[f"{name}.{number}.launches"] = torch.tensor(sum(found.launches.values()))
        params["backbone.layer4.2.bn3.weight"] *= 1.5
    # Read at the end: what was replayed later must have left earlier results alone.
    for name, found in kept:
        there = {key: value for key, value in found._asdict().items() if value is not None}
        made |= {f"{name}.{key}": value.cpu() for key, value in there.items()}
    save_file({name: value.contiguous() for name, value in made.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
