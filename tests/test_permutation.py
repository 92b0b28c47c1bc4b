"""Laws of the permutations that decide the order of training samples."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from shards.order import Order
from shards.permutation import ROUNDS, permuted, round_keys

GOLDEN = [
    [9, 8, 5, 0, 4, 7, 6, 2, 3, 1],
    [0, 1, 3, 4, 2, 9, 7, 8, 5, 6],
    [656929, 429948, 553627, 933695],
    [633602493540, 291549812612, 343243739259],
]
SIZES = (*range(1, 40), 100, 257, 1000, 4097)


def permutations(n: int, epochs: int, seed: int = 0) -> np.ndarray:
    """(epochs, n), whole permutations."""
    entries = np.tile(np.arange(n), epochs)
    keys = np.repeat(np.stack([round_keys(seed, epoch) for epoch in range(epochs)]), n, axis=0)
    return permuted(entries, n, keys.T).reshape(epochs, n)


def reference(x: int, n: int, seed: int, epoch: int) -> int:
    """One entry, by the definition in whole numbers."""
    raw = hashlib.shake_256(f"{seed} {epoch}".encode()).digest(8 * ROUNDS)
    keys = [int.from_bytes(raw[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]
    a = next(a for a in range(1, n + 1) if a * a >= n)
    b = next(b for b in range(2, n + 3, 2) if a * b >= n)

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    while True:
        high, low = divmod(x, a)
        for r in range(0, ROUNDS, 2):
            low = (low + mix((high + keys[r]) % 2**64)) % a
            high = (high + mix((low + keys[r + 1]) % 2**64)) % b
        x = high * a + low
        if x < n:
            return x


def test_they_are_permutations() -> None:
    for n in SIZES:
        assert (np.sort(permutations(n, 3), axis=1) == np.arange(n)).all(), n


@pytest.mark.parametrize("n", [1, 2, 6, 7, 100, 12345, 10**9 + 7])
def test_they_are_what_the_definition_says(n: int) -> None:
    entries = np.unique(np.linspace(0, n - 1, 20).astype(np.int64))
    keys = np.repeat(round_keys(5, 3)[:, None], len(entries), axis=1)
    assert permuted(entries, n, keys).tolist() == [reference(int(x), n, 5, 3) for x in entries]


def test_they_never_change() -> None:
    """Training is resumed by other versions of this program and of NumPy."""
    assert Order(10, 10, seed=0).indices(0) == GOLDEN[0]
    assert Order(10, 10, seed=0).indices(1) == GOLDEN[1]
    assert Order(1_000_000, 4, seed=7).indices(123_456_789) == GOLDEN[2]
    assert Order(10**12, 3, seed=2**70).indices(10**10) == GOLDEN[3]


def test_all_permutations_are_equally_frequent() -> None:
    for n in (2, 3, 4, 5, 6):
        epochs = 50 * math.factorial(n)
        _, counts = np.unique(permutations(n, epochs) @ 10 ** np.arange(n), return_counts=True)
        assert len(counts) == math.factorial(n)
        assert stats.chisquare(counts).pvalue > 1e-3, n


@pytest.mark.parametrize("n", [9, 30])
def test_pairs_of_positions_are_uniform(n: int) -> None:
    drawn = permutations(n, 20_000)
    distinct = ~np.eye(n, dtype=bool).ravel()
    for i, j in ((0, 1), (0, n - 1), (n // 2, n // 2 + 1)):
        counts = np.bincount(drawn[:, i] * n + drawn[:, j], minlength=n * n)
        assert stats.chisquare(counts[distinct]).pvalue > 1e-3, (i, j)


def test_epochs_and_seeds_are_independent() -> None:
    n, bins = 20_011, 50
    epochs, other = permutations(n, 4), permutations(n, 4, seed=1)
    pairs = [*itertools.pairwise(epochs), *zip(epochs, other), (epochs[0][1:], epochs[0][:-1])]
    for one, two in pairs:  # of independent permutations all differences are equally frequent
        counts = np.bincount((one - two) % n * bins // n, minlength=bins)
        assert stats.chisquare(counts).pvalue > 1e-3
        assert abs(np.corrcoef(one, two)[0, 1]) * math.sqrt(n) < 4


def test_a_batch_is_any_part_of_the_endless_stream() -> None:
    n = 5
    stream = np.concatenate(permutations(n, 12, seed=4)).tolist()
    for batch in (1, 3, 5, 13):
        order = Order(n, batch, seed=4)
        for step in range(len(stream) // batch):
            assert order.indices(step) == stream[step * batch : (step + 1) * batch]
            parts = [order.part(step, rank, 16) for rank in range(16)]  # more workers than samples
            assert [i for part in parts for i in part] == order.indices(step)
