"""A trained detector on its device: images in, what it found out.

The same object serves `casc predict`, `casc eval`, training's evaluations and Python, so that all
of them see an image alike.

Legend: h x w an image as it is upright, Hi x Wi input canvas, H x W canvas that the network sees.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from casc.data.batch import Batch
from casc.data.index import Category
from casc.data.stream import to_device
from casc.device.compute import Compute
from casc.device.replay import Pool, ReplayedFunction
from casc.errors import UserError
from casc.evaluate.coco_results import ImageDetections, found_in
from casc.inference.images import KINDS, Picture, batch_of, canvas_of, holding_canvas, read_image
from casc.inference.results import Results
from casc.inference.settings import Settings, Views
from casc.inference.views import merged, views_of
from casc.model.detector_config import DetectorConfig, InferenceConfig
from casc.model.forward_detect import Detections
from casc.model.layers import Params
from casc.model.preprocess import ImageConfig
from casc.model.steps import DetectStep, make_detect_step

_AHEAD = 4
"""Batches' worth of images that are read at once, to find some for the same canvas."""


@dataclass(frozen=True, eq=False)
class Detector:
    """A trained detector, ready for images of any size. Threads may share it.

    `casc.load` makes one of a checkpoint.
    """

    params: Params = field(repr=False)
    """Weights by name, on the device; later updates in place are seen."""
    buffers: Params = field(repr=False)
    """Batch norm statistics by name."""
    model: DetectorConfig = field(repr=False)
    image: ImageConfig = field(repr=False)
    """How images are resized and normalised."""
    compute: Compute
    device: torch.device
    categories: tuple[Category, ...]
    """The classes, in the order of labels."""
    source: str = ""
    """The checkpoint."""
    split: str = "val2017"
    """What it was evaluated on when it was trained."""
    known: Literal["classes", "names", "none"] = "classes"
    """What of `categories` the checkpoint says: ids and names, names, or neither."""
    replay: bool = False
    """Whether the steps of `detect` are recorded at the first batch of a canvas and replayed from
    then on, which pays for many batches. Weights may change in place, and not be exchanged."""
    views: Views = field(default_factory=Views)
    """How often each image is looked at."""
    _steps: dict[object, DetectStep] = field(default_factory=dict, init=False, repr=False)
    _pool: Pool = field(default_factory=Pool, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.views.check()
        if self.views.several and self.model.inference.soft_nms != "off":
            raise UserError(
                "--soft-nms: what tiles, flips and scales find is merged by suppression; leave out"
                " one or the other"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names, in the order of labels."""
        return tuple(category.name for category in self.categories)

    @property
    def most(self) -> int | None:
        """The most detections of an image; None with tiles, each of which may give as many."""
        return self.model.inference.detections if self.views.tiles is None else None

    @overload
    def __call__(self, images: Picture, *, threshold: float = ..., batch: int = ...) -> Results: ...

    @overload
    def __call__(
        self, images: Sequence[Picture], *, threshold: float = ..., batch: int = ...
    ) -> list[Results]: ...

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float = 0.5,
        batch: int = 1,
    ) -> Results | list[Results]:
        """Detect objects.

        Args:
            images: one image, or a list of them: paths, URLs, a file's bytes, Pillow's images,
                arrays `[h, w, 3]` uint8 RGB, tensors `[3, h, w]` uint8, or float in [0, 1]; of
                a model of other channels, as many. Files and Pillow's images are turned upright
                as their EXIF data says.
            threshold: detections with a lower score are left out. It may be below the model's own.
            batch: images per step; those of similar aspect share one.

        Returns:
            What was found in the image, or a list of that, in the images' order.

        Raises:
            UserError: an image can't be read or isn't as it should be, the threshold is out of
                range, or the model's output isn't finite.
        """
        if isinstance(images, KINDS):
            return next(self.stream([images], threshold=threshold))
        return list(self.stream(images, threshold=threshold, batch=batch))

    def stream(
        self, images: Iterable[Picture], *, threshold: float = 0.5, batch: int = 1
    ) -> Iterator[Results]:
        """Yield what is found in one image after the other, for more than memory holds.

        Arguments and errors are those of a call; few images are read ahead.
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must be in [0, 1], not {threshold}")
        if batch < 1:
            raise UserError(f"batch must be at least 1, not {batch}")
        waiting = iter(images)
        ahead = 1 if batch == 1 else _AHEAD * batch
        while some := list(islice(waiting, ahead)):
            yield from self._some([self.read(picture) for picture in some], threshold, batch)

    def read(self, picture: Picture) -> np.ndarray:
        """Give an image `[h, w, c]` uint8 as a call would see it; errors are those of a call."""
        return read_image(picture, self.image.channels)

    def detect(
        self,
        batch: Batch,
        size: tuple[int, int],
        inference: InferenceConfig | None = None,
        image: ImageConfig | None = None,
    ) -> Detections:
        """Detections of a batch on the device whose images fit the canvas `size` (H, W).

        Args:
            batch: its ground truth isn't looked at.
            size: the canvas.
            inference: from scores to detections, in place of the model's.
            image: how images are resized, in place of the model's.
        """
        inference, image = inference or self.model.inference, image or self.image
        key = inference, image, size, tuple(t.shape for t in batch if t is not None)
        # One device does one thing at a time, and tracing isn't made for threads.
        with self._lock:
            if key not in self._steps:
                model = replace(self.model, inference=inference)
                step = make_detect_step(model, image, size, self.compute)
                self._steps[key] = _replayed(step, self._pool) if self.replay else step
            return self._steps[key](self.params, self.buffers, batch)

    def find(self, batches: Iterable[tuple[Batch, tuple[int, int]]]) -> Iterator[ImageDetections]:
        """Yield what is found in each image of some batches, looked at as `views` says.

        Args:
            batches: each in host memory, with the canvas (H, W) that its images fit.
        """
        if self.views == Views():
            yield from found_in(
                (self.detect(to_device(batch, self.device), size), batch.image_id, batch.size)
                for batch, size in batches
            )
            return
        for batch, _ in batches:
            sizes = batch.size.long().tolist()
            rows = [row for row, number in enumerate(batch.image_id.tolist()) if number >= 0]
            images = [batch.image[i, : sizes[i][0], : sizes[i][1]].numpy() for i in rows]
            found = self._look(images, self.model.inference, len(batch.image_id))
            for row, each in zip(rows, found, strict=True):
                yield each._replace(image_id=int(batch.image_id[row]))

    def with_settings(self, settings: Settings) -> "Detector":
        """Give a detector of the same weights that makes other detections of scores.

        Raises:
            UserError: a setting is out of range, or there is no such class.
        """
        inference = settings.applied(self.model.inference, self.categories)
        return replace(self, model=replace(self.model, inference=inference))

    def with_views(self, views: Views) -> "Detector":
        """Give a detector of the same weights that looks at each image so often.

        Raises:
            UserError: one of the numbers is out of range, or the model lowers scores (soft-NMS)
                where several looks are merged by suppression.
        """
        return replace(self, views=views)

    def check_classes(self, categories: Sequence[Category], where: str) -> None:
        """Refuse a data set of other classes, or of the same in another order.

        Args:
            categories: the data set's.
            where: what errors call it.

        Raises:
            UserError: naming the first class that differs.
        """
        if self.known != "none":
            for i, pair in enumerate(zip(self.categories, categories, strict=False)):
                trained, wanted = (self._called(category) for category in pair)
                if trained != wanted:
                    raise UserError(
                        f"{self.source}: class {i} is {trained}, in {where} it is"
                        f" {wanted}{self._ways_out()}"
                    )
        if len(self.categories) != len(categories):
            raise UserError(
                f"{self.source}: trained on {len(self.categories)} classes, {where} has"
                f" {len(categories)}{self._ways_out()}"
            )

    def _ways_out(self) -> str:
        return (
            "; take shards of the checkpoint's classes in their order, or train it on these:"
            f" casc train finetune --init {self.source} --data SHARDS"
        )

    def _called(self, category: Category) -> str:
        return repr(category.name) + (f" (id {category.id})" if self.known == "classes" else "")

    def _some(
        self, images: Sequence[np.ndarray], threshold: float, batch: int
    ) -> Iterator[Results]:
        """What is found in a few images, in their order."""
        inference = self.model.inference
        if threshold < inference.score_threshold:
            inference = replace(inference, score_threshold=threshold)
        for image, found in zip(images, self._look(images, inference, batch), strict=True):
            yield Results(found, self.categories, image).filter(threshold=threshold)

    def _look(
        self, images: Sequence[np.ndarray], inference: InferenceConfig, batch: int
    ) -> Iterator[ImageDetections]:
        """What is found in a few images, merged of as many looks as `views` says."""
        looks = [views_of(self.views, self.image.short, *image.shape[:2]) for image in images]
        pairs = zip(images, looks, strict=True)
        seen = [(view.of(image), view.short) for image, views in pairs for view in views]
        found = iter(self._found(seen, inference, batch))
        for image, views in zip(images, looks, strict=True):
            height, width = image.shape[:2]
            yield merged(views, [next(found) for _ in views], (height, width), inference)

    def _found(
        self, images: Sequence[tuple[np.ndarray, int]], inference: InferenceConfig, batch: int
    ) -> list[ImageDetections]:
        """What is found in images, each resized to a shorter side; equal canvases go together."""
        by_canvas: dict[tuple[ImageConfig, tuple[int, int]], list[int]] = {}
        for number, (image, short) in enumerate(images):
            # The model's own size to the bit, others in proportion.
            resize = replace(
                self.image, short=short, long=self.image.long * short // self.image.short
            )
            size = canvas_of(resize, *image.shape[:2])
            by_canvas.setdefault((resize, size), []).append(number)
        found: dict[int, ImageDetections] = {}
        for (resize, size), numbers in by_canvas.items():
            for start in range(0, len(numbers), batch):
                part = numbers[start : start + batch]
                # What is compiled has one shape: the last batch is filled up.
                rows = batch if self.compute.compile else len(part)
                held = [holding_canvas(*images[i][0].shape[:2]) for i in part]
                pixels = max(h for h, _ in held), max(w for _, w in held)
                made = batch_of({i: images[i][0] for i in part}, pixels, rows)
                detections = self.detect(to_device(made, self.device), size, inference, resize)
                for each in found_in([(detections, made.image_id, made.size)]):
                    found[each.image_id] = each
        return [found[number] for number in range(len(images))]


def _replayed(step: DetectStep, pool: Pool) -> DetectStep:
    """The same step for weights that stay where they are: recorded when first called."""
    made: list[ReplayedFunction] = []
    # What detections there are: some detectors give no masks.
    given: list[str] = []

    def detect(params: Params, buffers: Params, batch: Batch) -> Detections:
        columns = {name: value for name, value in batch._asdict().items() if value is not None}
        names = tuple(columns)
        if not made:

            def run(*values: Tensor) -> list[Tensor]:
                found = step(params, buffers, Batch(**dict(zip(names, values, strict=True))))
                there = {k: v for k, v in found._asdict().items() if v is not None}
                given[:] = there
                return list(there.values())

            made.append(ReplayedFunction(run, pool))
        return Detections(**dict(zip(given, made[0](*columns.values()), strict=True)))

    return detect
