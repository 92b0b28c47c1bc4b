"""CPU time of reading volumes and random crops of packed data, directly and from a cache on a local disk."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.storage.formats import SHAPES, cpu_ms, markdown, scans, volume
from shards.cache import Cache
from shards.dataset import Dataset, open_dataset
from shards.quantization import quantize, stored_as
from shards.schema import Schema
from shards.shard_writer import STORAGES
from shards.writer import DatasetWriter

SCHEMA = Schema.from_dict({"image": {"kind": "volume", "suffix": "T1w"}})
ROUNDS = 15
EDGES = (32, 64)  # of crops, voxels


def write(out: Path, storage: str, dtype: str, volumes: list[NDArray[np.float32]]) -> Dataset:
    """A data set of these volumes."""
    arrays = {"image": {"shape": volumes[0].shape, **stored_as(dtype)}}
    writer = DatasetWriter(out, storage, "volumes", SCHEMA, arrays, {"spacing": 1.0})
    for i, x in enumerate(volumes):
        writer.add(f"sub-{i}", f"sub-{i}", {}, {"image": quantize(x, dtype)})
    writer.finish()
    return open_dataset(out)


def crop(dataset: Dataset, key: str, rng: np.random.Generator, edge: int) -> None:
    """Read a random cube."""
    shape = dataset.index.arrays["image"]["shape"]
    dataset.read_box(key, "image", [int(rng.integers(0, n - edge + 1)) for n in shape], [edge] * 3)


def stacked(dataset: Dataset, keys: list[str]) -> None:
    """Read a batch as separate volumes."""
    np.stack([dataset.read(key, "image") for key in keys])


def in_place(dataset: Dataset, keys: list[str]) -> None:
    """Read a batch into its array."""
    batch = np.empty((len(keys), *dataset.index.arrays["image"]["shape"]), np.float16)
    for part, key in zip(batch, keys):
        dataset.read(key, "image", out=part)


def table(source: Path, spacing: float, count: int) -> str:
    """Milliseconds per volume or crop, medians, as Markdown."""
    found = scans(source)
    volumes = [volume(path, spacing, source) for path in found[:: max(1, len(found) // count)][:count]]
    ways: dict[str, Callable[[Dataset, str, np.random.Generator], Any]] = {
        "volume": lambda data, key, rng: data.read(key, "image"),
        "as stored": lambda data, key, rng: data.read_stored(key, "image"),
        **{f"crop of {edge}": partial(crop, edge=edge) for edge in EDGES},
    }
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for storage in STORAGES:
            for dtype in ("float16", "uint8"):
                out = Path(root) / f"{storage}-{dtype}"
                data = write(out, storage, dtype, volumes)
                cached = open_dataset(out, Cache(Path(root) / "cache", 10**11))
                keys, rng = list(data.keys()), np.random.default_rng(0)
                for key in keys:
                    cached.read(key, "image")
                cells = [
                    median(cpu_ms(way, source, key, rng)[0] for _ in range(ROUNDS) for key in keys)
                    for way, source in [*((way, data) for way in ways.values()), (ways["volume"], cached)]
                ]
                for way in (stacked, in_place):
                    cells.append(median(cpu_ms(way, data, keys)[0] / len(keys) for _ in range(ROUNDS)))
                rows.append([storage, dtype, *(f"{ms:.2f}" for ms in cells)])
    head = ["format", "stored as", *(f"{way}, ms" for way in ways), "volume from the cache, ms"]
    head += ["volume of a batch, stacked, ms", "in place, ms"]
    return f"{' x '.join(map(str, SHAPES[spacing]))} voxels of {spacing:g} mm\n\n{markdown(head, rows)}\n"
