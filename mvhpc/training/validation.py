"""Validation: means over all samples, however many workers share them."""

import math

import torch
from torch import Tensor, nn

from mvhpc.runtime.collectives import Collectives
from mvhpc.training.metrics import ADVICE
from mvhpc.training.task import Task


def validate(task: Task, networks: dict[str, nn.Module], size: int, collectives: Collectives) -> dict[str, float]:
    """Means of a task's metrics over its validation samples. Collective.

    Each worker takes the same number of batches, padded with samples that do not count: layers may be collective too.

    Args:
        task: with at least one validation sample.
        networks: in evaluation mode.
        size: samples of a batch at each worker.
        collectives: the workers.

    Raises:
        KeyError: a score that the task does not measure.
        FloatingPointError: a score that is not finite.
    """
    sums: dict[str, Tensor] = {}  # name -> (sum, count)
    for first in range(0, task.validation, size * collectives.world):
        begin = first + collectives.rank * size
        places = list(range(begin, begin + size))
        real = torch.tensor([p < task.validation for p in places])  # (B,)
        indices = [min(p, task.validation - 1) for p in places]
        for name, values in task.validate(indices, networks).items():
            values = values.detach().to("cpu", torch.float64)  # (B,)
            counted = real & ~values.isnan()
            pair = torch.stack([values[counted].sum(), counted.sum().double()])
            sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair
    scores = [score for score, *_ in task.exported.values()]
    if missing := set(scores) - set(sums):
        raise KeyError(f"the task validates {', '.join(sums)}, not its score {', '.join(sorted(missing))}")
    names = sorted(sums)
    totals = collectives.sum(torch.stack([sums[name] for name in names]))  # (metrics, 2)
    means = {name: float(total / count) for name, (total, count) in zip(names, totals) if count > 0}
    for score in scores:
        if not math.isfinite(means.get(score, math.nan)):
            raise FloatingPointError(f"validation {score} is not finite; {ADVICE}")
    return means
