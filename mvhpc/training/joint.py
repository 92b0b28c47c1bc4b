"""Training of the joint diffusion (paper, section 3.1), with all latents in memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvhpc.config import (
    Compute,
    ConfigError,
    DenoiserConfig,
    DiffusionConfig,
    Optimizer,
    Tracking,
    Training,
    choose,
    fingerprint,
)
from mvhpc.diffusion.joint import Batch, JointDiffusion
from mvhpc.models.bundle import autoencoder_identity, save_joint
from mvhpc.models.joint_network import build_networks
from mvhpc.models.linear_denoiser import LinearDenoiser
from mvhpc.models.loading import prepare
from mvhpc.models.scalar_predictor import ScalarPredictor
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import scalar_values
from mvhpc.runtime.devices import one_thread, repeatable, resolve_device
from mvhpc.runtime.randomness import generator, rand
from mvhpc.training.calibration import calibrate
from mvhpc.training.cross_fitting import assign_folds
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Task
from mvhpc.variables import Value, Variables, check_known, standard_intervals
from shards.dataset import Dataset, open_dataset
from shards.errors import nearest
from shards.index import Index
from shards.schema import Schema

SD_FLOOR = 0.1  # least SD of an element, in typical SDs: latents of empty background hardly vary
STANDARDIZED = 256  # subjects by which the encoders' features are scaled before training
MOST_FITTED = 1024  # subjects that the linear denoiser is fitted to, and
MOST_ELEMENTS = 2**28  # elements of their latents, mirrored ones included: 1 GiB
PEOPLE_PER_COMPONENT = 4  # a quarter as many components as subjects: its held-out errors are near their smallest
MOST_HELD_OUT = 500  # subjects for validation and calibration of scalars
VALIDATION_DRAWS = 16  # noise draws per validation sample, the same at every validation


@dataclass
class JointConfig:
    """`mvhpc train joint`."""

    out: str
    latents: str
    vae: str
    split: str
    schema: str  # name under configs/schema, a YAML file, or "" for the schema the data were packed with
    queries_per_volume: int  # sets of levels of the scalars per row and step, for one encoding of its volumes
    clean_volume_prob: float  # probability that the scalar predictor is given a volume clean that the U-Net denoises
    scaling: str  # interval mapped to [-1, 1]. sd: training mean plus or minus one SD; range: the schema's range
    model: DenoiserConfig
    diffusion: DiffusionConfig
    ema: float  # decay per step
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking


@dataclass(frozen=True)
class Records:
    """Latents and scalars of some subjects, in memory.

    Attributes:
        keys: of the records.
        rows: scalars by name.
        latents: by volume, (N, 1 or 2, C, h, w, d) float16: original and, if stored, mirrored; 0 where missing.
        there: by volume, which records have it, (N,) bool.
    """

    keys: list[str]
    rows: list[Mapping[str, Value]]
    latents: dict[str, Tensor]
    there: dict[str, Tensor]


def read_records(dataset: Dataset, keys: list[str], schema: Schema) -> Records:
    """All variables of ``schema`` for the records ``keys``.

    Raises:
        ConfigError: the dataset lacks a variable, or the schema lacks a record's category.
    """
    names, recorded = [v.name for v in schema], [v.name for v in dataset.index.schema]
    for name in names:
        if name not in recorded:
            raise ConfigError(f"schema: {nearest(name, recorded, 'variable of the data')}")
    rows: list[Mapping[str, Value]] = [scalar_values(dataset, key, schema, names) for key in keys]
    latents, there = {}, {}
    for volume in schema.volumes:
        has = [dataset.has(key, volume.name) for key in keys]
        mirrored = f"{volume.name}_mirrored"
        versions = [volume.name] + [mirrored] * any(dataset.has(key, mirrored) for key in keys)
        shape = dataset.index.arrays[volume.name]["shape"]
        stored = np.zeros((len(keys), len(versions), *shape), np.float16)
        for i, key in enumerate(keys):
            for j, version in enumerate(versions if has[i] else ()):
                stored[i, j] = dataset.read(key, version if dataset.has(key, version) else volume.name)
        latents[volume.name] = torch.from_numpy(stored)
        there[volume.name] = torch.tensor(has)
    return Records(keys, rows, latents, there)


class RecordTensors:
    """All values of some records, as tensors.

    Args:
        records: the records.
        variables: encodings of their scalars.

    Attributes:
        keys: of the records.
        values: by variable, (N, 1 or 2, C, h, w, d) float16 for a volume (original, mirrored), else (N, 1) or (N,).
        present: by variable, which records have a value, (N,) bool.
    """

    def __init__(self, records: Records, variables: Variables) -> None:
        self.keys = records.keys
        values, present = variables.encode_scalars(records.rows)
        self.values, self.present = values | records.latents, present | records.there

    def take(self, indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and presence of the records at ``indices``; by NumPy, see :func:`shards.order.prefetch`."""

        def pick(of_all: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(x.numpy()[indices]) for name, x in of_all.items()}

        return pick(self.values), pick(self.present)


