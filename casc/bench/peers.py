"""The peer to measure against: torchvision's Mask R-CNN, on the same images and objects.

It is set up like the reference where it can be: ResNet-50 with frozen batch norm and frozen
first stage, 256 anchors and 512 RoIs per image, no resizing. It has one box and one mask
stage where the cascade has three.
"""

import time
from typing import Any

import torch
from torch import Tensor

from casc.bench.batch import CLASSES, Job, Load, made_up_batch
from casc.data.batch import Batch
from casc.device.devices import synchronize


def mask_rcnn(load: Load) -> Any:
    """Torchvision's Mask R-CNN R50-FPN with fresh weights."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    return MaskRCNN(
        backbone,
        num_classes=CLASSES + 1,
        min_size=min(load.canvas),
        max_size=max(load.canvas),
        box_batch_size_per_image=512,
        rpn_pre_nms_top_n_train=2000,
        rpn_post_nms_top_n_train=2000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_test=1000,
    )


def images_of(batch: Batch) -> list[Tensor]:
    """[3, H, W] float32 in [0, 1], each at its own size."""
    return [
        image[: int(h), : int(w)].permute(2, 0, 1).float() / 255
        for image, (h, w) in zip(batch.image, batch.size.tolist(), strict=True)
    ]


def targets_of(batch: Batch) -> list[dict[str, Any]]:
    """Boxes, labels from 1 on and bitmaps of square objects, as torchvision wants them."""
    targets = []
    for i in range(batch.image.shape[0]):
        boxes = batch.boxes[i][batch.valid[i]]
        masks = torch.zeros((len(boxes), *batch.image.shape[1:3]), dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append(
            {"boxes": boxes, "labels": batch.labels[i][batch.valid[i]] + 1, "masks": masks}
        )
    return targets


class Training:
    """Losses and gradients; bfloat16 means autocast, as torchvision's users run it."""

    def __init__(self, job: Job):
        self.device, self.dtype = torch.device(job.device), getattr(torch, job.dtype)
        self.model = mask_rcnn(job.load).to(self.device).train()
        batch = made_up_batch(job.load, CLASSES)
        self.images = [image.to(self.device) for image in images_of(batch)]
        self.targets = [
            {k: v.to(self.device) for k, v in target.items()} for target in targets_of(batch)
        ]

    def step(self) -> dict[str, float]:
        """One step."""
        start = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(self.images, self.targets)
        total = torch.stack(list(losses.values())).sum()
        synchronize(self.device)
        middle = time.perf_counter()
        total.backward()
        synchronize(self.device)
        end = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        return {"step_s": end - start, "forward_s": middle - start, "backward_s": end - middle}

    def facts(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


class Inference:
    """Detections with 28x28 masks, not pasted: what a detector of this family returns first."""

    def __init__(self, job: Job):
        self.device, self.dtype = torch.device(job.device), getattr(torch, job.dtype)
        self.model = mask_rcnn(job.load).to(self.device).eval()
        # Pasting masks into the image belongs to the evaluation, as it does in casc.
        self.model.transform.postprocess = lambda result, *_: result
        self.images = [i.to(self.device) for i in images_of(made_up_batch(job.load, CLASSES))]
        self.found = 0.0

    def step(self) -> dict[str, float]:
        """One batch."""
        start = time.perf_counter()
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            found = self.model(self.images)
        synchronize(self.device)
        self.found = sum(len(f["boxes"]) for f in found) / len(found)
        return {"step_s": time.perf_counter() - start}

    def facts(self) -> dict[str, Any]:
        """How many detections an image had: its mask head runs on those only."""
        return {"detections": self.found}
