"""Predictive laws of scalars without a chain: unknown variables rest at t = T, given ones at t = 0, and one encoding of
the volumes serves every query about them."""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.diffusion.categorical import draw, probabilities
from mvhpc.diffusion.density import density, quantile
from mvhpc.diffusion.joint import Batch, JointDiffusion
from mvhpc.variables import Categorical, Volume

Law = MixtureSameFamily | Tensor  # of a number, in the scale of z_0; or the probabilities of the classes (B, K)


class ScalarNetwork(Protocol):
    """A network that encodes the volumes once and predicts scalars from these features."""

    components: int

    def encode(self, z: Batch, t: Batch) -> Tensor:
        """Features (B, ...) of the volumes."""
        ...

    def predict(self, features: Tensor, z: Batch, t: Batch, want: Collection[str]) -> Mapping[str, Tensor]:
        """Logits (B, K), or parameters (B, 1 + 3M) of :func:`mvhpc.diffusion.density.density`; (B, R, ...) of R
        ensemble members."""
        ...


def why_not(network: ScalarNetwork | None, diffusion: JointDiffusion) -> str:
    """Why a model has no posterior; empty where it has one."""
    if diffusion.masked_level is None:
        return "it was not trained with independent times and without eps"
    if network is None or not network.components:
        return "its scalars enter early or have no density (model.scalars, model.components)"
    return ""


class Posterior:
    """p(scalars | given) of B people; the volumes are encoded once, here.

    Args:
        denoiser: the network.
        diffusion: that it was trained under.
        given: encoded clean values by variable: (B, C, h, w, d), (B, 1) or int64 (B,).
        rows: B, as nothing may be given.
        present: in which rows a given value is present, (B,) bool by variable. No entry: in all.
        temperature: by scalar, the factor that calibration found for predictions from volumes; see
            :mod:`mvhpc.training.calibration`.

    Raises:
        ValueError: a model without posterior; see :func:`why_not`.
        KeyError: an unknown variable that is given.
    """

    def __init__(
        self,
        denoiser: ScalarNetwork,
        diffusion: JointDiffusion,
        given: Mapping[str, Tensor],
        rows: int,
        present: Mapping[str, Tensor] | None = None,
        temperature: Mapping[str, float] | None = None,
    ) -> None:
        if reason := why_not(denoiser, diffusion):
            raise ValueError(f"this model has no posterior: {reason}")
        self.denoiser, self.diffusion, self.temperature = denoiser, diffusion, dict(temperature or {})
        variables, device = diffusion.variables, diffusion.device
        self.z: Batch = {}
        self.t: Batch = {}
        for v in variables:
            shape = v.shape if isinstance(v, Volume) else () if isinstance(v, Categorical) else (1,)
            kind = torch.int64 if isinstance(v, Categorical) else torch.float32
            self.z[v.name] = torch.zeros(rows, *shape, dtype=kind, device=device)  # masked: it is at T
            self.t[v.name] = torch.full((rows,), diffusion.steps, device=device)
        for name, value in given.items():
            v, known = variables[name], (present or {}).get(name)
            known = torch.ones(rows, dtype=torch.bool) if known is None else known
            known = known.to(device)
            self.z[v.name] = torch.where(known.reshape(-1, *[1] * (value.ndim - 1)), value.to(device), self.z[v.name])
            self.t[v.name] = self.t[v.name].masked_fill(known, 0)
        self.features = denoiser.encode(self.z, self.t)

    def laws(self, want: Collection[str]) -> dict[str, Law]:
        """The predictive law of each wanted scalar by itself."""
        return self._laws(self.features, self.z, self.t, want)

    def draw(self, want: Collection[str], uniform: Tensor) -> Batch:
        """Joint draws by the chain rule: the first wanted variable, the next given that too, and so on.

        Each of these laws is learnt by itself, so another order of ``want`` gives slightly different draws.

        Args:
            want: scalars.
            uniform: (B, draws, len(want)) draws from (0, 1).

        Returns:
            By wanted variable clean encoded values (B x draws, 1) or (B x draws,), the draws of a row together.
        """
        n = uniform.shape[1]
        features = self.features.repeat_interleave(n, 0)
        z = {v.name: self.z[v.name].repeat_interleave(n, 0) for v in self.diffusion.variables.scalars}
        t = {name: x.repeat_interleave(n, 0) for name, x in self.t.items()}
        for i, name in enumerate(want):
            law, u = self._laws(features, z, t, [name])[name], uniform[..., i].reshape(-1)
            z[name] = draw(law, u) if isinstance(law, Tensor) else quantile(law, u[:, None]).float()
            t[name] = torch.zeros_like(t[name])
        return {name: z[name] for name in want}

    def _laws(self, features: Tensor, z: Batch, t: Batch, want: Collection[str]) -> dict[str, Law]:
        variables = self.diffusion.variables
        clean_volume = torch.stack([t[v.name] == 0 for v in variables.volumes]).any(0)[:, None]  # (B, 1)
        laws: dict[str, Law] = {}
        for name, output in self.denoiser.predict(features, z, t, want).items():
            temperature = 1.0 + (self.temperature.get(name, 1.0) - 1.0) * clean_volume.double()
            if isinstance(variables[name], Categorical):
                laws[name] = probabilities(output, temperature)
            else:
                laws[name] = density(output, self.diffusion.parameterization(variables[name]), temperature)
        return laws
