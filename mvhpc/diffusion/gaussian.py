"""Gaussian diffusion of volumes and continuous variables (paper, eq. 1): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

Every level ``t``, ``s`` is an int or an int64 tensor (B,) of one level per row.
"""

from torch import Tensor, nn

TARGETS = ("eps", "v", "x0")  # what a network may predict


class Gaussian(nn.Module):
    """The forward process, the three parameterisations and the deterministic reverse step.

    Args:
        abar: signal share by level, (T + 1,), abar[0] = 1.
    """

    abar: Tensor

    def __init__(self, abar: Tensor) -> None:
        super().__init__()
        self.register_buffer("abar", abar.double(), persistent=False)

    def coefficients(self, t: int | Tensor, like: Tensor, s: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a) for a = abar_t / abar_s, in the type of ``like`` and shaped to multiply it."""
        abar = (self.abar[t] / self.abar[s]).reshape(-1, *[1] * (like.ndim - 1))  # (B or 1, 1, ...)
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, z_s: Tensor, t: int | Tensor, eps: Tensor, s: int | Tensor = 0) -> Tensor:
        """z_t from z_s, s <= t; from z_0 by eq. 1."""
        a, b = self.coefficients(t, z_s, s)
        return a * z_s + b * eps

    def target(self, z0: Tensor, eps: Tensor, t: int | Tensor, kind: str) -> Tensor:
        """The target of the network: eps, z_0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0."""
        if kind == "eps":
            return eps
        if kind == "x0":
            return z0
        a, b = self.coefficients(t, z0)
        return a * eps - b * z0

    def x0(self, output: Tensor, z_t: Tensor, t: int | Tensor, kind: str) -> Tensor:
        """z_0 from the network's output, not clipped: latents and scaled scalars have no hard bounds.

        From ``eps`` this divides by sqrt(abar_t), about 0.01 at T: exact for an exact eps, useless for a learned one.
        """
        if kind == "x0":
            return output
        a, b = self.coefficients(t, z_t)
        return (z_t - b * output) / a if kind == "eps" else a * z_t - b * output

    def eps(self, x0: Tensor, z_t: Tensor, t: int | Tensor) -> Tensor:
        """The noise in z_t given x_0; t >= 1."""
        a, b = self.coefficients(t, z_t)
        return (z_t - a * x0) / b

    def ddim_step(self, z_t: Tensor, x0: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
        """z_s from z_t and the predicted x0, s < t, without new noise (Song et al. 2021, eq. 12 with sigma = 0)."""
        return self.add_noise(x0, s, self.eps(x0, z_t, t))

    def dpm_step(self, z_t: Tensor, x0: Tensor, t: int, s: int, before: tuple[Tensor, int] | None) -> Tensor:
        """z_s from z_t by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order at one network call a step.

        Args:
            z_t, x0: the present value and the predicted x_0, at level t >= 1.
            t, s: levels, s < t.
            before: the x_0 predicted one step earlier and its level; None at the first step, which is DDIM's.

        Returns:
            z_s; at s = 0 the predicted x_0.
        """
        if before is None or s == 0:
            return self.ddim_step(z_t, x0, t, s)
        earlier, u = before
        h, last = self.log_snr(s) - self.log_snr(t), self.log_snr(t) - self.log_snr(u)
        return self.ddim_step(z_t, x0 + h / (2 * last) * (x0 - earlier), t, s)

    def log_snr(self, t: int) -> float:
        """lambda_t = log(alpha_t / sigma_t)."""
        return float(0.5 * (self.abar[t] / (1 - self.abar[t])).log())
