"""Training the joint diffusion (paper, section 3.1): all latents in memory, one loss over every variable."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mvhpc.config import ConfigError, JointConfig, choose
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.models.bundle import save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.randomness import generator, rand
from mvhpc.training.cluster import launch
from mvhpc.training.engine import Engine
from mvhpc.training.loop import train
from mvhpc.variables import Value, Variables
from shards.errors import nearest
from shards.loader import Dataset, open_dataset
from shards.schema import Schema

if TYPE_CHECKING:
    from mvhpc.run import Run

VALIDATION_DRAWS = 16  # noisings of each validation sample, the same at every validation


class People:
    """Everything known of some people, encoded and in memory.

    Args:
        dataset: packed latents.
        keys: whose.
        schema: the variables of the model.
        variables: the same, as tensors.

    Attributes:
        values: by variable, (N, 1 or 2, C, h, w, d) float16 for a volume (as it is, mirrored), (N, 1) or (N,) else.
        present: by variable, who has a value, (N,) bool.
    """

    def __init__(self, dataset: Dataset, keys: list[str], schema: Schema, variables: Variables) -> None:
        self.keys = keys
        rows: list[Mapping[str, Value]] = [
            {v.name: _value(dataset.values(key), v.name, schema) for v in schema.scalars} for key in keys
        ]
        self.values, self.present = variables.encode_scalars(rows)
        for volume in variables.volumes:
            there = [dataset.has(key, volume.name) for key in keys]
            mirrored = f"{volume.name}_mirrored"
            versions = [volume.name] + [mirrored] * any(dataset.has(key, mirrored) for key in keys)
            latents = np.zeros((len(keys), len(versions), *volume.shape), np.float16)
            for i, key in enumerate(keys):
                for j, version in enumerate(versions if there[i] else ()):
                    latents[i, j] = dataset.read(key, version)
            self.values[volume.name] = torch.from_numpy(latents)
            self.present[volume.name] = torch.tensor(there)

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
        ConfigError: a variable that the data do not have, or data that are no latents.
    """

    averaged: str | None = "denoiser"
    best = "denoiser"
    score = "loss"

    def __init__(self, config: JointConfig) -> None:
        self.config = config
        dataset = open_dataset(config.latents)
        index = dataset.index
        if index.kind != "latents":
            raise ConfigError(f"latents={config.latents} holds {index.kind}; encode it first: mvhpc encode")
        self.schema = Schema.load(config.schema) if config.schema else index.schema
        self.grid = index.grid
        self.latent = {
            v.name: {"shape": list(index.arrays[v.name]["shape"]), "scale": index.extra["scale"][v.name]}
            for v in self.schema.volumes
        }
        train = dataset.keys("train", config.split)
        self.intervals = self._intervals(dataset, train)
        variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.diffusion = JointDiffusion(variables, config.diffusion)
        self.people, self.others = (
            People(dataset, dataset.keys(part, config.split), self.schema, variables)
            for part in ("train", "validation")
        )
        self.samples, self.validation = len(self.people.keys), len(self.others.keys)
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        self.networks: dict[str, nn.Module] = {"denoiser": JointDenoiser(variables, config.model)}
        self.learning_rates = {"denoiser": config.optimizer.lr}

    def _intervals(self, dataset: Dataset, keys: list[str]) -> dict[str, list[float]]:
        """What becomes [-1, 1] of each continuous variable: one SD each way of the mean of ``keys``.

        None for a variable that takes its schema's range: with ``scaling=range``, or where it does not vary.
        """
        intervals: dict[str, list[float]] = {}
        if choose(self.config.scaling, ("sd", "range"), "scaling") == "range":
            return intervals
        for v in self.schema.scalars:
            if v.kind == "continuous":
                seen = [_value(dataset.values(key), v.name, self.schema) for key in keys]
                known = np.array([x for x in seen if x is not None], float)
                if len(known) > 1 and known.std() > 0:
                    intervals[v.name] = [known.mean() - known.std(), known.mean() + known.std()]
        return intervals

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
            batch[v.name] = v.encode(versions[torch.arange(len(which)), which])
        return batch

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Noise a batch, denoise it, and take one optimiser step."""
        generators = [generator(self.config.training.seed, "train", step, i) for i in indices]
        engine = engines["denoiser"]
        first = next(iter(batch["present"].values()))
        self.diffusion.to(first.device)
        clean = self._encode(batch["values"], rand(generators, (), first.device) < 0.5)
        t = self.diffusion.draw_times(generators)
        noised = self.diffusion.noise(clean, batch["present"], t, generators)
        losses = self.diffusion.losses(engine(noised.z, noised.t), noised)
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
        sums: dict[str, Tensor] = {}
        for draw in range(VALIDATION_DRAWS):
            generators = [generator(self.config.training.seed, "validation", i, draw) for i in indices]
            noised = self.diffusion.noise(clean, present, self.diffusion.draw_times(generators), generators)
            losses = self.diffusion.losses(network(noised.z, noised.t), noised)
            for name, value in {"loss": self.diffusion.total(losses), **losses}.items():
                sums[name] = sums.get(name, 0) + value / VALIDATION_DRAWS
        return {
            name if name == "loss" else f"loss_{name}": value
            if name == "loss"
            else torch.where(present[name], value, torch.nan)
            for name, value in sums.items()
        }

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the self-contained model: averaged denoiser, autoencoder, schema, latents' scale."""
        save_joint(
            folder,
            states["denoiser"],
            self.config.vae,
            model=self.config.model,
            diffusion=self.config.diffusion,
            schema=self.schema,
            latent=self.latent,
            intervals=self.intervals,
            grid=self.grid,
            extra={"validation": metrics},
        )


def worker(config: JointConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank`` of ``world``."""
    return train(JointTask(config), config, folder, rank, world)


def run(config: JointConfig, run: "Run") -> dict[str, float]:
    """Stage ``joint``: train the joint diffusion on latents.

    Returns:
        the best validation's metrics, steps and samples per second.
    """
    return launch("mvhpc.training.joint:worker", config, run.folder, config.compute.workers)
