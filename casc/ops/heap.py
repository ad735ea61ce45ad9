"""Memory that the C library keeps after tensors on the CPU are freed."""

import ctypes
from collections.abc import Callable
from functools import cache

from torch import Tensor

# glibc maps blocks from this size on afresh, however much of its heap is free; smaller ones
# come out of the heap once the first of their size has been freed.
MAPPED = 32 * 2**20


def trim_heap(size: int, near: Tensor) -> None:
    """Give unused pages back to the system before a block of so many bytes is asked for.

    A step leaves holes in the heap that hold memory but no block as large. Giving them back takes
    5 to 30 ms; it is left alone where the block is small, the tensor beside which it is to be isn't
    on the CPU, or the C library isn't glibc.
    """
    if near.is_cpu and size >= MAPPED and (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
