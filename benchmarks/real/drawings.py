"""Are drawn brains as sharp as real ones, and of the age and sex that they were asked for?

    python -m benchmarks.real.drawings runs/small/fold-1/joint runs/small/packed --split fold-1-of-3

One brain is drawn for the age and sex of each person of the test part. A reader, ridge regression on voxels of real
scans of the training and validation part, reads real and drawn brains. Sharpness is the mean square of what a Gaussian
of one voxel removes, in slices of each plane inside the brain, drawn over real. With ``--picture`` real brains stand
over drawn ones of the same age and sex.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mvhpc.config import load_config
from mvhpc.evaluation.figures import gallery, slices
from mvhpc.inference.generate import GenerateConfig, decode
from mvhpc.inference.sampler import Sampler
from mvhpc.runtime.randomness import generator
from shards.dataset import Dataset, open_dataset

STRENGTHS = np.logspace(-1, 6, 15)
PLANES = ("sagittal", "coronal", "axial")
SMOOTHING = 1.0  # voxels, of what the reader reads
BRAIN = 0.1  # intensity
SHOWN = 6
Floats = NDArray[np.float32]


def draw(sampler: Sampler, dataset: Dataset, keys: list[str]) -> list[Floats]:
    """A volume for the scalars of each record, with noise of its own."""
    variables = sampler.model.variables
    rows = [dataset.values(key) for key in keys]
    encoded, present = variables.encode_scalars(rows)
    volume = variables.volumes[0].name
    drawn = []
    for i in range(0, len(keys), 16):
        part = slice(i, i + 16)
        given = {name: x[part] for name, x in encoded.items()}
        there = {name: x[part] for name, x in present.items()}
        noise = [generator(0, "drawings", key) for key in keys[part]]
        latents = sampler(given, noise, there, want=[volume])[volume]
        drawn += [decode(sampler, volume, z[None]) for z in latents]
    return drawn


def sharpness(volumes: list[Floats]) -> NDArray[np.float64]:
    """Mean over volumes of the energy of fine detail in each plane, (3,)."""
    energies = []
    for x in volumes:
        inside = gaussian_filter(x, 2) > BRAIN
        row = []
        for axis in range(3):
            sigma = [0.0 if a == axis else 1.0 for a in range(3)]
            row.append(float(np.square(x - gaussian_filter(x, sigma))[inside].mean()))
        energies.append(row)
    return np.mean(energies, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder of the joint model")
    parser.add_argument("data", help="packed data set")
    parser.add_argument("--split", default="default")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the stage generate")
    options = parser.parse_intermixed_args()
    values: dict[str, Any] = {"model": options.model, "out": "unused"}
    sampler = Sampler.of(load_config(GenerateConfig, "generate", "default", options.overrides, values))
    dataset, volume = open_dataset(options.data), sampler.model.variables.volumes[0].name

    def people(*parts: str) -> list[str]:
        """Those whose age and sex are known."""
        keys = [key for part in parts for key in dataset.keys(part, options.split)]
        return [key for key in keys if None not in (dataset.values(key)["age"], dataset.values(key)["sex"])]

    seen, keys = people("train", "validation"), people("test")

    def read(of: list[str]) -> list[Floats]:
        return [dataset.read(key, volume).astype(np.float32) for key in of]

    def features(volumes: list[Floats]) -> Floats:
        return np.stack([gaussian_filter(x, SMOOTHING)[::2, ::2, ::2].ravel() for x in volumes])

    def values_of(of: list[str], name: str) -> list[Any]:
        return [dataset.values(key)[name] for key in of]

    real, drawn = read(keys), draw(sampler, dataset, keys)
    known, x, y = features(read(seen)), features(real), features(drawn)
    age, truth = np.array(values_of(seen, "age"), float), np.array(values_of(keys, "age"), float)
    reader = make_pipeline(StandardScaler(with_std=False), RidgeCV(STRENGTHS)).fit(known, age)
    of_sex = make_pipeline(StandardScaler(with_std=False), RidgeClassifierCV(STRENGTHS)).fit(
        known, values_of(seen, "sex")
    )
    sexes = np.array(values_of(keys, "sex"))
    print(f"{len(keys)} people, read by ridge regression on {len(seen)} real scans\n")
    print("| | real | drawn |\n|---|---:|---:|")
    correlations = [float(np.corrcoef(truth, reader.predict(part))[0, 1]) for part in (x, y)]
    print(f"| correlation of true or asked age with the age read | {correlations[0]:.2f} | {correlations[1]:.2f} |")
    errors = [float(np.abs(truth - reader.predict(part)).mean()) for part in (x, y)]
    print(f"| mean absolute difference, years | {errors[0]:.1f} | {errors[1]:.1f} |")
    right = [float((of_sex.predict(part) == sexes).mean()) for part in (x, y)]
    print(f"| sex read is that asked for | {right[0]:.2f} | {right[1]:.2f} |")
    for plane, a, b in zip(PLANES, sharpness(real), sharpness(drawn), strict=True):
        print(f"| sharpness, {plane} | 1 | {b / a:.2f} |")
    if options.picture:
        rows = [[slices(v) for v in part[:SHOWN]] for part in (real, drawn)]
        labels = [f"{dataset.values(k)['sex']} {float(dataset.values(k)['age'] or 0):.0f}" for k in keys[:SHOWN]]
        gallery(rows, options.picture, [labels, labels], title="real over drawn", spacing=sampler.model.grid["spacing"])


if __name__ == "__main__":
    main()
