"""Flip single bits all over a packed data set, and see whether `shards verify` names them and a reader notices.

    python -m benchmarks.faults.bits [--flips 1000] [--seed 0]

For each format a small data set of several shards is written. Each trial flips one bit of one file; all files have
equally many trials, at bytes drawn evenly. Then:

* verify has to name that file and, where the bit lies in a stored volume, its record and variable;
* a reader opens the data set anew and reads everything: records, splits and volumes. Whatever it is given has to be
  what was written; an error that names the damage is right too.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from shards import shard_writer
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.index import Index, Record
from shards.schema import Schema
from shards.split import draw_fractions
from shards.verify import verify
from shards.writer import DatasetWriter
from shards.zarr_store import shard_path

SHAPE = (20, 24, 20)
RECORDS, PER_SHARD = 36, 8
ARRAYS = {"image": {"shape": SHAPE, "dtype": "<f2"}, "image_GM": {"shape": SHAPE, "dtype": "|u1"}}


def write(folder: Path, storage: str) -> None:
    """Smooth blobs in empty boxes; one record lacks its second volume."""
    rng = np.random.default_rng(0)
    shard_writer.SHARD_RECORDS = PER_SHARD
    writer = DatasetWriter(folder, storage, "volumes", Schema.load(), ARRAYS, {"spacing": 8.0, "shape": list(SHAPE)})
    for i in range(RECORDS):
        blob = np.clip(ndimage.gaussian_filter(rng.normal(size=SHAPE), 3) * 20, 0, 1)
        arrays = {"image": blob.astype("<f2"), "image_GM": (255 * blob).astype("|u1")}
        if i == 5:
            del arrays["image_GM"]
        figures, affines = {"image.snr": float(rng.random())}, {"image": np.eye(4)}
        values = {"age": float(20 + i), "sex": "FM"[i % 2] if i % 7 else None}
        writer.add(f"sub-{i:03d}", f"sub-{i:03d}", values, arrays, figures=figures, affines=affines)
    splits = {"default": draw_fractions(writer.records, (0.7, 0.1, 0.2), 0)}
    writer.finish(splits, {"arguments": {}}, files={"rejected.tsv": b"line\tkey\treason\n"})


def everything(dataset: Dataset) -> Iterator[tuple[str, Any]]:
    """Name and a function of all that a data set gives."""
    yield "records", lambda: list(dataset.index.records)
    yield "splits", lambda: dict(dataset.index.split().assignment)
    yield "header", lambda: [dataset.index.schema, dataset.index.grid, dataset.index.arrays, dataset.index.digest]
    yield "keys", lambda: list(dataset.keys())
    for i in range(RECORDS):
        key = f"sub-{i:03d}"
        yield f"values {key}", lambda key=key: dataset.values(key)
        for variable in ARRAYS:
            yield f"{key} {variable}", lambda key=key, v=variable: read(dataset, key, v)


def read(dataset: Dataset, key: str, variable: str) -> Any:
    return dataset.read(key, variable).tobytes() if dataset.has(key, variable) else None


def damaged_volume(index: Index, file: str, byte: int) -> tuple[str, str]:
    """The record and variable that a byte of a file belongs to; ('', '') for none."""

    def holds(record: Record, variable: str) -> bool:
        path = record.shard or shard_path(variable, record.slot // PER_SHARD, len(SHAPE))
        start = record.offsets[variable]
        return path == file and start <= byte < start + record.sizes[variable]

    found = [(r.key, v) for r in index.records for v in r.checksums if holds(r, v)]
    return found[0] if found else ("", "")


def trial(folder: Path, index: Index, file: str, byte: int, bit: int, known: dict[str, Any]) -> Counter[str]:
    """Flip a bit, count what verify and a reader notice, and flip it back."""
    path, counts = folder / file, Counter({"flips": 1})
    raw = path.read_bytes()
    key, variable = damaged_volume(index, file, byte)
    path.write_bytes(raw[:byte] + bytes([raw[byte] ^ 1 << bit]) + raw[byte + 1 :])
    try:
        found = list(verify(folder, workers=2))
        counts["found"] += bool(found)
        counts["file named"] += bool(found) and {damage.file for damage in found} == {file}
        if key:
            counts["in a volume"] += 1
            counts["volume named"] += [(d.key, d.variable) for d in found] == [(key, variable)]
        outcomes = Counter(_outcomes(folder, known))
        counts["refused by the reader"] += outcomes["refused"] > 0
        counts["read wrong"] += outcomes["wrong"]
    finally:
        path.write_bytes(raw)
    return counts


def _outcomes(folder: Path, known: dict[str, Any]) -> Iterator[str]:
    try:
        dataset = open_dataset(folder)
    except DataError:
        yield "refused"
        return
    for name, function in everything(dataset):
        try:
            yield "right" if function() == known[name] else "wrong"
        except DataError:
            yield "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000, metavar="N", help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = ("flips", "found", "file named", "in a volume", "volume named", "refused by the reader", "read wrong")
    print(f"| format | files | {' | '.join(names)} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for storage in ("webdataset", "zarr"):
        with tempfile.TemporaryDirectory() as place:
            folder, rng = Path(place) / storage, np.random.default_rng(options.seed)
            write(folder, storage)
            known = {name: function() for name, function in everything(open_dataset(folder))}
            index = Index.load(folder)
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            counts: Counter[str] = Counter()
            for i in range(options.flips):
                file = files[i % len(files)]
                byte = int(rng.integers((folder / file).stat().st_size))
                counts += trial(folder, index, file, byte, int(rng.integers(8)), known)
            assert not list(verify(folder))
        print(f"| {storage} | {len(files)} | {' | '.join(str(counts[name]) for name in names)} |", flush=True)


if __name__ == "__main__":
    main()
