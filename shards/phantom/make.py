"""Procedural T1w-like brains as a BIDS tree, their anatomy drawn from a known joint law with age and sex.

The law and its exact posterior are in :mod:`shards.phantom.anatomy`, the shape in :mod:`shards.phantom.brain`. Other
variation between subjects (folds, pose, aspect, asymmetry, intensity scale, bias field, noise) comes from a separate
random stream that is independent of age and sex, so an image depends on these only through the drawn anatomy.

Rich phantoms also have a second, T2w-like contrast, one of five sites, whose scanners differ in contrast and noise, and
a memory score, a whole number, that falls with age (:data:`MEMORY`), independent of anatomy given age and sex.
"""

import json
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shards.cpus import worker_count
from shards.errors import DataError
from shards.files import atomic_folder
from shards.phantom.anatomy import LAW, Regression, draw_anatomy, draw_person
from shards.phantom.brain import Tissues, render_tissues, spacing
from shards.processes import KILLED, process_pool
from shards.progress import progress

T1W = {"csf": 0.16, "grey": 0.56, "deep": 0.64, "white": 0.90}
T2W = {"csf": 0.95, "grey": 0.62, "deep": 0.54, "white": 0.42}
NOISE = 0.02  # SD, in the units above


class Scanner(NamedTuple):
    """The scanner of a site: intensities are raised to ``gamma``; the noise is ``noise`` times :data:`NOISE`."""

    gamma: float = 1.0
    noise: float = 1.0


PLAIN = Scanner()
SITES = {  # name -> share of subjects, scanner
    "Arden": (0.35, PLAIN),
    "Birch": (0.25, Scanner(gamma=0.75)),
    "Cedar": (0.20, Scanner(gamma=1.35)),
    "Doone": (0.12, Scanner(noise=3.0)),
    "Elmet": (0.08, Scanner(gamma=0.75, noise=3.0)),
}
MEMORY = Regression(50, -2.5, 0, -1.5, 8)  # a score of mean 50 at 50 years


def render_image(
    tissues: Tissues, rng: np.random.Generator, intensity: dict[str, float] = T1W, scanner: Scanner = PLAIN
) -> NDArray[np.int16]:
    """Intensities of a contrast, background zero: contrast x bias field x scanner scale, with Rician noise."""
    clean = (
        intensity["csf"] * tissues.csf
        + intensity["grey"] * (tissues.grey - tissues.deep)
        + intensity["deep"] * tissues.deep
        + intensity["white"] * tissues.white
    ) ** scanner.gamma
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in clean.shape), indexing="ij", sparse=True)
    terms = (x, y, z, x * y, x * z, y * z, x * x, y * y, z * z)
    bias = np.exp(sum(c * term for c, term in zip(rng.normal(0, 0.06, len(terms)), terms)))
    scale = 1000 * np.exp(rng.normal(0, 0.25))
    noise = rng.standard_normal((2, *clean.shape), np.float32) * (NOISE * scanner.noise)
    noisy = np.hypot(clean * bias + noise[0], noise[1])
    inside = tissues.csf + tissues.grey + tissues.white > 0.5
    return np.where(inside, np.clip(noisy * scale, 1, 32767), 0).astype(np.int16)


# --- a data set ------------------------------------------------------------------------------------------------------


def draw_subject(
    seed: int, index: int, shape: tuple[int, int, int]
) -> tuple[float, str, dict[str, float], NDArray[np.int16]]:
    """Age, sex, anatomy and image of subject ``index`` (from 0); a pure function of its arguments."""
    law, nuisance = (np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence((seed, index)).spawn(2))
    age, sex = draw_person(law)
    anatomy = draw_anatomy(law, age, sex)
    return age, sex, anatomy, render_image(render_tissues(anatomy, nuisance, shape), nuisance)


class Rich(NamedTuple):
    """The additional variables of a rich phantom."""

    site: str
    memory: int
    t1w: NDArray[np.int16]
    t2w: NDArray[np.int16]


