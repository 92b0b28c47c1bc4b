"""CPU time per volume of packing's conversion, with its quality control, beside a plain nibabel and SciPy loop.

The plain loop loads a scan, orients it, scales it by a percentile, resamples it linearly around the middle of the
volume and writes float16 as .npy; it checks nothing. Before a coarser grid it aliases, so that it is measured with a
Gaussian filter too, which is what packing does there. All are measured on the same scans, in a random order, with one
thread, as in packing's workers.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported

import nibabel as nib
import numpy as np
from scipy import ndimage

from shards.preprocess.recipe import read_derivative
from shards.volumes import canonical

SHAPES = {1.0: (160, 192, 160), 2.0: (80, 96, 80)}


def plain(path: Path, spacing: float, shape: tuple[int, int, int], out: Path, smooth: bool) -> None:
    """The loop that most projects begin with; with ``smooth``, without aliasing."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = image.get_fdata(dtype=np.float32)
    high = np.percentile(voxels[voxels > 0], 99.5)
    scaled = np.clip(voxels / high, 0, 1)
    step = np.linalg.inv(image.affine[:3, :3]) * spacing
    if smooth:
        sigma = np.sqrt(np.maximum(np.linalg.norm(step, axis=1) ** 2 - 1, 0)) / np.sqrt(8 * np.log(2))
        scaled = ndimage.gaussian_filter(scaled, sigma)
    offset = (np.array(voxels.shape) - 1) / 2 - step @ [n // 2 for n in shape]
    box = ndimage.affine_transform(scaled, step, offset, output_shape=shape, order=1)
    np.save(out, box.astype(np.float16))


def _pack(path: Path, spacing: float, shape: tuple[int, int, int], out: Path) -> None:
    np.save(out, canonical(path, spacing, shape).voxels)


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
    print("| source | spacing | plain, ms | smoothed, ms | ours, ms | ours / plain | ours / smoothed |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for source in options.sources:
            space = (read_derivative(source) or (None, None))[1]
            files = sorted(source.rglob("*_T1w.nii.gz"))
            files = files[:: max(1, len(files) // options.scans)][: options.scans]
            for spacing, shape in SHAPES.items():
                times: dict[str, list[float]] = {"plain": [], "smoothed": [], "ours": []}
                out = Path(folder) / "volume.npy"
                ways: dict[str, Callable[[Path], object]] = {
                    "plain": partial(plain, spacing=spacing, shape=shape, out=out, smooth=False),
                    "smoothed": partial(plain, spacing=spacing, shape=shape, out=out, smooth=True),
                    "ours": partial(_pack, spacing=spacing, shape=shape, out=out),
                }
                ways["ours"](files[0])  # what is prepared once
                for _ in range(options.rounds):
                    for path in files:
                        for name, way in draw.sample(sorted(ways.items()), len(ways)):
                            times[name].append(cpu_ms(partial(way, path)))
                median = {name: statistics.median(values) for name, values in times.items()}
                place = f"{source.name}{' (derivative)' if space else ''}, {len(files)} scans"
                cells = [f"{median[name]:.0f}" for name in times]
                cells += [f"{median['ours'] / median[name]:.2f}" for name in ("plain", "smoothed")]
                print(f"| {place} | {spacing:g} mm | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
