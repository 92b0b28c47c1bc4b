"""CPU time per volume of packing's conversion, with its quality control, beside a plain nibabel and SciPy loop.

The plain loop loads a scan, orients it, scales it by a percentile, resamples it linearly around the middle of the
volume and writes float16 as .npy. It neither smooths before it takes a coarser grid nor checks anything. Both are
measured in turn on the same scans.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from shards.preprocess.recipe import read_derivative
from shards.volumes import canonical

SHAPES = {1.0: (160, 192, 160), 2.0: (80, 96, 80)}


def plain(path: Path, spacing: float, shape: tuple[int, int, int], out: Path) -> None:
    """The loop that most projects begin with."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = image.get_fdata(dtype=np.float32)
    high = np.percentile(voxels[voxels > 0], 99.5)
    scaled = np.clip(voxels / high, 0, 1)
    step = np.linalg.inv(image.affine[:3, :3]) * spacing
    offset = (np.array(voxels.shape) - 1) / 2 - step @ [n // 2 for n in shape]
    box = ndimage.affine_transform(scaled, step, offset, output_shape=shape, order=1)
    np.save(out, box.astype(np.float16))


def cpu_ms(function: Callable[[], object]) -> float:
    """CPU milliseconds of this process."""
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="BIDS folders or derivatives with T1w scans")
    parser.add_argument("--scans", type=int, default=10, help="of each source")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| source | spacing | plain, ms | ours, ms | ratio of medians | ratios of single scans |")
    print("|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for source in options.sources:
            space = (read_derivative(source) or (None, None))[1]
            files = sorted(source.rglob("*_T1w.nii.gz"))
            files = files[:: max(1, len(files) // options.scans)][: options.scans]
            for spacing, shape in SHAPES.items():
                times: dict[str, list[float]] = {"plain": [], "ours": []}
                ways: dict[str, Callable[[Path], object]] = {
                    "plain": lambda path: plain(path, spacing, shape, Path(folder) / "plain.npy"),  # noqa: B023
                    "ours": lambda path: np.save(Path(folder) / "ours.npy", canonical(path, spacing, shape).voxels),  # noqa: B023
                }
                ways["ours"](files[0])  # what is prepared once
                for _ in range(options.rounds):
                    for path in files:
                        for name, way in ways.items():
                            times[name].append(cpu_ms(lambda: way(path)))  # noqa: B023
                ratios = sorted(b / a for a, b in zip(times["plain"], times["ours"]))
                medians = {name: statistics.median(values) for name, values in times.items()}
                place = f"{source.name}{' (derivative)' if space else ''}"
                print(
                    f"| {place}, {len(files)} scans | {spacing:g} mm | {medians['plain']:.0f} | {medians['ours']:.0f} "
                    f"| {medians['ours'] / medians['plain']:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
