"""What the page's charts draw: series of points, as plain data for its script.

A series' point is (x, y); a y of None is a gap. The script knows the rest from the axes: their
label with its unit, where they must begin and end, and whether they are shares.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from casc.report.error_analysis import ErrorAnalysis
from casc.report.history import History, Record, number

Chart = dict[str, Any]
Points = list[tuple[float, float | None]]
MOST_POINTS = 600
_MOST_MARKS = 200
_KINDS = (
    ("loss_cls", "Classification loss, by stage"),
    ("loss_bbox", "Box loss, by stage"),
    ("loss_mask", "Mask loss, by stage"),
)


def training_charts(history: History) -> list[tuple[str, str, Chart]]:
    """Name, title and data of what the log has of training; what it doesn't have is left out."""
    found: list[tuple[str, str, Chart]] = []
    names = {name for record in history.train for name in record}

    def add(name: str, title: str, unit: str, series: dict[str, str], **axis: Any) -> None:
        there = {shown: field for shown, field in series.items() if field in names}
        if there:
            lines = [
                {"name": shown, "points": _points(history.train, field)}
                for shown, field in there.items()
            ]
            chart = _chart("step", unit, lines, **axis)
            chart["marks"] = _marks(history)
            found.append((name, title, chart))

    add("loss", "Loss", "loss", {"loss": "loss"}, min=0)
    losses = [(r["step"], number(r.get("losses") or {}, "loss")) for r in history.evaluations]
    if any(value is not None for _, value in losses):
        line = {"name": "validation", "points": losses}
        if found:  # beside that of training
            series = found[0][2]["series"]
            series[0]["name"] = "training"
            series.append(line)
        else:
            found.append(("loss", "Loss", _chart("step", "loss", [line], min=0)))
    add("lr", "Learning rate", "learning rate", {"learning rate": "lr"}, min=0)
    add(
        "rpn", "Losses of the region proposals", "loss",
        {"objectness": "loss_rpn_cls", "box": "loss_rpn_bbox"}, min=0,
    )  # fmt: skip
    for kind, title in _KINDS:
        stages = [name for name in sorted(names) if re.fullmatch(rf"s\d{{1,3}}\.{kind}", name)]
        add(
            kind,
            title,
            "loss",
            {f"stage {int(s[1 : -1 - len(kind)]) + 1}": s for s in stages},
            min=0,
        )
    add("norm", "Norm of the gradient, before clipping", "norm", {"norm": "grad_norm"}, min=0)
    add("speed", "Throughput", "images per second", {"img/s": "images_per_second"}, min=0)
    add("wait", "Time spent waiting for data", "share of the time", {"waiting": "data_wait"},
        min=0, max=1, percent=True)  # fmt: skip
    gib: Callable[[float], float] = lambda value: value / 2**30  # noqa: E731
    if "memory" in names:
        lines = [{"name": "memory", "points": _points(history.train, "memory", gib)}]
        found.append(("memory", "Peak memory", _chart("step", "GiB", lines, min=0)))
    return found


def accuracy_chart(history: History) -> Chart | None:
    """AP of each evaluation over epochs."""
    lines = []
    for name, field in (
        ("box AP", "box_ap"), ("mask AP", "mask_ap"),
        ("box AP50", "box_ap50"), ("mask AP50", "mask_ap50"),
    ):  # fmt: skip
        points = [
            (history.epoch_of(r["step"]), number(r.get("figures") or {}, field))
            for r in history.evaluations
        ]
        if any(value is not None for _, value in points):
            lines.append({"name": name, "points": points})
    unit = "epoch" if history.steps_per_epoch else "step"
    return _chart(unit, "AP", lines, min=0, max=1, percent=True) if lines else None


def precision_charts(analysis: ErrorAnalysis, choice: str) -> dict[str, Chart]:
    """Precision by recall by IoU type, for all classes and for each; in thousandths.

    Args:
        analysis: the curves.
        choice: id of the page's element that chooses the class.
    """
    charts: dict[str, Chart] = {}
    for kind, precision in analysis.curves.items():
        # [T, 101, K] -> [3 curves, 101, K]: IoU .50, IoU .75, the mean over .50:.95
        curves = np.stack([precision[0], precision[5], precision.mean(axis=0)])
        known: np.ndarray = np.all(precision >= 0, axis=(0, 1))
        # Without any class there is no mean, and numpy would warn.
        mean = [curves[:, :, known].mean(axis=2)] if known.any() else [None]
        each = [curves[:, :, k] if known[k] else None for k in range(len(known))]
        chart = _chart("recall", "precision", [], min=0, max=1, percent=True)
        chart["x"] = {"label": "recall", "min": 0, "max": 1, "percent": True}
        chart["series"] = ["IoU .50", "IoU .75", "mean of .50 to .95"]
        chart["choices"] = [
            [] if c is None else np.rint(1000 * c).astype(int).tolist() for c in (*mean, *each)
        ]
        chart |= {"choice": choice, "dots": False}
        charts[kind] = chart
    return charts


def typical_speed(history: History) -> float | None:
    """Images per second: the median of the log's intervals."""
    speeds = [number(r, "images_per_second") for r in history.train]
    known = [speed for speed in speeds if speed is not None]
    return statistics.median(known) if known else None


def group_size(history: History) -> int:
    """How many of the log's records make a point."""
    return -(-len(history.train) // MOST_POINTS)


def _chart(x: str, y: str, series: Sequence[dict[str, Any]], **axis: Any) -> Chart:
    whole = {"min": 0, "whole": True}
    return {"x": {"label": x, **whole}, "y": {"label": y, **axis}, "series": list(series)}


def _points(
    records: Sequence[Record], field: str, convert: Callable[[float], float] = float
) -> Points:
    """Points of a figure; of long runs the mean of several, placed at the last one's step."""
    size = max(1, -(-len(records) // MOST_POINTS))
    points: Points = []
    for start in range(0, len(records), size):
        group = records[start : start + size]
        values = [number(record, field) for record in group]
        finite = [convert(value) for value in values if value is not None]
        points.append((group[-1]["step"], statistics.fmean(finite) if finite else None))
    return points


def _marks(history: History) -> list[dict[str, Any]]:
    """Where the run was continued, and where updates were skipped."""
    marks: list[dict[str, Any]] = [
        {"x": part.step, "label": f"continued at step {part.step:,}"} for part in history.parts[1:]
    ]
    skips = [r for r in history.train if r.get("skipped")]
    if len(skips) > _MOST_MARKS:
        return marks  # the page says how many in words
    for record in skips:
        count = int(record["skipped"])
        label = f"{count} update{'s' if count > 1 else ''} skipped"
        marks.append({"x": record["step"], "label": label, "alert": True})
    return marks
