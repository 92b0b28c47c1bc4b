"""Predictions for the subjects of a data set by a joint model whose U-Net predicts scalars: from chains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mvhpc.config import ConfigError, Sampling, Tracking, Workers, at_least, to_dict
from mvhpc.diffusion.joint import Batch
from mvhpc.evaluation import ensembles
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.flags import UNKNOWN, row_flag
from mvhpc.inference.groups import GroupedPredictor, group_size, take_rows
from mvhpc.inference.law_cells import decode_draws
from mvhpc.inference.prediction_columns import QUANTILES
from mvhpc.inference.prediction_tables import Row, class_cells
from mvhpc.inference.sampler import Sampler, Voxels, encode_given, read_voxels
from mvhpc.models.bundle import JointModel
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_data, check_names, scalar_values, true_value
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Categorical, Continuous
from shards.dataset import open_dataset
from shards.schema import Schema

WIDTH = 64  # voxels of a volume that a U-Net needs as much memory for as for a voxel of its latent


@dataclass
class PredictConfig:
    """`mvhpc predict`: any scalars from any variables."""

    out: str  # a TSV file
    model: str
    data: str
    split: str  # train | validation | test | all | auto
    split_name: str  # which recorded split
    given: list[str]
    want: list[str]
    samples: int  # chains per subject, for models whose U-Net predicts scalars
    draws: int  # joint draws per subject of a model of scalars, into NAME.draws.tsv
    batch: int  # subjects that a worker takes at a time
    seed: int
    sampling: Sampling
    compute: Workers
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples, "batch": self.batch})
        at_least(0, {"draws": self.draws})
        if both := sorted({*self.given} & {*self.want}):  # before a job is submitted
            raise ConfigError(f"{', '.join(both)} is both given and wanted; name each variable once")


def check_query(schema: Schema, given: Sequence[str], want: Sequence[str]) -> None:
    """Refuse a query that the model does not take.

    Raises:
        ConfigError: as :func:`~mvhpc.records.check_names`; nothing wanted, or a wanted volume.
    """
    check_names(schema, given, want)
    if not want:
        raise ConfigError(f"nothing is wanted; set want to one or more of {', '.join(v.name for v in schema)}")
    for name in want:
        if schema[name].kind == "volume":
            raise ConfigError(
                f"{name} is a volume: use `mvhpc translate` to draw it for every subject, `mvhpc generate` to sample "
                "people (given=name=value,...) or `mvhpc inpaint` to fill in a part of one"
            )


def check_config(schema: Schema, config: PredictConfig) -> None:
    """:func:`check_query` of a configuration."""
    check_query(schema, config.given, config.want)


class Predictor(GroupedPredictor):
    """Answers one query about any subjects of one data set by a joint model.

    A given variable that a subject lacks is unknown for this subject. A subject that lacks everything given has no
    answer, where something is given.

    Args:
        config: data, query and sampling.
        model: a joint model on the device to use; it is the predictor's from now on, see
            :class:`~mvhpc.inference.sampler.Sampler`.

    Raises:
        ConfigError: a query that the model does not take, or data on another grid.
    """

    def __init__(self, config: PredictConfig, model: JointModel) -> None:
        self.config, self.given, self.want = config, config.given, config.want
        self.sampler = Sampler(model, config.sampling, config.compute)
        self.method = self.sampler.sampling.conditioning
        if config.draws:
            raise ConfigError(
                f"draws={config.draws}: joint draws come from a model of scalars, and {config.model} predicts by "
                f"{self.method} chains; take 0"
            )
        self.model, self.dataset, self.schema = model, open_dataset(config.data), model.schema
        check_query(self.schema, self.given, self.want)
        check_data(model.grid, self.schema, self.dataset, self.given, self.want)
        latents = sum(math.prod(v.shape[1:]) for v in model.variables.volumes)
        self.group = group_size(self.sampler.device, WIDTH * latents * config.samples)
        self.calls = self.sampler.calls(self.given, self.want) * config.samples
        self.facts = {"samples": config.samples, "sampling": to_dict(self.sampler.sampling)}
        self.training = TrainingPeople.read(model.meta)
        self.learnt = self.training.learnt(self.dataset.index)

    def read(self, keys: Sequence[str]) -> Voxels:
        """The given volumes.

        Raises:
            IntegrityError: a damaged volume, with its record.
        """
        return read_voxels(self.dataset, keys, self.schema, self.given)

    @torch.inference_mode()
    def answer(self, keys: Sequence[str], inputs: Voxels) -> list[Row]:
        """Predictions, one row per subject, in order."""
        given, present = encode_given(self.sampler, self.dataset, keys, self.given, inputs)
        cells = self._chains(keys, given, present)
        rows: list[Row] = []
        for i, key in enumerate(keys):
            lacking = [name for name in self.given if not present[name][i]]
            answered = not self.given or len(lacking) < len(self.given)
            row: Row = {"key": key, "subject": subject_of(key)}
            for name in self.want:
                own = cells[name][i]
                row |= own if answered and not self.training.uniform(name) else dict.fromkeys(own)
                row[f"{name}_true"] = true_value(self.dataset, key, self.schema[name])
            values = scalar_values(self.dataset, key, self.schema, self.given)
            flags = self.scan_flags(key)
            flags += row_flag(self.schema, self.training, {}, values, row, self.want, self.learnt.get(key, ""))
            flags = flags if answered else [UNKNOWN]
            rows.append(row | {"not_given": ",".join(lacking) or None, "flag": "; ".join(flags) or "ok"})
        return rows

    def _chains(self, keys: Sequence[str], given: Batch, present: Batch) -> dict[str, list[Row]]:
        """Cells from chains, by wanted variable, one row per subject."""
        n = self.config.samples
        full, (given, present) = _repeat_last(keys, self.group), take_rows((given, present), 0, self.group)
        drawn = self.sampler(
            {name: value.repeat_interleave(n, 0) for name, value in given.items()},
            [generator(self.config.seed, "predict", key, chain) for key in full for chain in range(n)],
            {name: there.repeat_interleave(n) for name, there in present.items()},
            want=self.want,
        )
        drawn = {name: x[: len(keys) * n] for name, x in drawn.items()}
        rows: dict[str, list[Row]] = {}
        for name in self.want:
            variable, chains = (
                self.model.variables[name],
                decode_draws(self.model.variables[name], drawn[name], len(keys)),
            )
            if isinstance(variable, Categorical):
                rows[name] = [class_cells(name, {c: x.count(c) / n for c in variable.classes}) for x in chains]
            else:
                assert isinstance(variable, Continuous)
                rows[name] = self._ensemble(variable, np.array(chains), keys)
        return rows

    def _ensemble(self, variable: Continuous, chains: NDArray[np.float64], keys: Sequence[str]) -> list[Row]:
        """Cells of a number from chains (B, samples); one chain has no SD."""
        name, means = variable.name, chains.mean(1).tolist()
        if self.config.samples < 2:
            return [{name: mean, f"{name}_sd": None} for mean in means]
        truth = np.array([true_value(self.dataset, key, self.schema[name]) for key in keys], float)  # NaN where missing
        points = variable.snap(torch.from_numpy(ensembles.quantiles(chains, [q / 100 for q in QUANTILES])))  # (B, 5)
        scores, below = (
            [None if np.isnan(x) else x for x in measure(chains, truth).tolist()]
            for measure in (ensembles.crps, ensembles.pit)
        )
        columns = {name: means, f"{name}_sd": chains.std(1, ddof=1).tolist()}
        columns |= {f"{name}_q{q:02d}": points[:, i].tolist() for i, q in enumerate(QUANTILES)}
        columns |= {f"{name}_crps": scores, f"{name}_pit": below}
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _repeat_last(keys: Sequence[str], size: int) -> list[str]:
    return [*keys, *[keys[-1]] * (size - len(keys))]
