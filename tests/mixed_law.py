"""A joint law of a small image, a number and a category whose every conditional is known: classes, and Gaussians given
the class. With its exact denoiser, which answers at any level of each variable."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.variables import Categorical, Continuous, Variables, Volume

K, D = 3, 3  # classes; continuous dimensions: two voxels and the number
VARIABLES = Variables([Volume("image", (1, 2, 1, 1)), Continuous("age", 0, 100), Categorical("sex", ("F", "M", "X"))])


def diffusion(
    time: str = "independent", kind: str = "v", weights: dict[str, float] | None = None, steps: int = 1000
) -> JointDiffusion:
    """A joint diffusion of the law's variables."""
    settings = config.DiffusionConfig(
        steps=steps,
        beta_start=0.0015,
        beta_end=0.0195,
        time=time,
        shared_fraction=0.3,
        clean_fraction=0.2,
        noise_fraction=0.1,
        volume=kind,
        continuous=kind,
        weights=weights or {},
    )
    return JointDiffusion(VARIABLES, settings)


def flat(z: dict[str, Tensor]) -> Tensor:
    """The continuous parts as (B, D) float64."""
    return torch.cat([z["image"].flatten(1), z["age"]], 1).double()


class MixedLaw:
    """The law, and as a call the exact denoiser of it under ``diffusion``."""

    def __init__(self, diffusion: JointDiffusion) -> None:
        self.diffusion = diffusion
        self.prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        self.mean = torch.tensor([[-1.0, 0.5, 0.8], [0.0, -0.8, -0.4], [1.0, 0.6, 0.3]], dtype=torch.float64)
        root = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.7, 0.0], [-0.4, 0.5, 0.5]], dtype=torch.float64)
        self.covariance = torch.stack([root @ root.T * c for c in (1.0, 0.7, 1.2)])  # (K, D, D)

    def __call__(self, z: dict[str, Tensor], t: dict[str, Tensor], want: list[str]) -> dict[str, Tensor]:
        abar = self.diffusion.gaussian.abar
        level = {name: int(rows.unique()) for name, rows in t.items()}  # the same in all rows
        share = torch.stack([abar[level["image"]], abar[level["image"]], abar[level["age"]]])  # (D,)
        x, a, b = flat(z), share.sqrt(), (1 - share).sqrt()
        there = a[:, None] * self.covariance * a + torch.diag(b**2 + 1e-12)  # (K, D, D)
        off = x[:, None] - a * self.mean  # (B, K, D)
        log = MultivariateNormal(torch.zeros(D).double(), there).log_prob(off)
        seen = self.diffusion.categorical.marginal(F.one_hot(z["sex"], K), level["sex"])  # q(x_t | class)
        logits = log + self.prior.log() + seen.clamp(min=1e-300).log()  # (B, K)
        gain = self.covariance * a @ torch.linalg.inv(there)  # (K, D, D)
        x0 = self.mean + torch.einsum("kij,bkj->bki", gain, off)  # E[x_0 | z, class]
        x0 = (logits.softmax(-1)[..., None] * x0).sum(1)
        kind = self.diffusion.config.volume
        eps = (x - a * x0) / b.clamp(min=1e-6)
        out = {"eps": eps, "x0": x0, "v": a * eps - b * x0}[kind]
        answers = {"image": out[:, :2].reshape(-1, 1, 2, 1, 1).float(), "age": out[:, 2:].float(), "sex": logits}
        return {name: answers[name] for name in want}

    def draw(self, n: int, seed: int) -> dict[str, Tensor]:
        """n exact draws."""
        g = torch.Generator().manual_seed(seed)
        sex = torch.multinomial(self.prior, n, replacement=True, generator=g)
        root = torch.linalg.cholesky(self.covariance)
        x = self.mean[sex] + (root[sex] @ torch.randn(n, D, 1, generator=g, dtype=torch.float64))[..., 0]
        return {"image": x[:, :2].reshape(n, 1, 2, 1, 1).float(), "age": x[:, 2:].float(), "sex": sex}

    def given(self, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The exact law given the continuous dimensions ``dims`` = x (..., len(dims)).

        Returns:
            p(class) (..., K), and mean (..., K, rest) and covariance (K, rest, rest) of the other dimensions by class.
        """
        rest = [i for i in range(D) if i not in dims]
        known, cross = self.covariance[:, dims][:, :, dims], self.covariance[:, rest][:, :, dims]
        gain = cross @ torch.linalg.inv(known)
        off = x[..., None, :] - self.mean[:, dims]  # (..., K, dims)
        log = self.prior.log().expand(off.shape[:-1])
        if dims:
            log = log + MultivariateNormal(torch.zeros(len(dims)).double(), known).log_prob(off)
        mean = self.mean[:, rest] + (gain @ off[..., None])[..., 0]
        return log.softmax(-1), mean, self.covariance[:, rest][:, :, rest] - gain @ cross.transpose(1, 2)


def mixture(p: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a mixture of Gaussians: p (K,), mean (K, d), covariance (K, d, d)."""
    centre = p @ mean
    off = mean - centre
    return centre, torch.einsum("k,kij->ij", p, covariance + off[:, :, None] * off[:, None, :])


def one_hot_share(x: Tensor) -> Tensor:
    """Shares of the classes (K,) among x (n,)."""
    return F.one_hot(x, K).double().mean(0)


def stderr(n: int, spread: float = 1.0, sigmas: float = 4.5) -> float:
    """A bound that the mean of n draws of standard deviation ``spread`` keeps to."""
    return sigmas * spread / math.sqrt(n)
