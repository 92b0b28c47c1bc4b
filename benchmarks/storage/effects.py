"""What a number format of the stored volumes does to predictions of age and sex, and to an autoencoder.

Everything is compared with float16: the same people, folds, first weights and order of samples. A second float16 run of
the autoencoder with another seed shows how much chance does.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.storage.formats import DTYPES, SHAPES, markdown
from mvhpc.config import load_config
from mvhpc.evaluation.ridge import read_classes, read_numbers
from mvhpc.evaluation.similarity import psnr, ssim
from mvhpc.execute import execute, plan
from mvhpc.models.bundle import AutoencoderModel, load
from mvhpc.records import pool
from mvhpc.training.vae import VAEConfig
from shards.dataset import Dataset, open_dataset
from shards.pack import pack

REPEATS, FOLDS = 5, 5  # of cross-validation
FINE, COARSE = 2.0, 4.0  # mm


def tables(source: Path, epochs: int) -> str:
    """Both tables, as Markdown."""
    with tempfile.TemporaryDirectory() as root:
        return f"{readings(source, Path(root))}\n\n{autoencoders(source, Path(root), epochs)}\n"


def packed(source: Path, out: Path, dtype: str, spacing: float) -> Dataset:
    """The scans of ``source``, packed."""
    shape = SHAPES.get(spacing, "auto")
    pack(source, out, schema="default", spacing=spacing, shape=shape, dtype=dtype, fractions=[0.55, 0.15, 0.3])
    return open_dataset(out)


def readings(source: Path, root: Path) -> str:
    """Age and sex by ridge regression on voxels, cross-validated."""
    rows = []
    answers: dict[str, NDArray[np.float64]] = {}
    for dtype in DTYPES:
        data = packed(source, root / dtype, dtype, FINE)
        keys = [key for key in data.keys("all") if None not in data.values(key).values()]
        age = np.array([data.values(key)["age"] for key in keys], float)
        sex = np.array([data.values(key)["sex"] for key in keys])
        name = data.index.schema.volumes[0].name
        volumes = torch.stack([torch.from_numpy(np.array(data.read(key, name))).float() for key in keys])
        cells: list[str] = []
        for voxels in (volumes, pool(volumes, round(COARSE / FINE))):
            features = coordinates(voxels.flatten(1))
            ages, right = np.zeros((REPEATS, len(keys))), []
            for repeat in range(REPEATS):
                order = np.random.default_rng(repeat).permutation(len(keys))
                for held in np.array_split(order, FOLDS):
                    rest = np.setdiff1d(order, held)
                    ages[repeat, held] = read_numbers(features[rest], list(age[rest]), features[held])
                    found = read_classes(features[rest], list(sex[rest]), features[held])
                    right.append(float((np.array(found) == sex[held]).mean()))
            key = f"{dtype} {len(cells)}"
            answers[key] = ages
            change = np.abs(ages - answers[f"float16 {len(cells) // 3 * 3}"]).max()
            cells += [f"{np.abs(ages - age).mean():.3f}", f"{change:.3f}", f"{np.mean(right):.4f}"]
        rows.append([dtype, *cells])
    head = ["stored as"]
    for mm in (FINE, COARSE):
        head += [f"age error at {mm:g} mm, years", "largest change of an answer", "share of sexes right"]
    return markdown(head, rows)


def coordinates(x: torch.Tensor) -> NDArray[np.float64]:
    """(N, N) coordinates of N points in the space that they span: ridge regression on these finds the same."""
    values, vectors = np.linalg.eigh(sum(part.double() @ part.double().T for part in x.split(2**15, dim=1)).numpy())
    coordinates: NDArray[np.float64] = vectors * np.sqrt(values.clip(min=0))
    return coordinates


def autoencoders(source: Path, root: Path, epochs: int) -> str:
    """Autoencoders of preset ``small``, trained on each format and tried on the float16 volumes of the test part."""
    originals = packed(source, root / "small-float16", "float16", COARSE)
    name = originals.index.schema.volumes[0].name
    x = torch.from_numpy(np.stack([originals.read(key, name) for key in originals.keys("test")]))[:, None].float()
    rows = []
    for dtype, seed in (*((dtype, 0) for dtype in DTYPES), ("float16", 1)):
        data, out = root / f"small-{dtype}", root / f"vae-{dtype}-{seed}"
        if not data.exists():
            packed(source, data, dtype, COARSE)
        values = {"out": str(out), "data": str(data), "training.epochs": epochs, "training.seed": seed}
        config = load_config(VAEConfig, "vae", "small", values={**values, "compute.workers": 1, "compute.threads": 1})
        execute(plan("vae", config))
        network = load(out, kind=AutoencoderModel).network
        y = torch.cat([network(v, torch.zeros(1, *network.latent_shape(v.shape[2:])))[0] for v in x.split(1)])
        y, brain = y.clamp(0, 1), x > 0
        figures = [psnr(y, x), psnr(y, x, brain), ssim(y, x), ssim(y, x, brain)]
        rows.append([f"{dtype}, seed {seed}", *(f"{f.mean():.{n}f}" for f, n in zip(figures, (3, 3, 5, 5)))])
    head = ["trained on", "PSNR, dB", "in brain", "SSIM", "in brain"]
    return f"{len(x)} volumes, {epochs} epochs\n\n{markdown(head, rows)}"
