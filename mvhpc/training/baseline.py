"""Training of a baseline: a network for a single query (paper, section 4.2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_map_only

from mvhpc.config import Compute, ConfigError, Optimizer, ResNetConfig, Tracking, Training, ViTConfig, choose
from mvhpc.diffusion.joint import Batch
from mvhpc.models.baseline import SMALLEST, TITLES, Baseline, scalars_of
from mvhpc.models.bundle import save_baseline
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import read_people, scalar_values, true_value, volume_shape
from mvhpc.runtime.randomness import generator, rand
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Task
from mvhpc.variables import Categorical, Continuous, Scalar, standard_intervals
from shards.dataset import open_dataset
from shards.errors import nearest
from shards.order import Order
from shards.schema import Schema

LARGER = 4  # size of the batches of `refresh`, in training batches; without gradients they need less memory
STANDARDIZED = 128  # people whose volumes give the mean and the SD of each voxel
BATCHES = 8  # number of batches of `refresh`
DEPTHS = (10, 18, 34, 50, 101, 152, 200)  # of MONAI's ResNets


@dataclass
class BaselineConfig:
    """`mvhpc train baseline`."""

    out: str
    name: str  # of the network: densenet | vit | braid
    data: str
    split: str
    want: str  # the one scalar it predicts
    given: list[str]  # volumes and scalars
    flip: float  # probability of mirroring left and right in training
    vit: ViTConfig
    braid: ResNetConfig
    learning_rates: dict[str, float]  # by network, where optimizer.lr is 0
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        choose(self.name, list(TITLES), "network")
        if self.braid.depth not in DEPTHS:
            raise ConfigError(f"braid.depth={self.braid.depth}: take one of {', '.join(map(str, DEPTHS))}")
        if self.vit.hidden % self.vit.heads:
            raise ConfigError(f"vit.hidden={self.vit.hidden} does not divide evenly among vit.heads={self.vit.heads}")

    @property
    def network(self) -> ViTConfig | ResNetConfig | None:
        """The settings of the network; None: DenseNet121 has none."""
        return self.vit if self.name == "vit" else self.braid if self.name == "braid" else None


class BaselineTask(Task):
    """One step of a baseline; see :class:`mvhpc.training.task.Task`.

    A sample is one person who has the wanted scalar and every given volume. The batch normalisation sees one
    micro-batch of all workers together; see :meth:`refresh`.

    Raises:
        ConfigError: a baseline cannot be trained for this query; the data are not volumes, lack this split, have
            several shapes or are too small; the training part is empty; or a batch has a single sample.
    """

    def __init__(self, config: BaselineConfig) -> None:
        self.config = config
        self.dataset = open_dataset(config.data)
        self.schema = self.dataset.index.schema
        choose(config.split, list(self.dataset.index.splits), f"split of {config.data}")
        check_query(self.schema, config)
        self.volumes = [name for name in config.given if self.schema[name].kind == "volume"]
        shape = volume_shape(self.dataset, self.volumes)
        check_shape(config, shape)
        if config.training.batch < 2 * config.training.accumulate:
            raise ConfigError(
                f"training.batch={config.training.batch} with training.accumulate={config.training.accumulate}: batch "
                "normalisation needs at least two samples at a time; raise the batch"
            )
        self.train, self.others = self._keys("train"), self._keys("validation")
        if not self.train:
            raise ConfigError(
                f"data={config.data}: no subject in the training part of split {config.split!r} has "
                f"{' and '.join([config.want, *self.volumes])}; set another split, want or given"
            )
        names = [*config.given, config.want]
        rows = [scalar_values(self.dataset, key, self.schema, names) for key in self.train]
        self.intervals = standard_intervals(self.schema, rows)
        self.scalars = scalars_of(self.schema, names, self.intervals)
        self.wanted = next(v for v in self.scalars.scalars if v.name == config.want)
        self.exported: Mapping[str, Sequence[str]] = {
            "baseline": ("loss", "mae" if isinstance(self.wanted, Continuous) else "accuracy")
        }
        self.samples, self.validation = len(self.train), len(self.others)
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        network = Baseline(self.scalars, config.given, config.want, config.network, shape)
        if network.standardizes and len(self.train) > 1:
            order = Order(self.samples, min(self.samples, STANDARDIZED), config.training.seed)
            network.standardize(self._read([self.train[i] for i in order.part(0, 0, 1)])[0])
        self.networks: dict[str, nn.Module] = {"baseline": network}
        self.learning_rates = {"baseline": config.optimizer.lr or config.learning_rates[config.name]}

    @classmethod
    def check(cls, config: BaselineConfig) -> None:
        """Raises ConfigError as the constructor does."""
        cls(config)

    def _keys(self, part: str) -> list[str]:
        wanted = self.schema[self.config.want]
        return [
            key
            for key in self.dataset.keys(part, self.config.split)
            if true_value(self.dataset, key, wanted) is not None
            and all(self.dataset.has(key, name) for name in self.volumes)
        ]

    def _read(self, keys: list[str]) -> tuple[Tensor, Batch, Batch]:
        return read_people(self.dataset, keys, self.schema, self.volumes, self.scalars)

    def load(self, indices: list[int]) -> dict[str, Any]:
        """``voxels`` (B, V, H, W, D) float16, and by scalar ``values`` and ``present``."""
        return dict(zip(("voxels", "values", "present"), self._read([self.train[i] for i in indices])))

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Predict for a batch, randomly mirrored, and take one optimiser step."""
        draws = [generator(self.config.training.seed, "train", step, i) for i in indices]
        x = batch["voxels"].float()
        mirror = rand(draws, (), x.device) < self.config.flip
        x = torch.where(mirror.view(-1, 1, 1, 1, 1), x.flip(2), x)  # axis 2 runs from left to right
        prediction = engines["baseline"](x, batch["values"], batch["present"])
        loss = losses(self.wanted, prediction, batch["values"][self.wanted.name]).mean()
        engines["baseline"].backward(loss)
        engines["baseline"].step()
        return {"loss": loss}

    def refresh(self, networks: dict[str, nn.Module], rank: int, world: int) -> None:
        """Recompute the batch normalisation's statistics, where there is any, from batches larger than training's.

        Running statistics are those of layers whose inputs were normalised by small batches. In evaluation they are
        not, and the error grows with every layer (Wu and Johnson 2021, "Rethinking Batch in BatchNorm", section 3).
        """
        network = networks["baseline"]
        assert isinstance(network, Baseline)
        training = self.config.training
        order = Order(self.samples, LARGER * training.batch // training.accumulate, training.seed)

        def batches() -> Iterator[Tensor]:
            for step in range(min(BATCHES, order.steps_per_epoch)):
                yield network.channels(*self._to(network, [self.train[i] for i in order.part(step, rank, world)]))

        update_bn(batches(), network.network)

    def _to(self, network: nn.Module, keys: list[str]) -> tuple[Tensor, Batch, Batch]:
        """The network's inputs for the subjects ``keys``, on its device."""
        device = next(network.parameters()).device
        voxels, values, present = tree_map_only(Tensor, lambda x: x.to(device), self._read(keys))
        return voxels.float(), values, present

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The loss, and the absolute error in the variable's unit or the accuracy of the most probable class."""
        network = networks["baseline"]
        voxels, values, present = self._to(network, [self.others[i] for i in indices])
        prediction, truth = network(voxels, values, present).float(), values[self.wanted.name]
        metrics = {"loss": losses(self.wanted, prediction, truth)}
        if isinstance(self.wanted, Continuous):
            return metrics | {"mae": (self.wanted.decode(prediction) - self.wanted.decode(truth)).abs()}
        return metrics | {"accuracy": (prediction.argmax(1) == truth).float()}

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the network with its query and its validation metrics."""
        people = [*self.train, *self.others]
        names = [*self.config.given, self.config.want]
        rows = [scalar_values(self.dataset, key, self.schema, names) for key in people]
        save_baseline(
            folder,
            states["baseline"],
            given=self.config.given,
            want=self.config.want,
            name=self.config.name,
            settings=self.config.network,
            schema=self.schema,
            intervals=self.intervals,
            grid=self.dataset.index.grid,
            training=TrainingPeople.of(self.dataset.index, people, self.schema, rows),
            extra={"validation": metrics},
        )


def check_shape(config: BaselineConfig, shape: Sequence[int]) -> None:
    """Check that a network takes volumes of ``shape``, (H, W, D).

    Raises:
        ConfigError: too few voxels for a DenseNet121, or an axis that a ViT's patches do not divide.
    """
    if config.name == "densenet" and min(shape) < SMALLEST:
        raise ConfigError(
            f"data={config.data}: volumes of {tuple(shape)} voxels are too small for a DenseNet121, which halves them "
            f"five times; pack at least {SMALLEST} voxels per axis"
        )
    if config.name == "vit" and any(size % config.vit.patch for size in shape):
        raise ConfigError(
            f"data={config.data}: volumes of {tuple(shape)} voxels are not divided evenly by vit.patch="
            f"{config.vit.patch}; take a patch that divides them"
        )


def check_query(schema: Schema, config: BaselineConfig) -> None:
    """Check that a baseline can be trained for a query.

    Raises:
        ConfigError: an unknown variable (naming the nearest), a wanted volume, a variable named twice, or no volume
            given.
    """
    names = [v.name for v in schema]
    for key, named in (("want", [config.want]), ("given", config.given)):
        for name in named:
            if name not in names:
                raise ConfigError(f"{key}: {nearest(name, names, 'variable')}")
    scalars = [v.name for v in schema.scalars]
    if config.want not in scalars:
        raise ConfigError(
            f"want={config.want} is a volume; a baseline predicts a number or a category: {', '.join(scalars)}"
        )
    if config.want in config.given:
        raise ConfigError(f"given: {config.want} is the wanted variable; remove it from given")
    if len(set(config.given)) < len(config.given):
        raise ConfigError(f"given=[{','.join(config.given)}]: name each variable once")
    if set(config.given) <= set(scalars):
        volumes = ", ".join(v.name for v in schema.volumes)
        raise ConfigError(f"given=[{','.join(config.given)}]: a baseline needs a volume; add one of {volumes}")


def losses(wanted: Scalar, prediction: Tensor, truth: Tensor) -> Tensor:
    """Squared error of an encoded number, cross-entropy of a category: (B,).

    Args:
        wanted: the variable.
        prediction: (B, 1), or logits (B, K).
        truth: (B, 1), or (B,) int64.
    """
    if isinstance(wanted, Categorical):
        return F.cross_entropy(prediction, truth, reduction="none")
    return (prediction - truth).square()[:, 0]
