"""Stage ``encode``: posterior means of all volumes, as a packed data set of latents."""

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvhpc.config import ConfigError, Device, Tracking, at_least, fingerprint
from mvhpc.inference.sampler import set_threads
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, load
from mvhpc.models.training_people import scans_of
from mvhpc.records import check_grid, volume_shape
from mvhpc.runtime.devices import resolve_device, resolve_precision
from shards.dataset import Dataset, open_dataset
from shards.order import prefetch
from shards.progress import progress
from shards.writer import DatasetWriter

if TYPE_CHECKING:
    from mvhpc.runs.folder import Run

LARGEST = float(np.finfo(np.float16).max)
PACKAGES = ("torch", "monai", "numpy", "zarr", "mvhpc")


@dataclass
class EncodeConfig:
    """`mvhpc encode`: posterior means of all volumes -> a store of latents."""

    out: str
    data: str
    vae: str
    split: str  # which split's training side the latent scale is measured on
    flip: bool  # also store the latents of mirrored volumes of the training and validation parts
    batch: int
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"batch": self.batch})


class Item(NamedTuple):
    """A volume to encode.

    Attributes:
        key: of the record.
        variable: name of the volume.
        mirror: whether left and right are exchanged.
    """

    key: str
    variable: str
    mirror: bool

    @property
    def name(self) -> str:
        """Under which name its latent is stored."""
        return f"{self.variable}_mirrored" if self.mirror else self.variable


class Moments:
    """Mean and variance of a stream of arrays, in float64, merged block by block (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Add every element of ``values``."""
        values = values.astype(np.float64)
        n, mean = values.size, float(values.mean())
        difference, total = mean - self.mean, self.count + n
        self.squares += float(np.square(values - mean).sum()) + difference**2 * self.count * n / total
        self.mean += difference * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of all elements; NaN without elements."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


def to_float16(latents: Tensor) -> NDArray[np.float16]:
    """Latents in the type that they are stored in.

    Raises:
        OverflowError: a value outside the range of float16, or NaN.
    """
    largest = float(latents.abs().max())
    if not largest <= LARGEST:  # NaN too
        raise OverflowError(
            f"a latent of {largest:g} is outside the range of float16 (at most {LARGEST:g}); the autoencoder has "
            "diverged, or needs a larger loss.kl"
        )
    return latents.cpu().numpy().astype(np.float16)


def encode(
    autoencoder: Autoencoder, dataset: Dataset, items: list[Item], batch: int, precision: torch.dtype
) -> Iterator[NDArray[np.float16]]:
    """The posterior means (C, h, w, d) of ``items``, in their order.

    Args:
        autoencoder: on the device to use.
        dataset: packed volumes.
        items: which of them.
        batch: volumes at a time; changes results by rounding alone.
        precision: of the network.

    Raises:
        OverflowError: a value outside the range of float16, or NaN.
        LookupError, IntegrityError: a volume that cannot be read.
    """
    device = next(autoencoder.parameters()).device
    batches = [items[i : i + batch] for i in range(0, len(items), batch)]

    def read(number: int) -> Tensor:
        volumes = (dataset.read(item.key, item.variable) for item in batches[number])
        flipped = (v[::-1] if item.mirror else v for v, item in zip(volumes, batches[number], strict=True))
        return torch.from_numpy(np.stack(list(flipped))[:, None])  # (B, 1, H, W, D) float16

    for volumes in prefetch(read, range(len(batches))):
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            means = autoencoder.encode(volumes.to(device).float())[0].float()  # (B, C, h, w, d)
        yield from to_float16(means)


def _items(dataset: Dataset, key: str, mirrored: bool) -> list[Item]:
    """The volumes of a record, and with ``mirrored`` their mirror images."""
    names = [v.name for v in dataset.index.schema.volumes if dataset.has(key, v.name)]
    return [Item(key, name, mirror) for name in names for mirror in (False, True)[: 1 + mirrored]]


def run(config: EncodeConfig, run: "Run") -> dict[str, float]:
    """Stage ``encode``: latents of the volumes of every part, with their scale over the training part.

    The dataset of latents keeps the records, scalars, splits and schema of the volumes. With ``flip`` the training and
    validation parts also hold ``NAME_mirrored``, the latents of the volumes mirrored left to right. Its ``extra`` holds
    ``scale`` (1 / SD of the training part's latents, for each volume variable), ``training`` (fingerprint of that
    part's keys) and ``vae`` (the weights' SHA-256).

    Returns:
        the number of volumes and of mirrored ones, the elements of one latent, and the scale of each variable.

    Raises:
        ConfigError: data that are no volumes or on another grid than the autoencoder was trained on, or a volume
            variable that the training part lacks.
        ModelError: no autoencoder at ``vae``, or a damaged one.
        OverflowError: a latent outside the range of float16.
    """
    set_threads(config.compute)
    dataset = open_dataset(config.data)
    index = dataset.index
    shape = volume_shape(dataset)
    device = resolve_device(config.compute.device)
    autoencoder, meta = load(config.vae, device, kind=AutoencoderModel)
    if "grid" in meta["extra"]:
        check_grid(meta["extra"]["grid"], dataset)
    if config.compute.compile:
        autoencoder.network.encoder.compile()
    latent_shape = autoencoder.latent_shape(shape)
    training = set(dataset.keys("train", config.split))
    mirrored = training | set(dataset.keys("validation", config.split))  # both are used by the joint model
    plan = {key: _items(dataset, key, config.flip and key in mirrored) for key in dataset.keys(None)}
    stored = sorted({item.name for items in plan.values() for item in items})
    writer = DatasetWriter(
        config.out,
        "zarr",
        "latents",
        index.schema,
        {name: {"shape": latent_shape, "dtype": "float16"} for name in stored},
        index.grid,
        index.group,
    )
    moments = {v.name: Moments() for v in index.schema.volumes}
    precision = resolve_precision(config.compute.precision, device)
    stream = encode(autoencoder, dataset, list(chain(*plan.values())), config.batch, precision)
    for record in progress(index.records, "encode", unit="record"):
        arrays = {}
        for item, array in zip(plan[record.key], stream):  # takes as many from the stream as the record has
            arrays[item.name] = array
            if record.key in training and not item.mirror:
                moments[item.variable].add(array)
        places = {name: record.affines[name] for name in record.affines if name in arrays}
        writer.add(record.key, record.subject, record.values, arrays, record.group, affines=places)
    scale = {}
    for name, moment in moments.items():
        if not moment.std > 0:  # NaN too
            raise ConfigError(
                f"data={config.data}: the training part of split {config.split} has no {name} from which to measure "
                f"the scale of the latents, or all latents are equal"
            )
        scale[name] = 1 / moment.std
    provenance = {
        "software": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "arguments": {"flip": config.flip, "split": config.split, "precision": config.compute.precision},
        "source_sha256": index.digest,
        "scans": {record.key: scans_of(index, record) for record in index.records},
    }
    writer.finish(
        index.splits,
        provenance,
        {"scale": scale, "vae": meta["sha256"], "training": fingerprint(sorted(training))},
    )
    elements = float(np.prod(latent_shape))
    flipped = float(sum(item.mirror for items in plan.values() for item in items))
    counts = {"volumes": float(sum(map(len, plan.values()))) - flipped, "mirrored_volumes": flipped}
    return counts | {"elements": elements} | {f"scale_{name}": value for name, value in scale.items()}
