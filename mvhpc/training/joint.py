"""Training of the joint diffusion (paper, section 3.1), with all latents in memory."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.linear_denoiser import LinearDenoiser
from mvhpc.models.model_folder import model_folder, read_manifest
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runtime.devices import one_thread, repeatable
from mvhpc.runtime.randomness import generator, rand
from mvhpc.training.engines.base import Engine
from mvhpc.training.joint_records import Records, RecordTensors, read_records
from mvhpc.training.task import Task
from mvhpc.variables import Variables, check_known, standard_intervals
from shards.dataset import Dataset, open_dataset
from shards.index import Index
from shards.schema import Schema

SD_FLOOR = 0.1  # least SD of an element, in typical SDs: latents of empty background hardly vary
MOST_FITTED = 1024  # subjects that the linear denoiser is fitted to, and
MOST_ELEMENTS = 2**28  # elements of their latents, mirrored ones included: 1 GiB
PEOPLE_PER_COMPONENT = 4  # a quarter as many components as subjects: its held-out errors are near their smallest
VALIDATION_DRAWS = 16  # noise draws per validation sample, the same at every validation


@dataclass
class JointConfig:
    """`mvhpc train joint`."""

    out: str
    latents: str
    vae: str
    scalars: str  # run folder of the model of scalars; empty: none
    split: str
    schema: str  # name under configs/schema, a YAML file, or "" for the schema the data were packed with
    scaling: str  # interval mapped to [-1, 1]. sd: training mean plus or minus one SD; range: the schema's range
    model: DenoiserConfig
    diffusion: DiffusionConfig
    ema: float  # decay per step
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking


def open_latents(config: JointConfig) -> Dataset:
    """Open the data set of latents, and check that it fits the rest of the configuration.

    Raises:
        ConfigError: the data are not latents, or are of another autoencoder or split.
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
    return dataset


def _schema(config: JointConfig, index: Index) -> Schema:
    return Schema.load(config.schema) if config.schema else index.schema


def design_of(config: JointConfig, schema: Schema) -> DenoiserConfig:
    """The U-Net's configuration with ``scalars=auto`` resolved: late with a model of scalars or without scalars, else
    early.

    Raises:
        ConfigError: a design that does not allow this ``scalars``, ``diffusion.time`` or ``model.linear_components``.
    """
    model = config.model
    if choose(model.scalars, ("auto", "late", "early"), "model.scalars") == "auto":
        late = bool(config.scalars) or not schema.scalars
        model = replace(model, scalars="late", linear_components=model.linear_components * late)
        model = model if late else replace(model, scalars="early")
    late = model.scalars == "late"
    if bool(config.scalars) != (late and bool(schema.scalars)):
        raise ConfigError(
            f"scalars={config.scalars}: leave it empty (`scalars=`) where model.scalars=early, or the schema has no "
            "scalars"
            if config.scalars
            else "scalars is empty: give the run folder of the model of scalars (mvhpc train scalars), which draws "
            "scalars with model.scalars=late"
        )
    if late and config.diffusion.time != "independent":
        raise ConfigError(
            f"diffusion.time={config.diffusion.time}: independent with model.scalars=late, where scalars that are "
            "given or unknown have levels of their own"
        )
    if model.linear_components and not (late and config.diffusion.volume == "v"):
        raise ConfigError(
            f"model.linear_components={model.linear_components}: 0 unless model.scalars=late and diffusion.volume=v; "
            "the linear denoiser predicts v of volumes from all scalars"
        )
    return model


def check_scalars(config: JointConfig, schema: Schema, dataset: Dataset) -> None:
    """Check that the model of scalars, where there is one, fits.

    Raises:
        ConfigError: of another grid, with other scalars, or trained on people of the test part.
        ModelError: no model of scalars there, or a damaged one.
    """
    if not config.scalars:
        return
    meta = read_manifest(model_folder(config.scalars), "scalars")
    theirs, ours = ({v.name: v for v in s.scalars} for s in (Schema.from_dict(meta["schema"]), schema))
    if theirs != ours:
        differ = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        raise ConfigError(
            f"scalars={config.scalars} has {', '.join(theirs)}, this model {', '.join(ours)}; train both with one "
            f"schema ({', '.join(differ)} differ{'s' * (len(differ) == 1)})"
        )
    if meta["grid"] != dataset.index.grid:
        raise ConfigError(f"scalars={config.scalars} was trained on volumes of another grid; train it on the same data")
    known = TrainingPeople.read(meta).learnt(dataset.index).keys()
    if learnt := known & set(dataset.keys("test", config.split)):
        raise ConfigError(
            f"scalars={config.scalars} was trained on {len(learnt)} people of the test part of split={config.split}, "
            f"as {min(learnt)}; train it with split={config.split}"
        )


