"""The report of a run: everything that is known of it, on one page."""

from typing import Any

from casc.draw.html import document, escape
from casc.evaluate.metrics import Evaluation
from casc.report import run_info as about
from casc.report import sections
from casc.report.charts import accuracy_chart, precision_charts, training_charts
from casc.report.error_analysis import ErrorAnalysis
from casc.report.history import History
from casc.train.loop import PICTURE

_CHOICE = "pr-class"


def report_page(
    history: History,
    evaluated: tuple[int, Evaluation] | None,
    analysis: tuple[int, ErrorAnalysis] | None,
    *,
    threshold: float = 0.5,
    without: str = "",
) -> str:
    """The page's HTML.

    Args:
        history: of the run.
        evaluated: the newest evaluation, and its step.
        analysis: a checkpoint's step and its errors; None leaves precision and images out.
        threshold: the score that `analysis` drew from.
        without: why there is no `analysis`.
    """
    training = training_charts(history)
    data: dict[str, Any] = {name: chart for name, _, chart in training}
    accuracy = accuracy_chart(history)
    if accuracy:
        data["ap"] = accuracy
    if analysis:
        step, errors = analysis
        if errors.images == errors.whole and (not evaluated or evaluated[0] < step):
            evaluated = step, errors.evaluation
    first_batch = history.folder / PICTURE
    parts = [
        ("summary", "Summary", sections.summary(history, evaluated)),
        (
            "training",
            "Training",
            sections.training(history, [(name, title) for name, title, _ in training], first_batch),
        ),
        ("accuracy", "Accuracy", sections.accuracy(history, evaluated, accuracy is not None)),
    ]
    if analysis:
        step, errors = analysis
        data |= {f"pr-{k}": chart for k, chart in precision_charts(errors, _CHOICE).items()}
        parts += [
            ("precision", "Precision and recall", sections.curves(errors, step, _CHOICE)),
            ("images", "Worst and best images", sections.images(errors, step, threshold)),
        ]
        if errors.evaluation.errors is not None:
            kinds = ("errors", "Kinds of errors", sections.kinds(errors, step, threshold))
            parts.insert(-1, kinds)
    else:
        text = f"Left out: {without}"
        parts.append(("images", "Precision, worst and best images", f"<p>{escape(text)}</p>"))
    parts += [
        ("recipe", "Recipe", about.recipe(history)),
        ("environment", "Environment", about.environment(history)),
        ("messages", "Warnings and errors", about.messages(history)),
    ]
    name = history.recipe.get("name") or history.folder.resolve().name
    head = ""
    if history.parts:
        head = f"<p>casc run, started {sections.when(history.parts[0].began)}</p>"
    return document(f"{name}: report", parts, head=head, data=data)
