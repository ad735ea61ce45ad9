"""Put a detector's classes in the order of a data set's."""

from collections.abc import Sequence

import torch

from casc.checkpoints.foreign import Checkpoint
from casc.checkpoints.report import Convention, Row
from casc.data.index import Category
from casc.errors import UserError
from casc.model.box_head import PREFIX as BOX
from casc.model.mask_head import PREFIX as MASK
from casc.model.mask_scoring import PREFIX as SCORING


def in_order_of(
    checkpoint: Checkpoint, categories: Sequence[Category], where: str
) -> tuple[Checkpoint, list[Row], Convention]:
    """A detector whose label i is the data set's class i.

    Classes are found by name. A checkpoint without names is taken to have its classes by rising
    id, as Detectron2 and COCO's own lists do.

    Args:
        checkpoint: the detector.
        categories: the data set's, in the order of labels.
        where: what errors call the data set.

    Raises:
        UserError: the classes aren't the same ones.
    """
    known = checkpoint.categories
    count = checkpoint.model.classes
    if len(categories) != count:
        raise UserError(f"{where}: has {len(categories)} classes, the checkpoint {count}")
    ascending = sorted(categories, key=lambda category: category.id)
    names = [c.name for c in (ascending if known is None else known)]
    wanted = [c.name for c in categories]
    if len(set(names)) != count:
        raise UserError(f"{where}: the names of classes aren't unique; they can't be matched")
    for name in wanted:
        if name not in names:
            raise UserError(f"{where}: class {name!r} is none of the checkpoint's")
    order = [names.index(name) for name in wanted]
    moved = order != list(range(count))
    tensors = dict(checkpoint.tensors)
    rows = []
    for name, value in tensors.items():
        if moved and _by_class(name, value, count):
            # Where each class has its own box, its four rows lie together.
            rows_each = 4 if ".fc_reg." in name else 1
            each = value.reshape(-1, rows_each, *value.shape[1:])
            index = torch.tensor(order + list(range(count, len(each))))
            tensors[name] = each[index].reshape(value.shape)
            rows.append(Row("reordered", name, name, tuple(value.shape), "classes"))
        else:
            rows.append(Row("matched", name, name, tuple(value.shape)))
    text = f"{'moved into' if moved else 'already in'} the order of {where}"
    how = "assumed" if known is None else "file"
    flag = "taken to be by rising id, as there are no names" if known is None else ""
    changed = checkpoint._replace(tensors=tensors, categories=tuple(categories))
    return changed, rows, Convention("class order", text, how, flag)


def _by_class(name: str, value: torch.Tensor, count: int) -> bool:
    """Whether a tensor's rows are classes; of `fc_cls`, the last row is the background."""
    head, _, layer = name.rpartition(".")[0].rpartition(".")
    own_boxes = layer == "fc_reg" and count > 1 and len(value) == 4 * count
    return (
        (head.startswith(BOX) and (layer == "fc_cls" or own_boxes))
        or (head.startswith(MASK) and layer == "conv_logits")
        or (head == SCORING and layer == "fc_mask_iou")
    )
