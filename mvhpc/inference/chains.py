"""What prediction, generation and inpainting share: a loaded model on a device, and chains drawn from it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mvhpc.config import Compute, ConfigError, Sampling, choose, to_dict
from mvhpc.devices import resolve_device, resolve_precision
from mvhpc.diffusion.sampling import sample, time_grid
from mvhpc.models.bundle import JointModel, load_joint
from shards.schema import Schema


class Sampler:
    """A joint model that draws any of its variables given any others.

    Args:
        model: run folder of a joint model, or its ``model`` folder.
        sampling: how a conditional is sampled.
        device: auto | cpu | cuda.
        precision: float32 | bfloat16, of the networks.

    Attributes:
        model: the loaded :class:`~mvhpc.models.bundle.JointModel`.
        device: where it is.

    Raises:
        ConfigError: an unknown way of conditioning or precision, or ``clean`` with a model of shared time.
        ModelError: no model there, or a damaged one.
    """

    def __init__(self, model: str | Path, sampling: Sampling, device: str = "auto", precision: str = "float32") -> None:
        choose(sampling.conditioning, ["repaint", "clean"], "conditioning")
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.sampling = sampling
        self.model: JointModel = load_joint(model, self.device)

    @property
    def calls(self) -> int:
        """Network calls of one chain."""
        c = self.sampling
        return len(time_grid(self.model.diffusion.gaussian, c.steps, c.stride, c.solver)) - 1

    @torch.inference_mode()
    def __call__(
        self,
        given: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        present: Mapping[str, Tensor] | None = None,
        mask: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Draw all variables, one row a generator; see :func:`mvhpc.diffusion.sampling.sample`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            return sample(
                self.model.denoiser,
                self.model.diffusion,
                given,
                generators,
                present=present,
                mask=mask,
                **to_dict(self.sampling),
            )


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
