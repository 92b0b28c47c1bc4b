"""A packed dataset of ellipsoids: volumes small and simple enough to train on within seconds."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.index import Split
from shards.schema import Schema
from shards.writer import DatasetWriter

SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T2w"},
        "other": {"kind": "volume", "suffix": "FLAIR"},
        "size": {"kind": "continuous", "range": [0, 1]},
    }
)


def ellipsoid(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[NDArray[np.float16], float]:
    """A bright shell around a darker core, off centre; float16 in [0, 1], and its relative size."""
    size = rng.uniform(0.5, 0.9)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radii = size * rng.uniform(0.8, 1.0, 3)
    centre = rng.uniform(-0.1, 0.1, 3)
    distance = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True)))
    edge = np.clip((1 - distance) * 8, 0, 1)
    core = np.clip((0.6 - distance) * 8, 0, 1)
    return (edge * 0.9 - core * 0.5).astype(np.float16), float(size)


def pack_ellipsoids(
    folder: Path, train: int = 6, validation: int = 2, test: int = 1, shape: tuple[int, int, int] = (16, 16, 16)
) -> Path:
    """Pack records with a ``scan`` each, every third with an ``other`` too, and one with neither."""
    writer = DatasetWriter(
        folder,
        "zarr",
        "volumes",
        SCHEMA,
        {v.name: {"shape": shape, "dtype": "float16"} for v in SCHEMA.volumes},
        {"spacing": 4.0, "shape": list(shape), "affine": np.diag([4.0, 4.0, 4.0, 1.0]).tolist()},
    )
    rng = np.random.default_rng(0)
    parts = ["train"] * train + ["validation"] * validation + ["test"] * test
    assignment = {}
    for i, part in enumerate([*parts, "train"]):
        key = f"sub-{i:02d}"
        scan, size = ellipsoid(rng, shape)
        arrays = {"scan": scan} | ({"other": ellipsoid(rng, shape)[0]} if i % 3 == 0 else {})
        writer.add(key, key, {"size": size}, arrays if i < len(parts) else {})
        assignment[key] = part
    writer.finish({"default": Split("fractions", 0, [0.8, 0.1, 0.1], [], "", assignment)})
    return folder
