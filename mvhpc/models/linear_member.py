"""A linear member of an ensemble: principal components of each volume, and moments of them and the scalars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvhpc.diffusion.laws import Law
from mvhpc.models.linear import Moments
from mvhpc.models.principal_components import PrincipalComponents, Scores
from mvhpc.variables import Scalar


@dataclass(frozen=True)
class LinearMember:
    """Linear predictions from the features of volumes; see :mod:`mvhpc.models.linear`.

    Attributes:
        components: of each volume.
        moments: of the scores and the scalars.
    """

    components: dict[str, PrincipalComponents]
    moments: Moments

    @classmethod
    def fit(
        cls,
        scalars: Sequence[Scalar],
        features: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        chosen: Tensor,
        count: int,
    ) -> "LinearMember":
        """The member of some people.

        Args:
            scalars: in the schema's order.
            features: of each volume (N, P), of any floating type; zero where the volume is missing.
            values, present: by variable, as :meth:`Moments.of_people` takes them.
            chosen: the people to learn from, (N,) bool.
            count: of principal components, at most.

        Raises:
            ValueError: a volume that fewer than two of them have.
        """
        components = {name: PrincipalComponents.fit(x, chosen & present[name], count) for name, x in features.items()}
        scores = {name: components[name].scores(x[chosen]).values for name, x in features.items()}
        values, present = ({name: x[chosen] for name, x in of.items()} for of in (values, present))
        return cls(components, Moments.of_people(scalars, scores, values, present))

    def scores(self, features: Mapping[str, Tensor]) -> dict[str, Scores]:
        """Scores of each volume's features (B, P)."""
        return {name: self.components[name].scores(x) for name, x in features.items()}

    def law(
        self, want: str, scores: Mapping[str, Scores], values: Mapping[str, Tensor], known: Mapping[str, Tensor]
    ) -> Law:
        """The predictive law of a scalar given everything else that is known of B people.

        Args:
            want: a scalar; its own value is ignored.
            scores: of each volume.
            values: encoded scalars, (B, 1) or (B,).
            known: by variable, (B,) bool.
        """
        features = {name: x.values for name, x in scores.items()}
        return self.moments.law(want, features, {name: x.rest for name, x in scores.items()}, values, known)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        found = {f"{name}.{key}": x for name, part in self.components.items() for key, x in part.tensors().items()}
        patterns = [[name in pattern for name in self.components] for pattern in self.moments.patterns]
        return found | {"moments": self.moments.sums, "patterns": torch.tensor(patterns)}

    @classmethod
    def of(cls, scalars: Sequence[Scalar], volumes: Sequence[str], tensors: Mapping[str, Tensor]) -> "LinearMember":
        """The member of :meth:`tensors`."""
        components = {
            name: PrincipalComponents(*(tensors[f"{name}.{key}"] for key in ("mean", "basis", "scale", "sd")))
            for name in volumes
        }
        patterns = [[n for n, there in zip(volumes, row) if there] for row in tensors["patterns"].tolist()]
        sizes = {name: len(part.basis) for name, part in components.items()}
        return cls(components, Moments(scalars, sizes, tensors["moments"], patterns))
