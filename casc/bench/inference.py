"""Inference: backbone to boxes, scores, labels and 28x28 masks."""

import time
from typing import Any

import torch

from casc.bench import budgets
from casc.bench.batch import CLASSES, Job, made_up_batch
from casc.bench.train import compute_of, image_config
from casc.data.stream import to_device
from casc.device.devices import synchronize
from casc.model.detector import init
from casc.model.detector_config import DetectorConfig
from casc.model.steps import make_detect_step, to_format


class Inference:
    """casc's detection step with fresh weights; its masks always are those of 100 boxes."""

    def __init__(self, job: Job):
        self.config, self.device, compute = (
            DetectorConfig(classes=CLASSES),
            torch.device(job.device),
            compute_of(job),
        )
        params, buffers = init(self.config, torch.Generator().manual_seed(0))
        self.params = {
            k: v.to(self.device) for k, v in to_format(params, compute.memory_format).items()
        }
        self.buffers = {k: v.to(self.device) for k, v in buffers.items()}
        self.batch = to_device(made_up_batch(job.load, CLASSES), self.device)
        self.detect = make_detect_step(
            self.config, image_config(job.load), job.load.canvas, compute
        )
        self.found = 0.0

    def step(self) -> dict[str, float]:
        """One batch."""
        start = time.perf_counter()
        found = self.detect(self.params, self.buffers, self.batch)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.found = found.valid.sum().item() / len(found.valid)
        return {"step_s": seconds}

    def facts(self) -> dict[str, Any]:
        """Budgets."""
        return {
            "detections": self.found,
            **budgets.audit_inference(self.config)._asdict(),
        }
