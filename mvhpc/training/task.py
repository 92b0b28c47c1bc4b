"""What the training loop asks of a stage that trains networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mvhpc.config import Compute, ConfigError, Optimizer, Training
from mvhpc.training.engines.base import Engine


class Config(Protocol):
    """The parts of a stage's configuration that the loop reads; ``ema`` too where the task averages a network."""

    optimizer: Optimizer
    training: Training
    compute: Compute


@dataclass(frozen=True)
class Part:
    """What a score judges: a part of the exported network, exported as it was at its own best validation.

    Attributes:
        weights: how the names of its weights begin; the first part that fits counts.
        metrics: further ones that tell of it, None for all; like the score reported as they were at that validation.
    """

    weights: tuple[str, ...] = ("",)
    metrics: tuple[str, ...] | None = None


class Task(ABC):
    """What is trained, and what one step of it is.

    Attributes:
        networks: each gets an engine of its own; equal weights at every worker.
        learning_rates: largest rate of each network.
        averaged: the network whose weights are averaged (with the configuration's ``ema``); None for none.
        best: the network that is exported at the best validation.
        samples: how many training samples there are.
        validation: how many validation samples; 0 exports the last weights.
        scores: metrics of :meth:`validate` to minimise, each with what it judges.
    """

    networks: dict[str, nn.Module]
    learning_rates: dict[str, float]
    averaged: str | None = None
    best: str
    samples: int
    validation: int
    scores: Mapping[str, Part]

    @classmethod  # noqa: B027 a hook
    def check(cls, config: Any) -> None:
        """Refuse a configuration or data before anything is started; called once, where the stage is started.

        Raises:
            ConfigError: what cannot be used.
        """

    @abstractmethod
    def load(self, indices: list[int]) -> dict[str, Any]:
        """The training samples ``indices`` as a batch in host memory; runs in prefetching threads."""

    @abstractmethod
    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """One micro-batch (tensors on the device): forward, ``engine.backward(loss)``, ``engine.step()``.

        Returns:
            scalars to log, means over the micro-batch.
        """

    @abstractmethod
    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Metrics (B,) of the validation samples ``indices``; NaN where a metric has no value for a sample."""

    @abstractmethod
    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the model into the empty ``folder``; ``states`` holds the (averaged) state dict of ``best``."""

    def exported(self, folder: Path) -> dict[str, Tensor]:
        """The state dict in a folder that :meth:`export` wrote; needed where there are several scores."""
        raise NotImplementedError(f"{type(self).__name__} has several scores and must read what it exported")

    def refresh(self, networks: dict[str, nn.Module], rank: int, world: int) -> None:  # noqa: B027 a hook
        """Before each validation, at every worker: make anew what a network knows beside its weights."""

    def figures(self, networks: dict[str, nn.Module], step: int) -> dict[str, Callable[[Path], None]]:
        """Pictures after each export: file name -> a function that writes it.

        Called by every worker, with the averaged weights in place; rank 0 alone calls the functions.
        """
        return {}


def micro_batch(training: Training, world: int) -> int:
    """Samples per worker and micro-batch.

    Raises:
        ConfigError: where the global batch does not divide evenly.
    """
    parts = world * training.accumulate
    if training.batch < 1 or training.accumulate < 1 or training.batch % parts:
        raise ConfigError(
            f"training.batch={training.batch} does not divide evenly among {world} worker(s) x "
            f"training.accumulate={training.accumulate}; make it a multiple of {parts}"
        )
    return training.batch // parts
