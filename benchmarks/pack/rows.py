"""What packing costs beside the conversion: many rows, whose conversion is simulated by one finished volume.

Measures CPU time to pack all rows, to find that nothing has changed, and to add one row; then how much of it the parent
process needs where workers convert real scans, which bounds the volumes per second of all workers together.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import shards.convert
from shards.pack import pack
from shards.volumes import canonical

SIZE = (20, 24, 18)


def blob(path: Path) -> None:
    """A tiny scan."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, n) for n in SIZE], indexing="ij"))
    inside = np.square(grid).sum(0) < 1
    values = np.where(inside, 100 + np.random.default_rng(0).integers(0, 1001, SIZE), 0).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), path)


def simulate() -> None:
    """Convert the first scan, and give its volume for all others."""
    known: dict[str, Any] = {}

    def simulated(path: Path, *args: Any) -> Any:
        if "volume" not in known:
            known["volume"] = canonical(path, *args)
        return known["volume"]

    shards.convert.canonical = simulated  # type: ignore[assignment]


def timed(name: str, function: Callable[[], Any]) -> tuple[float, Any]:
    """Print CPU seconds of this process and the time on the clock."""
    start, clock = time.process_time(), time.monotonic()
    found = function()
    seconds = time.process_time() - start
    print(f"{name}: {seconds:.1f} s of CPU, {time.monotonic() - clock:.1f} s", flush=True)
    return seconds, found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--scans", type=Path, help="a BIDS folder whose scans are converted by two workers and by one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.scans:
            _workers(options.scans, folder)
        blob(folder / "scan.nii.gz")
        rows = [f"p{i},scan.nii.gz,{20 + i % 60},{'FM'[i % 2]},s{i % 4}\n" for i in range(options.rows)]
        table = folder / "scans.csv"
        table.write_text("participant_id,path,age,sex,site\n" + "".join(rows))
        simulate()

        def run() -> Any:
            return pack(table, folder / "out", spacing=2.0, shape=SIZE, keep_suspect=True, group="site")

        seconds, _ = timed(f"pack {options.rows:,} rows", run)
        print(f"per row: {1000 * seconds / options.rows:.2f} ms")
        timed("nothing has changed", run)
        with table.open("a") as file:
            file.write("added,scan.nii.gz,40,F,s1\n")
        _, summary = timed("one row added", run)
        assert summary["converted"] == 1


def _workers(source: Path, folder: Path) -> None:
    for workers in (1, 2):
        out = folder / f"workers-{workers}"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, summary = timed(
            f"{workers} workers",
            lambda: pack(source, out, spacing=2.0, shape=(80, 96, 80), workers=workers, storage="webdataset"),  # noqa: B023
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        theirs = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"  {summary['packed']} volumes; {theirs:.1f} s of CPU in workers, at most {after.ru_maxrss >> 10} MiB each"
        )
        if workers > 1:
            print(f"  parent: {1000 * seconds / summary['packed']:.1f} ms per volume, with start and end")


if __name__ == "__main__":
    main()
