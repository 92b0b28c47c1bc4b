"""Training the joint diffusion (paper, section 3.1): all latents in memory, one loss over every variable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvhpc.config import ConfigError, JointConfig, choose
from mvhpc.devices import resolve_device
from mvhpc.diffusion.joint import Batch, JointDiffusion, Noised
from mvhpc.models.bundle import read_denoiser, save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.randomness import generator, rand
from mvhpc.training.calibration import calibrate
from mvhpc.training.engine import Engine
from mvhpc.training.loop import train
from mvhpc.variables import Value, Variables, standard_intervals
from shards.errors import nearest
from shards.index import Index
from shards.loader import Dataset, open_dataset
from shards.schema import Schema

SD_FLOOR = 0.1  # of an element, in typical SDs: latents of empty background hardly vary
ADAPTED = 256  # training people whom the reader's first features are scaled by
CALIBRATION = 1000  # validation people it takes at most
VALIDATION_DRAWS = 16  # noisings of each validation sample, the same at every validation


@dataclass(frozen=True)
class Records:
    """What a dataset of latents holds of some people, in memory.

    Attributes:
        keys: whose.
        rows: their scalars, by name.
        latents: by volume, (N, 1 or 2, C, h, w, d) float16: as it is and, where stored, mirrored; 0 where missing.
        there: by volume, who has it, (N,) bool.
    """

    keys: list[str]
    rows: list[Mapping[str, Value]]
    latents: dict[str, Tensor]
    there: dict[str, Tensor]


def read_records(dataset: Dataset, keys: list[str], schema: Schema) -> Records:
    """Everything that ``schema`` asks for of the people ``keys``.

    Raises:
        ConfigError: a scalar that the dataset does not have.
    """
    rows: list[Mapping[str, Value]] = [
        {v.name: _value(dataset.values(key), v.name, schema) for v in schema.scalars} for key in keys
    ]
    latents, there = {}, {}
    for volume in schema.volumes:
        has = [dataset.has(key, volume.name) for key in keys]
        mirrored = f"{volume.name}_mirrored"
        versions = [volume.name] + [mirrored] * any(dataset.has(key, mirrored) for key in keys)
        shape = dataset.index.arrays[volume.name]["shape"]
        stored = np.zeros((len(keys), len(versions), *shape), np.float16)
        for i, key in enumerate(keys):
            for j, version in enumerate(versions if has[i] else ()):
                stored[i, j] = dataset.read(key, version)
        latents[volume.name] = torch.from_numpy(stored)
        there[volume.name] = torch.tensor(has)
    return Records(keys, rows, latents, there)


class People:
    """Everything known of some people, as tensors.

    Args:
        records: of them.
        variables: what becomes of their scalars.

    Attributes:
        keys: whose.
        values: by variable, (N, 1 or 2, C, h, w, d) float16 for a volume (as it is, mirrored), (N, 1) or (N,) else.
        present: by variable, who has a value, (N,) bool.
    """

    def __init__(self, records: Records, variables: Variables) -> None:
        self.keys = records.keys
        values, present = variables.encode_scalars(records.rows)
        self.values, self.present = values | records.latents, present | records.there

    def take(self, indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and presence of the people at ``indices``."""
        return {n: v[indices] for n, v in self.values.items()}, {n: p[indices] for n, p in self.present.items()}


def _value(values: Mapping[str, Value], name: str, schema: Schema) -> Value:
    """A scalar as the schema reads it: a recorded category may be a number of the model."""
    if name not in values:
        raise ConfigError(f"schema: {nearest(name, values, 'variable of the data')}")
    value = values[name]
    return schema[name].parse(value) if isinstance(value, str) else value


