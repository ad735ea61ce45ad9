"""Watching what a step computes on its way, for `casc verify`.

The step's functions call `probe(name, value)` where they have made something that the reference
recorded as well, and go on with what it returns. What is verified is then what trains.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Probe(Protocol):
    """Sees a tensor, or a list or NamedTuple of some; returns what the step goes on with."""

    def __call__(self, name: str, value: T, /) -> T:
        """Look at a value."""
        ...


def unwatched(name: str, value: T, /) -> T:
    """The probe of every step but the one that is verified: nothing is kept or replaced."""
    return value


class Recorder:
    """A probe that keeps every value, and replaces those that it is given others for."""

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        """Begin empty; `given` has values by name, of the replaced ones' structure and shapes."""
        self.given = {} if given is None else given
        self.seen: dict[str, list[Any]] = {}
        """By name what was computed, one entry for each call: stage after stage, for instance."""

    def __call__(self, name: str, value: T, /) -> T:
        """Keep a value without its gradient."""
        self.seen.setdefault(name, []).append(map_tensors(Tensor.detach, value))
        return self.given.get(name, value)


def recorded(
    function: Callable, recorder: Recorder | None, compiled: Callable[[Callable], Callable]
) -> Callable:
    """Compile a function that takes a `probe`; what it shows is kept by the recorder.

    A compiled function can only show what it returns: it has a recorder of its own, whose
    record is one of its results.
    """
    if recorder is None:
        return compiled(function)

    def run(*args: Any) -> tuple[Any, dict[str, list[Any]]]:
        inside = Recorder(recorder.given)
        return function(*args, probe=inside), inside.seen

    step = compiled(run)

    def called(*args: Any) -> Any:
        result, seen = step(*args)
        for name, values in seen.items():
            recorder.seen.setdefault(name, []).extend(values)
        return result

    return called


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor of nested lists and (named) tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(function, v) for v in value]
    if isinstance(value, tuple):
        mapped = [map_tensors(function, v) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    return value
