"""Shuffles and seeds from an integer hash: the same with every version of every library.

Any part of such a shuffle or stream of seeds can be had without the rest.
"""

import numpy as np


def hash64(*values: int) -> int:
    """A 64-bit hash of integers: each is added to the state, which splitmix64 then mixes."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        state = _mix(state + np.uint64(value & 0xFFFFFFFFFFFFFFFF))
    return int(state[0])


def shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count): the order of a bijective hash, so without ties."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + np.uint64(key)))


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
