"""The parts of the page, each from what it shows to HTML."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from casc.draw.html import chart, escape, picture, table
from casc.evaluate.errors import KINDS, confusion_rows
from casc.evaluate.metrics import FIGURES, Evaluation
from casc.report.charts import group_size, typical_speed
from casc.report.error_analysis import ErrorAnalysis, Example
from casc.report.history import History, number

_MESSAGES = 200
_WIDEST = 1200
_TITLES = {"bbox": "box", "segm": "mask"}
_MATRIX = {"bbox": "boxes", "segm": "masks"}
_SIZES = ("APs", "APm", "APl")
_ENDS = {
    "results": "finished",
    "stopped": "stopped",
    "error": "failed",
    "crash": "failed",
    "": "going on, or killed",
}


def when(seconds: float) -> str:
    """A time of the log, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def summary(history: History, evaluated: tuple[int, Evaluation] | None) -> str:
    """How the run stands, in a few figures."""
    unfinished = history.steps is not None and history.step < history.steps
    status = "stopped" if history.ended == "results" and unfinished else _ENDS[history.ended]
    tiles = [("Status", status, f"log ends {when(history.last)}" if history.last else "empty log")]
    total = "" if history.steps is None else f" of {history.steps:,}"
    epochs = history.epoch_of(history.step)
    tiles.append(
        ("Steps", f"{history.step:,}{total}", f"{epochs:.4g} epochs" if history.parts else "")
    )
    kinds = [("Box AP", "box_ap"), ("Mask AP", "mask_ap")]
    if (history.recipe.get("model") or {}).get("masks") == "none":
        kinds.pop()
    for title, name in kinds:
        figures = [
            (value, r["step"])
            for r in history.evaluations
            if (value := number(r.get("figures") or {}, name)) is not None
        ]
        if not figures:
            last = (
                evaluated[1].figures.get("bbox" if name == "box_ap" else "segm", {})
                if evaluated
                else {}
            )
            value = last.get("AP")
            tiles.append((title, _percent(value), "" if evaluated else "not evaluated yet"))
            continue
        value, step = figures[-1]
        best, at = max(figures)
        more = f", best {_percent(best)} at step {at:,}" if at != step else ""
        tiles.append((title, _percent(value), f"at step {step:,}{more}"))
    speed = typical_speed(history)
    tiles.append(
        ("Throughput", "n/a" if speed is None else f"{speed:.3g} img/s", "median of the log")
    )
    if history.skipped:
        tiles.append(("Updates skipped", f"{history.skipped:,}", "loss or gradient not finite"))
    if len(history.parts) > 1:
        times = len(history.parts) - 1
        tiles.append(("Continued", "once" if times == 1 else f"{times:,} times", "after a stop"))
    cells = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>"
        for a, b, c in tiles
    )
    notes = ""
    if history.damaged:
        notes = note(f"{history.damaged} lines of the log can't be read and are left out.", True)
    return f'<dl class="tiles">{cells}</dl>{notes}'


def training(history: History, names: list[tuple[str, str]], first_batch: Path) -> str:
    """Charts of the log, and the first batch."""
    if not names:
        body = note("The log has no figures of training yet.")
    else:
        size = group_size(history)
        text = "Each point is the mean over one interval of the log."
        if size > 1:
            text = f"Each point is the mean of {size} intervals of the log."
        text += " Move over a chart, or focus it and use the arrow keys, to read its values."
        if len(history.parts) > 1:
            text += " Dotted lines show where the run was continued."
        if history.skipped:
            text += " Triangles show where updates were skipped."
        charts = "".join(chart(name, title) for name, title in names)
        body = f'<p>{escape(text)}</p><div class="charts">{charts}</div>'
    if first_batch.exists():
        with Image.open(first_batch) as image:
            image.thumbnail((_WIDEST, 4 * _WIDEST))
            shown = picture(np.asarray(image.convert("RGB")), "Images of the first batch, drawn")
        body += (
            '<h3>The first batch, as the model sees it</h3><div class="scroll single" tabindex="0"'
            f' role="region" aria-label="The first batch">{shown}</div>'
        )
    return body


def accuracy(history: History, evaluated: tuple[int, Evaluation] | None, charted: bool) -> str:
    """AP over epochs, COCO's twelve figures and each class's AP."""
    body = ""
    if charted:
        body += chart("ap", "AP on the validation split")
    if evaluated is None:
        why = (
            "evaluations are off (--evaluate-every 0)"
            if history.recipe.get("evaluate_every") == 0
            else "the run hasn't been evaluated yet"
        )
        return body + note(f"There are no figures of accuracy: {why}.")
    step, evaluation = evaluated
    types = list(evaluation.figures)
    where = f"at step {step:,}, {evaluation.images:,} images, {evaluation.instances:,} objects"
    rows = [
        [(text.replace("^2", "²"), text), *(_figure(evaluation.figures[t].get(key)) for t in types)]
        for key, text in FIGURES.items()
    ]
    body += table(f"COCO's figures in %, {where}", ["", *(_TITLES[t] for t in types)], rows)
    body = f'<div class="charts">{body}</div>'
    for count, what in (
        (evaluation.skipped, "annotations left out: no usable box or unknown category"),
        (evaluation.unmasked, "objects have no usable mask: mask AP ignores them"),
    ):
        if count:
            body += note(f"{count:,} {what}.")
    sized = [
        key
        for key in _SIZES
        if any(c.more.get(t, {}).get(key) is not None for c in evaluation.classes for t in types)
    ]
    rows = [
        [
            (c.name, c.name),
            (f"{c.instances:,}", c.instances),
            *(_figure(c.ap.get(t)) for t in types),
            *(_figure(c.more.get(t, {}).get(k)) for t in types for k in sized),
        ]
        for c in evaluation.classes
    ]
    heads = ["class", "objects", *(f"{_TITLES[t]} AP" for t in types)]
    heads += [f"{_TITLES[t]} {k}" for t in types for k in sized]
    title = f"AP by class in %, IoU .50 to .95, at step {step:,}"
    if sized:
        title += "; APs below 32² pixels, APm to 96², APl above"
    return body + table(title, heads, rows, sortable=True, filtered="Find a class")


