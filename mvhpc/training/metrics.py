"""What the training loop measures: means of scalars over steps and workers, and where the time goes."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvhpc.runtime.collectives import Collectives

PATIENCE = 5  # updates left out in a row
# Dense bfloat16 TFLOP/s by name of the GPU (NVIDIA's data sheets), the longer names first.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A6000": 155.0,
    "A40": 150.0,
    "RTX 4090": 165.0,
}
ADVICE = "lower optimizer.lr, lengthen optimizer.warmup or set optimizer.clip; the checkpoints were written before it"


class Diverged(FloatingPointError):
    """Updates were left out :data:`PATIENCE` times in a row.

    Args:
        first: step (from 0) of the first of them.

    Attributes:
        what: the message without advice.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.what = f"the gradients of steps {first + 1} to {first + PATIENCE} are not finite or explode"
        super().__init__(f"{self.what}; {ADVICE}")


def peak(device: torch.device) -> float | None:
    """TFLOP/s that a device reaches at most in bfloat16; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), None)


class Skips:
    """The updates that engines left out; like the scalars of :class:`Meter` they stay on their device for a while.

    Attributes:
        total: how many steps had one.
        streak: how many of the last steps had one, one after another.
    """

    def __init__(self) -> None:
        self.total = self.streak = 0
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, step: int, skipped: Tensor) -> None:
        """Take in whether an engine left out its update in ``step`` (from 0): 1 or 0."""
        self._pending.append((step, skipped))

    def collect(self) -> None:
        """Bring in what is still on the devices.

        Raises:
            Diverged: at every worker, since they all leave out the same updates.
        """
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        skipped = torch.stack([flag for _, flag in self._pending]).tolist()
        self._pending.clear()
        for step, flag in zip(steps, skipped, strict=True):
            self.total += int(flag)
            self.streak = self.streak + 1 if flag else 0
            if self.streak == PATIENCE:
                raise Diverged(step + 1 - PATIENCE)

    def state(self) -> dict[str, int]:
        """What a checkpoint must hold; :meth:`collect` first."""
        return {"total": self.total, "streak": self.streak}

    def restore(self, state: dict[str, int]) -> None:
        """Take up what :meth:`state` gave."""
        self.total, self.streak = state["total"], state["streak"]
        self._pending.clear()


class Meter:
    """Means of the scalars of each step, over the steps since the last mean and over all workers.

    A step whose update was left out does not count, nor does a value that is not finite.
    Scalars stay on their device until :meth:`collect`, so that a step never waits for them.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._pending: list[tuple[list[str], Tensor]] = []
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]

    def add(self, scalars: dict[str, Tensor], skipped: Tensor) -> None:
        """Take in the scalars of a micro-batch; they do not count where ``skipped`` is 1."""
        if scalars:
            values = torch.stack([value.detach().double().reshape(()) for value in scalars.values()])
            values = torch.where(skipped > 0, torch.nan, values)
            self._pending.append((list(scalars), values))

    def collect(self) -> None:
        """Bring in what is still on the devices. Collective."""
        if not self._pending:
            return
        values = self._collectives.sum(torch.cat([v for _, v in self._pending])) / self._collectives.world
        keys = [name for names, _ in self._pending for name in names]
        self._pending.clear()
        for name, value in zip(keys, values.tolist(), strict=True):
            if not math.isfinite(value):
                continue
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
        self._pending.clear()


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
