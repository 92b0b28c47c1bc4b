"""Pseudo-random permutations of which single entries can be computed, and which never change.

NumPy promises its streams of random bits to be stable, but not its permutations. Here a permutation of n numbers is a
Feistel network on pairs (x mod a, x // a) with a about sqrt(n) (Black and Rogaway, Ciphers with arbitrary finite
domains, CT-RSA 2002): in each round a hash of one half is added to the other, modulo its range, which is a bijection
for any hash. A result of n or more goes through the network again (cycle walking), which keeps it a bijection. The
round keys are SHAKE-256 of seed and epoch; the hash is the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
"""

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 16  # for few numbers too, all permutations are equally frequent
U64 = NDArray[np.uint64]


def round_keys(seed: int, epoch: int) -> U64:
    """(ROUNDS,) keys of one permutation."""
    raw = hashlib.shake_256(f"{seed} {epoch}".encode()).digest(8 * ROUNDS)
    return np.frombuffer(raw, "<u8").astype(np.uint64)


def permuted(x: NDArray[np.integer[Any]], n: int, keys: U64) -> NDArray[np.int64]:
    """The entries ``x`` of permutations of the numbers 0 to n - 1.

    Args:
        x: (entries,), 0 to n - 1.
        n: 1 to 2^62.
        keys: (ROUNDS, entries), the round keys of the permutation of each entry.
    """
    a = math.isqrt(n - 1) + 1
    b = 2 * -(-n // (2 * a))  # even: with two odd ranges, every permutation would be an even one
    ranges = np.uint64(a), np.uint64(b)
    found = _network(x.astype(np.uint64), ranges, keys)
    while (beyond := np.flatnonzero(found >= n)).size:
        found[beyond] = _network(found[beyond], ranges, keys[:, beyond])
    return found.astype(np.int64)


def _network(x: U64, ranges: tuple[np.uint64, np.uint64], keys: U64) -> U64:
    a, b = ranges
    high, low = np.divmod(x, a)  # (entries,) each: 0 to b - 1, and 0 to a - 1
    for r in range(0, ROUNDS, 2):
        low = (low + _hash(high + keys[r]) % a) % a
        high = (high + _hash(low + keys[r + 1]) % b) % b
    return high * a + low


def _hash(z: U64) -> U64:
    """64 bits of which each depends on every bit of ``z``."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
