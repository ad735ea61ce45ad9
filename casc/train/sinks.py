"""Where a run's records go beside `log.jsonl`: a sink is any function of a record.

`train(recipe, sinks=[...])` and `launch(..., sinks=[...])` hand every record of the main rank to
each sink, as it comes: {"kind": "train", "time": ..., "step": ..., "loss": ..., ...}. The kinds
and their values are in docs/logging.md.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casc.errors import UserError

Sink = Callable[[Mapping[str, Any]], object]

_NOT_FIGURES = ("kind", "time", "step")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record by name, as TensorBoard and its like draw them over steps.

    Args:
        record: what a sink gets.

    Returns:
        "train/loss" and so on of a `train` record, "val/box_ap" and, with --validation-loss,
        "val/loss" and so on of an `evaluation`;
        nothing of other kinds, and nothing of what wasn't measured (None).
    """
    if record["kind"] == "train":
        group, values = "train", {k: v for k, v in record.items() if k not in _NOT_FIGURES}
    elif record["kind"] == "evaluation":
        group, values = "val", {**record["figures"], **record.get("losses", {})}
    else:
        return {}
    return {
        f"{group}/{name}": value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


@contextmanager
def tensorboard(folder: Path) -> Iterator[Sink]:
    """A sink that writes TensorBoard's format into a folder.

    Raises:
        UserError: it isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: not installed; pip install 'casc[tensorboard]'") from None
    with SummaryWriter(folder) as board:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in scalars(record).items():
                board.add_scalar(name, value, record["step"])

        yield write
