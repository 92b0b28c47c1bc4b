"""The linear floor of a comparison: linear readings of pooled volumes or tissue maps, fitted in closed form.

What a network for these data has to be better than. Ridge regression on principal components of the maps, whose
strength is the most probable one (:mod:`mvhpc.models.linear`), answers every query.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.inference.law_cells import law_cells
from mvhpc.inference.prediction_tables import Row
from mvhpc.models.baseline import scalars_of
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.pooled_features import linear_features
from mvhpc.records import channels_of, cube, read_pooled, scalar_values, true_value
from mvhpc.variables import standard_intervals
from shards.dataset import Dataset
from shards.schema import Schema

SPACING = 4.0  # mm, of the pooled volumes, and the SD of their smoothing; those of stage scalars
COMPONENTS = 256  # principal components of a volume, at most; those of stage scalars


class LinearFloor:
    """Linear predictions of scalars from one part of a packed data set.

    Args:
        dataset: packed volumes.
        keys: of the records to learn from.

    Attributes:
        schema: of the variables that it answers for; scalars that fewer than two of them have are left out.
    """

    def __init__(self, dataset: Dataset, keys: Sequence[str]) -> None:
        self.dataset = dataset
        own, names = dataset.index.schema, [v.name for v in dataset.index.schema.scalars]
        rows = [scalar_values(dataset, key, own, names) for key in keys]
        known = [v.name for v in own.scalars if sum(row[v.name] is not None for row in rows) > 1]
        volumes = [v.name for v in own.volumes if sum(dataset.has(key, v.name) for key in keys) > 1]
        self.schema = Schema(tuple(v for v in own if v.name in (*known, *volumes)))
        self.scalars = scalars_of(self.schema, known, standard_intervals(self.schema, rows))
        features, values, present = self._read(keys, [*known, *volumes])
        everybody = torch.ones(len(keys), dtype=torch.bool)
        self.member = LinearMember.fit(self.scalars.scalars, features, values, present, everybody, COMPONENTS)

    def _read(
        self, keys: Sequence[str], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Features (N, P) of each volume, encoded scalars, and by variable who has it and it is among ``names``."""
        index, n = self.dataset.index, cube(self.dataset.index.grid, SPACING)
        sd = SPACING / (n * float(index.grid["spacing"]))
        values, there = self.scalars.encode_scalars(
            [scalar_values(self.dataset, key, self.schema, self.scalars.names) for key in keys]
        )
        present = {name: x if name in names else torch.zeros_like(x) for name, x in there.items()}
        features = {}
        for v in self.schema.volumes:
            arrays = channels_of(index, v.name)
            shape = [len(arrays), *(-(-size // n) for size in index.grid["shape"])]
            present[v.name] = torch.tensor(
                [v.name in names and all(self.dataset.has(k, a) for a in arrays) for k in keys]
            )
            found = []
            for key, used in zip(keys, present[v.name].tolist()):
                pooled = read_pooled(self.dataset, key, arrays, SPACING) if used else torch.zeros(shape)
                found.append(linear_features(pooled[None], sd)[0].half())
            features[v.name] = torch.stack(found)
        return features, values, present

    @torch.no_grad()
    def answer(self, keys: Sequence[str], given: Sequence[str], want: str) -> list[Row]:
        """The cells of one wanted scalar, one row for each record; without an answer where a given volume is missing.

        Raises:
            IntegrityError: a damaged volume, with its record.
        """
        features, values, present = self._read(keys, given)
        law = self.member.law(want, self.member.scores(features), values, present)
        truth = [true_value(self.dataset, key, self.schema[want]) for key in keys]
        variable = self.scalars[want]
        volumes = [v.name for v in self.schema.volumes if v.name in given]
        rows = law_cells(variable, law, truth)  # type: ignore[arg-type]
        whole = [all(bool(present[name][i]) for name in volumes) for i in range(len(keys))]
        return [row if complete else dict.fromkeys(row) for row, complete in zip(rows, whole)]
