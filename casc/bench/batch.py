"""A batch of a known load: nothing has to be on disk, and every run times the same work."""

from dataclasses import dataclass

import torch

from casc.data.batch import Batch
from casc.detector import DetectorConfig


@dataclass(frozen=True)
class Load:
    """What is timed."""

    canvas: tuple[int, int] = (800, 1088)
    """Height and width in pixels, divisible by 32."""
    batch: int = 2
    """Images per step."""
    objects: int = 8
    """Objects per image."""
    steps: int = 5
    """Timed steps, after two that are not."""


def made_up_batch(config: DetectorConfig, load: Load, seed: int = 0) -> Batch:
    """Noise images full of square objects, with a capacity of at least one."""
    generator = torch.Generator().manual_seed(seed)
    height, width = load.canvas
    batch, count = load.batch, max(load.objects, 1)
    side = torch.rand(batch, count, 1, generator=generator) * 0.3 + 0.1
    sides = side * min(height, width) * torch.ones(2)
    room = torch.tensor([width, height]) - sides
    corner = torch.rand(batch, count, 2, generator=generator) * room
    valid = torch.arange(count).expand(batch, -1) < load.objects
    boxes = torch.cat([corner, corner + sides], dim=-1) * valid[..., None]
    x1, y1, x2, y2 = boxes.unbind(-1)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    edges = torch.stack(
        [torch.stack([*corners[i], *corners[(i + 1) % 4]], dim=-1) for i in range(4)], dim=2
    )
    ids = torch.arange(batch)
    return Batch(
        image=torch.randint(256, (batch, height, width, 3), dtype=torch.uint8, generator=generator),
        size=torch.tensor([[height, width]] * batch, dtype=torch.float32),
        boxes=boxes,
        labels=torch.randint(config.classes, (batch, count), generator=generator) * valid,
        valid=valid,
        edges=edges,
        image_id=ids,
        seed=ids,
    )
