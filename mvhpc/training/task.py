"""What the training loop asks of a stage that trains networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
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


class Task(ABC):
    """What is trained, and what one step of it is.

    Attributes:
        networks: each gets an engine of its own; equal weights at every worker.
        learning_rates: largest rate of each network.
        exported: the networks that the model consists of, each with its metrics of :meth:`validate`. The first of these
            is minimised: the network is exported as it was at its own best validation.
        averaged: names of the networks whose weights are averaged (with the configuration's ``ema``).
        samples: how many training samples there are.
        validation: how many validation samples; 0 exports the last weights.
        shorter: what would make a step cheaper, as advice: keys with their effect.
    """

    networks: dict[str, nn.Module]
    learning_rates: dict[str, float]
    exported: Mapping[str, Sequence[str]]
    averaged: Collection[str] = ()
    samples: int
    validation: int
    shorter: Sequence[str] = ()

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
        """Write networks of the model into ``folder``; those that are there and not in ``states`` stay.

        At every moment the folder holds a whole model, the old one or the new one, once the first was written.

        Args:
            folder: the ``model`` folder; need not be there.
            states: (averaged) state dicts by network, of all of :attr:`exported` or of some.
            metrics: of the model's networks, each at its own best validation.
        """

    def refresh(self, networks: dict[str, nn.Module], rank: int, world: int) -> None:  # noqa: B027 a hook
        """Before each validation, at every worker: recompute what a network holds beside its weights."""

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
