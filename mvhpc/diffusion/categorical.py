"""Uniform categorical diffusion (D3PM, Austin et al. 2021; paper, eqs. 2 and 4) in closed form, without K x K matrices.

With Q_t = (1 - beta_t) I + beta_t / K the product of any transitions is again of this form: from level s to t > s a
class is kept with probability a = abar_t / abar_s, else drawn from all K:
q(x_t | x_s) = a onehot(x_s) + (1 - a) / K.

Every level ``t``, ``s`` is an int or an int64 tensor (B,) of one level per row.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.diffusion.density import by_member


class Uniform(nn.Module):
    """The forward process and its reverse step over any stride.

    Args:
        abar: probability that a class is kept, by level, (T + 1,), abar[0] = 1.
    """

    abar: Tensor

    def __init__(self, abar: Tensor) -> None:
        super().__init__()
        self.register_buffer("abar", abar.double(), persistent=False)

    def marginal(self, p_s: Tensor, t: int | Tensor, s: int | Tensor = 0) -> Tensor:
        """q(x_t) of classes that at level s <= t are p_s (B, K), a one-hot row where known; (B, K) float64."""
        keep = (self.abar[t] / self.abar[s]).reshape(-1, 1)
        return keep * p_s + (1 - keep) / p_s.shape[-1]

    def add_noise(self, x_s: Tensor, t: int | Tensor, classes: int, uniform: Tensor, s: int | Tensor = 0) -> Tensor:
        """Draw x_t (B,) given x_s (B,) int64 of ``classes`` classes, with ``uniform`` (B,) draws from [0, 1)."""
        return draw(self.marginal(F.one_hot(x_s, classes).double(), t, s), uniform)

    def reverse(self, p0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
        """p(x_s | x_t) = sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t), for any s < t.

        By Bayes q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0); with w(x_0) = p(x_0 | x_t) / q(x_t | x_0)
        the sum is q(x_t | x_s) (abar_s w(x_s) + (1 - abar_s) / K sum w). At s = 0 this is p(x_0 | x_t) itself.

        Args:
            p0: p(x_0 | x_t), (B, K), rows summing to one; a one-hot row gives the posterior given that x_0.
            x_t: the classes at level t, (B,) int64.
            t: the level they are at, at least 1.
            s: the level to go to.

        Returns:
            (B, K) float64, rows summing to one.
        """
        p0 = p0.double()
        k = p0.shape[-1]
        abar_t, abar_s = self.abar[t].reshape(-1, 1), self.abar[s].reshape(-1, 1)
        keep = abar_t / abar_s
        here = F.one_hot(x_t, k)  # (B, K)
        w = p0 / (abar_t * here + (1 - abar_t) / k)
        return (keep * here + (1 - keep) / k) * (abar_s * w + (1 - abar_s) / k * w.sum(-1, keepdim=True))


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Classes (B,) int64 from probabilities p (B, K), by inversion at ``uniform`` (B,) in [0, 1)."""
    cumulative = p.double().cumsum(-1)
    above = (uniform.double() * cumulative[:, -1])[:, None] >= cumulative[:, :-1]  # (B, K - 1)
    return above.sum(-1)


def probabilities(output: Tensor) -> Tensor:
    """p(class) (B, K) in float64, of logits (B, K), or (B, R, K) of R ensemble members, which are averaged."""
    return by_member(output).double().softmax(-1).mean(1)
