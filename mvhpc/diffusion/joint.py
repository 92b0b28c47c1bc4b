"""The joint forward process over all variables of a person, and its loss (paper, section 3.1, eq. 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc import config
from mvhpc.diffusion import schedules
from mvhpc.diffusion.categorical import Uniform, draw
from mvhpc.diffusion.gaussian import TARGETS, Gaussian
from mvhpc.runtime.devices import send
from mvhpc.runtime.randomness import rand, randn
from mvhpc.variables import Categorical, Variable, Variables, Volume

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Noised:
    """A batch after the forward process.

    Attributes:
        z: noisy values, the input of the denoiser: (B, C, h, w, d), (B, 1) or int64 (B,) by kind of variable.
        t: levels, the other input, int64 (B,).
        target: of the outputs: eps, v or z_0 shaped like z, or the class (B,).
        counts: (B,) bool, False where there is no loss: a missing value, or one at t = 0.
    """

    z: Batch
    t: Batch
    target: Batch
    counts: Batch


class JointDiffusion(nn.Module):
    """Forward processes, targets, losses and reverse steps of all variables.

    It has no weights; ``to(device)`` moves its tables.

    Args:
        variables: of the model.
        diffusion: T, schedule, distribution of the levels, parameterisations and loss weights.

    Raises:
        config.ConfigError: an unknown distribution of the levels or parameterisation, probabilities that sum to more
            than 1, or a weight of an unknown variable.
    """

    def __init__(self, variables: Variables, diffusion: config.DiffusionConfig) -> None:
        super().__init__()
        config.choose(diffusion.time, ("shared", "independent"), "diffusion.time")
        for kind in (diffusion.volume, diffusion.continuous):
            config.choose(kind, TARGETS, "parameterisation")
        if not 0 <= diffusion.clean_fraction + diffusion.noise_fraction <= 1:
            raise config.ConfigError(
                f"diffusion.clean_fraction={diffusion.clean_fraction:g} and diffusion.noise_fraction="
                f"{diffusion.noise_fraction:g} are probabilities of one draw: together at most 1"
            )
        for name in diffusion.weights:
            config.choose(name, variables.names, "variable in diffusion.weights")
        self.variables = variables
        self.config = diffusion
        self.steps = diffusion.steps
        self.weights = {name: float(diffusion.weights.get(name, 1.0)) for name in variables.names}
        abar = schedules.scaled_linear(diffusion.steps, diffusion.beta_start, diffusion.beta_end)
        self.gaussian = Gaussian(abar)
        self.categorical = Uniform(schedules.cosine(diffusion.steps))

    @property
    def independent(self) -> bool:
        """Whether each variable has a level of its own."""
        return self.config.time == "independent"

    @property
    def masked_level(self) -> int | None:
        """The level whose values the network masks, as they are pure noise; None: no value is masked.

        With ``shared`` time none is masked, as in the paper; nor with eps, which is predicted from the noisy value.
        """
        kinds = {self.parameterization(v) for v in self.variables if not isinstance(v, Categorical)}
        return self.steps if self.independent and "eps" not in kinds else None

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.gaussian.abar.device

    def parameterization(self, variable: Variable) -> str:
        """What the denoiser predicts of a volume or continuous variable: eps, v or x0."""
        return self.config.volume if isinstance(variable, Volume) else self.config.continuous

    # --- training -----------------------------------------------------------------------------------------------

    def draw_times(self, generators: Sequence[torch.Generator], volumes_move: bool = False) -> Batch:
        """Levels for training, row b from ``generators[b]``.

        Shared: one level for all variables, uniform on 1..T (the paper). Independent: with probability
        ``shared_fraction`` the same; else each variable by itself rests at 0 with probability ``clean_fraction``, at T
        with ``noise_fraction``, and otherwise is uniform on 1..T. ``volumes_move``: for a network of volumes alone;
        rows where all of them would rest at 0 have them at their uniform levels.

        Returns:
            By variable, int64 (B,), on the CPU.
        """
        c, names = self.config, self.variables.names
        u = rand(generators, (2 + 2 * len(names),))  # (B, 2 + 2V)
        level = (1 + (u * self.steps).long()).clamp(max=self.steps)  # uniform on 1..T
        together = u[:, 0] < (c.shared_fraction if self.independent else 1.0)
        times = {}
        for i, name in enumerate(names):
            rest, own = u[:, 2 + 2 * i], level[:, 3 + 2 * i]
            own = torch.where(rest < c.clean_fraction + c.noise_fraction, self.steps, own)
            own = torch.where(rest < c.clean_fraction, 0, own)
            times[name] = torch.where(together, level[:, 1], own)
        if volumes_move:
            volumes = [(i, v.name) for i, v in enumerate(self.variables) if isinstance(v, Volume)]
            still = torch.stack([times[name] == 0 for _, name in volumes]).all(0)
            times |= {name: torch.where(still, level[:, 3 + 2 * i], times[name]) for i, name in volumes}
        return times

    def noise(
        self,
        batch: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
    ) -> Noised:
        """Bring a batch to the levels ``t``.

        A missing value is replaced by pure noise and has no loss. Its level is t = T in independent time, and in shared
        time the level of all variables.

        Args:
            batch: encoded values, (B, C, h, w, d), (B, 1) or int64 (B,); the value of a missing one has no effect.
            present: (B,) bool by variable; a variable without entry is present in every row.
            t: levels, int64 (B,) by variable.
            generators: one per row.
        """
        z, times, target, counts = {}, {}, {}, {}
        for v in self.variables:
            level = send(t[v.name], self.device)
            there = present.get(v.name, torch.ones_like(level, dtype=torch.bool))
            x0 = batch[v.name].masked_fill(~_against(there, batch[v.name]), 0)
            pure = self.prior(v, generators)
            if isinstance(v, Categorical):
                target[v.name] = x0
                x_t = self.categorical.add_noise(x0, level, v.size, rand(generators, (), self.device))
            else:
                target[v.name] = self.gaussian.target(x0, pure, level, self.parameterization(v))
                x_t = self.gaussian.add_noise(x0, level, pure)
            z[v.name] = torch.where(_against(there, x_t), x_t, pure)
            times[v.name] = torch.where(there, level, self.steps) if self.independent else level
            counts[v.name] = there & (level > 0)
        return Noised(z, times, target, counts)

    def losses(self, outputs: Mapping[str, Tensor], noised: Noised) -> Batch:
        """Loss of each row and variable (paper, eq. 5): mean over elements of the squared error, or cross-entropy.

        Args:
            outputs: of the network, by variable; variables that it does not predict have no loss.
            noised: its inputs and targets.

        Returns:
            By variable (B,) float32, unweighted; 0 where ``noised.counts`` is False. Their mean over B is not divided
            by the share of rows that count.
        """
        losses = {}
        for name, output in outputs.items():
            target = noised.target[name]
            if isinstance(self.variables[name], Categorical):
                loss = F.cross_entropy(output.float(), target, reduction="none")
            else:
                loss = (output.float() - target).square().flatten(1).mean(1)
            losses[name] = torch.where(noised.counts[name], loss, 0.0)
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum over variables, (B,)."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum(0)

    # --- the reverse process ------------------------------------------------------------------------------------

    def prior(self, variable: Variable, generators: Sequence[torch.Generator]) -> Tensor:
        """Pure noise, the distribution at t = T: normal, or uniform over the classes. Shaped as in :class:`Noised`."""
        if isinstance(variable, Categorical):
            u = rand(generators, (), self.device)
            return (u * variable.size).long().clamp(max=variable.size - 1)
        shape = variable.shape if isinstance(variable, Volume) else (1,)
        return randn(generators, shape, self.device)

    def renoise(
        self,
        variable: Variable,
        x_s: Tensor,
        t: int | Tensor,
        generators: Sequence[torch.Generator],
        s: int | Tensor = 0,
    ) -> Tensor:
        """A fresh draw of q(x_t | x_s), s <= t."""
        if isinstance(variable, Categorical):
            return self.categorical.add_noise(x_s, t, variable.size, rand(generators, (), self.device), s)
        return self.gaussian.add_noise(x_s, t, randn(generators, x_s.shape[1:], self.device), s)

    def predict(self, variable: Variable, output: Tensor, z_t: Tensor, t: int | Tensor) -> Tensor:
        """The prediction of x_0: E[z_0 | z_t] shaped like z_t, or p(x_0 | z_t) (B, K)."""
        if isinstance(variable, Categorical):
            return output.double().softmax(-1)
        return self.gaussian.x0(output.float(), z_t, t, self.parameterization(variable))

    def step(
        self,
        variable: Variable,
        x0: Tensor,
        z_t: Tensor,
        t: int,
        s: int,
        generators: Sequence[torch.Generator],
        before: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """From level t to s < t, given the prediction of x_0 by :meth:`predict`.

        A category is drawn from p(x_s | z_t). Volumes and numbers go by DDIM, or by DPM-Solver++(2M) with ``before``,
        the prediction of the step before and its level.
        """
        if isinstance(variable, Categorical):
            return draw(self.categorical.reverse(x0, z_t, t, s), rand(generators, (), self.device))
        return self.gaussian.dpm_step(z_t, x0, t, s, before)


def _against(rows: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast against ``like`` (B, ...)."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))
