"""All that a training run carries from one step to the next, and a checkpoint holds."""

from typing import NamedTuple

from casc.model.layers import Params


class State(NamedTuple):
    """The training state; a step updates the tensors in place and counts on."""

    step: int
    """Updates made so far."""
    params: Params
    """Every parameter by name, float32; the ones that train require a gradient."""
    buffers: Params
    """Batch norm statistics by name, which training doesn't change."""
    momentum: Params
    """The optimizer's first moment, for the parameters that train, under their names."""
    guard: Params
    """Scalars of the numerical guards by name, from `casc.train.guard`."""
    ema: Params = {}  # noqa: RUF012  # where it is empty, nothing is ever put in
    """Moving averages of the parameters that train, under their names; empty without."""
    second: Params = {}  # noqa: RUF012
    """The optimizer's second moment, likewise; empty where it has none."""
