"""Training of the model of scalars: linear members in closed form, and 3D encoders by gradient descent.

All subjects of the training and the validation part are read once, pooled, and kept in memory. Members are trained by
cross-fitting: a subject's held-out predictions, by members that were not fitted to it, decide how the members are mixed
and how far a scan may lie from those of the training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.config import Compute, ConfigError, EncoderConfig, Optimizer, Tracking, Training, at_least, choose
from mvhpc.diffusion.density import density
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.loading import prepare
from mvhpc.models.pooled_features import linear_features
from mvhpc.models.scalar_bundle import save_scalars
from mvhpc.models.scalar_predictor import ScalarPredictor
from mvhpc.models.scalar_stack import MASKED, build_encoders, standardized
from mvhpc.models.training_people import TrainingPeople
from mvhpc.models.typicality import COMPONENTS, Typicality
from mvhpc.records import channels_of, cube, read_pooled, scalar_values
from mvhpc.runtime.devices import one_thread, resolve_device, send
from mvhpc.runtime.randomness import generator, rand
from mvhpc.training.cross_fitting import assign_folds
from mvhpc.training.engines.base import Engine
from mvhpc.training.stacking import stack_members
from mvhpc.training.task import Task
from mvhpc.variables import Categorical, Value, Variables, check_known, standard_intervals
from shards.dataset import Dataset, open_dataset
from shards.errors import nearest
from shards.schema import Schema

STANDARDIZED = 64  # subjects by which the encoders' layers are standardised before training
HIDDEN_VOLUMES, HIDDEN_SCALARS = 0.1, 0.5  # shares of the queries in training
BATCH = 32  # subjects whose features are computed at a time
FEWEST = 10  # subjects to train on


@dataclass
class LinearConfig:
    """The linear members: one for each smoothing."""

    components: int  # principal components of a volume, at most
    smoothing: list[float]  # SD, mm

    def __post_init__(self) -> None:
        at_least(1, {"linear.components": self.components, "linear.smoothing (entries)": len(self.smoothing)})


@dataclass
class ScalarsConfig:
    """`mvhpc train scalars`."""

    out: str
    data: str
    split: str
    schema: str  # name under configs/schema, a YAML file, or "" for the schema the data were packed with
    linear: LinearConfig
    encoder: EncoderConfig
    queries_per_volume: int  # queries about each volume and step, for one encoding of it
    ema: float  # decay per step
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"queries_per_volume": self.queries_per_volume})
        at_least(2, {"encoder.ensemble_members": self.encoder.ensemble_members})


@dataclass(frozen=True)
class PooledRecords:
    """Pooled volumes and scalars of N subjects, in memory.

    Attributes:
        keys, groups: of the records.
        rows: scalars by name, None where missing.
        pooled: by volume, (N, C, h, w, d) float16 in [0, 1]; 0 where missing.
        values: encoded scalars, (N, 1) or (N,).
        present: by variable, (N,) bool.
    """

    keys: list[str]
    groups: list[str]
    rows: Sequence[Mapping[str, Value]]
    pooled: dict[str, Tensor]
    values: dict[str, Tensor]
    present: dict[str, Tensor]


def check_scalars(config: ScalarsConfig) -> tuple[Dataset, Schema]:
    """Open the data and the schema.

    Raises:
        ConfigError: the data are not volumes, lack the split or a variable, or have too few subjects; or there is no
            volume or no scalar.
    """
    dataset = open_dataset(config.data)
    index = dataset.index
    if index.kind != "volumes":
        raise ConfigError(f"data={config.data} holds {index.kind}, not volumes; give the folder that shards pack wrote")
    choose(config.split, list(index.splits), f"split of {config.data}")
    schema = Schema.load(config.schema) if config.schema else index.schema
    recorded = [v.name for v in index.schema]
    for v in schema:
        if v.name not in recorded:
            raise ConfigError(f"schema: {nearest(v.name, recorded, 'variable of the data')}")
    if not schema.volumes or not schema.scalars:
        raise ConfigError(f"schema={config.schema}: scalars are predicted from volumes; name at least one of each")
    count = sum(len(dataset.keys(part, config.split)) for part in ("train", "validation"))
    if count < FEWEST:
        raise ConfigError(f"data={config.data}: {count} subjects to train on in split {config.split}; give {FEWEST}")
    return dataset, schema


def pool_people(
    dataset: Dataset, keys: Sequence[str], variables: Variables, schema: Schema, spacing: float
) -> PooledRecords:
    """The records ``keys``, pooled to about ``spacing`` mm.

    Raises:
        IntegrityError: a damaged volume, with its record.
    """
    index = dataset.index
    rows: list[Mapping[str, Value]] = [scalar_values(dataset, key, schema, variables.names) for key in keys]
    values, present = variables.encode_scalars(rows)
    pooled = {}
    for v in variables.volumes:
        arrays = channels_of(index, v.name)
        present[v.name] = torch.tensor([all(dataset.has(key, a) for a in arrays) for key in keys])
        pooled[v.name] = torch.zeros(len(keys), *v.shape, dtype=torch.float16)
        for i in present[v.name].nonzero()[:, 0].tolist():
            pooled[v.name][i] = read_pooled(dataset, keys[i], arrays, spacing)
    groups = [dataset.record(key).group for key in keys]
    return PooledRecords(list(keys), groups, rows, pooled, values, present)


def pooled_variables(dataset: Dataset, schema: Schema, spacing: float, intervals: Mapping[str, Any]) -> Variables:
    """The variables of a schema, with the shapes of pooled volumes; these are not standardised yet."""
    n = cube(dataset.index.grid, spacing)
    latent = {
        v.name: {
            "shape": [
                len(channels_of(dataset.index, v.name)),
                *(-(-size // n) for size in dataset.index.grid["shape"]),
            ],
            "mean": torch.tensor(0.0),
            "sd": torch.tensor(1.0),
        }
        for v in schema.volumes
    }
    return Variables.from_schema(schema, latent, intervals)


class ScalarsTask(Task):
    """One step of the encoders; see :class:`mvhpc.training.task.Task`. The linear members are fitted at the export.

    Raises:
        ConfigError: as :func:`check_scalars`.
        DataError: no training subject has a value of a variable.
    """

    def __init__(self, config: ScalarsConfig) -> None:
        self.config = config
        self.dataset, self.schema = check_scalars(config)
        train, validation = (self.dataset.keys(part, config.split) for part in ("train", "validation"))
        rows = [scalar_values(self.dataset, key, self.schema, [v.name for v in self.schema]) for key in train]
        check_known(self.schema, rows)
        self.intervals = standard_intervals(self.schema, rows)
        spacing = config.encoder.spacing
        variables = pooled_variables(self.dataset, self.schema, spacing, self.intervals)
        self.people = pool_people(self.dataset, train + validation, variables, self.schema, spacing)
        self.latent = {
            v.name: {"shape": list(v.shape)} | _channel_moments(self.people, v.name) for v in variables.volumes
        }
        self.variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.in_fold = assign_folds(self.people.groups, config.encoder.ensemble_members, config.training.seed)  # (N, R)
        self.samples = self.validation = len(self.people.keys)
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        network = build_encoders(self.variables, config.encoder)
        whole = torch.stack([self.people.present[v.name] for v in self.variables.volumes]).all(0).nonzero()[:, 0]
        if len(whole) > 1:
            some = {name: x[whole[:STANDARDIZED]].float() for name, x in self.people.pooled.items()}
            network.standardize_features(standardized(self.variables, some))
        self.networks: dict[str, nn.Module] = {"encoders": network}
        self.learning_rates = {"encoders": config.optimizer.lr}
        names = [f"loss_{v.name}" for v in self.variables.scalars]
        self.exported: Mapping[str, Sequence[str]] = {"encoders": ["loss", *names]}
        self.averaged = ("encoders",)

    @classmethod
    def check(cls, config: ScalarsConfig) -> None:
        """Raises ConfigError as :func:`check_scalars`."""
        check_scalars(config)

    def load(self, indices: list[int]) -> dict[str, Any]:
        """``pooled``, ``values`` and ``present`` by variable, and ``in_fold`` (B, R)."""
        people = self.people

        def pick(of: Mapping[str, Tensor]) -> dict[str, Tensor]:  # by NumPy, see shards.order.prefetch
            return {name: torch.from_numpy(x.numpy()[indices]) for name, x in of.items()}

        return {
            "pooled": pick(people.pooled),
            "values": pick(people.values),
            "present": pick(people.present),
            "in_fold": torch.from_numpy(self.in_fold.numpy()[indices]),
        }

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Mirror volumes at random, predict for random queries, and take one optimiser step."""
        seed, n = self.config.training.seed, self.config.queries_per_volume
        mirrored = rand([generator(seed, "mirror", step, i) for i in indices]) < 0.5
        pooled = {name: mirror(x.float(), mirrored) for name, x in batch["pooled"].items()}
        queries = [generator(seed, "query", step, i, q) for i in indices for q in range(n)]
        draws = rand(queries, (len(self.variables.names),))  # (B Q, V)
        device = batch["in_fold"].device
        unknown = {}
        for name, u in zip(self.variables.names, draws.T):
            # A volume is hidden or not once for all queries about it.
            unknown[name] = (u[::n] < HIDDEN_VOLUMES if name in pooled else u < HIDDEN_SCALARS).to(device)
        losses = self._losses(engines["encoders"], pooled, batch["values"], batch["present"], batch["in_fold"], unknown)
        loss = torch.stack(list(losses.values())).sum(0).mean()
        engines["encoders"].backward(loss)
        engines["encoders"].step()
        return {"loss": loss.detach()} | {f"loss_{name}": x.detach().mean() for name, x in losses.items()}

    def _losses(
        self,
        network: Any,
        pooled: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        members: Tensor,
        unknown: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Negative log likelihood (B,) of each unknown scalar that is present, mean over queries and some members.

        Args:
            network: the encoders.
            pooled, values, present: of B rows.
            members: whose losses count, (B, R) bool.
            unknown: (B,) bool of a volume and (B Q,) of a scalar.
        """
        n = len(unknown[self.variables.scalars[0].name]) // len(members)
        volumes = {v.name for v in self.variables.volumes}
        present = {name: x if name in volumes else x.repeat_interleave(n) for name, x in present.items()}
        t = {name: (unknown[name] | ~x).long() * MASKED for name, x in present.items()}
        z = standardized(self.variables, pooled)
        z |= {v.name: values[v.name].repeat_interleave(n, 0) for v in self.variables.scalars}
        weight = members.repeat_interleave(n, 0).float()  # (B Q, R)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        losses = {}
        for name, output in network(z, t).items():
            nll = member_nll(output, z[name], isinstance(self.variables[name], Categorical))  # (B Q, R)
            counts = unknown[name] & present[name]
            losses[name] = ((nll * weight).sum(1) * counts).reshape(-1, n).sum(1) / max(n / 2, 1)
        return losses

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Held-out losses (B,) given the volumes, and given all other variables; NaN where the scalar is missing."""
        network = networks["encoders"]
        assert isinstance(network, ScalarPredictor)
        device = next(network.parameters()).device
        batch = self.load(indices)
        pooled = {name: x.float().to(device) for name, x in batch["pooled"].items()}
        values, present = ({k: x.to(device) for k, x in batch[part].items()} for part in ("values", "present"))
        held_out = ~batch["in_fold"].to(device)
        measured: dict[str, Tensor] = {}
        scalars = [v.name for v in self.variables.scalars]
        shown = {v.name: torch.zeros(len(indices), dtype=torch.bool, device=device) for v in self.variables.volumes}
        for name in scalars:
            total = torch.zeros(len(indices), device=device)
            for others in (True, False):
                unknown = shown | {s: torch.full_like(present[s], others or s == name) for s in scalars}
                total = total + self._losses(network, pooled, values, present, held_out, unknown)[name] / 2
            measured[f"loss_{name}"] = torch.where(present[name], total, torch.nan)
        measured["loss"] = torch.stack([x.nan_to_num(0.0) for x in measured.values()]).sum(0)
        return measured

    @property
    def smoothing(self) -> list[float]:
        """Of each linear member, SD in pooled voxels."""
        grid = self.dataset.index.grid
        edge = grid["spacing"] * cube(grid, self.config.encoder.spacing)  # mm
        return [mm / edge for mm in self.config.linear.smoothing]

    @cached_property
    def features(self) -> list[dict[str, Tensor]]:
        """Of each linear member, by volume: (N, P) float16."""
        return [{name: _features(x, sd) for name, x in self.people.pooled.items()} for sd in self.smoothing]

    def fit_linear(self, chosen: Tensor) -> list[LinearMember]:
        """The linear members of some people, (N,) bool."""
        people = self.people
        return [
            LinearMember.fit(
                self.variables.scalars, x, people.values, people.present, chosen, self.config.linear.components
            )
            for x in self.features
        ]

    @cached_property
    def linear(self) -> list[LinearMember]:
        """The linear members of everybody."""
        return self.fit_linear(torch.ones(len(self.people.keys), dtype=torch.bool))

    @cached_property
    def held_out_linear(self) -> list[list[LinearMember]]:
        """For each fold, the linear members of all others."""
        return [self.fit_linear(chosen) for chosen in self.in_fold.T]

    @one_thread()  # training and export find the same model, to the bit
    @torch.no_grad()
    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Fit the linear members, mix all members by held-out people, and write the model."""
        network = build_encoders(self.variables, self.config.encoder)
        network.load_state_dict(states["encoders"])
        prepare(network, resolve_device(self.config.compute.device))
        mixing = stack_members(self.variables, self.people, self.features, self.held_out_linear, self.in_fold, network)
        index = self.dataset.index
        volumes = [v.name for v in self.variables.volumes]
        people = {self.dataset.record(key).subject for key in self.people.keys}
        save_scalars(
            folder,
            encoders=states["encoders"],
            linear=self.linear,
            mixing=mixing,
            typical={name: self.typical(name) for name in volumes},
            model=self.config.encoder,
            smoothing=self.smoothing,
            schema=self.schema,
            latent=self.latent,
            channels={name: channels_of(index, name) for name in volumes},
            intervals=self.intervals,
            grid=index.grid,
            training=TrainingPeople.of(index, self.people.keys, self.schema, self.people.rows),
            recipe=index.provenance.get("recipe"),
            extra={"validation": metrics, "calibrated on": len(people)},
        )

    def typical(self, volume: str) -> Typicality:
        """Distances of everybody's volume from the people of the other folds."""
        x, there = self.features[0][volume], self.people.present[volume]
        distances = []
        for members, in_fold in zip(self.held_out_linear, self.in_fold.T):
            part = x[there & ~in_fold]
            components = members[0].components[volume]
            if len(part):
                distances.append(components.distances(components.scores(part), COMPONENTS))
        return Typicality.of_people(torch.cat(distances))


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """Volumes (B, C, h, w, d) with left and right, the first axis of space, exchanged in the chosen rows (B,)."""
    return torch.where(send(chosen, x.device).reshape(-1, 1, 1, 1, 1), x.flip(2), x)


def member_nll(output: Tensor, truth: Tensor, category: bool) -> Tensor:
    """Negative log likelihood (B, R) of the truth by each member's output (B, R, n)."""
    rows, members = output.shape[:2]
    flat = output.flatten(0, 1)  # (B R, n)
    if category:
        return F.cross_entropy(flat, truth.repeat_interleave(members), reduction="none").reshape(rows, members)
    law = density(flat)
    return -law.log_prob(truth[:, 0].double().repeat_interleave(members)).float().reshape(rows, members)


def _features(pooled: Tensor, sd: float) -> Tensor:
    return torch.cat([linear_features(part, sd).half() for part in pooled.split(BATCH)])


def _channel_moments(people: PooledRecords, name: str) -> dict[str, Tensor]:
    """Mean and SD of each channel over everybody's voxels, (C, 1, 1, 1)."""
    x = people.pooled[name][people.present[name]]
    if not len(x):
        raise ConfigError(f"no subject of the training has {name}; leave it out of the schema")
    means = torch.stack([part.double().mean((0, 2, 3, 4)) * len(part) for part in x.split(BATCH)]).sum(0) / len(x)
    centred = (part.double() - means[:, None, None, None] for part in x.split(BATCH))
    squares = torch.stack([c.square().mean((0, 2, 3, 4)) * len(c) for c in centred]).sum(0) / len(x)
    shape = (-1, 1, 1, 1)
    return {"mean": means.float().reshape(shape), "sd": squares.sqrt().clamp(min=1e-3).float().reshape(shape)}
