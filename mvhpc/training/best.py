"""The model that training exports: each network as it was at its own best validation."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mvhpc.runtime.collectives import Collectives
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Task


class BestModel:
    """The best weights so far of each exported network, in ``folder/model``.

    A model that cannot be written stays pending, and :meth:`write` tries again.

    Args:
        task: what is trained.
        engines: of the task's networks.
        folder: the run folder.
        collectives: the workers; rank 0 writes.

    Attributes:
        metrics: ``validation/NAME`` of each network at its best, and ``best_step``, the last step at which a network
            was better than before; empty at first.
    """

    def __init__(self, task: Task, engines: Mapping[str, Engine], folder: Path, collectives: Collectives) -> None:
        self._task, self._engines, self._folder, self._collectives = task, engines, folder / "model", collectives
        self._device = next(iter(engines.values())).device
        self._pending: dict[str, dict[str, Tensor]] = {}  # network -> weights that are not written yet, whole at rank 0
        self.metrics: dict[str, float] = {}

    @property
    def step(self) -> int:
        """The last step at which a network was better than before; 0 at first."""
        return int(self.metrics.get("best_step", 0))

    def restore(self, metrics: dict[str, float]) -> None:
        """Continue with the ``metrics`` of a checkpoint."""
        self.metrics, self._pending = metrics, {}

    def take(self, step: int, metrics: dict[str, float]) -> bool:
        """Take the weights of each network that is better than before; whether there was one. Collective.

        Args:
            step: after which.
            metrics: of the weights in place; without any, as of a task that does not validate, all are taken.
        """
        better = {
            network: names
            for network, names in self._task.exported.items()
            if metrics.get(names[0], -math.inf) < self.metrics.get(f"validation/{names[0]}", math.inf)
        }
        if not better:
            return False
        for network, names in better.items():
            self._pending[network] = self._engines[network].weights()
            self.metrics = self.metrics | {f"validation/{name}": metrics[name] for name in names if name in metrics}
        self.metrics = self.metrics | {"best_step": step}
        return True

    def write(self) -> str | None:
        """Write the weights that are pending. Collective.

        Computed in float32, as inference is by default: validation may be under autocast.

        Returns:
            why they could not be written, at all workers; they stay pending.
        """
        if not self._pending:
            return None
        warning = None
        if self._collectives.rank == 0:
            metrics = {name.removeprefix("validation/"): x for name, x in self.metrics.items() if name != "best_step"}
            try:
                with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                    self._task.export(self._folder, dict(self._pending), metrics)
            except (OSError, SafetensorError) as error:
                warning = f"the model of step {self.step} could not be written: {error}"
        warning = self._collectives.share(warning)
        if warning is None:
            self._pending = {}
        return warning