def open_latents(config: JointConfig) -> Dataset:
    """Open the data set of latents, and check that it fits the rest of the configuration.

    Raises:
        ConfigError: the data are not latents, or are of another autoencoder or split; or the design does not allow
            these ``queries_per_volume``, ``clean_volume_prob`` or ``ensemble_members``.
    """
    dataset = open_dataset(config.latents)
    index = dataset.index
    if index.kind != "latents":
        raise ConfigError(f"latents={config.latents} holds {index.kind}; encode it first: mvhpc encode")
    choose(config.split, list(index.splits), f"split of {config.latents}")
    if fingerprint(sorted(dataset.keys("train", config.split))) != index.extra.get("training"):
        raise ConfigError(
            f"split={config.split}: its training part is not the one that latents={config.latents} were scaled by "
            f"(split {index.provenance['arguments']['split']} when they were encoded); encode again with "
            f"split={config.split}"
        )
    if (theirs := index.extra["vae"]) != (ours := autoencoder_identity(config.vae)):
        raise ConfigError(
            f"vae={config.vae} (SHA-256 {ours[:12]}) is not the autoencoder that made latents={config.latents} "
            f"(SHA-256 {theirs[:12]}); set vae to that one, or encode again with vae={config.vae}"
        )
    choose(config.scaling, ("sd", "range"), "scaling")
    separate = config.diffusion.time == "independent" and config.model.scalars == "late"
    queries, probability = config.queries_per_volume, config.clean_volume_prob
    if queries < 1 or not 0 <= probability <= 1 or (not separate and (queries, probability) != (1, 0)):
        raise ConfigError(
            f"queries_per_volume={queries} clean_volume_prob={probability}: at least 1, and a probability; 1 and 0 "
            "unless diffusion.time=independent and model.scalars=late, where a network of its own predicts scalars"
        )
    if config.model.linear_components and not (config.model.scalars == "late" and config.diffusion.volume == "v"):
        raise ConfigError(
            f"model.linear_components={config.model.linear_components}: 0 unless model.scalars=late and "
            "diffusion.volume=v; the linear denoiser predicts v of volumes from all scalars"
        )
    members = config.model.ensemble_members
    if members < 1 or (members > 1 and not separate):
        raise ConfigError(
            f"model.ensemble_members={members}: at least 1, and 1 unless diffusion.time=independent and "
            "model.scalars=late, where a network of its own predicts scalars"
        )
    return dataset