def draw_rich(seed: int, index: int, shape: tuple[int, int, int]) -> tuple[float, str, dict[str, float], Rich]:
    """Age, sex and anatomy of subject ``index``, as of :func:`draw_subject`, and the additional variables."""
    law, nuisance, extra = (
        np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence((seed, index)).spawn(3)
    )
    age, sex = draw_person(law)
    anatomy = draw_anatomy(law, age, sex)
    site = str(extra.choice(list(SITES), p=[share for share, _ in SITES.values()]))
    memory = float(MEMORY.mean(age, sex == "M") + MEMORY.sd * extra.standard_normal())
    tissues, scanner = render_tissues(anatomy, nuisance, shape), SITES[site][1]
    t1w = render_image(tissues, nuisance, T1W, scanner)
    return age, sex, anatomy, Rich(site, round(memory), t1w, render_image(tissues, extra, T2W, scanner))


def _write_subject(folder: Path, seed: int, shape: tuple[int, int, int], rich: bool, index: int) -> dict[str, object]:
    name = f"sub-{index + 1:04d}"
    if rich:
        age, sex, anatomy, more = draw_rich(seed, index, shape)
        images = {"T1w": more.t1w, "T2w": more.t2w}
        row: dict[str, object] = {"age": age, "sex": sex, "site": more.site, "memory": more.memory}
    else:
        age, sex, anatomy, image = draw_subject(seed, index, shape)
        images, row = {"T1w": image}, {"age": age, "sex": sex}
    step = spacing(shape)
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = [(1 - n) * step / 2 for n in shape]
    (folder / name / "anat").mkdir(parents=True)
    for contrast, voxels in images.items():
        nifti = nib.Nifti1Image(voxels, affine)
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, folder / name / "anat" / f"{name}_{contrast}.nii.gz")
    return {"participant_id": name, **row, **anatomy}


def make_phantoms(
    out: Path,
    subjects: int,
    shape: tuple[int, int, int] = (32, 32, 32),
    seed: int = 0,
    workers: int = 0,
    rich: bool = False,
) -> None:
    """Write a BIDS tree of phantoms, atomically.

    ``out`` holds dataset_description.json, participants.tsv (participant_id, age in years, sex), an image
    ``sub-*/anat/sub-*_T1w.nii.gz`` per subject (int16, RAS, :func:`spacing` mm) and derivatives/phantom/anatomy.tsv
    with the drawn anatomy (:data:`shards.phantom.anatomy.LAW`) and the shares of brain and CSF that follow from it.

    Args:
        out: new or empty folder.
        subjects: number of phantoms. Subject i depends only on ``seed`` and i.
        shape: voxels.
        seed: of all draws.
        workers: processes; 0 for one per core.
        rich: add ``*_T2w.nii.gz``, and site and memory score to participants.tsv.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: fewer than one subject, a side below 16 voxels, or a negative number of workers.
        DataError: a process was killed.
    """
    if subjects < 1 or min(shape) < 16:
        raise ValueError(f"{subjects} phantoms of {shape} voxels: at least one phantom of 16 voxels a side is needed")
    workers = worker_count(workers)
    with atomic_folder(Path(out)) as folder:
        write = partial(_write_subject, folder, seed, shape, rich)
        if workers > 1:
            try:
                with process_pool(min(workers, subjects)) as pool:
                    rows = list(progress(pool.map(write, range(subjects), chunksize=8), "phantoms", subjects, "brain"))
            except BrokenProcessPool:
                raise DataError(KILLED) from None
        else:
            rows = list(progress(map(write, range(subjects)), "phantoms", subjects, "brain"))
        _write_tables(folder, pd.DataFrame(rows))


def _write_tables(folder: Path, table: pd.DataFrame) -> None:
    table.drop(columns=list(LAW)).to_csv(folder / "participants.tsv", sep="\t", index=False)
    anatomy = table[["participant_id", *LAW]].copy()
    anatomy["brain_ratio"] = (anatomy["grey_percent"] + anatomy["white_percent"]) / 100
    anatomy["csf_ml"] = anatomy["icv_ml"] * (1 - anatomy["brain_ratio"])
    derivatives = folder / "derivatives" / "phantom"
    derivatives.mkdir(parents=True)
    anatomy.to_csv(derivatives / "anatomy.tsv", sep="\t", index=False)
    for where, kind in ((folder, "raw"), (derivatives, "derivative")):
        description = {
            "Name": "Procedural brain phantoms",
            "BIDSVersion": "1.9.0",
            "DatasetType": kind,
            "GeneratedBy": [{"Name": "shards phantom"}],
        }
        (where / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
