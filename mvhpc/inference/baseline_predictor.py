"""The answers of a baseline: points and chances, to the one question it was trained for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mvhpc.config import ConfigError
from mvhpc.diffusion.joint import Batch
from mvhpc.evaluation.tables import label, subject_of
from mvhpc.inference.predictions import Row, chances
from mvhpc.models.bundle import load_baseline
from mvhpc.records import check_data, read_people, scalar_values
from mvhpc.runtime.devices import resolve_device, resolve_precision
from mvhpc.variables import Categorical, Continuous
from shards.dataset import open_dataset


class BaselinePredictor:
    """Answers its question about any subjects of one data set.

    Args:
        model: run folder of a baseline, or its ``model`` folder.
        data: packed volumes.
        given, want: the question, which must be the one it was trained for.
        device: auto | cpu | cuda.
        precision: auto | float32 | bfloat16, of the network.

    Attributes:
        dataset, schema: of the data; of the model.
        way: how the answers come about.
        calls: network calls a subject.
        facts: what the description of a table says of that.

    Raises:
        ConfigError: another question, or data on another grid.
        ModelError: no model there, or a damaged one.
    """

    way, calls = "DenseNet121", 1

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        given: Sequence[str],
        want: Sequence[str],
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model, self.dataset = load_baseline(model, self.device), open_dataset(data)
        self.schema, self.given, self.want = self.model.schema, self.model.given, self.model.want
        if sorted(given) != sorted(self.given) or list(want) != [self.want]:
            raise ConfigError(
                f"{model} is a baseline, which answers one question: {self.want} given {label(self.given)}, not "
                f"{', '.join(want) or 'nothing'} given {label(given)}; ask that, or a joint model, which answers any"
            )
        check_data(self.model.grid, self.schema, self.dataset, self.given, [self.want])
        self.volumes = [name for name in self.given if self.schema[name].kind == "volume"]
        self.facts = {"samples": None, "sampling": None}

    def inputs(self, keys: Sequence[str]) -> tuple[Tensor, Batch, Batch]:
        """What the network takes of some subjects who have every volume: voxels, values and presence.

        Raises:
            IntegrityError: a damaged volume, named.
        """
        people = read_people(self.dataset, keys, self.schema, self.volumes, self.model.scalars)
        voxels, values, present = tree_map_only(Tensor, lambda x: x.to(self.device), people)
        return voxels.float(), values, present

    @torch.inference_mode()
    def say(self, voxels: Tensor, values: Batch, present: Batch) -> Tensor:
        """Numbers in their unit (B,), or the chances of the classes (B, K), float64, on the CPU."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            said = self.model.network(voxels, values, present).double().cpu()
        wanted = self.model.scalars[self.want]
        return wanted.decode(said) if isinstance(wanted, Continuous) else said.softmax(1)

    def __call__(self, keys: Sequence[str]) -> list[Row]:
        """The answers about some subjects, one row each, in order; none about a subject who lacks a given volume.

        Raises:
            IntegrityError: a damaged volume, named.
        """
        seen = [key for key in keys if all(self.dataset.has(key, name) for name in self.volumes)]
        said = dict(zip(seen, self.say(*self.inputs(seen)).tolist())) if seen else {}
        return [self._row(key, said.get(key)) for key in keys]

    def _row(self, key: str, said: float | list[float] | None) -> Row:
        name, wanted = self.want, self.model.scalars[self.want]
        if not isinstance(wanted, Categorical):
            answer: Row = {name: said, f"{name}_sd": None}
        elif isinstance(said, list):
            answer = chances(name, dict(zip(wanted.classes, said)))
        else:
            answer = {name: None, **{f"{name}_p_{c}": None for c in wanted.classes}}
        true = scalar_values(self.dataset, key, self.schema, [*self.given, name])
        lacking = [n for n in self.given if not self.dataset.has(key, n) and true.get(n) is None]
        row = {"key": key, "subject": subject_of(key)} | answer | {f"{name}_true": true[name]}
        return row | {"not_given": ",".join(lacking) or None}