class JointTask(Task):
    """One step of the joint diffusion; see :class:`mvhpc.training.task.Task`.

    In the late design two networks are trained: ``denoiser`` on the training part, validated on the validation part,
    and ``scalars``, whose ensemble members are trained by cross-fitting on both parts.

    Raises:
        ConfigError: as :func:`open_latents`, or the data lack a variable.
        DataError: no training subject has a value of a variable.
    """

    def __init__(self, config: JointConfig) -> None:
        self.config = config
        dataset = open_latents(config)
        index = dataset.index
        self.schema = Schema.load(config.schema) if config.schema else index.schema
        self.grid = index.grid
        train, validation = (dataset.keys(part, config.split) for part in ("train", "validation"))
        records = read_records(dataset, train + validation, self.schema)
        check_known(self.schema, records.rows[: len(train)])
        self.training_people = TrainingPeople.of(index, records.keys, self.schema, records.rows)
        self.latent = {v.name: self._moments(records, len(train), v.name, index) for v in self.schema.volumes}
        self.intervals = standard_intervals(self.schema, records.rows[: len(train)]) if config.scaling == "sd" else {}
        variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.diffusion = JointDiffusion(variables, config.diffusion)
        self.people = RecordTensors(records, variables)  # of the training part, then of the validation part
        self.in_training = torch.arange(len(records.keys)) < len(train)  # (N,) records that the denoiser is trained on
        self.in_fold = self.in_training[:, None]  # (N, R) records that each ensemble member is trained on
        if config.model.ensemble_members > 1 and variables.scalars:
            group = {record.key: record.group for record in index.records}
            groups = [group[key] for key in records.keys]
            self.in_fold = assign_folds(groups, config.model.ensemble_members, config.training.seed)
        self.samples = int(self.in_fold.any(1).sum())
        validation_first = [*range(len(train), len(records.keys)), *range(len(train))]
        held_out = [i for i in validation_first if not self.in_fold[i].all()]
        self.held_out = held_out[: max(MOST_HELD_OUT, len(validation))]  # positions of the validation samples
        self.validation = len(self.held_out) if validation else 0
        self.linear = self._fit_linear()
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        self.networks = build_networks(variables, config.model, self.diffusion.masked_level)
        scalars = self.networks.get("scalars")
        whole = torch.stack([self.people.present[v.name] for v in variables.volumes]).all(0).nonzero()
        whole = whole[:STANDARDIZED, 0]
        if isinstance(scalars, ScalarPredictor) and len(whole) > 1:
            clean = {v.name: v.encode(self.people.values[v.name][whole, 0]) for v in variables.volumes}
            scalars.standardize_features(clean)
        of_volumes, of_scalars = ([f"loss_{v.name}" for v in of] for of in (variables.volumes, variables.scalars))
        self.exported: Mapping[str, Sequence[str]] = {"denoiser": ["loss", *of_volumes, *of_scalars]}
        if scalars is not None:  # it overfits few subjects long before volumes are learnt
            self.exported = {
                "denoiser": ["loss_of_volumes", *of_volumes],
                "scalars": ["loss_of_scalars", *of_scalars],
            }
        self.averaged = tuple(self.networks)
        self.learning_rates = dict.fromkeys(self.networks, config.optimizer.lr)

    @classmethod
    def check(cls, config: JointConfig) -> None:
        """Raises ConfigError as :func:`open_latents`."""
        open_latents(config)

    def _moments(self, records: Records, first: int, volume: str, index: Index) -> dict[str, Any]:
        """Shape of a volume's latents, and the mean and SD of the ``first`` records, by which they are standardised.

        ``scaling=sd``: of each element over the training subjects, mirrored versions included. Differences between
        subjects are small compared with what all brains have in common; unscaled, the noise hides them, and the network
        learns the average brain. ``scaling=range``: mean 0 and one SD, the scale measured by the encode stage.
        """
        facts: dict[str, Any] = {"shape": list(index.arrays[volume]["shape"])}
        there = records.there[volume][:first]
        latents = records.latents[volume][:first][there].flatten(0, 1)  # (N or 2N, C, h, w, d)
        if self.config.scaling == "range" or len(latents) < 2:
            return facts | {"mean": torch.tensor(0.0), "sd": torch.tensor(1 / index.extra["scale"][volume])}
        parts, zero = latents.split(256), torch.zeros(latents.shape[1:], dtype=torch.float64)
        mean = sum((part.double().sum(0) for part in parts), zero) / len(latents)
        sd = (sum(((part - mean).square().sum(0) for part in parts), zero) / len(latents)).sqrt()
        typical = sd.square().mean().sqrt()
        return facts | {"mean": mean.float(), "sd": sd.clamp(min=float(SD_FLOOR * typical)).float()}

    def _fit_linear(self) -> LinearDenoiser | None:
        """The linear denoiser of the training part, mirrored versions included; None where the configuration has none,
        or nobody has all volumes."""
        most = min(MOST_FITTED, MOST_ELEMENTS // (2 * sum(math.prod(facts["shape"]) for facts in self.latent.values())))
        values, present = self.people.take(self.in_training.nonzero()[:, 0][:most].tolist())
        whole = torch.stack([present[v.name] for v in self.diffusion.variables.volumes]).all(0)
        if not self.config.model.linear_components or not whole.any():
            return None
        both = [self._encode(values, torch.full_like(whole, mirror)) for mirror in (False, True)]
        components = min(self.config.model.linear_components, int(whole.sum()) // PEOPLE_PER_COMPONENT)
        with one_thread():
            return LinearDenoiser.fit(
                self.diffusion,
                {name: torch.cat([version[name] for version in both]) for name in values},
                {name: there.repeat(2) for name, there in present.items()},
                components,
            )

    def load(self, indices: list[int]) -> dict[str, Any]:
        """``values`` and ``present`` by variable, and ``in_fold`` (B, R)."""
        values, present = self.people.take(indices)
        return {"values": values, "present": present, "in_fold": self.in_fold[indices]}

    def _encode(self, values: Mapping[str, Tensor], mirror: Tensor) -> dict[str, Tensor]:
        """Scaled latents (B, C, h, w, d), mirrored where ``mirror`` (B,) is True and a mirrored version is stored."""
        batch = dict(values)
        for v in self.diffusion.variables.volumes:
            versions = values[v.name]  # (B, 1 or 2, C, h, w, d)
            which = mirror.long().clamp(max=versions.shape[1] - 1)
            batch[v.name] = v.encode(versions[torch.arange(len(which), device=which.device), which])
        return batch

    def _losses(
        self,
        networks: Mapping[str, Callable[..., Batch]],
        clean: Batch,
        present: Batch,
        moving: Tensor,
        members: Tensor,
        generators: Sequence[torch.Generator],
        queries: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Losses of each row (B,) after adding noise, by variable.

        Args:
            networks: by name.
            clean, present: the rows.
            moving: rows whose volumes are noised and denoised, (B,) bool on the CPU; those of others stay at t = 0.
            members: ensemble members whose predictions count, (B, R) bool.
            generators: one per row; they decide which volumes ``scalars`` is given clean.
            queries: generators of levels and noise, Q per row.
        """
        volumes = self.diffusion.variables.volumes
        levels = self.diffusion.draw_times(queries)
        still = ~moving.repeat_interleave(len(queries) // len(generators))
        levels |= {v.name: levels[v.name].masked_fill(still, 0) for v in volumes}
        noised = self.diffusion.noise(clean, present, levels, queries)
        outputs = networks["denoiser"](noised.z, noised.t, moving=noised.moving)
        if self.linear is not None:
            outputs = self.linear.added_to(outputs, noised.z, noised.t)
        if "scalars" in networks:
            draw = rand(generators, (len(volumes),), self.diffusion.device)
            z, t = self.diffusion.show_clean(noised, draw < self.config.clean_volume_prob)
            outputs = outputs | networks["scalars"]({**noised.z, **z}, {**noised.t, **t})
        return self.diffusion.losses(outputs, noised, members)

    def _totals(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum (B,) of the losses of each network's variables, by network."""
        if "scalars" not in self.networks:
            return {"denoiser": self.diffusion.total(losses)}
        volumes = {v.name for v in self.diffusion.variables.volumes}
        return {
            "denoiser": self.diffusion.total({name: x for name, x in losses.items() if name in volumes}),
            "scalars": self.diffusion.total({name: x for name, x in losses.items() if name not in volumes}),
        }

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Noise a batch, denoise it, and take one optimiser step of each network."""
        seed = self.config.training.seed
        generators = [generator(seed, "train", step, i) for i in indices]
        first = next(iter(batch["present"].values()))
        self.diffusion.to(first.device)
        if self.linear is not None:
            self.linear.to(first.device)
        clean = self._encode(batch["values"], rand(generators, (), first.device) < 0.5)
        queries = [generator(seed, "train", step, i, q) for i in indices for q in range(self.config.queries_per_volume)]
        in_training, in_fold = self.in_training[indices], batch["in_fold"]
        losses = self._losses(engines, clean, batch["present"], in_training, in_fold, generators, queries)
        for name, loss in self._totals(losses).items():
            with repeatable(engines[name].device):
                engines[name].backward(loss.mean())
            engines[name].step()
        logged = {"loss": self.diffusion.total(losses)} | {f"loss_{name}": value for name, value in losses.items()}
        return {name: value.detach().mean() for name, value in logged.items()}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Losses of held-out records at fixed levels and noise, by networks that were not trained on them.

        NaN where a record lacks the variable, and for volumes of records that the denoiser was trained on.
        """
        device = next(networks["denoiser"].parameters()).device
        self.diffusion.to(device)
        if self.linear is not None:
            self.linear.to(device)
        clean, present, held_out = self._read_held_out(indices, device)
        untrained = ~self.in_training[[self.held_out[i] for i in indices]]
        fresh = untrained.to(device)
        volumes = {v.name for v in self.diffusion.variables.volumes}
        sums: dict[str, Tensor] = {}
        for draw in range(VALIDATION_DRAWS):
            generators = [generator(self.config.training.seed, "validation", i, draw) for i in indices]
            losses = self._losses(networks, clean, present, untrained, held_out, generators, generators)
            measured = {"loss": self.diffusion.total(losses)}
            if "scalars" in networks:
                totals = self._totals(losses)
                measured |= {"loss_of_volumes": totals["denoiser"], "loss_of_scalars": totals["scalars"]}
            for name in {"loss", "loss_of_volumes"} & measured.keys():
                measured[name] = torch.where(fresh, measured[name], torch.nan)
            for name, x in losses.items():
                known = present[name] & fresh if name in volumes else present[name]
                measured[f"loss_{name}"] = torch.where(known, x, torch.nan)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value / VALIDATION_DRAWS
        return sums

    def _read_held_out(self, indices: Sequence[int], device: torch.device) -> tuple[Batch, Batch, Tensor]:
        """Encoded values and presence of held-out records, and the members not trained on them, (B, R) bool."""
        places = [self.held_out[i] for i in indices]
        values, present = self.people.take(places)
        values, present = ({n: x.to(device) for n, x in part.items()} for part in (values, present))
        unmirrored = torch.zeros(len(places), dtype=torch.bool, device=device)
        return self._encode(values, unmirrored), present, ~self.in_fold[places].to(device)

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write networks of the self-contained model, with averaged weights; with ``scalars`` also its calibration."""
        indices = range(min(len(self.held_out), MOST_HELD_OUT))
        temperature = None
        if "scalars" in states:
            network = ScalarPredictor(self.diffusion.variables, self.config.model, self.diffusion.masked_level)
            network.load_state_dict(states["scalars"])
            device = resolve_device(self.config.compute.device)
            prepare(network, device)
            temperature = calibrate(network, self.diffusion.to(device), *self._read_held_out(indices, device))
        save_joint(
            folder,
            states,
            self.config.vae,
            model=self.config.model,
            diffusion=self.config.diffusion,
            schema=self.schema,
            latent=self.latent,
            intervals=self.intervals,
            temperature=temperature,
            linear=self.linear,
            grid=self.grid,
            training=self.training_people,
            extra={"validation": metrics, "calibrated on": len(indices)},
        )
