"""Detect objects in image and video files: annotated ones, and what was found as JSON."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from casc.data.decode import ImageError
from casc.errors import UserError
from casc.evaluate.coco_results import Result, write_results
from casc.inference import video
from casc.inference.detector import Detector
from casc.inference.image_files import (
    Source,
    base_name,
    find_images,
    image_ids,
    names_of,
    reason_of,
    suffixes_of,
    targets_of,
)
from casc.inference.images import read_file

RESULTS_NAME = "predictions.json"


class Predicted(NamedTuple):
    """What `predict` did."""

    results: list[Result]
    """COCO results with `file_name` added."""
    pictures: list[Path]
    """The annotated pictures and videos, in the order of what they show."""
    failed: list[tuple[str, str]]
    """Files that were skipped, and why."""
    results_file: Path

    @property
    def exit_code(self) -> int:
        """What a command returns: 1 when a file was skipped."""
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
    """Detect objects in images and videos and write what was found.

    For each image `out_dir` gets a JPEG of the same name with boxes, masks and names, and
    all detections go to `out_dir/predictions.json` in COCO's results format with
    `file_name` added. Its image ids are those that `ids` lists, or 1, 2, ... in the images'
    order. Photographs are turned upright as their EXIF data says; boxes and masks are in pixels
    of the upright image.

    For each video or animation it gets an annotated mp4, and a file of JSON lines, one for each
    frame: `frame` from 0, `seconds`, and what `Results.to_dict` has.

    A file that can't be read is reported and skipped.

    Args:
        detector: what to run.
        paths: images, videos, folders (with those below them), URLs, and patterns such as
            `photos/*.jpg`.
        out_dir: made if it isn't there; files of the same names are overwritten.
        threshold: detections with a lower score are neither drawn nor written.
        ids: of the images by file name, from `listed_ids`.
        log: is given a line for each file.

    Raises:
        UserError: when `threshold` is out of range, `ids` lacks an image, a picture would
            overwrite an image that is read, or the model's output isn't finite.
        OSError: when `out_dir` can't be written.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], not {threshold}")
    files, failed = find_images(paths, suffixes_of(detector.image.channels) | video.SUFFIXES)
    for name, reason in failed:
        log(f"{name}: skipped: {reason}")
    names = names_of(files)
    stills = [file for file in files if not _is_video(file)]
    identities = dict(zip(stills, image_ids(stills, ids), strict=True))
    folder = Path(out_dir)
    targets = targets_of(files, folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: isn't a folder; give another")
    folder.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    pictures: list[Path] = []

    def skip(file: Source, error: Exception) -> None:
        failed.append((str(file), reason_of(error)))
        log(f"{file}: skipped: {reason_of(error)}")

    try:
        for file, name, target in zip(files, names, targets, strict=True):
            try:
                opened = _open(detector, file)
            except (UserError, OSError) as error:
                skip(file, error)
                continue
            if isinstance(opened, np.ndarray):
                found = detector(opened, threshold=threshold)
                coco = found.to_coco(identities[file])
                results += [{**result, "file_name": name} for result in coco]
                found.draw().save(target, format="JPEG", quality=92, subsampling=0)
                counts = Counter(found.names)
            else:
                target = target.with_suffix(".mp4")
                try:
                    counts = _predict_frames(detector, opened, target, threshold)
                except ImageError as error:
                    skip(file, error)
                    continue
            pictures.append(target)
            listed = ", ".join(f"{count} {key}" for key, count in counts.most_common())
            log(f"{file}: {listed or 'nothing found'} -> {target}")
    finally:
        # Whatever stops the run, what was found until then is kept.
        results_file = folder / RESULTS_NAME
        write_results(results, results_file)
    return Predicted(results, pictures, failed, results_file)


def _is_video(file: Source) -> bool:
    return PurePath(base_name(file)).suffix.lower() in video.SUFFIXES


def _open(detector: Detector, file: Source) -> np.ndarray | Iterator[video.Frame]:
    """An image, or the frames of a video or an animation."""
    if _is_video(file):
        _check_rgb(detector)
        if isinstance(file, Path):
            file.open("rb").close()  # what can't be opened is told now, and not at the first frame
            return video.read_video(file)
        return video.read_video(read_file(file))
    data = read_file(file)
    if not video.is_animated(data):
        return detector.read(data)
    _check_rgb(detector)
    return video.read_animation(data)


def _check_rgb(detector: Detector) -> None:
    channels = detector.image.channels
    if channels != 3:
        raise UserError(
            f"videos and animations are RGB, but the model's --image.channels is {channels}; give"
            " it images"
        )


def _predict_frames(
    detector: Detector, frames: Iterator[video.Frame], target: Path, threshold: float
) -> Counter[str]:
    """Write the annotated video and its lines; give how often each class was seen in a frame."""
    counts: Counter[str] = Counter()
    with (
        video.video_writer(target) as write,
        target.with_suffix(".jsonl").open("w", encoding="utf-8") as lines,
    ):
        for found in video.find_in_frames(detector, frames, threshold=threshold):
            # Line by line: what was found is there even if the rest never comes.
            lines.write(json.dumps(found.to_dict()) + "\n")
            write(found.results.draw(), found.seconds)
            counts.update(found.results.names)
    return counts
