"""What a run is worth: the row that goes into the table of results.

The columns are those of the project that this one grew from, so that rows can be compared.
"""

from collections.abc import Mapping

import torch

from casc.distributed import from_main
from casc.evaluate.metrics import Evaluation
from casc.json_files import read_json, write_json
from casc.train.derived import spread
from casc.train.patience import out_of_patience
from casc.train.run import Run

RESULTS = "results.json"
COLUMNS = (
    "NAME", "Batch_Size", "Epochs", "Throughput", "Box AP", "Mask AP", "AMP_Type", "Torch_Version"
)  # fmt: skip


def figures_of(evaluation: Evaluation) -> dict[str, float | None]:
    """All figures under names such as box_ap and mask_ap50, in [0, 1]."""
    titles = {"bbox": "box", "segm": "mask"}
    return {
        f"{titles[kind]}_{name.lower()}": value
        for kind, figures in evaluation.figures.items()
        for name, value in figures.items()
    }


def conclude(run: Run, step: int, speed: float, evaluation: Evaluation | None) -> None:
    """Print the run's row and save it in its folder."""
    recipe = run.recipe
    figures = figures_of(evaluation) if evaluation else {}
    row = {
        "NAME": recipe.name,
        "Batch_Size": f"{run.facts.images_per_step} ({spread(recipe, run.ranks.world)})",
        "Epochs": f"{step / run.facts.steps_per_epoch:.4g}",
        "Throughput": f"{speed:.2f} img/s" if speed else "-",
        "Box AP": _percent(figures.get("box_ap")),
        "Mask AP": _percent(figures.get("mask_ap")),
        "AMP_Type": str(run.compute.dtype).removeprefix("torch."),
        "Torch_Version": torch.__version__,
    }
    write_json({"row": row, "step": step, "figures": figures}, recipe.folder / RESULTS)
    run.log.say(results_table(row), "results", row=row)
    run.log.say(f"output in {recipe.folder.absolute()}")


def concluded(run: Run, step: int) -> bool:
    """Whether the run got to its end before, and this step is it; if so, print its row.

    All ranks ask together and are told the same.
    """
    return from_main(_concluded(run, step) if run.ranks.main else None, run.ranks)


def _concluded(run: Run, step: int) -> bool:
    ending = out_of_patience(run.recipe, step)
    if step < run.facts.steps and not ending:
        return False
    path = run.recipe.folder / RESULTS
    results = read_json(path) if path.exists() else {}
    if results.get("step") != step:
        return False
    why = f" ({ending})" if ending else ""
    run.log.say(f"{run.recipe.folder}: the run is already at its end, step {step:,}{why}")
    run.log.say(results_table(results["row"]))
    return True


def results_table(row: Mapping[str, str]) -> str:
    """One row under `COLUMNS`, as Markdown."""
    widths = [max(len(name), len(row[name])) for name in COLUMNS]
    rows = [COLUMNS, ["-" * width for width in widths], [row[name] for name in COLUMNS]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"
        for cells in rows
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
