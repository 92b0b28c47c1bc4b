"""Training the joint diffusion (paper, section 3.1): all latents in memory, one loss over every variable.

The U-Net learns from the training part and is judged by the validation part. Of several readers, which answer for
scalars, each learns from the people of both parts but for a share of its own, and is judged by that share
(:mod:`mvhpc.training.cross_fitting`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvhpc.config import Compute, ConfigError, DenoiserConfig, DiffusionConfig, Optimizer, Tracking, Training, choose
from mvhpc.diffusion.joint import Batch, JointDiffusion
from mvhpc.models.bundle import read_denoiser, save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.records import scalar_values
from mvhpc.runtime.devices import repeatable, resolve_device
from mvhpc.runtime.randomness import generator, rand
from mvhpc.training.calibration import calibrate
from mvhpc.training.cross_fitting import shares
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Part, Task
from mvhpc.variables import Value, Variables, standard_intervals
from shards.dataset import Dataset, open_dataset
from shards.errors import nearest
from shards.index import Index
from shards.schema import Schema

SD_FLOOR = 0.1  # of an element, in typical SDs: latents of empty background hardly vary
ADAPTED = 256  # people whom the readers' first features are scaled by
JUDGES = 500  # people at most whom scalars are judged and calibrated by
VALIDATION_DRAWS = 16  # noisings of each validation sample, the same at every validation


@dataclass
class JointConfig:
    """`mvhpc train joint`."""

    out: str
    latents: str
    vae: str
    split: str
    schema: str  # name under configs/schema, a YAML file, or "" for the schema the data were packed with
    questions: int  # sets of the scalars' levels that each row is trained on, for one look at its volumes
    reveal: float  # chance that the reader is shown clean a volume that the U-Net must denoise
    scaling: str  # sd: one SD each way of the training mean becomes [-1, 1]; range: the schema's range does
    model: DenoiserConfig
    diffusion: DiffusionConfig
    ema: float  # decay per step
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking


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
        ConfigError: a variable that the dataset does not have, or a category that the schema does not, and whose.
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
        """Values and presence of the people at ``indices``; by NumPy, see :func:`shards.order.prefetch`."""

        def pick(of_all: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(x.numpy()[indices]) for name, x in of_all.items()}

        return pick(self.values), pick(self.present)


class JointTask(Task):
    """One step of the joint diffusion; see :class:`mvhpc.training.task.Task`.

    Raises:
        ConfigError: a variable that the data do not have, data that are no latents, or questions or readers that the
            design does not allow.
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
        if config.model.readers < 1 or (config.model.readers > 1 and not apart):
            raise ConfigError(
                f"model.readers={config.model.readers}: at least 1, and 1 unless diffusion.time=independent and "
                "model.scalars=late, where scalars are answered for beside the U-Net"
            )
        train, validation = (dataset.keys(part, config.split) for part in ("train", "validation"))
        records = read_records(dataset, train + validation, self.schema)
        self.latent = {v.name: self._moments(records, len(train), v.name, index) for v in self.schema.volumes}
        self.intervals = standard_intervals(self.schema, records.rows[: len(train)]) if config.scaling == "sd" else {}
        variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.diffusion = JointDiffusion(variables, config.diffusion)
        self.people = People(records, variables)  # of the training part, then of the validation part
        self.trained = torch.arange(len(records.keys)) < len(train)  # (N,) from whom the U-Net learns
        self.taught = self.trained[:, None]  # (N, readers) from whom each reader learns
        if config.model.readers > 1 and variables.scalars:
            group = {record.key: record.group for record in index.records}
            self.taught = shares([group[key] for key in records.keys], config.model.readers, config.training.seed)
        self.samples = int(self.taught.any(1).sum())
        validation_first = [*range(len(train), len(records.keys)), *range(len(train))]
        judges = [i for i in validation_first if not self.taught[i].all()]
        self.judges = judges[: max(JUDGES, len(validation))]
        self.validation = len(self.judges) if validation else 0
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        denoiser = JointDenoiser(variables, config.model, self.diffusion.masked_level)
        whole = torch.stack([self.people.present[v.name] for v in variables.volumes]).all(0).nonzero()[:ADAPTED, 0]
        if len(whole) > 1:
            denoiser.adapt({v.name: v.encode(self.people.values[v.name][whole, 0]) for v in variables.volumes})
        self.networks: dict[str, nn.Module] = {"denoiser": denoiser}
        self.scores: Mapping[str, Part] = {"loss": Part()}
        if denoiser.late and variables.scalars:  # few people are learnt by heart long before volumes are learnt
            names = (tuple(f"loss_{v.name}" for v in of) for of in (variables.scalars, variables.volumes))
            parts = map(Part, (denoiser.ANSWERING, ("",)), names)
            self.scores = dict(zip(("loss_of_scalars", "loss_of_volumes"), parts))
        self.learning_rates = {"denoiser": config.optimizer.lr}

    def _moments(self, records: Records, first: int, volume: str, index: Index) -> dict[str, Any]:
        """Shape of a volume's latents, and the mean and SD to standardise them by, of the ``first`` records.

        ``scaling=sd``: of each element over the training people, mirrored versions too. What makes two people differ
        is a small part of a latent beside what all brains share; unscaled, it drowns in the noise, and the network
        learns the average brain. ``scaling=range``: mean 0 and one SD, the scale that encoding measured.
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

    def load(self, indices: list[int]) -> dict[str, Any]:
        """Values and presence, by variable; and who teaches the readers (B, readers)."""
        values, present = self.people.take(indices)
        return {"values": values, "present": present, "taught": self.taught[indices]}

    def _encode(self, values: Mapping[str, Tensor], mirror: Tensor) -> dict[str, Tensor]:
        """Scaled latents (B, C, h, w, d), mirrored where ``mirror`` (B,) says so and a mirrored version is stored."""
        batch = dict(values)
        for v in self.diffusion.variables.volumes:
            versions = values[v.name]  # (B, 1 or 2, C, h, w, d)
            which = mirror.long().clamp(max=versions.shape[1] - 1)
            batch[v.name] = v.encode(versions[torch.arange(len(which), device=which.device), which])
        return batch

    def _losses(
        self,
        network: Callable[..., Batch],
        clean: Batch,
        present: Batch,
        moving: Tensor,
        judged: Tensor,
        generators: Sequence[torch.Generator],
        questions: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Of each row (B,), by variable, after noising it.

        Args:
            network: the denoiser.
            clean, present: the rows.
            moving: whose volumes are noised and denoised, (B,) bool on the CPU; others rest at t = 0.
            judged: which readers' answers count, (B, readers) bool.
            generators: one a row; they say what the readers are shown clean.
            questions: Q a row, of levels and noise.
        """
        volumes = self.diffusion.variables.volumes
        levels = self.diffusion.draw_times(questions)
        still = ~moving.repeat_interleave(len(questions) // len(generators))
        levels |= {v.name: levels[v.name].masked_fill(still, 0) for v in volumes}
        noised = self.diffusion.noise(clean, present, levels, questions)
        chosen = rand(generators, (len(volumes),), self.diffusion.device) < self.config.reveal
        outputs = network(noised.z, noised.t, shown=self.diffusion.show_clean(noised, chosen), moving=noised.moving)
        return self.diffusion.losses(outputs, noised, judged)

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Noise a batch, denoise it, and take one optimiser step."""
        generators = [generator(self.config.training.seed, "train", step, i) for i in indices]
        engine = engines["denoiser"]
        first = next(iter(batch["present"].values()))
        self.diffusion.to(first.device)
        clean = self._encode(batch["values"], rand(generators, (), first.device) < 0.5)
        numbers = range(self.config.questions)
        questions = [generator(self.config.training.seed, "train", step, i, q) for i in indices for q in numbers]
        trained, taught = self.trained[indices], batch["taught"]
        losses = self._losses(engine, clean, batch["present"], trained, taught, generators, questions)
        loss = self.diffusion.total(losses).mean()
        with repeatable(engine.device):
            engine.backward(loss)
        engine.step()
        return {"loss": loss} | {f"loss_{name}": value.mean() for name, value in losses.items()}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Losses of judges at fixed levels and noise, of readers and a U-Net that did not learn from them.

        NaN for a variable that a person lacks, and what is of volumes for whom the U-Net learnt from.
        """
        network = networks["denoiser"]
        device = next(network.parameters()).device
        self.diffusion.to(device)
        clean, present, strange = self._judged(indices, device)
        untrained = ~self.trained[[self.judges[i] for i in indices]]
        fresh = untrained.to(device)
        volumes = {v.name for v in self.diffusion.variables.volumes}
        sums: dict[str, Tensor] = {}
        for draw in range(VALIDATION_DRAWS):
            generators = [generator(self.config.training.seed, "validation", i, draw) for i in indices]
            losses = self._losses(network, clean, present, untrained, strange, generators, generators)
            totals = {"loss": losses}
            if len(self.scores) > 1:
                totals["loss_of_volumes"] = {name: x for name, x in losses.items() if name in volumes}
                totals["loss_of_scalars"] = {name: x for name, x in losses.items() if name not in volumes}
            measured = {name: self.diffusion.total(parts) for name, parts in totals.items()}
            for name in {"loss", "loss_of_volumes"} & measured.keys():
                measured[name] = torch.where(fresh, measured[name], torch.nan)
            for name, x in losses.items():
                known = present[name] & fresh if name in volumes else present[name]
                measured[f"loss_{name}"] = torch.where(known, x, torch.nan)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value / VALIDATION_DRAWS
        return sums

    def _judged(self, indices: Sequence[int], device: torch.device) -> tuple[Batch, Batch, Tensor]:
        """Encoded values and presence of judges, and which readers did not learn from them, (B, readers) bool."""
        places = [self.judges[i] for i in indices]
        values, present = self.people.take(places)
        values, present = ({n: x.to(device) for n, x in part.items()} for part in (values, present))
        unmirrored = torch.zeros(len(places), dtype=torch.bool, device=device)
        return self._encode(values, unmirrored), present, ~self.taught[places].to(device)

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the self-contained model: averaged denoiser, calibration, autoencoder, schema, latents' scale."""
        denoiser = JointDenoiser(self.diffusion.variables, self.config.model, self.diffusion.masked_level)
        denoiser.load_state_dict(states["denoiser"])
        judges = range(min(len(self.judges), JUDGES))
        device = resolve_device(self.config.compute.device)
        temperature = calibrate(denoiser.to(device).eval(), self.diffusion.to(device), *self._judged(judges, device))
        save_joint(
            folder,
            states["denoiser"],
            self.config.vae,
            model=self.config.model,
            diffusion=self.config.diffusion,
            schema=self.schema,
            latent=self.latent,
            intervals=self.intervals,
            temperature=temperature,
            grid=self.grid,
            extra={"validation": metrics, "calibrated on": len(judges)},
        )

    def exported(self, folder: Path) -> dict[str, Tensor]:
        """The denoiser's weights that :meth:`export` wrote."""
        return read_denoiser(folder)
