"""Principal components of volumes, from the Gram matrix of at most a few thousand people."""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PEOPLE = 2048  # that the components are computed from; the others are projected
BATCH = 64  # people whose voxels are converted to float32 at a time


@dataclass(frozen=True)
class Scores:
    """Volumes as their principal components.

    Attributes:
        values: scores, (B, R) float64.
        rest: squared length of what they leave, (B,) float64; the variances of all components of the people that these
            were fitted to sum to 1.
    """

    values: Tensor
    rest: Tensor

    def __getitem__(self, rows: Tensor) -> "Scores":
        return Scores(self.values[rows], self.rest[rows])


@dataclass(frozen=True)
class PrincipalComponents:
    """A linear map from P voxels to R scores, ordered by variance. float32.

    Attributes:
        mean: of the voxels, (P,).
        basis: orthonormal rows, (R, P).
        scale: divides the scores, so that the variances of all components sum to 1.
        sd: of each score, (R,).
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    sd: Tensor

    @classmethod
    def fit(cls, x: Tensor, chosen: Tensor, count: int) -> "PrincipalComponents":
        """The components of some people.

        Args:
            x: (N, P), of any floating type.
            chosen: the people to learn from, (N,) bool, at least 2. With more than 2,048, evenly chosen ones decide.
            count: R at most; less where there are fewer people or the rank is less.

        Raises:
            ValueError: fewer than two people, or people who do not differ.
        """
        rows = chosen.nonzero()[:, 0]
        if len(rows) > MOST_PEOPLE:
            rows = rows[torch.linspace(0, len(rows) - 1, MOST_PEOPLE).long()]
        if len(rows) < 2:
            raise ValueError("principal components need at least two people who have the volume")
        centred = x[rows].float()
        mean = centred.mean(0)
        centred -= mean
        variance, vectors = torch.linalg.eigh((centred @ centred.T).double() / len(rows))  # ascending
        variance, vectors = variance.flip(0), vectors.flip(1)
        keep = min(count, len(rows) - 1, int((variance > 1e-6 * variance[0]).sum()))
        if not keep or variance[0] <= 0:
            raise ValueError("principal components of people who do not differ")
        basis = vectors[:, :keep].T.float() @ centred / (variance[:keep, None] * len(rows)).sqrt().float()
        scale = variance.clamp(min=0).sum().sqrt()
        return cls(mean, basis, scale.float(), (variance[:keep].sqrt() / scale).float())

    def scores(self, x: Tensor) -> Scores:
        """The scores of voxels (B, P), which may be of any floating type."""
        values, rests = [], []
        for part in x.split(BATCH):
            centred = (part.float() - self.mean) / self.scale
            values.append((centred @ self.basis.T).double())
            rests.append((centred.double().square().sum(1) - values[-1].square().sum(1)).clamp(min=0))
        return Scores(torch.cat(values), torch.cat(rests))

    def distances(self, scores: Scores, first: int) -> Tensor:
        """How far B volumes are from the people's: (B, 2), float64.

        The Mahalanobis distance of the ``first`` scores, and the length of what these leave, in units of all people's.
        """
        head, tail = scores.values[:, :first], scores.values[:, first:]
        rest = scores.rest + tail.square().sum(1)
        return torch.stack([(head / self.sd[:first]).square().sum(1).sqrt(), rest.sqrt()], 1)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale, "sd": self.sd}
