"""Detect objects in images from files: annotated pictures and a COCO results file."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from casc.errors import UserError
from casc.evaluate.coco_results import Result, write_results
from casc.inference.detector import Detector
from casc.inference.image_files import (
    find_images,
    image_ids,
    names_of,
    reason_of,
    targets_of,
)
from casc.inference.images import read_image

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
    detector: Detector,
    paths: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    threshold: float = 0.5,
    ids: Mapping[str, int] | None = None,
    log: Callable[[str], None] = print,
) -> Predicted:
    """Detect objects in images and write what was found.

    For each image `out_dir` gets a JPEG of the same name with boxes, masks and names, and
    all detections go to `out_dir/predictions.json` in COCO's results format with
    `file_name` added. Its image ids are those that `ids` lists, or 1, 2, ... in the images'
    order. Photographs are turned upright as their EXIF data says; boxes and masks are in pixels
    of the upright image.

    An image that can't be read is reported and skipped.

    Args:
        detector: what to run.
        paths: images, folders (with those below them), URLs, and patterns such as `photos/*.jpg`.
        out_dir: made if it isn't there; files of the same names are overwritten.
        threshold: detections with a lower score are neither drawn nor written.
        ids: of the images by file name, from `listed_ids`.
        log: is given a line for each image.

    Raises:
        UserError: when `threshold` is out of range, `ids` lacks an image, a picture would
            overwrite an image that is read, or the model's output isn't finite.
        OSError: when `out_dir` can't be written.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], not {threshold}")
    files, failed = find_images(paths)
    for name, reason in failed:
        log(f"{name}: skipped: {reason}")
    names = names_of(files)
    identities = image_ids(files, ids)
    folder = Path(out_dir)
    targets = targets_of(files, folder)
    folder.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    pictures: list[Path] = []
    try:
        for identity, file, name, target in zip(identities, files, names, targets, strict=True):
            try:
                image = read_image(file)
            except (UserError, OSError) as error:
                failed.append((str(file), reason_of(error)))
                log(f"{file}: skipped: {reason_of(error)}")
                continue
            found = detector(image, threshold=threshold)
            results += [{**result, "file_name": name} for result in found.to_coco(identity)]
            found.draw().save(target, format="JPEG", quality=92, subsampling=0)
            pictures.append(target)
            counts = Counter(found.names)
            listed = ", ".join(f"{count} {key}" for key, count in counts.most_common())
            log(f"{file}: {listed or 'nothing found'} -> {target}")
    finally:
        # Whatever stops the run, what was found until then is kept.
        results_file = folder / RESULTS_NAME
        write_results(results, results_file)
    return Predicted(results, pictures, failed, results_file)
