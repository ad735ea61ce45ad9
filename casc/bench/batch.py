"""What is timed: a batch of a known load.

Nothing has to be on disk, and every run times the same work.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from casc.data.batch import Batch
from casc.errors import UserError

CLASSES = 80
"""COCO's."""


@dataclass(frozen=True)
class Load:
    """How much work a step is."""

    canvas: tuple[int, int] = (800, 1088)
    """Height and width in pixels, divisible by 32."""
    batch: int = 2
    """Images per step."""
    objects: int = 8
    """Objects per image."""
    positives: int | None = None
    """RoIs per image and stage that get a mask loss, at least. Fresh weights find hardly more
    than the objects themselves; a trained network has about 120."""
    capacity: int | None = None
    """Objects that a batch has room for; None for as many as it has, and one at least."""


What = Literal["train", "inference"]


@dataclass(frozen=True)
class Job:
    """What a worker times."""

    what: What
    who: Literal["casc", "torchvision"]
    load: Load
    dtype: str
    """float32 or bfloat16."""
    device: str
    compile: bool = True
    cache: Path | None = None
    """Folder for compiled code; None for the default one."""
    threads: int | None = None
    """Of the CPU; None for torch's choice."""
    replay: bool | None = None
    """Of training: None for losses and gradients alone; else with the update, replayed or not."""


def made_up_batch(load: Load, classes: int, seed: int = 0) -> Batch:
    """Noise images full of square objects, with a capacity of at least one.

    Positives are imposed by repeating objects, a pixel or less apart, as so many instances:
    every stage of every detector of this family adds ground truth to its samples.

    Args:
        load: sizes and counts.
        classes: K.
        seed: of the generator; the same seed gives the same batch.

    Raises:
        UserError: the objects exceed the capacity.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = load.canvas
    batch, places = load.batch, max(load.objects, 1)
    side = torch.rand(batch, places, 1, generator=generator) * 0.3 + 0.1
    sides = side * min(height, width) * torch.ones(2)
    room = torch.tensor([width, height]) - sides
    corner = torch.rand(batch, places, 2, generator=generator) * room
    labels = torch.randint(classes, (batch, places), generator=generator)
    instances = max(load.objects, load.positives or 0)
    capacity = max(instances, 1) if load.capacity is None else load.capacity
    if capacity < instances:
        raise UserError(f"capacity {capacity} doesn't hold {instances} objects")
    at = torch.arange(capacity) % places
    # The repetitions lie a little apart, as the proposals for one object do.
    shift = (
        torch.rand(batch, capacity, 2, generator=generator)
        * (torch.arange(capacity) >= places)[:, None]
    )
    corner, sides, labels = corner[:, at], sides[:, at] - 1, labels[:, at]
    valid = torch.arange(capacity).expand(batch, -1) < instances
    boxes = torch.cat([corner + shift, corner + shift + sides], dim=-1) * valid[..., None]
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
        labels=labels * valid,
        valid=valid,
        edges=edges.flatten(1, 2),
        edge_gt=torch.arange(capacity).repeat_interleave(4).expand(batch, -1).contiguous(),
        image_id=ids,
        seed=ids,
    )