class JointTask:
    """One step of the joint diffusion; see :class:`mvhpc.training.loop.Task`.

    Raises:
        ConfigError: a variable that the data do not have, data that are no latents, or questions that the design does
            not allow.
    """

    averaged: str | None = "denoiser"
    best = "denoiser"

    def __init__(self, config: JointConfig) -> None:
        self.config = config
        dataset = open_dataset(config.latents)
        index = dataset.index
        if index.kind != "latents":
            raise ConfigError(f"latents={config.latents} holds {index.kind}; encode it first: mvhpc encode")
        self.schema = Schema.load(config.schema) if config.schema else index.schema
        self.grid = index.grid
        choose(config.scaling, ("sd", "range"), "scaling")
        apart = config.diffusion.time == "independent" and config.model.scalars == "late"
        if (
            config.questions < 1
            or not 0 <= config.reveal <= 1
            or (not apart and (config.questions, config.reveal) != (1, 0))
        ):
            raise ConfigError(
                f"questions={config.questions} reveal={config.reveal}: at least 1 and a chance, and 1 and 0 unless "
                "diffusion.time=independent and model.scalars=late, where scalars have levels of their own and the "
                "volumes are read without them"
            )
        train, others = (
            read_records(dataset, dataset.keys(part, config.split), self.schema) for part in ("train", "validation")
        )
        self.latent = {v.name: self._moments(train, v.name, index) for v in self.schema.volumes}
        self.intervals = standard_intervals(self.schema, train.rows) if config.scaling == "sd" else {}
        variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.diffusion = JointDiffusion(variables, config.diffusion)
        self.people, self.others = People(train, variables), People(others, variables)
        self.samples, self.validation = len(self.people.keys), len(self.others.keys)
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        denoiser = JointDenoiser(variables, config.model, self.diffusion.blind)
        whole = torch.stack([self.people.present[v.name] for v in variables.volumes]).all(0).nonzero()[:ADAPTED, 0]
        if len(whole) > 1:
            denoiser.adapt({v.name: v.encode(self.people.values[v.name][whole, 0]) for v in variables.volumes})
        self.networks: dict[str, nn.Module] = {"denoiser": denoiser}
        self.scores: Mapping[str, tuple[str, ...]] = {"loss": ("",)}
        if denoiser.late and variables.scalars:  # few people are learnt by heart long before volumes are learnt
            self.scores = {"loss_of_scalars": denoiser.ANSWERING, "loss_of_volumes": ("",)}
        self.learning_rates = {"denoiser": config.optimizer.lr}

    def _moments(self, train: Records, volume: str, index: Index) -> dict[str, Any]:
        """Shape of a volume's latents, and the mean and SD to standardise them by.

        ``scaling=sd``: of each element over the training people, mirrored versions too. What makes two people differ
        is a small part of a latent beside what all brains share; unscaled, it drowns in the noise, and the network
        learns the average brain. ``scaling=range``: mean 0 and one SD, the scale that encoding measured.
        """
        facts: dict[str, Any] = {"shape": list(index.arrays[volume]["shape"])}
        latents = train.latents[volume][train.there[volume]].flatten(0, 1)  # (N or 2N, C, h, w, d)
        if self.config.scaling == "range" or len(latents) < 2:
            return facts | {"mean": torch.tensor(0.0), "sd": torch.tensor(1 / index.extra["scale"][volume])}
        parts, zero = latents.split(256), torch.zeros(latents.shape[1:], dtype=torch.float64)
        mean = sum((part.double().sum(0) for part in parts), zero) / len(latents)
        sd = (sum(((part - mean).square().sum(0) for part in parts), zero) / len(latents)).sqrt()
        typical = sd.square().mean().sqrt()
        return facts | {"mean": mean.float(), "sd": sd.clamp(min=float(SD_FLOOR * typical)).float()}

    def load(self, indices: list[int]) -> dict[str, Any]:
        """Values and presence, by variable."""
        values, present = self.people.take(indices)
        return {"values": values, "present": present}

    def _encode(self, values: Mapping[str, Tensor], mirror: Tensor) -> dict[str, Tensor]:
        """Scaled latents (B, C, h, w, d), mirrored where ``mirror`` (B,) says so and a mirrored version is stored."""
        batch = dict(values)
        for v in self.diffusion.variables.volumes:
            versions = values[v.name]  # (B, 1 or 2, C, h, w, d)
            which = mirror.long().clamp(max=versions.shape[1] - 1)
            batch[v.name] = v.encode(versions[torch.arange(len(which), device=which.device), which])
        return batch

    def _losses(
        self, network: Callable[..., Batch], noised: Noised, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Of each row (B,), by variable; one generator a row says what the reader is shown clean."""
        volumes = len(self.diffusion.variables.volumes)
        chosen = rand(generators, (volumes,), self.diffusion.device) < self.config.reveal
        outputs = network(noised.z, noised.t, shown=self.diffusion.reveal(noised, chosen))
        return self.diffusion.losses(outputs, noised)

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Noise a batch, denoise it, and take one optimiser step."""
        generators = [generator(self.config.training.seed, "train", step, i) for i in indices]
        engine = engines["denoiser"]
        first = next(iter(batch["present"].values()))
        self.diffusion.to(first.device)
        clean = self._encode(batch["values"], rand(generators, (), first.device) < 0.5)
        questions = range(self.config.questions)
        rows = [generator(self.config.training.seed, "train", step, i, q) for i in indices for q in questions]
        noised = self.diffusion.noise(clean, batch["present"], self.diffusion.draw_times(rows), rows)
        losses = self._losses(engine, noised, generators)
        loss = self.diffusion.total(losses).mean()
        engine.backward(loss)
        engine.step()
        return {"loss": loss} | {f"loss_{name}": value.mean() for name, value in losses.items()}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Losses at fixed levels and noise; NaN for a variable that a person lacks."""
        network = networks["denoiser"]
        device = next(network.parameters()).device
        self.diffusion.to(device)
        values, present = self.others.take(indices)
        values = {n: v.to(device) for n, v in values.items()}
        present = {n: p.to(device) for n, p in present.items()}
        clean = self._encode(values, torch.zeros(len(indices), dtype=torch.bool, device=device))
        volumes = {v.name for v in self.diffusion.variables.volumes}
        sums: dict[str, Tensor] = {}
        for draw in range(VALIDATION_DRAWS):
            generators = [generator(self.config.training.seed, "validation", i, draw) for i in indices]
            noised = self.diffusion.noise(clean, present, self.diffusion.draw_times(generators), generators)
            losses = self._losses(network, noised, generators)
            totals = {"loss": losses}
            if len(self.scores) > 1:
                totals["loss_of_volumes"] = {name: x for name, x in losses.items() if name in volumes}
                totals["loss_of_scalars"] = {name: x for name, x in losses.items() if name not in volumes}
            measured = {name: self.diffusion.total(parts) for name, parts in totals.items()}
            measured |= {f"loss_{name}": torch.where(present[name], x, torch.nan) for name, x in losses.items()}
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value / VALIDATION_DRAWS
        return sums

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the self-contained model: averaged denoiser, calibration, autoencoder, schema, latents' scale."""
        denoiser = JointDenoiser(self.diffusion.variables, self.config.model, self.diffusion.blind)
        denoiser.load_state_dict(states["denoiser"])
        values, present = self.others.take(list(range(min(self.validation, CALIBRATION))))
        unmirrored = torch.zeros(min(self.validation, CALIBRATION), dtype=torch.bool)
        device = resolve_device(self.config.compute.device)
        spread = calibrate(
            denoiser.to(device).eval(), self.diffusion.to(device), self._encode(values, unmirrored), present
        )
        save_joint(
            folder,
            states["denoiser"],
            self.config.vae,
            model=self.config.model,
            diffusion=self.config.diffusion,
            schema=self.schema,
            latent=self.latent,
            intervals=self.intervals,
            spread=spread,
            grid=self.grid,
            extra={"validation": metrics, "calibrated on": min(self.validation, CALIBRATION)},
        )

    def exported(self, folder: Path) -> dict[str, Tensor]:
        """The denoiser's weights that :meth:`export` wrote."""
        return read_denoiser(folder)


def worker(config: JointConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank`` of ``world``."""
    return train(JointTask(config), config, folder, rank, world)