class JointTask(Task):
    """One step of the joint diffusion; see :class:`mvhpc.training.task.Task`.

    In the late design the U-Net learns volumes given scalars; these are those of a trained model of scalars.

    Raises:
        ConfigError: as :func:`open_latents`, :func:`design_of` and :func:`check_scalars`, or the data lack a variable.
        DataError: no training subject has a value of a variable.
        ModelError: no model of scalars where one is needed, or a damaged one.
    """

    def __init__(self, config: JointConfig) -> None:
        self.config = config
        dataset = open_latents(config)
        index = dataset.index
        self.schema = _schema(config, index)
        self.model = design_of(config, self.schema)
        self.grid = index.grid
        train, validation = (dataset.keys(part, config.split) for part in ("train", "validation"))
        records = read_records(dataset, train + validation, self.schema)
        check_known(self.schema, records.rows[: len(train)])
        self.training_people = TrainingPeople.of(index, records.keys, self.schema, records.rows)
        check_scalars(config, self.schema, dataset)
        self.latent = {v.name: self._moments(records, len(train), v.name, index) for v in self.schema.volumes}
        self.intervals = standard_intervals(self.schema, records.rows[: len(train)]) if config.scaling == "sd" else {}
        variables = Variables.from_schema(self.schema, self.latent, self.intervals)
        self.diffusion = JointDiffusion(variables, config.diffusion)
        self.people = RecordTensors(records, variables)  # of the training part, then of the validation part
        self.samples, self.validation = len(train), len(validation)
        self.linear = self._fit_linear()
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        denoiser = JointDenoiser(variables, self.model, self.diffusion.masked_level)
        self.networks: dict[str, nn.Module] = {"denoiser": denoiser}
        losses = ["loss", *(f"loss_{name}" for name in denoiser.outputs)]
        self.exported: Mapping[str, Sequence[str]] = {"denoiser": losses}
        self.averaged = ("denoiser",)
        self.learning_rates = {"denoiser": config.optimizer.lr}

    @classmethod
    def check(cls, config: JointConfig) -> None:
        """Raises ConfigError and ModelError as the class."""
        dataset = open_latents(config)
        schema = _schema(config, dataset.index)
        model = design_of(config, schema)
        check_scalars(config, schema, dataset)
        if model.scalars == "early" and config.model.scalars == "auto":
            print(
                "joint: without a model of scalars (scalars=RUN) the U-Net predicts scalars too, by chains, as in the "
                "paper; such predictions are slower and worse",
                file=sys.stderr,
            )

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
        values, present = self.people.take(list(range(min(self.samples, most))))
        whole = torch.stack([present[v.name] for v in self.diffusion.variables.volumes]).all(0)
        if not self.model.linear_components or not whole.any():
            return None
        both = [self._encode(values, torch.full_like(whole, mirror)) for mirror in (False, True)]
        components = min(self.model.linear_components, int(whole.sum()) // PEOPLE_PER_COMPONENT)
        with one_thread():
            return LinearDenoiser.fit(
                self.diffusion,
                {name: torch.cat([version[name] for version in both]) for name in values},
                {name: there.repeat(2) for name, there in present.items()},
                components,
            )

    def load(self, indices: list[int]) -> dict[str, Any]:
        """``values`` and ``present`` by variable."""
        values, present = self.people.take(indices)
        return {"values": values, "present": present}

    def _encode(self, values: Mapping[str, Tensor], mirror: Tensor) -> dict[str, Tensor]:
        """Scaled latents (B, C, h, w, d), mirrored where ``mirror`` (B,) is True and a mirrored version is stored."""
        batch = dict(values)
        for v in self.diffusion.variables.volumes:
            versions = values[v.name]  # (B, 1 or 2, C, h, w, d)
            which = mirror.long().clamp(max=versions.shape[1] - 1)
            batch[v.name] = v.encode(versions[torch.arange(len(which), device=which.device), which])
        return batch

    def _losses(
        self, denoiser: Callable[..., Batch], clean: Batch, present: Batch, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Losses of each row (B,) after adding noise, by variable, and their weighted sum ``loss``.

        Args:
            denoiser: the U-Net.
            clean, present: the rows.
            generators: of levels and noise, one per row.
        """
        levels = self.diffusion.draw_times(generators, volumes_move=self.model.scalars == "late")
        noised = self.diffusion.noise(clean, present, levels, generators)
        outputs = denoiser(noised.z, noised.t)
        if self.linear is not None:
            outputs = self.linear.added_to(outputs, noised.z, noised.t)
        losses = self.diffusion.losses(outputs, noised)
        return {"loss": self.diffusion.total(losses)} | {f"loss_{name}": x for name, x in losses.items()}

    def _to(self, device: torch.device) -> None:
        self.diffusion.to(device)
        if self.linear is not None:
            self.linear.to(device)

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Noise a batch, denoise it, and take one optimiser step."""
        seed, engine = self.config.training.seed, engines["denoiser"]
        self._to(engine.device)
        mirror = rand([generator(seed, "train", step, i) for i in indices], (), engine.device) < 0.5
        clean = self._encode(batch["values"], mirror)
        noise = [generator(seed, "train", step, i, "noise") for i in indices]
        losses = self._losses(engine, clean, batch["present"], noise)
        with repeatable(engine.device):
            engine.backward(losses["loss"].mean())
        engine.step()
        return {name: value.detach().mean() for name, value in losses.items()}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Losses of records of the validation part at fixed levels and noise; NaN where a record lacks the variable."""
        device = next(networks["denoiser"].parameters()).device
        self._to(device)
        values, present = self.people.take([self.samples + i for i in indices])
        values, present = ({n: x.to(device) for n, x in part.items()} for part in (values, present))
        clean = self._encode(values, torch.zeros(len(indices), dtype=torch.bool, device=device))
        sums: dict[str, Tensor] = {}
        for draw in range(VALIDATION_DRAWS):
            generators = [generator(self.config.training.seed, "validation", i, draw) for i in indices]
            for name, x in self._losses(networks["denoiser"], clean, present, generators).items():
                known = present.get(name.removeprefix("loss_"), torch.ones_like(x, dtype=torch.bool))
                sums[name] = sums.get(name, 0) + torch.where(known, x, torch.nan) / VALIDATION_DRAWS
        return sums

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the self-contained model, with averaged weights of the U-Net."""
        save_joint(
            folder,
            states["denoiser"],
            self.config.vae,
            self.config.scalars or None,
            model=self.model,
            diffusion=self.config.diffusion,
            schema=self.schema,
            latent=self.latent,
            intervals=self.intervals,
            linear=self.linear,
            grid=self.grid,
            training=self.training_people,
            extra={"validation": metrics},
        )
