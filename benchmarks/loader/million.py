"""Time from an index of a million samples to the first batch, and to the batch after a resumption.

    python -m benchmarks.loader.million [--samples 1000000] [--repeats 7] [--scratch DIR]

The index is that of so many samples; each is one of 64 volumes (80 x 104 x 80, random) that are really stored, so that
batches of eight are read and checked. Each figure is of a process of its own, after its imports: wall time, CPU time
and private memory that opening, the order and one batch take. The resumption is at a random step of the third epoch;
its batch has the samples that an uninterrupted run has there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from benchmarks.loader.ways import write_dataset
from shards.dataset import open_dataset
from shards.index import Index, Record, Split
from shards.order import Order

STORED = 64
BATCH = 8
SEED = 1


class Copies(Sequence[Record]):
    """``n`` records, each with the volume of one of the ``stored`` records."""

    def __init__(self, stored: Sequence[Record], n: int) -> None:
        self.stored, self.n = list(stored), n

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...

    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self.n))]
        if not 0 <= row < self.n:
            raise IndexError(row)
        key = name(row)
        return replace(self.stored[row % len(self.stored)], key=key, subject=key, group=key)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(self.n))


def name(row: int) -> str:
    return f"sub-{row:07d}"


def write(folder: Path, samples: int) -> None:
    """A data set of the stored volumes whose index is of ``samples`` records, all of them for training."""
    shape = (STORED, 80, 104, 80)
    write_dataset(folder, "webdataset", np.random.default_rng(0).random(shape, np.float32).astype(np.float16))
    index = open_dataset(folder).index
    copies = Copies(index.records, samples)
    split = Split("column", 0, [], [], "", {name(row): "train" for row in range(samples)})
    plain = {field: getattr(index, field) for field in ("kind", "storage", "schema", "arrays", "grid", "per_shard")}
    Index(**plain, records=copies, files=dict(index.files), splits={"default": split}).save(folder)


def first_batch(folder: Path, step: int) -> dict[str, Any]:
    """What one process needs for the batch of a step."""
    import torch  # noqa: F401 - imported before the clock starts

    from shards.torch import Batches

    memory, wall, cpu = anonymous_memory(), time.perf_counter(), time.process_time()
    batches = Batches(folder, batch=BATCH, seed=SEED)
    batches.load_state_dict({"step": step})
    batch = next(iter(batches))
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "memory": anonymous_memory() - memory,
        "keys": batch["key"],
    }


def anonymous_memory() -> float:
    """MiB that this process shares with no other and with no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.loader.million", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="folder for what is written; a temporary one by default")
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(first_batch(Path(options.read[0]), int(options.read[1]))))
        return
    steps = -(-options.samples // BATCH)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in the workers of a DataLoader
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "packed"
        write(folder, options.samples)
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) / 2**20
        print(f"{options.samples:,} samples, index of {size:.0f} MiB; batches of {BATCH}")
        print("| | wall, s | CPU, s | private memory, MiB |\n|---|---:|---:|---:|")
        for what, step in (
            ("first batch", 0),
            ("resumption", int(np.random.default_rng(0).integers(2 * steps, 3 * steps))),
        ):
            found = []
            for _ in range(options.repeats):
                command = [sys.executable, "-m", "benchmarks.loader.million", "--read", str(folder), str(step)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found.append(json.loads(done.stdout))
            expected = [name(row) for row in Order(options.samples, BATCH, SEED).indices(step)]
            assert all(f["keys"] == expected for f in found)
            cells = []
            for key in ("wall", "cpu", "memory"):
                values = [f[key] for f in found]
                cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
