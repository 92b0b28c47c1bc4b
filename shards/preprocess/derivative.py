"""The files of a BIDS derivative."""

import gzip
import io
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shards.files import atomic_file, write_bytes, write_text
from shards.preprocess.images import Volume
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import write_transform
from shards.preprocess.scan import Result

GENERATOR = "shards preprocess"
PACKAGES = ("mvhpc", "antspyx", "deepbet", "nilearn", "scikit-learn", "nibabel", "numpy", "scipy", "torch")
DESCRIPTION = "dataset_description.json"


def stem(folder: Path, key: str, suffix: str) -> tuple[Path, str]:
    """The folder ``anat`` of a visit ``sub-X[_ses-Y]`` and the start of its file names."""
    del suffix
    return folder.joinpath(*key.split("_"), "anat"), key


def names(key: str, suffix: str, recipe: Recipe) -> dict[str, str]:
    """File names of a visit's results: ``image``, ``mask``, ``sidecar``, ``transform`` and one per tissue."""
    space = f"_space-{recipe.space}" if "registration" in recipe.steps else ""
    found = {
        "image": f"{key}{space}_desc-preproc_{suffix}.nii.gz",
        "sidecar": f"{key}{space}_desc-preproc_{suffix}.json",
        "mask": f"{key}{space}_desc-brain_mask.nii.gz",
    }
    if "tissue" in recipe.steps:
        found |= {tissue: f"{key}{space}_label-{tissue}_probseg.nii.gz" for tissue in ("GM", "WM", "CSF")}
    if space:
        found["transform"] = f"{key}_from-{suffix}_to-{recipe.space}_mode-image_xfm.mat"
    return found


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(folder: Path, key: str, suffix: str, recipe: Recipe, result: Result) -> None:
    """Write the files of one visit; the sidecar comes last, and marks the visit as complete."""
    anat = folder.joinpath(*key.split("_"), "anat")
    anat.mkdir(parents=True, exist_ok=True)
    found = names(key, suffix, recipe)
    _write_volume(anat / found["image"], result.image, np.float32)
    _write_volume(anat / found["mask"], result.mask, np.uint8)
    for tissue, volume in result.tissue.items():
        _write_volume(anat / found[tissue], volume, np.float32)
    if result.matrix is not None:
        with atomic_file(anat / found["transform"]) as part:
            temporary = part.with_suffix(".mat")
            write_transform(result.matrix, temporary)
            temporary.replace(part)
    sidecar = {
        "SpatialReference": recipe.space if result.matrix is not None else "orig",
        "SkullStripped": True,
        "SourceSHA256": result.sha256,
        "BrainExtraction": result.extraction,
        "Recipe": recipe.to_dict(),
        "Software": versions(),
        "Figures": {name: round(value, 6) for name, value in result.figures.items()},
    }
    write_text(anat / found["sidecar"], json.dumps(sidecar, indent=1) + "\n")


def read_sidecar(folder: Path, key: str, suffix: str, recipe: Recipe) -> dict[str, Any] | None:
    """The sidecar of a complete visit; None where there is none."""
    path = folder.joinpath(*key.split("_"), "anat", names(key, suffix, recipe)["sidecar"])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_volume(path: Path, volume: Volume, dtype: type[Any]) -> None:
    image = nib.Nifti1Image(volume.voxels.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=4, mtime=0, filename="") as packed:
        packed.write(image.to_bytes())
    write_bytes(path, stream.getvalue())
