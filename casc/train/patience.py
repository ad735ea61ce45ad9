"""When a run has learnt what it is going to: its evaluations don't get better any more."""

import math
from collections.abc import Sequence

from casc.train.log import logged_figures
from casc.train.recipe import Recipe


def is_exhausted(figures: Sequence[float | None], patience: int) -> bool:
    """Whether none of the last `patience` figures has risen above all before.

    Args:
        figures: in order; None where there was none, which counts as one that hasn't risen.
        patience: how many.
    """
    best, waited = -math.inf, 0
    for figure in figures:
        waited += 1
        if figure is not None and figure > best:
            best, waited = figure, 0
    return waited >= patience


def out_of_patience(recipe: Recipe, step: int) -> str | None:
    """Why the run ends after this step, before its last; None where it goes on.

    What the log says of earlier evaluations counts, so stopping and going on changes nothing.
    """
    if recipe.patience is None:
        return None
    kept = [figures.get(recipe.keep_best) for figures in logged_figures(recipe.folder, step)]
    if not is_exhausted(kept, recipe.patience):
        return None
    known = [value for value in kept if value is not None]
    best = f" above {100 * max(known):.1f} %" if known else ""
    return (
        f"--patience {recipe.patience}: {recipe.keep_best} hasn't risen{best} in the last"
        f" {recipe.patience} of {len(kept)} evaluations"
    )
