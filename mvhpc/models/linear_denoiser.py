"""The best linear prediction of volumes from noisy ones, in closed form. The U-Net's output is added to it.

Latents of people are modelled as z_0 = s W + h B + e, with the effect W of their scalars s, factors h ~ N(0, 1) with
loadings B, and a rest e, normal and independent between cells of the grid, correlated between channels of one. W is a
regression, B are principal components of what it leaves (probabilistic principal components, Tipping and Bishop 1999).
E[z_0 | z_t] then follows at any levels by linear algebra, and the U-Net has to learn only what is not linear.

The channels of each cell are rotated so that its rest has independent elements; white noise stays white.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.diffusion.joint import Batch, JointDiffusion
from mvhpc.models.layers import Values
from mvhpc.models.principal_components import PrincipalComponents
from mvhpc.variables import Categorical

RIDGE = 5.0  # the regression counts this many people without any effect
SIZES = 32  # different variances of the rest in a volume, each of as many elements
LEAST_REST = 1e-4
SHRINK = 0.1  # of correlations in a cell: of those found from few people, some are chance


class LinearDenoiser(nn.Module):
    """E[z_0 | z_t] of volumes under the linear model, as the v that a network predicts. It is not trained further.

    All volumes of a person, rotated, are one vector of D elements.

    Args:
        diffusion: of the model.
        tensors: ``effect`` W, of the features of the scalars, (S, D); ``frequencies`` of the classes, one category
            after the other; ``loadings`` B, (K, D); ``rest``, variances in 32 sizes for each volume, (32 V,); ``size``
            of each element, its place in ``rest``, int64 (D,); ``rotation_0`` and so on, of each volume, (E, C, C) for
            its E cells.
    """

    effect: Tensor
    frequencies: Tensor
    loadings: Tensor
    rest: Tensor
    size: Tensor
    overlaps: Tensor

    def __init__(self, diffusion: JointDiffusion, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.diffusion = diffusion
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        parts = [self.loadings[:, self.size == i] for i in range(len(self.rest))]
        with torch.autocast(self.rest.device.type, enabled=False):  # a sampler opens it under its own
            overlaps = torch.stack([part @ part.T for part in parts])  # (32 V, K, K)
        self.register_buffer("overlaps", overlaps, persistent=False)

    @classmethod
    def fit(
        cls, diffusion: JointDiffusion, values: Mapping[str, Tensor], present: Mapping[str, Tensor], components: int
    ) -> "LinearDenoiser":
        """Learn from N people.

        Args:
            diffusion: of the model.
            values: encoded and clean, (N, C, h, w, d), (N, 1) or int64 (N,).
            present: (N,) bool by variable; people who lack a volume are left out.
            components: K, less than N.

        Raises:
            ValueError: nobody has all volumes.
        """
        variables = diffusion.variables
        whole = torch.stack([present[v.name] for v in variables.volumes]).all(0)
        if not whole.any():
            raise ValueError("nobody has all volumes")
        x = torch.cat([values[v.name][whole].flatten(1) for v in variables.volumes], 1)  # (N, D)
        classes = [
            F.one_hot(values[v.name][present[v.name]], v.size).float().mean(0)
            for v in variables.scalars
            if isinstance(v, Categorical)
        ]
        frequencies = torch.cat([x.new_zeros(0), *classes])
        levels = {v.name: torch.where(present[v.name], 0, diffusion.steps)[whole] for v in variables.scalars}
        s = _features(diffusion, frequencies, {name: values[name][whole] for name in levels}, levels, len(x))
        effect = torch.linalg.solve(s.T @ s + RIDGE * torch.eye(s.shape[1]), s.T @ x)
        x = x - s @ effect
        basis, variance = x.new_zeros(0, x.shape[1]), x.new_zeros(0)
        if components:
            found = PrincipalComponents.fit(x, torch.ones(len(x), dtype=torch.bool), components)
            basis, variance = found.basis, (found.sd * found.scale).square()
        left = x - (x @ basis.T) @ basis
        shapes = [v.shape for v in variables.volumes]
        rotations = [_principal_axes(part) for part in _split(left, shapes)]
        effect, basis, left = (torch.cat(_rotate(_split(y, shapes), rotations), 1) for y in (effect, basis, left))
        remaining = left.square().mean(0)  # (D,)
        remaining = remaining / (1 - basis.square().sum(0)).clamp(min=0.5)  # the components took their share of it
        sizes = [_by_size(part) for part in remaining.split([math.prod(shape) for shape in shapes])]
        size = torch.cat([part + SIZES * i for i, part in enumerate(sizes)])
        rest = torch.zeros(SIZES * len(sizes)).index_add(0, size, remaining) / size.bincount(
            minlength=SIZES * len(sizes)
        )
        rest = rest.nan_to_num(0.0).clamp(min=LEAST_REST)
        loadings = basis * (variance - basis.square() @ rest[size]).clamp(min=0).sqrt()[:, None]
        tensors = {"effect": effect, "frequencies": frequencies, "loadings": loadings, "rest": rest, "size": size}
        return cls(diffusion, tensors | {f"rotation_{i}": rotation for i, rotation in enumerate(rotations)})

    @property
    def rotations(self) -> list[Tensor]:
        """Of each volume."""
        return [self.get_buffer(f"rotation_{i}") for i in range(len(self.diffusion.variables.volumes))]

    @torch.no_grad()
    def forward(self, z: Values, t: Values) -> Batch:
        """
        Args:
            z: noisy values, (B, C, h, w, d) and, of scalars, (B Q, 1) or int64 (B Q,), of which the first of each Q is
                used.
            t: levels, int64 (B,) and (B Q,).

        Returns:
            v by volume, (B, C, h, w, d) float32; 0 at level 0.
        """
        volumes, scalars = self.diffusion.variables.volumes, self.diffusion.variables.scalars
        with torch.autocast(self.rest.device.type, enabled=False):
            x = torch.cat(_rotate([z[v.name].float() for v in volumes], self.rotations), 1)  # (B, D)
            n = len(z[scalars[0].name]) // len(x) if scalars else 1
            s_of, t_of = ({v.name: values[v.name][::n] for v in scalars} for values in (z, t))
            mean = _features(self.diffusion, self.frequencies, s_of, t_of, len(x)) @ self.effect
            levels = [self.diffusion.gaussian.coefficients(t[v.name], x[:, :1]) for v in volumes]
            alpha, sigma = (torch.cat([c.expand(-1, SIZES) for c in part], 1) for part in zip(*levels))  # (B, 32 V)
            gain = alpha / (alpha.square() * self.rest + sigma.square())
            precision = torch.einsum("bg,gkl->bkl", alpha * gain, self.overlaps)  # of the factors, (B, K, K)
            precision = precision + torch.eye(precision.shape[1], device=x.device)
            shrink = self.rest * gain
            alpha, sigma, gain, shrink = (c[:, self.size] for c in (alpha, sigma, gain, shrink))  # (B, D)
            left = x - alpha * mean
            seen = (gain * left) @ self.loadings.T  # (B, K)
            factors = torch.cholesky_solve(seen[..., None], torch.linalg.cholesky(precision))[..., 0]
            part = factors @ self.loadings
            x0 = mean + part + shrink * (left - alpha * part)
            v = torch.where(sigma > 0, (alpha * x - x0) / sigma.clamp(min=1e-6), 0.0)
            return dict(zip((w.name for w in volumes), self._unrotate(v)))

    def added_to(self, outputs: Mapping[str, Tensor], z: Values, t: Values) -> Batch:
        """A network's outputs by variable, those of volumes plus this v."""
        return {**outputs, **{name: outputs[name] + v for name, v in self(z, t).items()}}

    def _unrotate(self, x: Tensor) -> list[Tensor]:
        """Vectors (B, D) to volumes (B, C, h, w, d)."""
        volumes, found = self.diffusion.variables.volumes, []
        for part, w, rotation in zip(x.split([math.prod(w.shape) for w in volumes], 1), volumes, self.rotations):
            cells = part.unflatten(1, rotation.shape[:2])  # (B, E, C)
            found.append(torch.einsum("bed,ecd->bce", cells, rotation).unflatten(2, w.shape[1:]))
        return found


