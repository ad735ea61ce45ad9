"""What was found in an image.

Legend: D detections, best first; h x w the image, upright.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from casc.data.index import Category
from casc.draw import draw_instances
from casc.errors import UserError
from casc.evaluate.coco_results import ImageDetections, Result, image_results
from casc.evaluate.mask_rle import encode_masks, paste_masks
from casc.inference.settings import labels_of


@dataclass(frozen=True)
class Detection:
    """One object."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the image."""
    score: float
    label: int
    """From 0, a position in the model's classes."""
    name: str
    """The class's."""
    _of: "Results" = field(repr=False, compare=False)

    @property
    def mask(self) -> np.ndarray | None:
        """`[h, w]` bool; None where the model has no masks."""
        masks = self._of.masks
        return None if masks is None else masks[0]

    @property
    def mask_score(self) -> float | None:
        """What the mask is ranked by; None where the model doesn't score masks."""
        scores = self._of.found.mask_scores
        return None if scores is None else float(scores[0])


@dataclass(frozen=True, eq=False)
class Results:
    """The detections of an image; iterating gives each, an index or slice a part of them."""

    found: ImageDetections = field(repr=False)
    """Boxes, scores, labels and masks as the heads gave them."""
    categories: tuple[Category, ...] = field(repr=False)
    """The model's classes, in the order of labels."""
    image: np.ndarray = field(repr=False)
    """`[h, w, 3]` uint8 RGB, upright."""

    def __post_init__(self) -> None:
        for name, values in (("box", self.boxes), ("score", self.scores)):
            finite = np.isfinite(values)
            if not finite.all():
                raise UserError(
                    f"detection {int(np.argwhere(~finite)[0, 0])}: its {name} is not finite; the"
                    " parameters have probably diverged"
                )

    @property
    def boxes(self) -> np.ndarray:
        """`[D, 4]` float32: x0, y0, x1, y1 in pixels of the image."""
        return self.found.boxes

    @property
    def scores(self) -> np.ndarray:
        """`[D]` float32, falling."""
        return self.found.scores

    @property
    def labels(self) -> np.ndarray:
        """`[D]` int64, positions in `categories`."""
        return self.found.labels

    @property
    def names(self) -> list[str]:
        """Each detection's class."""
        return [self.categories[label].name for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """`[D, h, w]` bool, made each time it is asked for: D times as large as the image.

        None where the model has no masks.
        """
        if self.found.masks is None:
            return None
        masks, boxes = torch.from_numpy(self.found.masks), torch.from_numpy(self.boxes)
        return paste_masks(masks, boxes, self.found.height, self.found.width).numpy()

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for i, name in enumerate(self.names):
            x0, y0, x1, y1 = self.boxes[i].tolist()
            one = self[i]
            yield Detection((x0, y0, x1, y1), float(self.scores[i]), int(self.labels[i]), name, one)

    def __getitem__(self, which: int | slice | np.ndarray) -> "Results":
        """Keep the detections at an index, in a slice, or where an array `[D]` bool or int says."""
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"detection {which} of {len(self)}")
            which = slice(which, which + 1 or None)
        columns = {key: getattr(self.found, key) for key in _COLUMNS}
        columns = {key: None if v is None else v[which] for key, v in columns.items()}
        return replace(self, found=self.found._replace(**columns))

    def filter(
        self, *, threshold: float = 0.0, classes: Collection[str | int] | None = None
    ) -> "Results":
        """Keep detections of a score and of some classes.

        Args:
            threshold: lower scores go.
            classes: names or labels; None keeps all.

        Raises:
            UserError: there is no such class.
        """
        keep = ~(self.scores < threshold)
        if classes is not None:
            keep &= np.isin(self.labels, labels_of(classes, self.categories))
        return self[keep]

    def draw(self) -> Image.Image:
        """Give the image with boxes, masks, names and scores; small images are enlarged."""
        masks = [result.get("segmentation") for result in self.to_coco()]
        drawn = draw_instances(
            self.image, self.boxes, self.names, labels=self.labels, masks=masks, scores=self.scores
        )
        return Image.fromarray(drawn)

    def to_coco(self, image_id: int = 0) -> list[Result]:
        """Give COCO's results: `image_id`, `category_id`, `bbox`, `score`, `segmentation` RLE.

        Without the last where the model has no masks; with `mask_score` where it scores them.
        """
        ids = [category.id for category in self.categories]
        return image_results(self.found._replace(image_id=image_id), ids)

    def to_dict(self) -> dict[str, Any]:
        """Give what JSON can hold: the image's size, and of each detection all there is.

        `box` is x0, y0, x1, y1, `mask` COCO's compressed run lengths, where the model has masks,
        and `mask_score` what they are ranked by, where it scores them.
        """
        height, width = self.found.height, self.found.width
        detections: list[dict[str, Any]] = [
            {"box": list(d.box), "score": d.score, "label": d.label, "name": d.name} for d in self
        ]
        if self.found.masks is not None:
            masks, boxes = torch.from_numpy(self.found.masks), torch.from_numpy(self.boxes)
            for each, mask in zip(
                detections, encode_masks(masks, boxes, height, width), strict=True
            ):
                each["mask"] = mask
        if self.found.mask_scores is not None:
            for each, score in zip(detections, self.found.mask_scores.tolist(), strict=True):
                each["mask_score"] = score
        return {"height": height, "width": width, "detections": detections}

    def to_supervision(self) -> Any:
        """Give `supervision.Detections` with masks if there are any, and names as `class_name`.

        Raises:
            UserError: supervision isn't installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision: needs `pip install supervision`") from None
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=object).astype(str)},
        )


_COLUMNS = ("boxes", "scores", "labels", "masks", "mask_scores")
