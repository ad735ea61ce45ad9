"""The peer to measure against: torchvision's Mask R-CNN, on the same images and objects.

It is set up like the reference where it can be: ResNet-50 with frozen batch norm and frozen
first stage, 256 anchors and 512 RoIs per image, no resizing. It has one box and one mask
stage where the cascade has three.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from casc.bench.batch import Load
from casc.data.batch import Batch
from casc.devices import synchronize

Step = Callable[[], dict[str, float]]
"""One step; gives figures of it."""


def mask_rcnn(load: Load, classes: int) -> nn.Module:
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
        num_classes=classes + 1,
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


def training_step(
    load: Load, batch: Batch, classes: int, dtype: torch.dtype, device: torch.device
) -> Step:
    """Losses and gradients; bfloat16 means autocast, as torchvision's users run it."""
    model = mask_rcnn(load, classes).to(device).train()
    images = [image.to(device) for image in images_of(batch)]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets_of(batch)]

    def step() -> dict[str, float]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        synchronize(device)
        for parameter in model.parameters():
            parameter.grad = None
        return {"loss": total.item()}

    return step


def inference_step(
    load: Load, batch: Batch, classes: int, dtype: torch.dtype, device: torch.device
) -> Step:
    """Detections with 28x28 masks, not pasted: what a detector of this family returns first."""
    model = mask_rcnn(load, classes).to(device).eval()
    images = [image.to(device) for image in images_of(batch)]

    def step() -> dict[str, float]:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            found = model(images)
        synchronize(device)
        return {"detections": float(sum(len(f["boxes"]) for f in found))}

    return step
