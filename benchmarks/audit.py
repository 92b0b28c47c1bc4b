"""What an audit makes of faulty volumes: ``python -m benchmarks.audit PACKED``, a data set of intact brains.

Each fault is put into some volumes of an otherwise intact data set; the table has the ranks of these by outlier score.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from shards.audit.measure import measure
from shards.audit.outliers import deviations, histogram_distances
from shards.audit.stream import mean_brains
from shards.dataset import open_dataset

Volume = NDArray[np.float32]
COPIES = 5  # volumes with each fault


def without(volume: Volume, axis: int, share: float) -> Volume:
    """The first ``share`` of an axis; 0 beyond."""
    kept = volume.copy()
    np.moveaxis(kept, axis, 0)[round(share * volume.shape[axis]) :] = 0
    return kept


def turned(volume: Volume, degrees: float) -> Volume:
    return np.clip(ndimage.rotate(volume, degrees, axes=(1, 2), reshape=False, order=1), 0, 1)


def noisy(volume: Volume) -> Volume:
    noise = np.random.default_rng(0).normal(0, 0.12, volume.shape)
    return np.clip(volume + (volume > 0) * noise, 0, 1)


def shaded(volume: Volume) -> Volume:
    return np.clip(volume * np.linspace(0.4, 1.3, len(volume))[:, None, None], 0, 1)


FAULTS: dict[str, Callable[[Volume], Volume]] = {
    "left and right exchanged": lambda v: v[::-1],
    "upside down": lambda v: v[:, :, ::-1],
    "back to front": lambda v: v[:, ::-1],
    "turned by 25 degrees": lambda v: turned(v, 25),
    "top missing": lambda v: without(v, 2, 0.65),
    "one half missing": lambda v: without(v, 0, 0.5),
    "noise, SD 0.12": noisy,
    "ghost, 35 %": lambda v: np.clip(v + 0.35 * np.roll(v, v.shape[1] // 4, 1), 0, 1),
    "shading, 0.4 to 1.3": shaded,
    "squared intensities": lambda v: v**2,
    "inverted contrast": lambda v: np.where(v > 0, 1 - v, 0),
    "blurred, SD 1.5 voxels": lambda v: ndimage.gaussian_filter(v, 1.5),
    "empty": np.zeros_like,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", type=Path)
    dataset = open_dataset(parser.parse_args().packed)
    keys = list(dataset.keys())
    variable = dataset.index.schema.volumes[0].name
    reference = mean_brains(dataset, [variable])[variable]
    names = np.random.default_rng(0).permutation(keys)[:COPIES]
    found = {key: measure(dataset.read(key, variable).astype(np.float32), key, reference, 64) for key in keys}
    intact = pd.DataFrame([m.values for m in found.values()], index=keys)
    histograms = np.stack([m.histogram for m in found.values()])
    print(f"{len(keys)} intact: left_right at least {intact['left_right'].min():.2f}, ", end="")
    print(f"median {intact['left_right'].median():.2f}")
    for fault, make in FAULTS.items():
        ranks, causes, mirrored = [], [], []
        for key in names:
            volume = np.ascontiguousarray(make(dataset.read(key, variable).astype(np.float32)), np.float32)
            bad = measure(volume, "", reference, 64)
            table = pd.concat([intact.drop(key), pd.DataFrame([bad.values], index=["bad"])])
            others = np.delete(histograms, keys.index(key), axis=0)
            table["histogram"] = histogram_distances(np.vstack([others, bad.histogram[None]]))
            z = deviations(table).abs()
            ranks.append(int((z.max(axis=1) >= z.loc["bad"].max()).sum()))
            causes.append(z.loc["bad"].idxmax())
            mirrored.append(bad.values["left_right"])
        print(f"{fault}: ranks {sorted(ranks)}, by {', '.join(sorted(set(map(str, causes))))}", end="")
        print(f", left_right {max(mirrored):.2f} at most" if "exchanged" in fault else "")


if __name__ == "__main__":
    main()
