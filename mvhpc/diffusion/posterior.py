"""Answers about scalars without a chain: what is unknown rests at t = T, what is given at t = 0, and one pass of
the network's reader serves every question about these people."""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.diffusion.categorical import chances, draw
from mvhpc.diffusion.density import density, quantile
from mvhpc.diffusion.joint import Batch, JointDiffusion
from mvhpc.variables import Categorical, Volume

Law = MixtureSameFamily | Tensor  # of a number, in the scale of z_0; or the chances of the classes (B, K)


class ScalarNetwork(Protocol):
    """A network that encodes the volumes once and predicts scalars from these features."""

    late: bool
    components: int

    def encode(self, z: Batch, t: Batch) -> Tensor:
        """Features (B, ...) of the volumes."""
        ...

    def predict(self, features: Tensor, z: Batch, t: Batch, want: Collection[str]) -> Mapping[str, Tensor]:
        """Logits (B, K), or parameters (B, 1 + 3M) of :func:`mvhpc.diffusion.density.density`; (B, R, ...) of R
        readers."""
        ...


def why_not(denoiser: ScalarNetwork, diffusion: JointDiffusion) -> str:
    """Why a model cannot be asked for its posterior; empty where it can."""
    if diffusion.masked_level is None:
        return "it was not trained with independent times and without eps"
    if not (denoiser.late and denoiser.components):
        return "its scalars enter early or have no density (model.scalars, model.components)"
    return ""


class Posterior:
    """p(scalars | given) of B people; the volumes are read once, here.

    Args:
        denoiser: the network.
        diffusion: that it was trained under.
        given: encoded clean values by variable: (B, C, h, w, d), (B, 1) or int64 (B,).
        rows: B, which nothing given does not tell.
        present: who has a given value, (B,) bool by variable; of others it is unknown. No entry: everybody.
        temperature: by scalar, the factor that calibration found for answers from volumes; see
            :mod:`mvhpc.training.calibration`.

    Raises:
        ValueError: a model that cannot be asked so; see :func:`why_not`.
        KeyError: given values of no variable.
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
            self.z[v.name] = torch.zeros(rows, *shape, dtype=kind, device=device)  # not shown: it is at T
            self.t[v.name] = torch.full((rows,), diffusion.steps, device=device)
        for name, value in given.items():
            v, known = variables[name], (present or {}).get(name)
            known = torch.ones(rows, dtype=torch.bool) if known is None else known
            known = known.to(device)
            self.z[v.name] = torch.where(known.reshape(-1, *[1] * (value.ndim - 1)), value.to(device), self.z[v.name])
            self.t[v.name] = self.t[v.name].masked_fill(known, 0)
        self.seen = denoiser.encode(self.z, self.t)

    def laws(self, want: Collection[str]) -> dict[str, Law]:
        """The predictive law of each wanted scalar by itself."""
        return self._laws(self.seen, self.z, self.t, want)

    def draw(self, want: Collection[str], uniform: Tensor) -> Batch:
        """Joint draws by the chain rule: the first wanted given what is known, the next given that too, and so on.

        Each of these laws is learnt by itself, so that another order of ``want`` gives slightly other draws.

        Args:
            want: scalars.
            uniform: (B, draws, len(want)) draws from (0, 1).

        Returns:
            By wanted variable clean encoded values (B x draws, 1) or (B x draws,), the draws of a person together.
        """
        n = uniform.shape[1]
        seen = self.seen.repeat_interleave(n, 0)
        z = {v.name: self.z[v.name].repeat_interleave(n, 0) for v in self.diffusion.variables.scalars}
        t = {name: x.repeat_interleave(n, 0) for name, x in self.t.items()}
        for i, name in enumerate(want):
            law, u = self._laws(seen, z, t, [name])[name], uniform[..., i].reshape(-1)
            z[name] = draw(law, u) if isinstance(law, Tensor) else quantile(law, u[:, None]).float()
            t[name] = torch.zeros_like(t[name])
        return {name: z[name] for name in want}

    def _laws(self, seen: Tensor, z: Batch, t: Batch, want: Collection[str]) -> dict[str, Law]:
        variables = self.diffusion.variables
        sure = torch.stack([t[v.name] == 0 for v in variables.volumes]).any(0)[:, None]  # (B, 1)
        laws: dict[str, Law] = {}
        for name, output in self.denoiser.predict(seen, z, t, want).items():
            temperature = 1.0 + (self.temperature.get(name, 1.0) - 1.0) * sure.double()
            if isinstance(variables[name], Categorical):
                laws[name] = chances(output, temperature)
            else:
                laws[name] = density(output, self.diffusion.parameterization(variables[name]), temperature)
        return laws
