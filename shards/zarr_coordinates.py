"""What makes the store of a packed data set readable by name: dimensions, coordinates and scalar variables.

``xarray.open_zarr(FOLDER / "data.zarr")`` has the volumes with the dimensions ``key``, ``x``, ``y``, ``z`` (of latents
also ``channel``), keys as the labels of the first one, mm in RAS of the others, and each scalar variable by key, but
those with the name of a dimension.
Nothing here is read by this package.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from shards.records import Record
from shards.schema import Schema
from shards.zarr_store import FOLDER, METADATA, metadata

LEVEL = 3  # Zstandard's default
AXES = {3: ("x", "y", "z"), 4: ("channel", "x", "y", "z")}


def store_files(
    arrays: Mapping[str, Mapping[str, Any]],
    grid: Mapping[str, Any],
    schema: Schema,
    records: Iterable[Record],
    places: int,
    per_shard: int,
) -> dict[str, bytes]:
    """All files of a store but its shards: path relative to the data set's folder -> content.

    Args:
        arrays, grid, schema: see :class:`shards.index.Index`.
        records: of the data set.
        places: up to the last record.
        per_shard: places per shard.
    """
    records = list(records)
    slots = np.array([record.slot for record in records], np.int64)
    dimensions = dimension_names(arrays)
    files = metadata(arrays, places, per_shard)
    for variable, names in dimensions.items():
        path = f"{FOLDER}/{variable}/{METADATA}"
        files[path] = _json({**json.loads(files[path]), "dimension_names": names})
    first = _free("key", arrays)
    labels = {first: (first, _column([record.key for record in records], slots, places, ""), "")}
    labels |= {name: (name, positions, "mm") for name, positions in _positions(arrays, dimensions, grid).items()}
    for scalar in schema.scalars:
        if scalar.name not in labels:
            missing = "" if scalar.kind == "categorical" else np.nan
            known = [record.values.get(scalar.name) for record in records]
            column = _column([missing if v is None else v for v in known], slots, places, missing)
            labels[scalar.name] = (first, column, scalar.unit)
    for name, (dimension, values, unit) in labels.items():
        files |= _array(name, dimension, values, unit)
    group = f"{FOLDER}/{METADATA}"
    members = {
        path.split("/")[1]: json.loads(files[path]) for path in files if path.endswith(METADATA) and path != group
    }
    consolidated = {"kind": "inline", "must_understand": False, "metadata": members}  # zarr-python's: one file to open
    files[group] = _json({**json.loads(files[group]), "consolidated_metadata": consolidated})
    return files


def dimension_names(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Variable -> names of its dimensions; equal names have equal sizes, and no array has the name of a dimension."""
    sizes: dict[str, int] = {}
    found = {}
    for variable, spec in arrays.items():
        found[variable] = [_free("key", arrays)]
        axes = AXES.get(len(spec["shape"])) or [f"axis_{i}" for i in range(len(spec["shape"]))]
        for axis, size in zip(axes, spec["shape"]):
            name = _free(axis, arrays)
            if sizes.setdefault(name, size) != size:
                name = f"{variable}_{axis}"
            found[variable].append(name)
    return found


def _free(name: str, arrays: Mapping[str, Any]) -> str:
    return f"{name}_axis" if name in arrays else name


def _positions(
    arrays: Mapping[str, Mapping[str, Any]], dimensions: Mapping[str, Sequence[str]], grid: Mapping[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """Dimension -> mm of its voxels, of arrays on the grid."""
    found = {}
    for variable, spec in arrays.items():
        if list(spec["shape"]) == list(grid.get("shape", ())):
            affine = np.asarray(grid["affine"], float)
            for axis, name in enumerate(dimensions[variable][1:]):
                found[name] = affine[axis, axis] * np.arange(spec["shape"][axis]) + affine[axis, 3]
    return found


def _column(values: Sequence[Any], slots: NDArray[np.int64], places: int, missing: Any) -> NDArray[Any]:
    """(places,) the value of each record in its place."""
    column = np.full(places, missing, object if isinstance(missing, str) else np.float64)
    column[slots] = values
    return column


def _array(name: str, dimension: str, values: NDArray[Any], unit: str) -> dict[str, bytes]:
    """The files of a one-dimensional array of one chunk."""
    text = values.dtype == object
    raw = VLenUTF8().encode(values) if text else values.astype("<f8").tobytes()
    codec = {"name": "vlen-utf8"} if text else {"name": "bytes", "configuration": {"endian": "little"}}
    content = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [len(values)],
        "data_type": "string" if text else "float64",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, len(values))]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "" if text else "NaN",
        "codecs": [codec, {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}],
        "attributes": {"units": unit} if unit else {},
        "dimension_names": [dimension],
    }
    return {f"{FOLDER}/{name}/{METADATA}": _json(content), f"{FOLDER}/{name}/c/0": bytes(Zstd(LEVEL).encode(raw))}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
