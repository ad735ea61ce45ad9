"""Made-up detections at the load of a trained detector on COCO, and the objects among them.

Box sides from a few pixels to the image's, masks that are smooth blobs.
"""

import numpy as np

from casc.evaluate.coco_results import ImageDetections
from casc.evaluate.workers import Truth, by_image

CLASSES = 80


def made_up_detections(
    images: int, detections: int, size: tuple[int, int], seed: int
) -> tuple[Truth, list[ImageDetections]]:
    """A ground truth of seven objects an image, and what a fair detector might find there."""
    rng = np.random.default_rng(seed)
    height, width = size
    entries, annotations, found = [], [], []
    angle = np.linspace(0, 2 * np.pi, 41)[:-1]
    for image_id in range(1, images + 1):
        entries.append({"id": image_id, "width": width, "height": height})
        truth = _boxes(rng, 7, size)
        classes = rng.integers(0, CLASSES, 3)[rng.integers(0, 3, 7)]
        for (x0, y0, x1, y1), label in zip(truth.tolist(), classes.tolist(), strict=True):
            outline = np.stack([x0 + x1 + (x1 - x0) * np.cos(angle),
                                y0 + y1 + (y1 - y0) * np.sin(angle)], axis=1) / 2  # fmt: skip
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) * np.pi / 4,
                    "iscrowd": 0,
                    "segmentation": [outline.ravel().tolist()],
                }
            )
        # Most of a hundred detections lie near an object or share a class with one.
        count = detections
        near = rng.integers(0, 7, count)
        boxes = _boxes(rng, count, size)
        hit = rng.random(count) < 0.3
        sides = (truth[:, 2:] - truth[:, :2])[near]
        shift = rng.normal(0, 0.06, (count, 4)) * np.concatenate([sides, sides], axis=1)
        boxes[hit] = (truth[near] + shift)[hit]
        labels = np.where(rng.random(count) < 0.7, classes[near], rng.integers(0, CLASSES, count))
        found.append(
            ImageDetections(
                image_id=image_id,
                height=height,
                width=width,
                boxes=np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4).astype(np.float32),
                scores=(rng.random(count) ** 4).astype(np.float32),
                labels=labels.astype(np.int64),
                masks=_blobs(rng, count),
            )
        )
    names = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)]
    return by_image({"images": entries, "annotations": annotations, "categories": names}), found


def _boxes(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Sides around 50 pixels, a third below 32 and a quarter above 96, as COCO's objects."""
    room = np.array(size[::-1], np.float64)
    side = 50 * np.exp(rng.normal(0, 1, (count, 1)))
    stretch = np.exp(rng.normal(0, 0.2, (count, 1)))
    sides = np.minimum(np.maximum(side * np.concatenate([stretch, 1 / stretch], 1), 2), room)
    corner = rng.random((count, 2)) * (room - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def _blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    """`[count, 28, 28]` float32, discs with a wavy soft edge."""
    place = (np.arange(28) + 0.5) / 14 - 1
    waves = np.cos(place[:, None] * np.pi * np.arange(4))
    wavy = np.einsum("yi,nij,xj->nyx", waves, rng.normal(0, 0.8, (count, 4, 4)), waves)
    logits = 6 * (0.75 - place[:, None] ** 2 - place**2) + wavy
    return (1 / (1 + np.exp(-logits))).astype(np.float32)
