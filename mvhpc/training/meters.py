"""What the training loop measures: means of scalars over steps and workers, and where the time goes."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvhpc.training.ranks import Ranks

ADVICE = "lower optimizer.lr, lengthen optimizer.warmup or set optimizer.clip; the checkpoints were written before it"


class Meter:
    """Means of the scalars of each step, over the steps since the last mean and over all workers.

    Scalars stay on their device until :meth:`collect`, so that a step never waits for them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: list[tuple[int, list[str], Tensor]] = []
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Take in the scalars of a micro-batch of ``step`` (from 0)."""
        if scalars:
            values = torch.stack([value.detach().double().reshape(()) for value in scalars.values()])
            self._pending.append((step, list(scalars), values))

    def collect(self) -> None:
        """Bring in what is still on the devices. Collective.

        Raises:
            FloatingPointError: at every worker, naming the first step and scalar that is not finite.
        """
        if not self._pending:
            return
        values = self._ranks.sum(torch.cat([v for _, _, v in self._pending])) / self._ranks.world
        keys = [(step, name) for step, names, _ in self._pending for name in names]
        self._pending.clear()
        for (step, name), value in zip(keys, values.tolist(), strict=True):
            if value - value != 0:  # infinite or not a number
                raise FloatingPointError(f"step {step + 1}: train/{name} is {value}; {ADVICE}")
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def mean(self) -> dict[str, float]:
        """The means since the last call. Collective."""
        self.collect()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next mean to come out the same; :meth:`collect` first."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self._sums = {name: list(pair) for name, pair in state.items()}


class Clock:
    """Time spent on steps, and within it on waiting for data; validation and checkpoints do not count.

    Attributes:
        seconds: spent on steps since the run began, over all attempts.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._mark = time.perf_counter()
        self._interval = self._waited = 0.0
        self._steps = 0

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._interval += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count."""
        self._lap()
        yield
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def tick(self) -> None:
        """A step is done."""
        self._steps += 1

    def interval(self, batch: int) -> dict[str, float]:
        """Throughput and share of waiting since the last call.

        Args:
            batch: samples per step, over all workers.
        """
        self._lap()
        seconds = max(self._interval, 1e-9)
        result = {
            "system/samples_per_second": self._steps * batch / seconds,
            "system/data_wait_percent": 100 * self._waited / seconds,
        }
        self._interval = self._waited = 0.0
        self._steps = 0
        return result
