"""What of a phantom's anatomy can be read, linearly, from its voxels and from its latents.

    python benchmarks/anatomy_on_latents.py runs/scoreboard

Ridge regression of each quantity of the law (shards.phantom.anatomy.LAW; ventricles in logarithms) on standardised
voxels or latents of the training people, tested on the test people, each at the best of five strengths. Beside R
squared stands the error's SD in units of the law's own residual SD: at 1, what an image tells of age through this
quantity is halved.
"""

import argparse
from pathlib import Path

import numpy as np

from shards.dataset import open_dataset
from shards.phantom.anatomy import LAW, read_tables

STRENGTHS = (100, 300, 1000, 3000, 10000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with source, packed and latents of phantoms")
    root = parser.parse_args().root
    table = read_tables(root / "source").set_index("participant_id")
    print("| | " + " | ".join(LAW) + " |\n|---|" + "---:|" * len(LAW))
    for name in ("packed", "latents"):
        dataset = open_dataset(root / name)
        parts = dataset.keys("train"), dataset.keys("test")
        x, z = (np.stack([dataset.read(key, "image").ravel() for key in keys]).astype(np.float32) for keys in parts)
        mean, sd = x.mean(0), x.std(0)
        sd = np.maximum(sd, 0.1 * np.sqrt(np.mean(sd**2)))
        x, z = (x - mean) / sd, (z - mean) / sd
        values, vectors = np.linalg.eigh(x @ x.T)
        cells = []
        for quantity, law in LAW.items():
            y, truth = (table.loc[keys, quantity].to_numpy(float) for keys in parts)
            y, truth = (np.log(y), np.log(truth)) if law.log else (y, truth)
            weights = [vectors @ (vectors.T @ (y - y.mean()) / (values + strength)) for strength in STRENGTHS]
            error = min((z @ (x.T @ w) + y.mean() - truth).std() for w in weights)
            cells.append(f"{1 - error**2 / truth.var():.2f}, {error / law.sd:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
