"""torch.accelerator.Graph, which torch_npu gives a device of its own kind."""

import os

import torch

from torch_npu import _C


class Graph:
    """Captures what is launched inside it, and replays that."""

    def __init__(self, keep_graph: bool = False, *, pool=None, capture_error_mode="default"):
        self._pool = pool or (0, id(self))
        self._replay = None

    def capture_begin(self) -> None:
        """Begin."""
        if os.environ.get("TASK_QUEUE_ENABLE", "1") == "2":
            raise RuntimeError("Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture")
        _C.capture_begin()

    def capture_end(self) -> None:
        """End."""
        self._replay = _C.capture_end()

    def replay(self) -> None:
        """Do all of it again, with what its memory holds now: one call of the runtime."""
        if self._replay is None:
            raise RuntimeError("the graph was never captured")
        self._replay()

    def pool(self):
        """Its memory."""
        return self._pool

    def __enter__(self) -> None:
        torch.accelerator.synchronize()
        self.capture_begin()

    def __exit__(self, kind, *_) -> None:
        try:
            self.capture_end()
        except RuntimeError:
            if kind is None:
                raise


def register() -> None:
    """Put it where torch has it."""
    torch.accelerator.Graph = Graph