def _split(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Vectors (N, D) of plain elements as volumes (N, C, h, w, d)."""
    parts = x.split([math.prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]


def _rotate(volumes: Sequence[Tensor], rotations: Sequence[Tensor]) -> list[Tensor]:
    """Volumes (N, C, h, w, d) as vectors (N, E C) of rotated cells."""
    return [torch.einsum("nce,ecd->ned", v.flatten(2), r).flatten(1) for v, r in zip(volumes, rotations)]


def _principal_axes(x: Tensor) -> Tensor:
    """The axes (E, C, C), as columns, of the channels in each cell of N volumes (N, C, h, w, d)."""
    cells = x.flatten(2).permute(2, 1, 0)  # (E, C, N)
    covariance = cells @ cells.mT / len(x)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    vectors = torch.linalg.eigh(torch.lerp(covariance, diagonal, SHRINK))[1]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()  # a vector and its opposite are both right


def _by_size(values: Tensor) -> Tensor:
    """The place of each of D values among 32 sizes of as many values, int64 (D,)."""
    return values.argsort(stable=True).argsort() * SIZES // len(values)


def _features(diffusion: JointDiffusion, frequencies: Tensor, z: Values, t: Values, rows: int) -> Tensor:
    """What noisy scalars tell of the clean ones, (rows, S), 0 at t = T.

    E[z_0 | z_t] of a standardised number, and for each class of a category how much more likely it is than among all.
    """
    features = [frequencies.new_zeros(rows, 0)]
    parts = iter(frequencies.split([v.size for v in diffusion.variables.scalars if isinstance(v, Categorical)]))
    for v in diffusion.variables.scalars:
        seen = (t[v.name] < diffusion.steps).float()[:, None]
        if isinstance(v, Categorical):
            keep = diffusion.categorical.abar[t[v.name]].float()[:, None]
            features.append(seen * keep * (F.one_hot(z[v.name], v.size) - next(parts)))
        else:
            features.append(seen * z[v.name].float() * diffusion.gaussian.coefficients(t[v.name], z[v.name])[0])
    return torch.cat(features, 1)
