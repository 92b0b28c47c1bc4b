"""Network calls of a fixed size, so that a row does not depend on which other rows are predicted with it.

The kernels of a matrix product or a convolution differ with the size of the batch, and so do the last bits of their
results; in a batch of one size they do not differ with a row's place or with the other rows. Predictors therefore call
their network with groups of one size, which the device and the model determine. An incomplete group is filled up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mvhpc.inference.flags import copy_flags
from mvhpc.inference.prediction_tables import Row
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runtime.devices import one_thread
from shards.dataset import Dataset
from shards.qc.limits import explain
from shards.schema import Schema

ON_CPU = 4  # volumes of a call; larger calls gain nothing on a core
MOST = 64
VOXELS = 2**25  # of a call on a GPU; DenseNet121 needs some 3 GB for their activations in float32


def group_size(device: torch.device, voxels: int) -> int:
    """Subjects of a network call, a power of two; the same on all devices of a kind.

    Args:
        device: of the network.
        voxels: that the network reads of a subject.
    """
    if device.type == "cpu":
        return ON_CPU
    return 1 << (max(1, min(MOST, VOXELS // max(1, voxels))).bit_length() - 1)


def take_rows(tensors: Any, first: int, size: int) -> Any:
    """Of nested tensors (B, ...), ``size`` rows from ``first`` on: (size, ...); the last row fills up."""

    def take(x: Tensor) -> Tensor:
        return x[torch.arange(first, first + size, device=x.device).clamp(max=len(x) - 1)]

    return tree_map_only(Tensor, take, tensors)


class GroupedPredictor(ABC):
    """Answers one query about any subjects of one data set, a group at a time.

    Attributes:
        dataset, schema: of the data; of the model.
        given: the known variables.
        want: the predicted variables.
        training: from whom the model learnt.
        method: how predictions are made.
        calls: network calls per subject.
        group: subjects of a network call.
        facts: how predictions were made, for the description of their table.
        notes: what is known of the quality of the answers, for the user.
    """

    dataset: Dataset
    schema: Schema
    given: Sequence[str]
    want: Sequence[str]
    training: TrainingPeople
    method: str
    calls: int
    group: int
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()

    @abstractmethod
    def read(self, keys: Sequence[str]) -> Any:
        """What :meth:`answer` needs of at most ``group`` subjects, on the CPU; may be called in another thread.

        Raises:
            IntegrityError: a damaged volume, with its record.
            ConfigError: a category that the model does not have, with its record.
        """

    @abstractmethod
    def answer(self, keys: Sequence[str], inputs: Any) -> list[Row]:
        """Predictions, one row per subject, in order; ``inputs`` as :meth:`read` returns them."""

    @cached_property
    def copied(self) -> Mapping[str, str]:
        """Key -> that its given volume is another record's too, in words."""
        volumes = [name for name in self.given if self.schema[name].kind == "volume"]
        return copy_flags(self.dataset.index, volumes)

    def scan_flags(self, key: str) -> list[str]:
        """What is doubtful about the given volumes of a record, in words."""
        record = self.dataset.record(key)
        found = [explain(flag, record.figures) for flag in record.flags if flag.partition(".")[0] in self.given]
        return [*found, *([self.copied[key]] if key in self.copied else [])]

    def groups(self, keys: Sequence[str]) -> list[Sequence[str]]:
        """``keys`` in groups; the last one may be smaller."""
        return [keys[i : i + self.group] for i in range(0, len(keys), self.group)]

    def __call__(self, keys: Sequence[str]) -> list[Row]:
        """Predictions, one row per subject, in order.

        Raises:
            IntegrityError, ConfigError: as :meth:`read`.
        """
        with one_thread():
            return list(self._rows(keys))

    def _rows(self, keys: Sequence[str]) -> Iterator[Row]:
        for part in self.groups(keys):
            yield from self.answer(part, self.read(part))