def curves(analysis: ErrorAnalysis, step: int, choice: str) -> str:
    """Precision by recall, with the element that chooses a class."""
    options = "".join(
        f'<option value="{i}">{escape(name)}</option>'
        for i, name in enumerate(["all classes (mean)", *(c.name for c in analysis.categories)])
    )
    charts = "".join(
        chart(f"pr-{kind}", "Boxes" if kind == "bbox" else "Masks") for kind in analysis.curves
    )
    return (
        f"<p>{escape(_extent(analysis, step))} Precision is COCO's: the best at this recall or"
        " above."
        f'</p><div class="choice"><label for="{escape(choice)}">Class</label>'
        f'<select id="{escape(choice)}">{options}</select></div>'
        f'<div class="charts">{charts}</div>'
    )


def kinds(analysis: ErrorAnalysis, step: int, threshold: float) -> str:
    """What kinds of errors there are, and which classes are taken for which."""
    errors = analysis.evaluation.errors or {}
    rows = [
        [
            (text, text),
            *(
                cell
                for e in errors.values()
                for cell in ((f"{e['count'][kind]:,}", e["count"][kind]), _figure(e["lost"][kind]))
            ),
        ]
        for kind, text in KINDS.items()
    ]
    heads = [f"{_TITLES[t]} {what}" for t in errors for what in ("errors", "AP50 lost")]
    text = (
        f"{_extent(analysis, step)} Kinds are TIDE's (Bolya et al., 2020), at an IoU of .50; what"
        " is lost is the AP50, in %, that there would be more without them."
    )
    body = f"<p>{escape(text)}</p>" + table("Kinds of errors", ["", *heads], rows)
    names = [category.name for category in analysis.categories]
    for kind, found in errors.items():
        head, *lines = confusion_rows(found, names)
        cells = [[(str(value), value) for value in line] for line in lines]
        title = (
            f"Confusion matrix of {_MATRIX[kind]}, scores of {threshold:g} or more: rows are what"
            " objects are, columns what they were found as"
        )
        body += table(title, [str(name) for name in head], cells)
    return body


def images(analysis: ErrorAnalysis, step: int, threshold: float) -> str:
    """The worst and the best images, predictions beside ground truth."""
    kind = "mask" if "segm" in analysis.curves else "box"
    head = (
        f"{_extent(analysis, step)} Detections with a score of at least {threshold:g} are drawn and"
        f" counted. An image's quality is the summed {kind} IoU of the objects that were found (at"
        " an IoU of .50 or more), over the mean number of objects and detections (panoptic"
        " quality). 100\u00a0% means that all was found, exactly, and nothing else."
    )
    if not analysis.worst:
        return note("There are too few images with objects to call some best and some worst.")
    blocks = "".join(
        f'<h3>{title}</h3><div class="cards">{"".join(map(_card, shown))}</div>'
        for title, shown in (("Worst", analysis.worst), ("Best", analysis.best))
    )
    return f"<p>{escape(head)}</p>{blocks}"


def _card(shown: Example) -> str:
    quality = shown.quality
    text = f"{quality.found} found, {quality.missed} missed, {quality.wrong} wrong"
    title = f"{shown.file_name}: quality {_percent(quality.value)}"
    truth = picture(shown.truth, f"{shown.file_name} with its objects as annotated")
    predicted = picture(shown.predicted, f"{shown.file_name} with what was detected: {text}")
    return (
        f'<figure class="card"><figcaption>{escape(title)}<br>{escape(text)}</figcaption>'
        f'<div class="pair"><div>{truth}ground truth</div><div>{predicted}detections</div></div>'
        "</figure>"
    )


def _extent(analysis: ErrorAnalysis, step: int) -> str:
    if analysis.images == analysis.whole:
        return f"The checkpoint of step {step:,} on all {analysis.whole:,} images of the split."
    part = f"{analysis.images:,} of the split's {analysis.whole:,} images"
    return f"The checkpoint of step {step:,} on {part}."


def note(text: str, alarm: bool = False) -> str:
    """A paragraph that stands out."""
    return f'<p class="note{" alarm" if alarm else ""}">{escape(text)}</p>'


def _figure(value: float | None) -> tuple[str, float | None]:
    return ("n/a" if value is None else f"{100 * value:.1f}", value)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}\u00a0%"
