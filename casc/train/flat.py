"""Tensors of the state as views of one buffer each, so that a device updates them in one sweep."""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.model.layers import Params

ALIGNMENT = 16
"""In numbers: kernels load 64 bytes at a time, and a view must begin where they may."""


class Span(NamedTuple):
    """Where a tensor lies in its buffer."""

    name: str
    start: int
    stop: int
    """Of the tensor itself; the next one begins at the next multiple of 16."""


def flatten(tensors: Params) -> Params:
    """Copies of tensors as views of one new buffer, each laid out as it was.

    Weights lie before vectors (biases and norms, which may decay otherwise), in the order given.

    Args:
        tensors: float32 by name, dense, on one device.

    Returns:
        The views under the same names in the same order; what lies between them is zero.
    """
    order = sorted(tensors, key=lambda name: tensors[name].ndim <= 1)
    starts, size = {}, 0
    for name in order:
        starts[name] = size
        size += -(-tensors[name].numel() // ALIGNMENT) * ALIGNMENT
    example = next(iter(tensors.values()))
    buffer = torch.zeros(size, dtype=example.dtype, device=example.device)
    views = {
        name: buffer.as_strided(value.shape, value.stride(), starts[name])
        for name, value in tensors.items()
    }
    with torch.no_grad():
        for name, value in tensors.items():
            views[name].copy_(value)
    return views


def buffer_of(views: Params) -> Tensor:
    """The `[n]` buffer under the views that `flatten` made."""
    base = next(iter(views.values()))._base
    if base is None or any(view._base is not base for view in views.values()):
        raise ValueError("these tensors are not the views that `flatten` makes")
    return base.detach()


def spans(views: Params) -> list[Span]:
    """Where the tensors lie in their buffer, from its start to its end."""
    places = ((name, int(v.storage_offset()), v.numel()) for name, v in views.items())
    found = [Span(name, start, start + size) for name, start, size in places]
    return sorted(found, key=lambda span: span.start)


def as_vector(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order of its memory, as a `[n]` view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
