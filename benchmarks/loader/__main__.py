"""CPU time per volume of ways to read a data set of volumes, all in one run.

    shards pack SOURCE PACKED --spacing 1 --shape auto
    python -m benchmarks.loader NAME=PACKED@SOURCE [...] [--volumes 64] [--repeats 7] [--scratch DIR] [--markdown FILE]

NAME is a column of the table, such as ``"1 mm"``; SOURCE has the scans, which nibabel reads. Each way writes the same
volumes (float16) and reads them in random orders from the page cache. Each way has its own process, and the epochs of
all ways are interleaved. The figures are medians of the CPU time (all threads) per volume, with the smallest and
largest of the repeated epochs. A byte of each page of a volume is touched, so that nothing is only mapped.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.loader.measure import WAYS, measure, missing
from benchmarks.loader.ways import LIMITS, Nibabel, NibabelPrepared, Volume
from shards.dataset import open_dataset
from shards.files import write_text
from shards.participant_rows import Row
from shards.participants import read_table


def unpacked(packed: Path, source: Path, n: int, scratch: Path) -> tuple[Volume, list[Path]]:
    """The first ``n`` volumes of a data set as a memory map (n, H, W, D), float16, and the scans they come from."""
    dataset = open_dataset(packed)
    keys = [key for key in dataset.keys("all") if dataset.has(key, "image")][:n]
    shape = dataset.index.arrays["image"]["shape"]
    volumes = np.lib.format.open_memmap(scratch / "volumes.npy", "w+", np.float16, (len(keys), *shape))
    for i, key in enumerate(keys):
        volumes[i] = dataset.read(key, "image")
    rows = read_table(source, dataset.index.schema).rows
    files = {row.key: row.files["image"] for row in rows if isinstance(row, Row)}
    return volumes, [files[key] for key in keys]


def figure(times: Sequence[float]) -> str:
    """Median, smallest and largest."""
    if not times:
        return "-"
    digits = 2 if statistics.median(times) < 10 else 1
    return " ".join([f"{statistics.median(times):.{digits}f}", f"({min(times):.{digits}f} to {max(times):.{digits}f})"])


RATIOS = [  # what, how often its time goes into that of another way
    ("LitData / ours, tar", "LitData", "ours, tar"),
    ("MDS / ours, tar", "MosaicML Streaming (MDS)", "ours, tar"),
    ("LitData, zstd / ours, zarr", "LitData, zstd", "ours, zarr"),
    ("plain Zarr v3 / ours, zarr", "zarr-python, plain Zarr v3", "ours, zarr"),
    ("nibabel, load / ours, tar", Nibabel.name, "ours, tar"),
    ("nibabel, load / ours, zarr", Nibabel.name, "ours, zarr"),
    ("nibabel, all / ours, tar", NibabelPrepared.name, "ours, tar"),
    ("nibabel, all / ours, zarr", NibabelPrepared.name, "ours, zarr"),
    *((f"{name} / ours, zarr", name, "ours, zarr") for name in (way.name for way in LIMITS[1:])),
]


def ratio(times: dict[str, list[float]], one: str, other: str) -> str:
    """Ratio of two medians."""
    if not times.get(one) or not times.get(other):
        return "-"
    return f"{statistics.median(times[one]) / statistics.median(times[other]):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=PACKED@SOURCE")
    parser.add_argument("--volumes", type=int, default=64, help="of each source, at most")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="folder for what is written; a temporary one by default")
    parser.add_argument("--only", nargs="*", default=(), metavar="WORD", help="ways whose name holds one of the words")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    columns, sizes = {}, {}
    for text in options.sources:
        name, _, place = text.partition("=")
        packed, _, source = place.partition("@")
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            volumes, scans = unpacked(Path(packed), Path(source), options.volumes, Path(scratch))
            sizes[name] = f"{len(volumes)} volumes of {' x '.join(map(str, volumes.shape[1:]))}"
            columns[name] = measure(volumes, scans, Path(scratch), options.repeats, options.only)
    lines = [f"| CPU ms per volume | checks | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for way in WAYS:
        if any(way.name in times for times in columns.values()):
            figures = [figure(times.get(way.name, [])) for times in columns.values()]
            lines.append(f"| {way.name} | {way.checked} | {' | '.join(figures)} |")
    lines += ["", f"| ratio of medians | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for what, one, other in RATIOS:
        lines.append(f"| {what} | {' | '.join(ratio(times, one, other) for times in columns.values())} |")
    lines += ["", "; ".join(f"{name}: {size}" for name, size in sizes.items()) + "."]
    absent = sorted({way.package for way in WAYS if missing(way)})
    if absent:
        lines.append(f"Not installed: {', '.join(absent)}; benchmarks/loader/peers.txt says how.")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        write_text(options.markdown, text)


if __name__ == "__main__":
    main()
