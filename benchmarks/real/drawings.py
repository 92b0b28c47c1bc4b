"""Are drawn brains as sharp as real ones, and of the age and sex that they were asked for?

    python -m benchmarks.real.drawings runs/small/fold-1/joint runs/small/packed --split fold-1-of-3

One brain is drawn for the age and sex of each person of the test part. A reader, ridge regression on voxels of real
scans of the training and validation part, reads real and drawn brains. Sharpness is the mean square of what a Gaussian
of one voxel removes, in slices of each plane inside the brain, drawn over real. With ``--picture`` real brains stand
over drawn ones of the same age and sex. `mvhpc evaluate-generation` measures this and more, with intervals.
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
from mvhpc.evaluation.sharpness import PLANES, sharpness
from mvhpc.inference.drawn_volumes import draw_for_records
from mvhpc.inference.generate import GenerateConfig
from mvhpc.inference.sampler import Sampler
from shards.dataset import open_dataset

STRENGTHS = np.logspace(-1, 6, 15)
SMOOTHING = 1.0  # voxels, of what the reader reads
SHOWN = 6
Floats = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder of the joint model")
    parser.add_argument("data", help="packed data set")
    parser.add_argument("--split", default="default")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the stage generate")
    options = parser.parse_intermixed_args()
    values: dict[str, Any] = {"model": options.model, "out": "unused"}
    config = load_config(GenerateConfig, "generate", "default", options.overrides, values)
    sampler = Sampler.of(config)
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

    real, drawn = read(keys), list(draw_for_records(sampler, dataset, keys, volume, config.seed, config.batch))
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
    detail = [np.mean([sharpness(x) for x in volumes], 0) for volumes in (real, drawn)]
    for plane, a, b in zip(PLANES, *detail, strict=True):
        print(f"| sharpness, {plane} | 1 | {b / a:.2f} |")
    if options.picture:
        rows = [[slices(v) for v in part[:SHOWN]] for part in (real, drawn)]
        labels = [f"{dataset.values(k)['sex']} {float(dataset.values(k)['age'] or 0):.0f}" for k in keys[:SHOWN]]
        gallery(rows, options.picture, [labels, labels], title="real over drawn", spacing=sampler.model.grid["spacing"])


if __name__ == "__main__":
    main()
