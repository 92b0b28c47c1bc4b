"""Metrics of the training loop: means over steps and workers, skipped updates, throughput."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvhpc.runtime.collectives import Collectives

MAX_SKIPPED = 5  # consecutive updates
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
ADVICE = "lower optimizer.lr, lengthen optimizer.warmup or set optimizer.clip; the checkpoints are from before"


class Diverged(FloatingPointError):
    """:data:`MAX_SKIPPED` consecutive updates were skipped.

    Args:
        first: step (from 0) of the first one.

    Attributes:
        reason: the message without advice.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.reason = f"the gradients of steps {first + 1} to {first + MAX_SKIPPED} are not finite or explode"
        super().__init__(f"{self.reason}; {ADVICE}")


def peak_tflops(device: torch.device) -> float | None:
    """The peak of a device in dense bfloat16, in TFLOP/s; None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), None)


class SkippedUpdates:
    """Counts the updates that engines skipped. The flags stay on their device until :meth:`collect`.

    Attributes:
        total: steps with a skipped update.
        consecutive: how many of these are the last steps, without a gap.
    """

    def __init__(self) -> None:
        self.total = self.consecutive = 0
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, step: int, skipped: Tensor) -> None:
        """Add the flag of ``step`` (from 0): 1 where an engine skipped its update, else 0."""
        self._pending.append((step, skipped))

    def collect(self) -> None:
        """Count the flags that are still on the devices.

        Raises:
            Diverged: at every worker, since all of them skip the same updates.
        """
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        skipped = torch.stack([flag for _, flag in self._pending]).tolist()
        self._pending.clear()
        for step, flag in zip(steps, skipped, strict=True):
            self.total += int(flag)
            self.consecutive = self.consecutive + 1 if flag else 0
            if self.consecutive == MAX_SKIPPED:
                raise Diverged(step + 1 - MAX_SKIPPED)

    def state(self) -> dict[str, int]:
        """The state for a checkpoint; call :meth:`collect` before."""
        return {"total": self.total, "consecutive": self.consecutive}

    def restore(self, state: dict[str, int]) -> None:
        """Restore what :meth:`state` returned."""
        self.total, self.consecutive = state["total"], state["consecutive"]
        self._pending.clear()


class MetricMeans:
    """Means of the scalars of a step over all workers and over the steps since the last call of :meth:`mean`.

    Steps whose update was skipped and values that are not finite do not count. Scalars stay on their device until
    :meth:`collect`, so that a step never waits for them.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._pending: list[tuple[list[str], Tensor]] = []
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]

    def add(self, scalars: dict[str, Tensor], skipped: Tensor) -> None:
        """Add the scalars of a micro-batch; they do not count where ``skipped`` is 1."""
        if scalars:
            values = torch.stack([value.detach().double().reshape(()) for value in scalars.values()])
            values = torch.where(skipped > 0, torch.nan, values)
            self._pending.append((list(scalars), values))

    def collect(self) -> None:
        """Add the values that are still on the devices. Collective."""
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
        """The state for a checkpoint; call :meth:`collect` before."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._sums = {name: list(pair) for name, pair in state.items()}
        self._pending.clear()


class Stopwatch:
    """Time spent on steps, and the part of it spent on waiting for data; validation and checkpoints do not count.

    Attributes:
        seconds: spent on steps since the run began, all attempts together.
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
        """Count a step."""
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
