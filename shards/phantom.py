"""Procedural T1w-like brains as a BIDS tree, their anatomy drawn from a known joint law with age and sex.

The law and its exact posterior are :mod:`shards.anatomy`, the shape :mod:`shards.brain`. Whatever else varies between
subjects (folds, pose, aspect, asymmetry, intensity scale, bias field, noise) comes from a random stream of its own that
knows nothing of age or sex, so that the drawn anatomy is all an image can tell of them.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shards.anatomy import LAW, draw_anatomy, draw_person
from shards.brain import Tissues, render_tissues, spacing
from shards.progress import progress

INTENSITY = {"csf": 0.16, "grey": 0.56, "deep": 0.64, "white": 0.90}
NOISE = 0.02  # SD, in the units above


def render_image(tissues: Tissues, rng: np.random.Generator) -> NDArray[np.int16]:
    """T1w-like intensities, background zero: contrast x bias field x scanner scale, with Rician noise."""
    clean = (
        INTENSITY["csf"] * tissues.csf
        + INTENSITY["grey"] * (tissues.grey - tissues.deep)
        + INTENSITY["deep"] * tissues.deep
        + INTENSITY["white"] * tissues.white
    )
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in clean.shape), indexing="ij", sparse=True)
    terms = (x, y, z, x * y, x * z, y * z, x * x, y * y, z * z)
    bias = np.exp(sum(c * term for c, term in zip(rng.normal(0, 0.06, len(terms)), terms)))
    scale = 1000 * np.exp(rng.normal(0, 0.25))
    noise = rng.standard_normal((2, *clean.shape), np.float32) * NOISE
    noisy = np.hypot(clean * bias + noise[0], noise[1])
    inside = tissues.csf + tissues.grey + tissues.white > 0.5
    return np.where(inside, np.clip(noisy * scale, 1, 32767), 0).astype(np.int16)


# --- a data set ------------------------------------------------------------------------------------------------------


def draw_subject(
    seed: int, index: int, shape: tuple[int, int, int]
) -> tuple[float, str, dict[str, float], NDArray[np.int16]]:
    """Age, sex, anatomy and image of subject ``index`` (from 0): a function of its arguments alone."""
    law, nuisance = (np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence((seed, index)).spawn(2))
    age, sex = draw_person(law)
    anatomy = draw_anatomy(law, age, sex)
    return age, sex, anatomy, render_image(render_tissues(anatomy, nuisance, shape), nuisance)


def _write_subject(folder: Path, seed: int, shape: tuple[int, int, int], index: int) -> dict[str, object]:
    age, sex, anatomy, image = draw_subject(seed, index, shape)
    name = f"sub-{index + 1:04d}"
    step = spacing(shape)
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = [(1 - n) * step / 2 for n in shape]
    nifti = nib.Nifti1Image(image, affine)
    nifti.header.set_xyzt_units("mm")
    target = folder / name / "anat" / f"{name}_T1w.nii.gz"
    target.parent.mkdir(parents=True)
    nib.save(nifti, target)
    return {"participant_id": name, "age": age, "sex": sex, **anatomy}


def make_phantoms(
    out: Path,
    subjects: int,
    shape: tuple[int, int, int] = (32, 32, 32),
    seed: int = 0,
    workers: int = os.cpu_count() or 1,
) -> None:
    """Write a BIDS tree of ``subjects`` phantoms, whole or not at all.

    ``out`` gets dataset_description.json, participants.tsv (participant_id, age in years, sex), an image
    ``sub-*/anat/sub-*_T1w.nii.gz`` each (int16, RAS, :func:`spacing` mm) and derivatives/phantom/anatomy.tsv with what
    was drawn (:data:`shards.anatomy.LAW`) and the brain's and CSF's share that follow. Subject i depends on
    ``seed`` and i alone, not on ``subjects`` or ``workers``.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: fewer than one subject, or a side below 16 voxels.
    """
    out = Path(out)
    if subjects < 1 or min(shape) < 16:
        raise ValueError(f"{subjects} phantoms of {shape} voxels: ask for at least one, 16 voxels a side")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not empty: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write = partial(_write_subject, folder, seed, shape)
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, subjects), mp_context=spawn) as pool:
                rows = list(progress(pool.map(write, range(subjects), chunksize=8), "phantoms", subjects, "brain"))
        else:
            rows = list(progress(map(write, range(subjects)), "phantoms", subjects, "brain"))
        _write_tables(folder, pd.DataFrame(rows))
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_tables(folder: Path, table: pd.DataFrame) -> None:
    table[["participant_id", "age", "sex"]].to_csv(folder / "participants.tsv", sep="\t", index=False)
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
