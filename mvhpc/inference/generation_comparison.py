"""Who is compared with whom by the stage ``evaluate-generation``, and its configuration."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvhpc.config import ConfigError, Device, Sampling, Tracking, at_least, choose
from mvhpc.inference.drawn_volumes import DrawnTree, draw_for_records
from mvhpc.inference.sampler import Sampler
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_grid, subjects, true_value, volume_shape
from mvhpc.variables import Value
from shards.dataset import Dataset, open_dataset
from shards.schema import Variable

FEWEST = 20  # people; halves of fewer say nothing


@dataclass
class EvaluateGenerationConfig:
    """`mvhpc evaluate-generation`: drawn volumes beside real ones."""

    out: str
    data: str
    features: str
    features_sha256: str
    model: str
    drawn: str
    variable: str
    split: str
    split_name: str
    count: int  # of real people, and of drawn ones; 0: all of the part
    at: list[float]  # values of the first number, in the picture of one person
    slices: float  # share of each axis, about its middle; of 2D networks
    pixels: int  # side of the square that a slice is resampled to; 0: as it is
    resamples: int  # of the bootstrap of the FID
    batch: int  # volumes
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(0, {"count": self.count, "pixels": self.pixels})
        at_least(1, {"batch": self.batch})
        at_least(20, {"resamples": self.resamples})
        if not 0 < self.slices <= 1:
            raise ConfigError(f"slices={self.slices:g}: the share of slices lies above 0 and is at most 1")


@dataclass(frozen=True)
class Cohorts:
    """Who is compared with whom.

    Attributes:
        dataset: packed.
        volume: that is compared.
        keys: of the real people, a visit of each, in an order of chance.
        training: of the people from whom the model learnt.
        others: of all people outside of the part, for regressions on their voxels.
        values: scalars of the drawn people, in their order.
        drawn: their volumes.
        paired: whether drawn person i has the scalars of real person i.
        sampler: that draws; None where drawn people were given.
        warnings: for the user.
    """

    dataset: Dataset
    volume: Variable
    keys: list[str]
    training: list[str]
    others: list[str]
    values: list[dict[str, Value]]
    drawn: Iterable[NDArray[np.float32]]
    paired: bool
    sampler: Sampler | None
    warnings: list[str]

    @classmethod
    def of(cls, config: EvaluateGenerationConfig) -> "Cohorts":
        """Open data and model.

        Raises:
            ConfigError: neither model nor drawn people, an unknown volume, too few people, or another grid.
            ModelError: no joint model.
        """
        if not (config.model or config.drawn):
            raise ConfigError("give --model, a joint model that draws, or --drawn, a BIDS tree of drawn people")
        dataset = open_dataset(config.data)
        schema, shape = dataset.index.schema, volume_shape(dataset)
        names = [v.name for v in schema.volumes]
        volume = schema[choose(config.variable or names[0], names, "volume")]
        part = subjects(dataset, config.split, config.split_name)
        everybody = [key for key in dataset.keys("all") if dataset.has(key, volume.name)]
        having, inside = set(everybody), set(part)
        keys = [key for key in part if key in having]
        rng = np.random.default_rng(config.seed)
        visits = {dataset.record(keys[i]).subject: keys[i] for i in rng.permutation(len(keys))}
        keys = list(visits.values())[: config.count or None]
        rest = [key for key in everybody if key not in inside]
        if config.drawn:
            tree = DrawnTree.open(Path(config.drawn), schema, volume, shape)
            n = min(len(keys), len(tree.names))
            _enough(n, config)
            few = tree.take(rng.permutation(len(tree.names))[:n].tolist())
            seen = set(dataset.keys("train", config.split_name))
            training = [key for key in rest if key in seen]
            return cls(dataset, volume, keys[:n], training, rest, few.values, few, False, None, [])
        _enough(len(keys), config)
        sampler = Sampler.of(config)
        check_grid(sampler.model.grid, dataset)
        learnt = TrainingPeople.read(sampler.model.meta).learnt(dataset.index)
        met = [key for key in keys if key in learnt]
        warnings = (
            [f"the model learnt from {len(met)} of the {len(keys)} real people: name another split"] if met else []
        )
        values = [{v.name: true_value(dataset, key, v) for v in schema.scalars} for key in keys]
        drawn = draw_for_records(sampler, dataset, keys, volume.name, config.seed, config.batch)
        training = [key for key in rest if key in learnt]
        return cls(dataset, volume, keys, training, rest, values, drawn, True, sampler, warnings)

    def read(self, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Packed volumes (H, W, D) in [0, 1]."""
        return (self.dataset.read(key, self.volume.name).astype(np.float32) for key in keys)

    def recorded(self, keys: Sequence[str], variable: Variable) -> list[Value]:
        """The recorded values of a scalar."""
        return [true_value(self.dataset, key, variable) for key in keys]


def _enough(people: int, config: EvaluateGenerationConfig) -> None:
    if people < FEWEST:
        raise ConfigError(
            f"{people} people to compare with (split={config.split}, count={config.count}): at least {FEWEST} are "
            "needed; take a larger part, such as split=all for a model that did not learn from these data"
        )
