"""The model that training exports: each part of the network as it was at its own best validation."""

import math
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mvhpc.runtime.collectives import Collectives
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Task


class Best:
    """What was best so far, and its model in ``folder/model``.

    A model that cannot be written is owed, and tried again by :meth:`write`.

    Args:
        task: what is trained.
        engine: of the network that is exported.
        folder: the run folder.
        collectives: the workers; rank 0 writes.

    Attributes:
        metrics: ``validation/NAME`` of the model and ``best_step``, where some part was last the best; empty before.
    """

    def __init__(self, task: Task, engine: Engine, folder: Path, collectives: Collectives) -> None:
        self._task, self._engine, self._folder, self._collectives = task, engine, folder, collectives
        self._owed: tuple[dict[str, Tensor], dict[str, float]] | None = None  # weights, of rank 0, and their metrics
        self.metrics: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Where some part was last the best; 0 before."""
        return int(self.metrics.get("best_step", 0))

    def restore(self, metrics: dict[str, float]) -> None:
        """Take up the ``metrics`` that a checkpoint holds."""
        self.metrics, self._owed = metrics, None

    def take(self, step: int, metrics: dict[str, float]) -> bool:
        """Take in a validation of the weights that are in place; whether a part was better than before. Collective.

        Args:
            step: after which.
            metrics: by name; without any, as of a task that does not validate, the weights are taken.
        """
        before = {name: self.metrics.get(f"validation/{name}", math.inf) for name in self._task.scores}
        kept = {name for name, best in before.items() if metrics.get(name, -math.inf) >= best}
        if len(kept) == len(before):
            return False
        metrics = self._of_parts(metrics, kept)
        weights = self._parts(self._engine.weights(), kept)
        self.metrics = {f"validation/{name}": value for name, value in metrics.items()} | {"best_step": step}
        self._owed = (weights, metrics)
        return True

    def write(self) -> str | None:
        """Write the model that is owed, if one is. Collective.

        Returns:
            why it could not be written, at all workers; it is then owed still.
        """
        if self._owed is None:
            return None
        warning = None
        if self._collectives.rank == 0:
            try:
                self._write(*self._owed)
            except (OSError, SafetensorError) as error:
                warning = f"the model of step {self.step} could not be written: {error}"
        warning = self._collectives.share(warning)
        if warning is None:
            self._owed = None
        return warning

    def _write(self, weights: dict[str, Tensor], metrics: dict[str, float]) -> None:
        part, final, old = (self._folder / name for name in (".model.part", "model", ".model.old"))
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
        with torch.no_grad(), self._engine.autocast():
            self._task.export(part, {self._task.best: weights}, metrics)
        if final.exists():
            final.replace(old)
        part.replace(final)
        shutil.rmtree(old, ignore_errors=True)

    def _of_parts(self, metrics: dict[str, float], kept: Collection[str]) -> dict[str, float]:
        """``metrics`` of a network whose parts are in part ``kept``, by their scores: theirs as they were, and none of
        several parts together."""
        if not kept:
            return metrics

        def judge(metric: str) -> str | None:
            parts = self._task.scores.items()
            return next((s for s, p in parts if metric == s or p.metrics is None or metric in p.metrics), None)

        told = {name: score for name in metrics if (score := judge(name))}
        return {n: self.metrics[f"validation/{n}"] if score in kept else metrics[n] for n, score in told.items()}

    def _parts(self, weights: dict[str, Tensor], kept: Collection[str]) -> dict[str, Tensor]:
        """``weights``, those of the scores that are ``kept`` as they were exported; of rank 0."""
        if not kept or self._collectives.rank != 0:
            return weights
        before = self._owed[0] if self._owed else self._task.exported(self._folder / "model")

        def judge(name: str) -> str:
            return next(score for score, part in self._task.scores.items() if name.startswith(part.weights))

        return {name: before[name] if judge(name) in kept else w for name, w in weights.items()}
