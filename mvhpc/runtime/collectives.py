"""Collectives over the workers of a run for everything but gradients."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Collectives:
    """Collectives over all workers, on the CPU; with one worker each is the identity.

    Args:
        rank: this worker.
        world: number of workers. With several, ``torch.distributed`` must be initialised.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        # A gloo group of its own: these collectives neither wait for the accelerator nor occupy it.
        self._group = dist.new_group(backend="gloo") if world > 1 else None

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world > 1:
            dist.barrier(group=self._group)

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every worker, in the order of ranks, at every worker."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def share(self, value: T) -> T:
        """Rank 0's ``value``, at every worker."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers of tensors of equal shape, in float64 on the CPU."""
        total = values.detach().to("cpu", torch.float64)
        if self.world > 1:
            total = total.clone()
            dist.all_reduce(total, group=self._group)
        return total
