"""What prediction, generation and inpainting share: a loaded model, asked by chains or for its posterior."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import Compute, ConfigError, Sampling, choose, to_dict
from mvhpc.diffusion.joint import Batch
from mvhpc.diffusion.posterior import Posterior, why_not
from mvhpc.diffusion.sampling import check_way, levels, sample
from mvhpc.models.bundle import JointModel, load_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.packed_weights import freeze, pack
from mvhpc.records import scalar_values
from mvhpc.runtime.devices import resolve_device, resolve_precision
from mvhpc.variables import Volume
from shards.dataset import Dataset
from shards.schema import Schema


class Sampler:
    """A joint model that draws any of its variables given any others.

    Args:
        model: run folder of a joint model, or its ``model`` folder.
        sampling: how a conditional is sampled.
        device: auto | cpu | cuda.
        precision: auto | float32 | bfloat16, of the networks.
        scalars: whether scalars are all that is wanted, which a posterior can answer.
        compiled: the denoiser through torch.compile: minutes at first, then faster chains.

    Attributes:
        model: the loaded :class:`~mvhpc.models.bundle.JointModel`, its denoiser frozen in ``precision``.
        device: where it is.
        sampling: as given, ``auto`` resolved: the cheapest way that is exact for this model.
        calls: network calls of one chain; of a posterior 1, the readers'.

    Raises:
        ConfigError: an unknown way of conditioning or precision, one that this model or question does not allow, or
            steps out of range.
        ModelError: no model there, or a damaged one.
    """

    def __init__(
        self,
        model: str | Path,
        sampling: Sampling,
        device: str = "auto",
        precision: str = "float32",
        scalars: bool = False,
        compiled: bool = False,
    ) -> None:
        choose(sampling.conditioning, ["auto", "posterior", "clean", "repaint"], "conditioning")
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model: JointModel = load_joint(model, self.device)
        freeze(self.model.denoiser, self.precision, JointDenoiser.TELLING)
        self.sampling = replace(sampling, conditioning=self._way(sampling, scalars))
        self.calls = self._calls()
        if compiled and self.sampling.conditioning != "posterior":
            self.model.denoiser.compile()
        else:
            pack(self.model.denoiser)

    def _way(self, sampling: Sampling, scalars: bool) -> str:
        diffusion = self.model.diffusion
        reason = why_not(self.model.denoiser, diffusion) if scalars else "it answers for scalars, not for volumes"
        if not reason and sampling.guidance != 1:
            reason = f"it knows no guidance (sampling.guidance={sampling.guidance:g})"
        way = sampling.conditioning
        if way == "auto":
            way = "posterior" if not reason else "clean" if diffusion.independent else "repaint"
        elif way == "posterior" and reason:
            raise ConfigError(f"sampling.conditioning=posterior: {reason}; leave it at auto")
        check_way(diffusion, way, sampling.guidance)
        return way

    def _calls(self) -> int:
        c = self.sampling
        if c.conditioning == "posterior":
            return 1
        steps = len(levels(self.model.diffusion, c.steps, c.stride, c.solver)) - 1
        return (steps - 1) * c.resample + 1

    @torch.inference_mode()
    def __call__(
        self,
        given: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        present: Mapping[str, Tensor] | None = None,
        mask: Mapping[str, Tensor] | None = None,
        want: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Draw variables, one row a generator; see :func:`mvhpc.diffusion.sampling.sample`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            return sample(
                self.model.denoiser,
                self.model.diffusion,
                given,
                generators,
                present=present,
                mask=mask,
                want=want,
                **to_dict(self.sampling),
            )

    @torch.inference_mode()
    def posterior(
        self, given: Mapping[str, Tensor], rows: int, present: Mapping[str, Tensor] | None = None
    ) -> Posterior:
        """The predictive laws of ``rows`` people; see :class:`mvhpc.diffusion.posterior.Posterior`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            model = self.model
            return Posterior(model.denoiser, model.diffusion, given, rows, present, model.temperature)


@torch.inference_mode()
def read_given(sampler: Sampler, dataset: Dataset, keys: Sequence[str], names: Sequence[str]) -> tuple[Batch, Batch]:
    """Clean encoded values of some variables, and who has them.

    Args:
        sampler: of the model.
        dataset: packed volumes.
        keys: B people.
        names: of the variables that are given.

    Returns:
        By variable (B, C, h, w, d), (B, 1) or (B,); and (B,) bool.

    Raises:
        ConfigError: a category that the model does not know, and whose.
        IntegrityError: a damaged volume, named.
    """
    schema, variables = sampler.model.schema, sampler.model.variables
    rows = [scalar_values(dataset, key, schema, names) for key in keys]
    given, present = variables.encode_scalars(rows)
    for volume in variables.volumes:
        if volume.name in names:
            latents = [_latent(sampler, dataset, key, volume) for key in keys]
            absent = torch.zeros(1, *volume.shape, device=sampler.device)
            given[volume.name] = torch.cat([absent if z is None else z for z in latents])  # (B, C, h, w, d)
            present[volume.name] = torch.tensor([z is not None for z in latents])
    return {name: given[name] for name in names}, {name: present[name] for name in names}


def _latent(sampler: Sampler, dataset: Dataset, key: str, variable: Volume) -> Tensor | None:
    """The latent (1, C, h, w, d) of one volume; encoded alone, so that it is the same in any batch."""
    if not dataset.has(key, variable.name):
        return None
    voxels = torch.from_numpy(dataset.read(key, variable.name).astype(np.float32))  # (H, W, D)
    return sampler.model.encode(variable.name, voxels[None, None].to(sampler.device))


def set_threads(compute: Compute) -> None:
    """Give this process the asked number of threads; 0 leaves torch's choice."""
    if compute.threads:
        torch.set_num_threads(compute.threads)


def parse_given(schema: Schema, given: Mapping[str, str]) -> dict[str, float | str]:
    """Values typed by a user, as the schema reads them.

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
            raise ConfigError(f"given {name}={text}: no value; leave {name} out to have it sampled")
        values[name] = value
    return values


def versions() -> dict[str, str]:
    """The packages that a result depends on."""
    return {name: version(name) for name in ("mvhpc", "torch", "monai", "numpy")}
