"""A data set of a million records: opening, finding, order; and the speed of `shards verify`.

    python -m benchmarks.scale [--records 1000000] [--gib 2] [--root /tmp/scale]

The records are written without their volumes. Each process is new: what it measures is what a further process of a
node pays while another one has the data set open. Private memory is what the process does not share (USS), beyond that
of the imported modules; the files are in the page cache.

`verify` is measured on volumes of noise, interleaved with plain passes over the same files by as many threads: reading
alone, and reading with SHA-256. The files are dropped from the page cache before each pass that reads from the disc.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from shards.cpus import available_cores
from shards.dataset import open_dataset
from shards.index import Index, Record, Split
from shards.schema import Schema
from shards.verify import verify
from shards.writer import DatasetWriter

PER_SHARD = 64
REPEATS = 5
SHAPE = (160, 192, 160)
FIGURES = ("snr", "volume", "width", "box", "header_degrees", "header_sizes")
MEASURE = """
import json, sys, time
import psutil
from shards.dataset import open_dataset
from shards.order import Order

def seconds(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start

process = psutil.Process()
before = process.memory_full_info().uss
found = {}
dataset, found["open, s"] = seconds(lambda: open_dataset(sys.argv[1]))
found["private memory after opening, MB"] = (process.memory_full_info().uss - before) / 1e6
keys, found["keys of the training part, ms"] = seconds(lambda: dataset.keys("train"))
n = len(keys)
(order, batch), found["first batch of Order, ms"] = seconds(lambda: (o := Order(n, 256, 0), o.indices(0)))
_, found["resumption at step 10,000,000, ms"] = seconds(lambda: Order(n, 256, 0).indices(10_000_000))
wanted, found["its 256 keys, ms"] = seconds(lambda: [keys[i] for i in batch])
_, found["first record by key, ms"] = seconds(lambda: dataset.record(wanted[0]))
_, found["256 records by key, ms each"] = seconds(lambda: [dataset.record(key) for key in wanted])
found["private memory after these, MB"] = (process.memory_full_info().uss - before) / 1e6
_, found["all keys of the part, s"] = seconds(lambda: list(keys))
found = {name: value * 1000 if ", ms" in name else value for name, value in found.items()}
found["256 records by key, ms each"] /= 256
print(json.dumps(found))
"""


def records(count: int) -> Iterator[Record]:
    """Records like those of a packing, one in ten a second session."""
    rng = np.random.default_rng(0)
    figures = rng.random((count, len(FIGURES)))
    for i in range(count):
        subject = f"sub-{i - i % 10 // 9:07d}"
        checksum = hashlib.sha256(i.to_bytes(8)).hexdigest()
        yield Record(
            key=f"{subject}_ses-{i % 10 // 9 + 1}",
            subject=subject,
            group=subject,
            values={"age": 20.0 + i % 700 / 10, "sex": "FM"[i % 2]},
            checksums={"image": checksum},
            shard="",
            offsets={"image": i % PER_SHARD * 2_000_000},
            figures=dict(zip((f"image.{name}" for name in FIGURES), figures[i].tolist())),
            affines={"image": [[2.0, 0, 0, -80], [0, 2, 0, -96], [0, 0, 2, -80], [0, 0, 0, 1]]},
            crcs={"image": i},
            sizes={"image": 1_999_996},
            slot=i,
        )


def write_index(folder: Path, count: int) -> None:
    """The index of a data set whose shards are not there."""
    folder.mkdir(parents=True)
    own = list(records(count))
    splits = {}
    for number in range(6):  # the default one and five folds
        parts = np.array(["train", "train", "train", "validation", "test"])[(np.arange(count) + number) % 5]
        assignment = dict(zip((r.key for r in own), parts.tolist()))
        splits[f"fold-{number}-of-5" if number else "default"] = Split("folds", 0, [], [number, 5], "", assignment)
    grid = {"spacing": 1.0, "shape": list(SHAPE), "affine": np.eye(4).tolist()}
    arrays = {"image": {"shape": list(SHAPE), "dtype": "<f2"}}
    Index("volumes", "zarr", Schema.load(), arrays, grid, own, splits=splits, per_shard=PER_SHARD).save(folder)


def further_process(folder: Path) -> dict[str, float]:
    """The figures of one new process."""
    found = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(found.stdout)
    return figures


def write_volumes(folder: Path, storage: str, gib: float) -> None:
    """Volumes of noise: they do not compress, so that a file has as many bytes in both formats."""
    rng = np.random.default_rng(0)
    arrays = {"image": {"shape": SHAPE, "dtype": "<f2"}}
    writer = DatasetWriter(folder, storage, "volumes", Schema.load(), arrays, {"spacing": 1.0, "shape": list(SHAPE)})
    for i in range(max(2, round(gib * 2**30 / (2 * np.prod(SHAPE))))):
        volume = rng.integers(0, 2**16, SHAPE, np.uint16).view("<f2")
        writer.add(f"sub-{i:04d}", f"sub-{i:04d}", {"age": 40.0, "sex": "F"}, {"image": volume})
    writer.finish({}, {"arguments": {}})


def pass_over(files: list[Path], threads: int, use: Callable[[Any], Any]) -> None:
    """Read files by blocks in threads and call ``use`` with each block."""

    def one(path: Path) -> None:
        block = np.empty(2**20, np.uint8)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block.data):
                use(block[:count])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, files))


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def speeds(folder: Path, threads: int) -> dict[str, list[tuple[float, float]]]:
    """Name of a pass -> (seconds, CPU seconds) of each repetition, interleaved."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    passes: dict[str, Callable[[], Any]] = {
        "read": lambda: pass_over(files, threads, lambda block: None),
        "read + CRC-32C": lambda: pass_over(files, threads, google_crc32c.value),
        "read + SHA-256": lambda: pass_over(files, threads, lambda block: hashlib.sha256(block.data)),
        "verify": lambda: list(verify(folder, threads)),
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for cached in (True, False):
        pass_over(files, threads, lambda block: None)
        for _ in range(REPEATS):
            for name, function in passes.items():
                if not cached:
                    drop(files)
                wall, cpu = time.perf_counter(), time.process_time()
                function()
                taken = (time.perf_counter() - wall, time.process_time() - cpu)
                found.setdefault(f"{name}, {'page cache' if cached else 'disc'}", []).append(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--gib", type=float, default=2.0, metavar="N", help="of volumes to verify, in each format")
    parser.add_argument("--root", type=Path, default=Path("/tmp/scale"), metavar="FOLDER", help="a new folder")
    options = parser.parse_args()
    options.root.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, options.root)
        if options.records:
            index_table(options.root / "index", options.records)
        for storage in ("webdataset", "zarr") if options.gib else ():
            verify_table(options.root / storage, storage, options.gib)


def index_table(folder: Path, count: int) -> None:
    start = time.perf_counter()
    write_index(folder, count)
    size = sum(p.stat().st_size for p in folder.iterdir())
    seconds = time.perf_counter() - start
    print(f"{count:,} records, an index of {size / 1e6:,.0f} MB, made and written in {seconds:.1f} s\n")
    other = open_dataset(folder)  # of another process of the node: it maps all pages
    assert len(other.keys()) == count and other.record("sub-0000000_ses-1")
    runs = [further_process(folder) for _ in range(REPEATS)]
    print("| in a further process | median | range |\n|---|---:|---:|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"| {name} | {statistics.median(values):.3g} | {min(values):.3g} to {max(values):.3g} |")


def verify_table(folder: Path, storage: str, gib: float) -> None:
    write_volumes(folder, storage, gib)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**30
    threads = available_cores()
    print(f"\n{storage}, {size:.2f} GiB, {threads} threads\n")
    print("| pass | GiB/s | CPU s per GiB | range |\n|---|---:|---:|---:|")
    for name, taken in speeds(folder, threads).items():
        cpu = [c / size for _, c in taken]
        wall = statistics.median(w for w, _ in taken)
        print(f"| {name} | {size / wall:.2f} | {statistics.median(cpu):.3f} | {min(cpu):.3f} to {max(cpu):.3f} |")


if __name__ == "__main__":
    main()
