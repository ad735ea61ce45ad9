"""Weights of another detector as a run's beginning: what of them is taken, and what isn't.

The classifying rows of the heads belong to classes. They follow their class's name; a class
that the weights don't know begins with fresh rows.

Legend: K classes of the data to train on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from casc.checkpoints.read import Fit, Weights, fit_weights
from casc.config import differences, to_json
from casc.data.index import Category
from casc.errors import UserError
from casc.model.backbone import is_frozen
from casc.model.box_head import PREFIX as BOX
from casc.model.layers import Params
from casc.model.mask_head import PREFIX as MASK
from casc.model.mask_scoring import PREFIX as SCORING
from casc.train.recipe import Recipe

_BY_CLASS = {BOX: ".fc_cls.", MASK: ".conv_logits.", SCORING: ".fc_mask_iou."}
"""The layer of each head whose outputs are classes; `fc_cls` has the background as its last."""
_BOXES = ".fc_reg."
"""Reads what `fc_cls` reads. Its outputs are classes too where each has its own box, 4 of each."""


class Classes(NamedTuple):
    """Which of the data's classes the weights know."""

    total: int
    """Of the weights."""
    sources: list[int | None]
    """[K] for each of the data's classes its position in the weights, None where it is new."""
    text: str
    """For people."""


def transfer(
    recipe: Recipe,
    weights: Weights,
    params: Params,
    buffers: Params,
    categories: Sequence[Category],
) -> tuple[Params, Params, list[str]]:
    """Begin with weights as far as they fit.

    Args:
        recipe: of the run.
        weights: of any classes.
        params: initial values by name.
        buffers: likewise.
        categories: of the data to train on, in the order of labels.

    Returns:
        New parameters and buffers, and a report: what was taken, re-made and left.

    Raises:
        UserError: nothing fits, a frozen layer would keep its initial values, or the weights
            were trained on images of another kind.
    """
    warnings = check_conventions(recipe, weights)
    known = match_classes(weights, categories)
    tensors, made, notes = dict(weights.tensors), [], []
    if known is not None:
        notes.append(known.text)
        own = recipe.model.box_head.class_specific
        made = [
            name for name in params
            if name in tensors and (_is_by_class(name) or (own and _BOXES in name))
        ]  # fmt: skip
        for name in made:
            rows = _rows(name, params, tensors, known)
            if rows is None:
                del tensors[name]
            else:
                tensors[name] = rows
    params, buffers, fit = fit_weights(params, buffers, tensors)
    if not fit.matched:
        raise UserError(
            f"--init {recipe.init}: none of its {len(weights.tensors)} tensors fits the model"
        )
    _check_frozen(recipe, fit)
    if known is not None and known.sources != list(range(known.total)):
        kept = [name for name in made if name in tensors]
        notes += _remade(kept, "re-made: known classes' rows taken, new ones at initial values")
        notes += _remade(
            [name for name in made if name not in tensors], "re-made, at initial values"
        )
        fit = fit._replace(
            matched=[name for name in fit.matched if name not in kept],
            missing=[name for name in fit.missing if name not in made],
        )
    return params, buffers, [f"weights from {weights.source}: {fit}", *notes, *warnings]


def match_classes(weights: Weights, categories: Sequence[Category]) -> Classes | None:
    """Find the data's classes among those of the weights, by name.

    Weights without names are taken to have the data's classes, by rising id, if there are as
    many of them. None: the weights have no classes at all.

    Raises:
        UserError: the weights contradict themselves.
    """
    count = _class_count(weights)
    if count is None:
        return None
    names = [category.name for category in categories]
    if weights.categories is None:
        if count != len(names):
            return Classes(
                count, [None] * len(names), f"classes: {count} without names, none can be kept"
            )
        ascending = sorted(categories, key=lambda category: category.id)
        return Classes(
            count,
            [ascending.index(category) for category in categories],
            f"classes: the weights name none of their {count}; taken for the data's, by rising id",
        )
    theirs = [category.name for category in weights.categories]
    if len(theirs) != count:
        raise UserError(
            f"{weights.source}: names {len(theirs)} classes, but its heads know {count}"
        )
    # A name that occurs twice says nothing.
    twice = {n for found in (names, theirs) for n, times in Counter(found).items() if times > 1}
    sources = [theirs.index(n) if n in theirs and n not in twice else None for n in names]
    kept = [n for n, i in zip(names, sources, strict=True) if i is not None]
    parts = [
        f"{len(found)} {title} ({_listed(found)})"
        for title, found in (
            ("kept by name", kept),
            ("new", [n for n in names if n not in kept]),
            ("left", [n for n in theirs if n not in kept]),
        )
        if found
    ]
    return Classes(count, sources, "classes: " + ", ".join(parts))


