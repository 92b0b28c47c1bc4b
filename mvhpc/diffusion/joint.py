"""The joint forward process over all variables of a person, and its loss (paper, section 3.1, eq. 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc import config
from mvhpc.diffusion import schedules
from mvhpc.diffusion.categorical import Uniform, draw, probabilities
from mvhpc.diffusion.density import by_member, density
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
        clean: x_0, shaped like z.
        counts: (B,) bool, False where there is no loss: a missing value, or one at t = 0.
        moving: (B,) bool, on the CPU: rows with a volume at a level above 0.

    With Q queries per row, tensors of scalars have B x Q rows instead of B, the queries of a row together.
    """

    z: Batch
    t: Batch
    target: Batch
    clean: Batch
    counts: Batch
    moving: Tensor


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

    def draw_times(self, generators: Sequence[torch.Generator]) -> Batch:
        """Levels for training, row b from ``generators[b]``.

        Shared: one level for all variables, uniform on 1..T (the paper). Independent: with probability
        ``shared_fraction`` the same; else each variable by itself rests at 0 with probability ``clean_fraction``, at T
        with ``noise_fraction``, and otherwise is uniform on 1..T.

        Returns:
            By variable, int64 (B,), on the CPU, where the host can read them without waiting for a GPU.
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
        return times

    def noise(
        self,
        batch: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
    ) -> Noised:
        """Bring a batch to the levels ``t``.

        There may be Q generators and levels for each row of the batch, those of a row together: each scalar is noised Q
        times; a volume once, with the first level and generator of its row.

        A missing value is replaced by pure noise and has no loss. Its level is t = T in independent time, and in shared
        time the level of all variables.

        Args:
            batch: encoded values, (B, C, h, w, d), (B, 1) or int64 (B,); the value of a missing one has no effect.
            present: (B,) bool by variable; a variable without entry is present in every row.
            t: levels, int64 (B Q,) by variable.
            generators: Q per row.
        """
        z, times, target, clean, counts = {}, {}, {}, {}, {}
        n = len(generators) // len(batch[self.variables.names[0]])  # Q
        moving = torch.stack([t[v.name][::n] > 0 for v in self.variables.volumes]).any(0).cpu()
        t = {name: send(level, self.device) for name, level in t.items()}
        for v in self.variables:
            volume = isinstance(v, Volume)
            rows, level = (generators[::n], t[v.name][::n]) if volume else (generators, t[v.name])
            x0 = batch[v.name] if volume else batch[v.name].repeat_interleave(n, 0)
            there = torch.ones_like(level, dtype=torch.bool)
            if v.name in present:
                there = present[v.name] if volume else present[v.name].repeat_interleave(n)
            x0 = x0.masked_fill(~_against(there, x0), 0)
            pure = self.prior(v, rows)
            if isinstance(v, Categorical):
                target[v.name] = x0
                x_t = self.categorical.add_noise(x0, level, v.size, rand(rows, (), self.device))
            else:
                target[v.name] = self.gaussian.target(x0, pure, level, self.parameterization(v))
                x_t = self.gaussian.add_noise(x0, level, pure)
            z[v.name] = torch.where(_against(there, x_t), x_t, pure)
            times[v.name] = torch.where(there, level, self.steps) if self.independent else level
            clean[v.name] = x0
            counts[v.name] = there & (level > 0)
        return Noised(z, times, target, clean, counts, moving)

    def show_clean(self, noised: Noised, chosen: Tensor) -> tuple[Batch, Batch]:
        """The volumes and their levels, with those that are ``chosen`` clean and at t = 0.

        Predicting scalars and denoising volumes need levels of their own: most queries give a clean volume, denoising
        needs a noisy one.

        Args:
            noised: a noised batch.
            chosen: bool (B, volumes); has no effect where a volume is missing.

        Returns:
            Values (B, C, h, w, d) and levels (B,) by volume.
        """
        z, t = {}, {}
        for v, chose in zip(self.variables.volumes, chosen.unbind(1), strict=True):
            clean = chose & noised.counts[v.name]
            z[v.name] = torch.where(_against(clean, noised.z[v.name]), noised.clean[v.name], noised.z[v.name])
            t[v.name] = noised.t[v.name].masked_fill(clean, 0)
        return z, t

    def losses(self, outputs: Mapping[str, Tensor], noised: Noised, held_out: Tensor | None = None) -> Batch:
        """Loss of each row and variable (paper, eq. 5): mean over elements of the squared error, or cross-entropy.

        Where a number is at t = T and the network predicts a density, the negative log-likelihood is added, but not
        with eps, which at t = T tells nothing of the number. Each ensemble member has a loss of its own for a scalar.

        Args:
            outputs: of the network, by variable.
            noised: its inputs and targets.
            held_out: bool (B, R), the members whose loss on a row counts, of R; None: all.

        Returns:
            By variable (B,) float32, unweighted, the mean over the queries of a row and its members; 0 where
            ``noised.counts`` is False. Their mean over B is not divided by the share of rows that count.
        """
        losses = {}
        rows = min(len(z) for z in noised.z.values())  # B
        for v in self.variables:
            output, target, counts = outputs[v.name].float(), noised.target[v.name], noised.counts[v.name]
            if isinstance(v, Volume):
                losses[v.name] = torch.where(counts, (output - target).square().flatten(1).mean(1), 0.0)
                continue
            members = by_member(output).shape[1]  # R
            predicted = by_member(output).flatten(0, 1)  # (B Q R, n)
            target, level, clean, counts = (
                x.repeat_interleave(members, 0) for x in (target, noised.t[v.name], noised.clean[v.name], counts)
            )
            if isinstance(v, Categorical):
                loss = F.cross_entropy(predicted, target, reduction="none")
            else:
                loss = (predicted[:, :1] - target).square()[:, 0]
                kind = self.parameterization(v)
                if predicted.shape[1] > 1 and kind != "eps":
                    nll = -density(predicted, kind).log_prob(clean[:, 0].double()).float()
                    loss = loss + torch.where(level == self.steps, nll, 0.0)
            loss = torch.where(counts, loss, 0.0).reshape(rows, -1, members).mean(1)  # (B, R)
            losses[v.name] = loss.mean(1) if held_out is None else (loss * held_out).sum(1) / held_out.sum(1)
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
        """The prediction of x_0, averaged over members: E[z_0 | z_t] shaped like z_t, or p(x_0 | z_t) (B, K)."""
        if isinstance(variable, Categorical):
            return probabilities(output)
        mean = output if isinstance(variable, Volume) else by_member(output)[..., :1].mean(1)
        return self.gaussian.x0(mean.float(), z_t, t, self.parameterization(variable))

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
