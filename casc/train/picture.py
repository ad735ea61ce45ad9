"""The first batch as the model sees it, for a look before a long run.

Legend: B images, H x W canvas, E edges.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casc.data.batch import Batch
from casc.data.index import Category
from casc.device.compute import Compute
from casc.draw import draw_instances
from casc.model.copy_paste import covered
from casc.model.preprocess import ImageConfig, per_channel
from casc.model.steps import training_inputs
from casc.model.targets import Targets


def draw_batch(
    path: Path,
    batch: Batch,
    image: ImageConfig,
    canvas: tuple[int, int],
    categories: tuple[Category, ...],
    *,
    most: int = 8,
) -> None:
    """Save a contact sheet of a batch: resized, mirrored and padded, with what is to be found.

    Args:
        path: of the PNG.
        batch: on the CPU, as the loader gives it.
        image: as in training.
        canvas: (H, W).
        categories: names of the labels.
        most: images to draw.
    """
    columns = {k: v[:most] for k, v in batch._asdict().items() if v is not None}
    inputs = training_inputs(
        Batch(**columns), image, canvas, Compute(dtype=torch.float32, compile=False)
    )
    numbers = per_channel(image)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (numbers.mean, numbers.std))
    drawn = []
    targets = inputs.targets
    for i, pixels in enumerate(inputs.image):
        valid = targets.valid[i]
        # The padding is 0 after normalisation, so it shows as the mean colour.
        picture = (pixels * std + mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        labels = targets.labels[i][valid].tolist()
        ignored = _present(targets.regions, i)
        masks = None if targets.pasted is None else _masks(targets, i)
        drawn.append(
            draw_instances(
                picture.numpy(),
                torch.cat([targets.boxes[i][valid], ignored]).numpy(),
                [categories[label].name for label in labels] + ["ignored"] * len(ignored),
                labels=labels + [len(categories)] * len(ignored),
                masks=None if masks is None else masks + [None] * len(ignored),
                polygons=[
                    rings(targets.edges[i][targets.edge_gt[i] == k]) for k in valid.nonzero()[:, 0]
                ]
                + [[]] * len(ignored),
                crowds=[False] * len(labels) + [True] * len(ignored),
            )
        )
    Image.fromarray(_sheet(drawn)).save(path)


def _present(regions: Tensor | None, image: int) -> Tensor:
    """An image's regions to ignore [n, 4], those of no area left out."""
    if regions is None:
        return torch.zeros(0, 4)
    return regions[image][(regions[image, :, 2:] > regions[image, :, :2]).all(dim=-1)]


def rings(edges: Tensor) -> list[list[float]]:
    """The closed polygons `[x0, y0, x1, y1, ...]` that edges [E, 4] run along, in order."""
    found: list[list[float]] = []
    end: tuple[float, float] | None = None
    for x0, y0, x1, y1 in edges.tolist():
        if (x0, y0) == (x1, y1):
            continue
        if end != (x0, y0) or (found[-1][0], found[-1][1]) == end:
            found.append([])
        found[-1] += [x0, y0]
        end = (x1, y1)
    return found


def _masks(targets: Targets, image: int) -> list[np.ndarray | None]:
    """Of each valid object of an image what isn't hidden, `[H, W]`; None if it lies on top."""
    assert targets.pasted is not None
    pasted, edges = targets.pasted[image], targets.edges[image : image + 1]
    masks: list[np.ndarray | None] = []
    for k in targets.valid[image].nonzero()[:, 0].tolist():
        own = targets.edge_gt[image : image + 1] == k
        whole = covered(edges, own, (pasted.shape[0], pasted.shape[1]))[0]
        under = k < targets.valid.shape[1] // 2
        masks.append((whole & ~pasted).numpy() if under else None)
    return masks


def _sheet(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side in rows of four, on white."""
    height = max(p.shape[0] for p in pictures)
    width = max(p.shape[1] for p in pictures)
    across = min(len(pictures), 4)
    down = -(-len(pictures) // across)
    gap = 8
    sheet = np.full((down * (height + gap) - gap, across * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // across * (height + gap), i % across * (width + gap)
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet
