"""Predictions of a baseline: points and class probabilities, for the one query it was trained for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mvhpc.config import ConfigError
from mvhpc.diffusion.joint import Batch
from mvhpc.evaluation.tables import label, subject_of
from mvhpc.inference.flags import row_flag
from mvhpc.inference.groups import GroupedPredictor, group_size, take_rows
from mvhpc.inference.prediction_tables import Row, class_cells
from mvhpc.inference.predictor import PredictConfig
from mvhpc.models.baseline import TITLES
from mvhpc.models.bundle import BaselineModel
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_data, read_people, scalar_values
from mvhpc.runtime.devices import resolve_precision
from mvhpc.variables import Categorical, Continuous
from shards.dataset import open_dataset

People = tuple[Tensor, Batch, Batch]


class BaselinePredictor(GroupedPredictor):
    """Predicts one scalar of any subjects of one data set.

    Args:
        config: data, query and precision; the query must be the one that the model was trained for.
        model: a baseline, on the device to use.

    Raises:
        ConfigError: another query, joint draws, or data on another grid.
    """

    calls = 1

    def __init__(self, config: PredictConfig, model: BaselineModel) -> None:
        if config.draws:
            raise ConfigError(
                f"draws={config.draws}: joint draws come from a posterior, which a baseline lacks; take 0"
            )
        self.device = next(model.network.parameters()).device
        self.precision = resolve_precision(config.compute.precision, self.device)
        self.model, self.dataset, self.method = model, open_dataset(config.data), TITLES[model.name]
        self.schema, self.given, self.want = model.schema, model.given, [model.want]
        if sorted(config.given) != sorted(self.given) or list(config.want) != self.want:
            raise ConfigError(
                f"{config.model} is a baseline, trained for one query: {model.want} given {label(self.given)}, not "
                f"{', '.join(config.want) or 'nothing'} given {label(config.given)}; take that query, or a joint "
                "model, which takes any"
            )
        check_data(model.grid, self.schema, self.dataset, self.given, self.want)
        self.volumes = [name for name in self.given if self.schema[name].kind == "volume"]
        self.group = group_size(self.device, len(self.volumes) * math.prod(model.grid["shape"]))
        self.facts = {"samples": None, "sampling": None}
        self.training = TrainingPeople.read(model.meta)
        self.learnt = self.training.learnt(self.dataset.index)

    def read(self, keys: Sequence[str]) -> tuple[list[str], People | None]:
        """The keys of the subjects that have every given volume, and the network's inputs for them; None for nobody.

        Raises:
            IntegrityError: a damaged volume, with its record.
        """
        complete = [key for key in keys if all(self.dataset.has(key, name) for name in self.volumes)]
        return complete, self.inputs(complete) if complete else None

    def inputs(self, keys: Sequence[str]) -> People:
        """Inputs of the network for subjects that have every given volume.

        Returns:
            Voxels (B, V, H, W, D) float16; by scalar, encoded values and presence (B,) bool.

        Raises:
            IntegrityError: a damaged volume, with its record.
        """
        return read_people(self.dataset, keys, self.schema, self.volumes, self.model.scalars)

    @torch.inference_mode()
    def predict(self, voxels: Tensor, values: Batch, present: Batch) -> Tensor:
        """Numbers (B,) in their unit, or class probabilities (B, K); float64, on the CPU.

        Args:
            voxels, values, present: of B subjects, as :meth:`inputs` returns them.
        """
        outputs = []
        for first in range(0, len(voxels), self.group):
            people = take_rows((voxels, values, present), first, self.group)
            x, *scalars = tree_map_only(Tensor, lambda x: x.to(self.device), people)
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
                outputs.append(self.model.network(x.float(), *scalars)[: len(voxels) - first])
        output = torch.cat(outputs).double().cpu()
        wanted = self.model.scalars[self.model.want]
        return wanted.decode(output) if isinstance(wanted, Continuous) else output.softmax(1)

    def answer(self, keys: Sequence[str], inputs: tuple[list[str], People | None]) -> list[Row]:
        """Predictions, one row per subject, in order; empty for a subject that lacks a given volume."""
        complete, people = inputs
        predicted = dict(zip(complete, self.predict(*people).tolist())) if people else {}
        return [self._row(key, predicted.get(key)) for key in keys]

    def _row(self, key: str, predicted: float | list[float] | None) -> Row:
        (name,) = self.want
        wanted = self.model.scalars[name]
        if not isinstance(wanted, Categorical):
            cells: Row = {name: predicted, f"{name}_sd": None}
        elif isinstance(predicted, list):
            cells = class_cells(name, dict(zip(wanted.classes, predicted)))
        else:
            cells = {name: None, **{f"{name}_p_{c}": None for c in wanted.classes}}
        true = scalar_values(self.dataset, key, self.schema, [*self.given, name])
        lacking = [n for n in self.given if not self.dataset.has(key, n) and true.get(n) is None]
        row = {"key": key, "subject": subject_of(key)} | cells | {f"{name}_true": true[name]}
        values, learnt = {n: true[n] for n in self.given if n in true}, self.learnt.get(key, "")
        flags = self.scan_flags(key)
        flags += row_flag(self.schema, self.training, {}, values, row, [name], learnt)
        if predicted is None:
            flags = [f"no {' and no '.join(n for n in lacking if n in self.volumes)}"]
        return row | {"not_given": ",".join(lacking) or None, "flag": "; ".join(flags) or "ok"}
