"""Numerical guards: which updates are skipped, how many, and the loss scale of float16.

All of it is a few scalars on the device that follow the steps without being read. They are
functions of the averaged gradients, so they are the same on all ranks.
"""

import torch
from torch import Tensor

from casc.model.layers import Params

# torch.amp.GradScaler's defaults.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 65536.0, 2.0, 0.5, 2000

SCALE = "loss_scale"
"""float32, what the loss is multiplied by before its backward pass; only with float16."""
GOOD_STEPS = "good_steps"
"""int32, updates since the scale last changed; only with float16."""
SKIPPED = "skipped"
"""int64, updates that were skipped since the run began."""
UPDATES = "updates"
"""int64, updates that were made since the run began."""
IN_A_ROW = "skipped_in_a_row"
"""int64, of these, the ones since the last that wasn't."""


def new_guard(device: torch.device, *, scaled: bool) -> Params:
    """The guards' scalars at the beginning of a run."""
    guard = {
        name: torch.zeros((), dtype=torch.int64, device=device)
        for name in (UPDATES, SKIPPED, IN_A_ROW)
    }
    if scaled:
        guard[SCALE] = torch.full((), FIRST_SCALE, device=device)
        guard[GOOD_STEPS] = torch.zeros((), dtype=torch.int32, device=device)
    return guard


def scaled_loss(guard: Params, loss: Tensor, parts: int = 1) -> Tensor:
    """What to differentiate of a loss that is one of so many parts of a step's mean."""
    if parts > 1:
        loss = loss / parts
    return loss * guard[SCALE] if SCALE in guard else loss


def scale_of(guard: Params) -> Params:
    """The loss scale, for the log, if there is one."""
    return {SCALE: guard[SCALE]} if SCALE in guard else {}


def follow(guard: Params, finite: Tensor, interval: int = GROWTH_INTERVAL) -> None:
    """Note, in place, that an update was made (`finite`, a bool scalar) or skipped.

    The scale moves as torch.amp.GradScaler's does: halved by each skipped update, doubled
    after `interval` that weren't, but not to infinity.
    """
    guard[UPDATES] += finite
    guard[SKIPPED] += ~finite
    guard[IN_A_ROW].copy_(torch.where(finite, 0, guard[IN_A_ROW] + 1))
    if SCALE not in guard:
        return
    scale, good = guard[SCALE], torch.where(finite, guard[GOOD_STEPS] + 1, 0)
    grown = torch.where((scale * GROWTH).isfinite(), scale * GROWTH, scale)
    due = good >= interval
    scale.copy_(torch.where(finite, torch.where(due, grown, scale), scale * BACKOFF))
    guard[GOOD_STEPS].copy_(torch.where(due, 0, good))
