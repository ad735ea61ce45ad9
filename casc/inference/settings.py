"""Changes to how scores become detections, without training anew."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from casc.errors import UserError

if TYPE_CHECKING:  # torch and numpy take long to import, which --help needn't wait for
    from casc.data.index import Category
    from casc.model.detector import InferenceConfig


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
        if self.detections is not None and self.detections < 1:
            raise UserError(f"--detections {self.detections}: must be at least 1")
        given = {
            "score_threshold": self.threshold,
            "nms_iou": self.nms_iou,
            "detections": self.detections,
            "soft_nms": self.soft_nms,
            "class_agnostic": self.class_agnostic or None,
            "classes": tuple(labels_of(self.classes, categories)) or None,
        }
        return replace(inference, **{k: v for k, v in given.items() if v is not None})


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
