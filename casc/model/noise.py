"""Noise as a function: every random number of a step follows from one seed per image.

The numbers come from an integer hash rather than a generator, so they are the same on
every device, rank and world size, eager or compiled, and can be made inside the graph.

Legend: B images, N numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# What a number is for; distinct purposes of one image must not share their noise.
FLIP, RPN, SCALE, CROP, COLOUR, PASTE, ERASE = 1, 2, 3, 4, 5, 6, 7
DROP_PATH, STAGE = 15, 16  # stage k uses STAGE + k

_MASK = 0xFFFFFFFF


class Draws(NamedTuple):
    """What of `uniforms` doesn't depend on seeds."""

    purpose: Tensor
    """[P, 1] int64, what sets each purpose apart."""
    place: Tensor
    """[N] int64, what sets numbers of one purpose apart, purpose after purpose."""


def uniform(seed: Tensor, purpose: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), 24 bits each.

    Args:
        seed: [B] int64 in [0, 2**32).
        purpose: one of this module's constants.
        count: N, numbers per image.

    Returns:
        [B, N] float32.
    """
    return uniforms(seed, {purpose: count})[0]


def uniforms(seed: Tensor, counts: dict[int, int], draws: Draws | None = None) -> list[Tensor]:
    """`uniform` for several purposes at once, which launches hardly more than one does.

    Args:
        seed: [B] int64 in [0, 2**32).
        counts: numbers per image of each purpose.
        draws: from `make_draws` of the same counts; made here if None.

    Returns:
        [B, N] float32 of each.
    """
    draws = make_draws(counts, seed.device) if draws is None else draws
    streams = _mix(_mix(seed) ^ draws.purpose)
    parts = zip(streams, counts.values(), strict=True)
    mixed = torch.cat([stream[:, None].expand(-1, n) for stream, n in parts], dim=1) ^ draws.place
    numbers = (_mix(mixed) // 2**8).to(torch.float32) * 2.0**-24
    return list(numbers.split(list(counts.values()), dim=1))


def make_draws(counts: dict[int, int], device: torch.device) -> Draws:
    """What `uniforms` needs for such counts: make it once where it's needed often."""
    # Filled in: copies from the host would be transfers.
    purposes = [torch.full((1,), p * 0x9E3779B1 & _MASK, device=device) for p in counts]
    index = _mix(torch.arange(max(counts.values()), device=device))
    return Draws(torch.stack(purposes), torch.cat([index[:n] for n in counts.values()]))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, that changes half the bits.

    Xor-shift and multiply with the constants of C. Wellons' hash-prospector search. The
    second constant is written minus 2**32: then no product leaves int64. Shifts to the right are
    written as divisions, the same for what isn't negative: torch_npu copies the other operand
    of a shift from the host at every call.
    """
    x = x ^ (x // 2**16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x // 2**15)
    x = (x * (0xD35A2D97 - 2**32)) & _MASK
    return x ^ (x // 2**15)
