"""A run's folder without a run, and what a checkpoint might have done."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from casc.config import to_json
from casc.data.index import Category
from casc.evaluate.metrics import FIGURES, ClassFigures, Evaluation, write_evaluation
from casc.report.error_analysis import ErrorAnalysis, Example
from casc.report.quality import Quality
from casc.train.recipe import Recipe

BEGAN = 1_800_000_000
EVIL = "<script>alert('a & b')</script>"


class Log:
    """Writes a run's folder as training does, record by record."""

    def __init__(self, folder: Path, *, steps: int = 100, name: str = "made up") -> None:
        self.folder, self.steps, self.clock = folder, steps, BEGAN
        folder.mkdir(parents=True)
        self.recipe = to_json(Recipe(name=name))
        (folder / "recipe.json").write_text(json.dumps(self.recipe))

    def add(self, kind: str, **values: Any) -> None:
        self.clock += 10
        line = json.dumps({"kind": kind, "time": self.clock, **values})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def start(self, step: int = 0, **facts: Any) -> None:
        about = {"steps": self.steps, "steps_per_epoch": 50, "device": "cpu", "world": 1}
        self.add("run", step=step, casc="0", torch="2", recipe=self.recipe, **about | facts)

    def train(self, step: int, loss: Any = 1.5, **values: Any) -> None:
        figures = {"loss": loss, "lr": 0.02, "images_per_second": 8.0, "data_wait": 0.25}
        figures |= {"s0.loss_cls": 0.5, "s1.loss_cls": 0.25, "memory": 2**30, "skipped": 0}
        self.add("train", step=step, **figures | values)

    def evaluate(self, step: int, ap: float = 0.5) -> Evaluation:
        figures = {"box_ap": ap, "mask_ap": ap / 2, "box_ap50": 0.75, "mask_ap50": None}
        self.add("evaluation", step=step, text="a table", figures=figures)
        evaluation = an_evaluation(ap)
        (self.folder / "evaluations").mkdir(exist_ok=True)
        write_evaluation(evaluation, self.folder / f"evaluations/step-{step:08d}.json")
        return evaluation


def an_evaluation(ap: float = 0.5) -> Evaluation:
    # Sorted by name, by box AP and by objects these come in three different orders.
    classes = (("zebra", 5, 0.9), ("ant", 70, 0.1), (EVIL, 3, 0.5), ("cat", 20, None))
    return Evaluation(
        figures={kind: dict.fromkeys(FIGURES, ap) for kind in ("bbox", "segm")},
        classes=tuple(
            ClassFigures(i + 1, name, count, {"bbox": value, "segm": value})
            for i, (name, count, value) in enumerate(classes)
        ),
        images=9,
        instances=98,
        detections=300,
    )


def a_look() -> ErrorAnalysis:
    names = [c.name for c in an_evaluation().classes]
    precision = np.linspace(1, 0, 101)[None, :, None] * np.ones((10, 1, len(names)))
    precision[:, :, 1] = 0.25
    precision[:, :, 3] = -1  # a class without objects
    picture = np.full((90, 120, 3), 128, np.uint8)
    shown = Example(7, f"{EVIL}.jpg", Quality(0.25, 1, 2, 3), picture, picture)
    categories = [Category(i + 1, name) for i, name in enumerate(names)]
    curves: Any = {"bbox": precision, "segm": precision}
    return ErrorAnalysis(9, 9, an_evaluation(), curves, categories, [shown], [shown])