def _class_count(weights: Weights) -> int | None:
    bias = weights.tensors.get(f"{BOX}.0.fc_cls.bias")
    return None if bias is None else len(bias) - 1


def _is_by_class(name: str) -> bool:
    return any(name.startswith(f"{head}.") and layer in name for head, layer in _BY_CLASS.items())


def _rows(
    name: str, params: Params, tensors: Mapping[str, Tensor], known: Classes
) -> Tensor | None:
    """A classifying tensor with the rows of known classes; None where they mean nothing here."""
    if all(source is None for source in known.sources):
        return None
    fresh, old = params[name], tensors[name]
    head = name.rpartition(".")[0].rpartition(".")[0]
    below = [
        k for k in params
        if k.startswith(f"{head}.") and not _is_by_class(k) and _BOXES not in k
    ]  # fmt: skip
    alike = all(k in tensors and tensors[k].shape == params[k].shape for k in below)
    each = 4 if _BOXES in name else 1
    end = each * len(known.sources)
    rest = len(fresh) - end  # the background's row, where there is one
    if not alike or old.shape[1:] != fresh.shape[1:] or len(old) != each * known.total + rest:
        return None  # what these rows read is another thing now
    made = fresh.clone()
    for row, source in enumerate(known.sources):
        if source is not None:
            made[each * row : each * (row + 1)] = old[each * source : each * (source + 1)]
    made[end:] = old[each * known.total :]
    return made


def check_conventions(recipe: Recipe, weights: Weights) -> list[str]:
    """Compare what weights were trained with, where they say so.

    Raises:
        UserError: in something that makes them useless here.
    """
    notes = [f"warning: {weights.source}: {weights.problem}"] if weights.problem else []
    if weights.recipe is None:
        return notes
    before, now = weights.recipe, to_json(recipe)
    found = {
        f"{room}.{name}": pair
        for room in ("image", "model")
        for name, pair in differences(before.get(room) or {}, now[room]).items()
        if name.partition(".")[0] in (before.get(room) or {})
    }
    same_channels = (before.get("image") or {}).get("channels", 3) == recipe.image.channels
    for name in ("image.mean", "image.std", "model.backbone.stride_in_1x1"):
        if name.startswith("image.") and not same_channels:
            continue
        if name in found and None not in found[name]:
            old, new = found[name]
            raise UserError(
                f"--{name.replace('_', '-')}: the weights of {weights.source} were trained with"
                f" {old}, now it is {new}; use what they were trained with"
            )
    return notes + [
        f"warning: the weights were trained with {name} {old}, this run has {new}"
        for name, (old, new) in found.items()
        if name.startswith(("model.anchors.", "model.stages"))
    ]


def _check_frozen(recipe: Recipe, fit: Fit) -> None:
    backbone = recipe.model.backbone
    lost = (*fit.missing, *(n for n, _, _ in fit.reshaped))
    frozen = [name for name in lost if is_frozen(backbone, name) and "num_batches" not in name]
    if frozen:
        raise UserError(
            f"--init {recipe.init}: it has no {frozen[0]} that fits, and a frozen layer would keep"
            " its random initial values; use --model.backbone.frozen-stages -1, or the backbone"
            " that the weights are of"
        )


def _remade(names: Sequence[str], title: str) -> list[str]:
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [f"{title}: {', '.join(layers)}"] if layers else []


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, {len(names) - most} more"
