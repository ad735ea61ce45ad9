"""Changes to how scores become detections, without training anew."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from casc.errors import UserError

if TYPE_CHECKING:  # torch and numpy take long to import, which --help needn't wait for
    from casc.data.index import Category
    from casc.model.detector_config import InferenceConfig

MOST_DETECTIONS = 100_000
"""More than the proposals and classes of any model make; each has a row of every tensor."""


@dataclass(frozen=True)
class Settings:
    """From scores to detections; what isn't given is as the model was trained with."""

    threshold: float | None = None
    """Leave out detections with a score below; may be under the model's own threshold."""
    nms_iou: float | None = None
    """Of a class's boxes that overlap by more than this, keep the best."""
    detections: int | None = None
    """The most detections per image."""
    soft_nms: Literal["off", "linear", "gaussian"] | None = None
    """Lower the scores of overlapped boxes instead of dropping them (Bodla et al., 2017)."""
    class_agnostic: bool = False
    """Let boxes of different classes suppress each other."""
    classes: tuple[str, ...] = ()
    """Only these classes, by name; none given: all."""

    def applied(
        self, inference: "InferenceConfig", categories: "tuple[Category, ...]"
    ) -> "InferenceConfig":
        """Give the model's configuration with these changes.

        Raises:
            UserError: naming the setting that is out of range, or the class that there isn't.
        """
        for name, value in (("threshold", self.threshold), ("nms_iou", self.nms_iou)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{_flag(name)} {value}: must be in [0, 1]")
        if self.detections is not None and not 1 <= self.detections <= MOST_DETECTIONS:
            raise UserError(f"--detections {self.detections}: must be 1 to {MOST_DETECTIONS}")
        given = {
            "score_threshold": self.threshold,
            "nms_iou": self.nms_iou,
            "detections": self.detections,
            "soft_nms": self.soft_nms,
            "class_agnostic": self.class_agnostic or None,
            "classes": tuple(labels_of(self.classes, categories)) or None,
        }
        return replace(inference, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class Views:
    """How often an image is looked at; by default once, as a whole."""

    tiles: int | None = None
    """Also look at tiles of so many pixels a side, for small objects in large images."""
    overlap: float = 0.2
    """What neighbouring tiles share at least, as a share of their side."""
    flips: bool = False
    """Also look at the mirror image."""
    scales: tuple[int, ...] = ()
    """Look at images with the shorter side at each of these lengths, and the limit of the longer
    one in proportion; none given: at the model's own."""

    def check(self) -> None:
        """Refuse what can't be honoured.

        Raises:
            UserError: naming the flag.
        """
        if self.tiles is not None and self.tiles < 32:
            raise UserError(f"--tiles {self.tiles}: must be at least 32 pixels")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"--overlap {self.overlap}: must be in [0, 0.9]")
        if self.tiles is None and self.overlap != Views.overlap:
            raise UserError(f"--overlap {self.overlap}: of what? --tiles 1024 makes tiles")
        given = " ".join(map(str, self.scales))
        if any(scale < 32 for scale in self.scales):
            raise UserError(f"--scales {given}: each must be at least 32 pixels")
        if len(set(self.scales)) != len(self.scales):
            raise UserError(f"--scales {given}: one is there twice; leave it out")

    @property
    def several(self) -> bool:
        """Whether what is found has to be merged."""
        return self.tiles is not None or self.flips or len(self.scales) > 1


def labels_of(classes: Collection[str | int], categories: "tuple[Category, ...]") -> list[int]:
    """Give the labels of classes named by name or label, ascending.

    Raises:
        UserError: there is no such class.
    """
    names = [category.name for category in categories]
    labels = set()
    for given in classes:
        if isinstance(given, str) and given in names:
            labels.update(i for i, name in enumerate(names) if name == given)
        elif isinstance(given, int) and 0 <= given < len(names):
            labels.add(given)
        else:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(f"no class {given!r}; the model knows {shown}")
    return sorted(labels)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
