"""A joint model prepared for sampling, and what the stages that use one share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import ConfigError, Device, Sampling, choose, to_dict
from mvhpc.diffusion.joint import Batch
from mvhpc.diffusion.sampling import check_conditioning, levels, sample, sampled_variables
from mvhpc.models.bundle import JointModel, load
from mvhpc.models.kernels.packed_weights import freeze, pack
from mvhpc.records import scalar_values
from mvhpc.runtime.devices import resolve_device, resolve_precision
from mvhpc.variables import Volume
from shards.dataset import Dataset
from shards.schema import Schema


class SamplingConfig(Protocol):
    """The keys of a stage that draws volumes."""

    model: str
    sampling: Sampling
    compute: Device


class Sampler:
    """A joint model that draws any of its variables given any others.

    The U-Net of a model with a model of scalars draws volumes alone; :func:`mvhpc.inference.scalar_draws.draw_scalars`
    draws its unknown scalars first.

    Args:
        model: of the sampler alone from now on: its U-Net is frozen in the precision of ``device``.
        sampling: how a conditional is sampled.
        device: its ``precision`` and ``compile``; the model stays where it was loaded.

    Attributes:
        model, sampling: as given, ``sampling.conditioning`` resolved: of ``auto`` the cheapest that is exact for this
            model.
        device: of the model.

    Raises:
        ConfigError: an unknown conditioning or precision, one that this model does not allow, or steps or a stride out
            of range.
    """

    def __init__(self, model: JointModel, sampling: Sampling, device: Device) -> None:
        choose(sampling.conditioning, ["auto", "clean", "repaint"], "conditioning")
        self.model, self.device = model, model.diffusion.device
        self.precision = resolve_precision(device.precision, self.device)
        self.sampling = replace(sampling, conditioning=self._conditioning(sampling))
        self.calls([])
        freeze(model.denoiser, self.precision)
        if device.compile:
            model.denoiser.compile()
        else:
            pack(model.denoiser)

    @classmethod
    def of(cls, config: SamplingConfig) -> "Sampler":
        """The sampler of a stage that draws volumes: its threads set, its model loaded.

        Raises:
            ConfigError: as the class.
            ModelError: no joint model at ``config.model``, or a damaged one.
        """
        set_threads(config.compute)
        model = load(config.model, resolve_device(config.compute.device), kind=JointModel)
        return cls(model, config.sampling, config.compute)

    def _conditioning(self, sampling: Sampling) -> str:
        diffusion, conditioning = self.model.diffusion, sampling.conditioning
        if conditioning == "auto":
            conditioning = "clean" if diffusion.independent else "repaint"
        if conditioning == "repaint" and self.model.denoiser.late:
            raise ConfigError(
                "sampling.conditioning=repaint: the U-Net of this model predicts no scalars (model.scalars=late); "
                "leave it at auto"
            )
        check_conditioning(diffusion, conditioning, sampling.guidance)
        return conditioning

    def calls(self, given: Collection[str], want: Collection[str] | None = None) -> int:
        """Network calls of one chain.

        Args:
            given: names; any of them may be missing in some rows.
            want: names; None: all variables that the U-Net predicts.
        """
        c, want = self.sampling, self.model.denoiser.outputs if want is None else want
        drawn = sampled_variables(self.model.variables.names, want, given, given, c.conditioning)
        steps = len(levels(self.model.diffusion, drawn, c.steps, c.stride, c.solver)) - 1
        return steps * (2 if c.guidance != 1 and given else 1)  # with and without what is given

    @torch.inference_mode()
    def __call__(
        self,
        given: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        present: Mapping[str, Tensor] | None = None,
        mask: Mapping[str, Tensor] | None = None,
        want: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Draw variables that the U-Net predicts, one row a generator; see :func:`mvhpc.diffusion.sampling.sample`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            return sample(
                self.model.denoise,
                self.model.diffusion,
                given,
                generators,
                present=present,
                mask=mask,
                want=self.model.denoiser.outputs if want is None else want,
                **to_dict(self.sampling),
            )


Voxels = dict[str, list[Tensor | None]]  # volume -> its voxels (H, W, D) float32 of each record, None where missing


def read_given(sampler: Sampler, dataset: Dataset, keys: Sequence[str], names: Sequence[str]) -> tuple[Batch, Batch]:
    """Encoded values of the given variables, and in which rows they are present; as :func:`encode_given`.

    Raises:
        ConfigError: a category that the model does not have, with its record.
        IntegrityError: a damaged volume, with its record.
    """
    return encode_given(sampler, dataset, keys, names, read_voxels(dataset, keys, sampler.model.schema, names))


def read_voxels(dataset: Dataset, keys: Sequence[str], schema: Schema, names: Sequence[str]) -> Voxels:
    """The volumes among ``names`` of some records.

    Raises:
        IntegrityError: a damaged volume, with its record.
    """

    def one(key: str, name: str) -> Tensor | None:
        return torch.from_numpy(dataset.read(key, name).astype(np.float32)) if dataset.has(key, name) else None

    return {v.name: [one(key, v.name) for key in keys] for v in schema.volumes if v.name in names}


@torch.inference_mode()
def encode_given(
    sampler: Sampler, dataset: Dataset, keys: Sequence[str], names: Sequence[str], voxels: Voxels
) -> tuple[Batch, Batch]:
    """Encoded values of the given variables, and in which rows they are present.

    Args:
        sampler: of the model.
        dataset: packed volumes.
        keys: of B records.
        names: of the given variables.
        voxels: of the volumes among them, of :func:`read_voxels`.

    Returns:
        By variable: clean encoded values (B, C, h, w, d), (B, 1) or int64 (B,); presence (B,) bool.

    Raises:
        ConfigError: a category that the model does not have, with its record.
    """
    schema, variables = sampler.model.schema, sampler.model.variables
    rows = [scalar_values(dataset, key, schema, names) for key in keys]
    given, present = variables.encode_scalars(rows)
    for volume in variables.volumes:
        if volume.name in names:
            latents = [None if x is None else _latent(sampler, x, volume) for x in voxels[volume.name]]
            absent = torch.zeros(1, *volume.shape, device=sampler.device)
            given[volume.name] = torch.cat([absent if z is None else z for z in latents])  # (B, C, h, w, d)
            present[volume.name] = torch.tensor([z is not None for z in latents])
    return {name: given[name] for name in names}, {name: present[name] for name in names}


def _latent(sampler: Sampler, voxels: Tensor, variable: Volume) -> Tensor:
    """The latent (1, C, h, w, d) of one volume; encoded alone, so that it does not depend on the batch."""
    return sampler.model.encode(variable.name, voxels[None, None].to(sampler.device))


def set_threads(device: Device) -> None:
    """Give torch in this process ``device.threads`` threads; with 0 its own choice stays."""
    if device.threads:
        torch.set_num_threads(device.threads)


def parse_given(schema: Schema, given: Mapping[str, str]) -> dict[str, float | str]:
    """Values of scalars that a user typed, parsed by the schema.

    Args:
        schema: of the model.
        given: scalar -> text, as in ``{"age": "70", "sex": "F"}``.

    Raises:
        ConfigError: an unknown variable (naming the nearest), a volume, an unknown category, a number out of range.
    """
    values: dict[str, float | str] = {}
    for name, text in given.items():
        choose(name, [variable.name for variable in schema], "variable")
        if schema[name].kind == "volume":
            raise ConfigError(f"given {name}={text}: {name} is a volume; `mvhpc inpaint` takes one as a NIfTI file")
        try:
            value = schema[name].parse(str(text))
        except ValueError as error:
            raise ConfigError(f"given {name}={text}: {error}") from error
        if value is None:
            raise ConfigError(f"given {name}={text}: no value; leave {name} out, and it is sampled")
        values[name] = value
    return values


def versions(networks: bool = True) -> dict[str, str]:
    """Versions of the packages that a result depends on; ``networks``: of MONAI's networks too."""
    return {name: version(name) for name in ("mvhpc", "torch", *["monai"] * networks, "numpy")}
