"""Noise as a function: every random number of a step follows from one seed per image.

The numbers come from an integer hash rather than a generator, so they are the same on
every device, rank and world size, eager or compiled, and can be made inside the graph.

Legend: B images, N numbers.
"""

import torch
from torch import Tensor

# What a number is for; distinct purposes of one image must not share their noise.
FLIP, RPN, SCALE, CROP, COLOUR, PASTE, ERASE = 1, 2, 3, 4, 5, 6, 7
DROP_PATH, STAGE = 15, 16  # stage k uses STAGE + k

_MASK = 0xFFFFFFFF


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


def uniforms(seed: Tensor, counts: dict[int, int]) -> list[Tensor]:
    """`uniform` for several purposes at once, which launches hardly more than one does.

    Args:
        seed: [B] int64 in [0, 2**32).
        counts: numbers per image of each purpose.

    Returns:
        [B, N] float32 of each.
    """
    key = _mix(seed)
    streams = _mix(torch.stack([key ^ (purpose * 0x9E3779B1 & _MASK) for purpose in counts]))
    if max(counts.values()) == 1:
        mixed = streams.t()  # the first index is 0, and what it mixes to as well
    else:
        index = _mix(torch.arange(max(counts.values()), device=seed.device))
        parts = zip(streams, counts.values(), strict=True)
        mixed = torch.cat([stream[:, None] ^ index[:n] for stream, n in parts], dim=1)
    numbers = (_mix(mixed) // 2**8).to(torch.float32) * 2.0**-24
    return list(numbers.split(list(counts.values()), dim=1))


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
