"""Small packed data sets of both formats, of the present version and of version 1."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from shards.dataset import open_dataset
from shards.files import sha256
from shards.index import Index, Split
from shards.index_copy import COPY
from shards.schema import Schema
from shards.writer import DatasetWriter

SHAPE = (6, 7, 8)
SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T1w"},
        "mask": {"kind": "volume", "suffix": "mask"},
        "weight": {"kind": "continuous", "range": [0, 300], "unit": "kg"},
        "hand": {"kind": "categorical", "classes": ["L", "R"], "aliases": {"left": "L"}},
    }
)
ARRAYS = {name: {"shape": SHAPE, "dtype": "float16"} for name in ("scan", "mask")}
STORAGES = ("webdataset", "zarr")
PARTS = ("train", "validation", "test")


def stored(folder: Path, storage: str) -> Path:
    """Eight records, of which the last has no part; four have a mask, one of them of zeros."""
    writer, rng = DatasetWriter(folder, storage, "volumes", SCHEMA, ARRAYS, {"spacing": 2.0}), np.random.default_rng(0)
    for i in range(8):
        arrays = {"scan": rng.random(SHAPE).astype(np.float16)}
        if i < 4:
            arrays["mask"] = (rng.random(SHAPE) * (i != 2)).astype(np.float16)
        figures = {"scan.size": i / 3, **({"mask.size": 1.0} if i < 2 else {})}
        values = {"weight": 50 + i, "hand": "L" if i % 2 else None}
        where = {"scan": np.eye(4) * (i + 0.1)}
        writer.add(f"sub-{i}", f"sub-{i // 2}", values, arrays, "", figures, ["scan.size"] * (i == 3), where)
    assignment = {f"sub-{i}": PARTS[i % 3] for i in range(7)}
    writer.finish({"default": Split("fractions", 0, [0.5, 0.2, 0.3], [], "", assignment)}, {"rows": 8}, {"x": [1]})
    return folder


def as_version_1(folder: Path) -> Path:
    """Write a data set as version 1 of the format did: one JSON file, Zarr arrays by zarr-python."""
    dataset = open_dataset(folder)
    index = dataset.index
    records = [dataclasses.asdict(r) for r in index.records]
    for record in records:
        slot = record.pop("slot")
        del record["crcs"], record["sizes"]
        if index.storage == "zarr":
            record["offsets"] = dict.fromkeys(record["checksums"], slot)
    if index.storage == "zarr":
        arrays = {v: np.zeros((len(records), *SHAPE), np.float16) for v in ARRAYS}
        for i, record in enumerate(index.records):
            for v in record.checksums:
                arrays[v][i] = dataset.read(record.key, v)
        shutil.rmtree(folder / "data.zarr")
        group = zarr.open_group(folder / "data.zarr", mode="w", zarr_format=3)
        for name, array in arrays.items():
            group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=(1, *SHAPE),
                shards=(index.per_shard, *SHAPE),
                compressors=ZstdCodec(level=3, checksum=True),
                fill_value=0,
            )[:] = array
    for path in [*folder.glob("*.arrow"), *folder.glob("files-*.json"), folder / "index.json", folder / COPY]:
        path.unlink()
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    content = {
        "version": 1,
        "kind": index.kind,
        "storage": index.storage,
        "schema": index.schema.to_dict(),
        "arrays": index.arrays,
        "grid": index.grid,
        "records": records,
        "group": index.group,
        "files": {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in found},
        "splits": {n: {**vars(s), "assignment": dict(s.assignment.items())} for n, s in index.splits.items()},
        "provenance": index.provenance,
        "extra": index.extra,
    }
    checksum = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**content, "checksum": checksum}, indent=1) + "\n")
    return folder


def facts(folder: Path) -> dict[str, object]:
    """All that a data set says, whatever its version."""
    dataset = open_dataset(folder)
    index: Index = dataset.index
    names = ("key", "subject", "group", "values", "checksums", "figures", "flags", "affines")
    return {
        "records": [[getattr(r, name) for name in names] for r in index.records],
        "arrays": [[dataset.read(r.key, v).tobytes() for v in r.checksums] for r in index.records],
        "index": [index.digest, index.kind, index.storage, index.schema, index.arrays, index.grid, index.group],
        "more": [index.provenance, index.extra, dict(index.files)],
        "splits": {name: {**vars(s), "assignment": dict(s.assignment)} for name, s in index.splits.items()},
        "parts": [list(dataset.keys(part)) for part in (None, *PARTS)],
    }
