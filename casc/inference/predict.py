"""Detect objects in pictures from files: annotated pictures and a COCO results file.

Legend: h x w the image as it is upright, Hi x Wi input canvas, D detections.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from casc.data.batch import Batch
from casc.data.index import Bucket, Category, canvas
from casc.draw import draw_instances
from casc.errors import UserError
from casc.evaluate.coco_results import Result, coco_results, write_results
from casc.inference.image_files import (
    find_images,
    image_ids,
    names_of,
    read_image,
    reason_of,
    targets_of,
)
from casc.model.detector import Detections

RESULTS_NAME = "predictions.json"


class Predicted(NamedTuple):
    """What `predict` did."""

    results: list[Result]
    """COCO results with `file_name` added."""
    pictures: list[Path]
    """The annotated pictures, in the order of the images."""
    failed: list[tuple[str, str]]
    """Images that were skipped, and why."""
    results_file: Path

    @property
    def exit_code(self) -> int:
        """What a command returns: 1 when an image was skipped."""
        return int(bool(self.failed))


def predict(
    detect: Callable[[Batch], Detections],
    paths: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    categories: Sequence[Category],
    *,
    score_threshold: float = 0.5,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
) -> Predicted:
    """Detect objects in images and write what was found.

    For each image `out_dir` gets a JPEG of the same name with boxes, masks and names, and
    all detections go to `out_dir/predictions.json` in COCO's results format with
    `file_name` added. Its image ids are the numbers that the files are named by, as COCO's
    are, or 1, 2, ... where not every name is a number of its own. Photographs are turned
    upright as their EXIF data says; boxes and masks are in pixels of the upright image.

    An image that can't be read is reported and skipped.

    Args:
        detect: the inference step; it sees whole images as evaluation does, in batches of one,
            on canvases of few different sizes (`holding_canvas`).
        paths: images, folders of images, and patterns such as `photos/*.jpg`.
        out_dir: made if it isn't there; files of the same names are overwritten.
        categories: the model's classes, in the order of labels.
        score_threshold: detections below are neither drawn nor written.
        device: where `detect` wants its batch.
        log: is given a line for each image.

    Raises:
        UserError: when `score_threshold` is out of range, a picture would overwrite an image
            that is read, or the model's output isn't finite.
        OSError: when `out_dir` can't be written.
    """
    if not 0 <= score_threshold <= 1:
        raise UserError(f"score_threshold must be in [0, 1], not {score_threshold}")
    files, failed = find_images(paths)
    for name, reason in failed:
        log(f"{name}: skipped: {reason}")
    names = names_of(files)
    folder = Path(out_dir)
    targets = targets_of(files, folder)
    folder.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    pictures: list[Path] = []
    try:
        for identity, file, name, target in zip(
            image_ids(files), files, names, targets, strict=True
        ):
            try:
                image = read_image(file)
            except (UserError, OSError) as error:
                failed.append((str(file), reason_of(error)))
                log(f"{file}: skipped: {reason_of(error)}")
                continue
            batch, scale = image_batch(image, holding_canvas(*image.shape[:2]), identity)
            batch = Batch._make(None if t is None else t.to(device) for t in batch)
            found = Detections(*(t[0].cpu() for t in detect(batch)))
            labels, image_results = _results(
                found, scale, image, identity, categories, score_threshold
            )
            results += [{**result, "file_name": name} for result in image_results]
            _draw(image, labels, image_results, categories, target)
            pictures.append(target)
            counts = Counter(categories[label].name for label in labels)
            listed = ", ".join(f"{count} {key}" for key, count in counts.most_common())
            log(f"{file}: {listed or 'nothing found'} -> {target}")
    finally:
        # Whatever stops the run, what was found until then is kept.
        results_file = folder / RESULTS_NAME
        write_results(results, results_file)
    return Predicted(results, pictures, failed, results_file)


def canvas_chooser(
    short: int, long: int, aspects: Sequence[float] = (1 / 1.52, 1 / 1.36, 1, 1.36, 1.52)
) -> Callable[[int, int], tuple[int, int]]:
    """Choose the canvas (H, W) that the network sees, for an image's (h, w).

    It is the one of the bucket that sharding puts the image in by default, so prediction and
    evaluation compute the same, and there are as many shapes to compile as buckets.

    Args:
        short: pixels of the shorter side that the network sees, unless
        long: pixels is exceeded by the longer side.
        aspects: width over height where buckets meet, ascending.
    """
    edges = [0.0, *aspects]
    tops: list[float | None] = [*aspects, None]
    canvases = []
    for low, high in zip(edges, tops, strict=True):
        bucket = Bucket("", low, high, height=1, width=1, instances=1, edges=1, samples=0)
        canvases.append(canvas(bucket, short, long))

    def canvas_for(height: int, width: int) -> tuple[int, int]:
        return canvases[sum(width / height > edge for edge in aspects)]

    return canvas_for


def holding_canvas(height: int, width: int) -> tuple[int, int]:
    """Give an input canvas (Hi, Wi) for a whole image: each side has four lengths an octave."""

    def length(side: int) -> int:
        step = max(64, (1 << (side - 1).bit_length()) // 8)
        return -(-side // step) * step

    return length(height), length(width)


def image_batch(
    image: np.ndarray, size: tuple[int, int], image_id: int = 0
) -> tuple[Batch, tuple[float, float]]:
    """Put an image on an input canvas, as a batch of one without ground truth.

    An image that is larger than the canvas is reduced to fit.

    Args:
        image: `[h, w, 3]` uint8 RGB.
        size: the canvas (Hi, Wi).
        image_id: at least 0.

    Returns:
        The batch on the CPU, and the image's pixels per pixel of the batch (in x, in y), by
        which detections have to be multiplied.
    """
    height, width = image.shape[:2]
    ratio = min(size[0] / height, size[1] / width, 1.0)
    rows, columns = max(1, round(height * ratio)), max(1, round(width * ratio))
    if ratio < 1:
        picture = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
        image = np.asarray(picture)
    canvas_image = torch.zeros((1, *size, 3), dtype=torch.uint8)
    canvas_image[0, :rows, :columns] = torch.from_numpy(np.array(image))
    batch = Batch(
        image=canvas_image,
        size=torch.tensor([[rows, columns]], dtype=torch.float32),
        boxes=torch.zeros((1, 1, 4)),
        labels=torch.zeros((1, 1), dtype=torch.int64),
        valid=torch.zeros((1, 1), dtype=torch.bool),
        edges=torch.zeros((1, 1, 1, 4)),
        image_id=torch.tensor([image_id]),
        seed=torch.zeros(1, dtype=torch.int64),
    )
    return batch, (width / columns, height / rows)


def _results(
    found: Detections,
    scale: tuple[float, float],
    image: np.ndarray,
    image_id: int,
    categories: Sequence[Category],
    score_threshold: float,
) -> tuple[list[int], list[Result]]:
    """Labels and COCO results of one image's detections `[D, ...]` above the threshold."""
    # `not <` keeps a score that isn't a number, for coco_results to refuse.
    keep = found.valid & ~(found.scores < score_threshold)
    labels = found.labels[keep]
    results = coco_results(
        found.boxes[keep] * torch.tensor([*scale, *scale]),
        found.scores[keep],
        labels,
        found.masks[keep],
        image_id=image_id,
        height=image.shape[0],
        width=image.shape[1],
        category_ids=[category.id for category in categories],
    )
    return labels.tolist(), results


def _draw(
    image: np.ndarray,
    labels: Sequence[int],
    results: Sequence[Result],
    categories: Sequence[Category],
    target: Path,
) -> None:
    boxes = np.array([result["bbox"] for result in results]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    drawn = draw_instances(
        image,
        boxes,
        [categories[label].name for label in labels],
        labels=labels,
        masks=[result["segmentation"] for result in results],
        scores=[result["score"] for result in results],
    )
    Image.fromarray(drawn).save(target, format="JPEG", quality=92, subsampling=0)
