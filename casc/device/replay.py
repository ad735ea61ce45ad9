"""Steps that a device repeats by itself: recorded once as a graph, then replayed whole.

What is recorded is what was launched, with the addresses it was launched on. So whatever a step
reads must lie where it lay, and whatever it changes is changed in place; numbers of the host
(a rate, a step's number) are tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from casc.device.devices import graph_class, is_accelerator, traits
from casc.errors import UserError

_WARM_UP = 2
"""Runs before the recording: compilers, libraries and allocators are then ready."""


def replay_missing(device: torch.device) -> str | None:
    """Why steps can't be replayed on a device, in a few words; None if they can."""
    if not is_accelerator(device):
        return "a CPU launches nothing"
    if graph_class(device) is None:
        return f"torch {torch.__version__} records no graphs of {device.type}"
    return traits(device).replay_missing()


def refused(device: torch.device) -> str | None:
    """What a device says to the recording of an addition, in one line; None if it does it.

    Older chips have no graphs, and drivers' settings forbid them.
    """
    try:
        total = torch.zeros((), device=device)
        step = Replay(total.add_, lambda: [total], Pool())
        for _ in range(2):
            step(torch.ones((), device=device))
        torch.accelerator.synchronize(device)
    except (RuntimeError, UserError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        return f"{device.type} refused to record an addition ({reason})"
    return None


class Replay:
    """A function of tensors that is recorded at its first call and replayed from then on."""

    def __init__(
        self,
        function: Callable[..., object],
        changed: Callable[[], Sequence[Tensor]],
        pool: "Pool",
    ):
        """Prepare.

        Args:
            function: of tensors, which changes other tensors in place and returns nothing.
            changed: gives the tensors that it changes, once it has run: they are put back after
                the runs before the recording.
            pool: memory that recordings which never run at the same time share.
        """
        self.function, self.changed, self.pool = function, changed, pool
        self.inputs: list[Tensor] = []
        self.graph: Any = None

    def __call__(self, *inputs: Tensor) -> None:
        """Run on these values; their shapes are those of the first call.

        Raises:
            UserError: the function can't be recorded: it reads something back, for instance.
        """
        if self.graph is None:
            self.graph = self._record(inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()

    def _record(self, inputs: Sequence[Tensor]) -> Any:
        device = inputs[0].device
        self.inputs = [value.clone() for value in inputs]
        current = torch.accelerator.current_stream(device)
        aside = torch.Stream(device)
        aside.wait_stream(current)
        with aside:
            before = [value.clone() for value in self.changed()]
            for _ in range(_WARM_UP):
                self.function(*self.inputs)
            for value, old in zip(self.changed(), before, strict=True):
                value.detach().copy_(old)
        current.wait_stream(aside)
        torch.accelerator.synchronize(device)
        graph = graph_class(device)(pool=self.pool.token)
        try:
            with aside, graph:
                self.function(*self.inputs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--replay: the step can't be recorded ({reason}); use --replay off"
            ) from error
        current.wait_stream(aside)
        self.pool.token = graph.pool()
        return graph


class ReplayedFunction:
    """A function of tensors whose results are wanted: each call gives tensors of its own."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], pool: "Pool"):
        """Prepare.

        Args:
            function: of tensors, which changes none.
            pool: as of `Replay`.
        """
        self.function = function
        self.results: Sequence[Tensor] = ()
        self.replay = Replay(self._run, list, pool)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Results for these values; their shapes are those of the first call.

        Raises:
            UserError: as `Replay`.
        """
        self.replay(*inputs)
        # The next call, of any function that shares the pool, writes over what was recorded.
        return [value.clone() for value in self.results]

    def _run(self, *inputs: Tensor) -> None:
        self.results = self.function(*inputs)


class Pool:
    """Memory that several recordings share; there is none before the first."""

    def __init__(self) -> None:
        self.token: tuple[int, int] | None = None


class Choice(NamedTuple):
    """Whether steps are replayed, and what there is to say of it."""

    replay: bool
    note: str


def choose_replay(setting: str, device: torch.device, reads: str | None) -> Choice:
    """What --replay stands for.

    Args:
        setting: auto, on or off.
        device: of the run.
        reads: why the step itself can't be replayed, in a few words; None if it can.

    Raises:
        UserError: it was asked for and can't be.
    """
    if setting == "off":
        return Choice(False, "steps are launched one by one (--replay off)")
    missing = replay_missing(device) or reads or refused(device)
    if missing is None:
        return Choice(True, "steps are recorded once per canvas and replayed")
    if setting == "on":
        raise UserError(f"--replay on: {missing}; use --replay auto or off")
    return Choice(False, f"steps are launched one by one: {missing}")
