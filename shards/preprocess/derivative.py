"""The files of a BIDS derivative."""

import gzip
import io
import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shards.files import write_bytes, write_text
from shards.participant_rows import Row
from shards.preprocess.images import Volume
from shards.preprocess.recipe import TISSUES, Recipe
from shards.preprocess.registration import transform_bytes
from shards.preprocess.scan import Result, parameters

PACKAGES = ("mvhpc", "antspyx", "deepbet", "nilearn", "scikit-learn", "nibabel", "numpy", "scipy", "torch")
TABLES = ("participants.tsv", "participants.json", "sessions.json", "sub-*/*_sessions.tsv", "sub-*/*_sessions.json")


def result_files(folder: Path, row: Row, suffix: str, recipe: Recipe) -> dict[str, Path]:
    """The files of a visit's results.

    Args:
        folder: of the derivative.
        row: the visit.
        suffix: of the scan, as ``T1w``.
        recipe: decides which there are.

    Returns:
        ``image``, ``sidecar``, ``mask``, the tissues, and ``transform`` -> path.
    """
    space = f"_space-{recipe.space}" if "registration" in recipe.steps else ""
    names = {
        "image": f"{row.key}{space}_desc-preproc_{suffix}.nii.gz",
        "sidecar": f"{row.key}{space}_desc-preproc_{suffix}.json",
        "mask": f"{row.key}{space}_desc-brain_mask.nii.gz",
    }
    if "tissue" in recipe.steps:
        names |= {tissue: f"{row.key}{space}_label-{tissue}_probseg.nii.gz" for tissue in TISSUES}
    if space:
        names["transform"] = f"{row.key}_from-{suffix}_to-{recipe.space}_mode-image_xfm.mat"
    return {name: _anat(folder, row) / file for name, file in names.items()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(
    folder: Path, row: Row, suffix: str, recipe: Recipe, result: Result, sources: Mapping[str, str]
) -> None:
    """Write the files of one visit; the sidecar comes last, and marks the visit as complete.

    Args:
        folder: of the derivative.
        row: the visit.
        suffix: of the scan.
        recipe: that was followed.
        result: to write.
        sources: role -> SHA-256 of the file: the scan, its mask, the reference of a follow-up.
    """
    _anat(folder, row).mkdir(parents=True, exist_ok=True)
    files = result_files(folder, row, suffix, recipe)
    _write_volume(files["image"], result.image, np.float32)
    _write_volume(files["mask"], result.mask, np.uint8)
    for tissue, volume in result.tissue.items():
        _write_volume(files[tissue], volume, np.float32)
    if result.matrix is not None:
        write_bytes(files["transform"], transform_bytes(result.matrix))
    sidecar = {
        "SkullStripped": True,
        "SpatialReference": recipe.space if result.matrix is not None else "orig",
        "SourceSHA256": dict(sources),
        "BrainExtraction": result.extraction,
        "Recipe": recipe.to_dict(),
        "Parameters": parameters(recipe),
        "Software": versions(),
        "Figures": {name: float(f"{value:.6g}") for name, value in result.figures.items()},
        "Flags": result.flags,
        "Suspect": result.suspect,
    }
    write_text(files["sidecar"], json.dumps(sidecar, indent=1) + "\n")


def quality_file(image: Path) -> Path:
    """The sidecar of a preprocessed volume."""
    return image.with_name(f"{image.name.partition('.')[0]}.json")


def read_quality(image: Path) -> tuple[dict[str, float], list[str]]:
    """Figures and flags of quality control in the sidecar of a preprocessed volume.

    Raises:
        ValueError: no sidecar, or a damaged one.
    """
    path = quality_file(image)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(x) for name, x in content["Figures"].items()}, [str(x) for x in content["Flags"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("no usable sidecar beside it; run shards preprocess again") from None


def read_sidecar(folder: Path, row: Row, suffix: str, recipe: Recipe) -> dict[str, Any] | None:
    """The sidecar of a complete visit; None where there is none."""
    try:
        content = json.loads(result_files(folder, row, suffix, recipe)["sidecar"].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def clear_visit(folder: Path, row: Row) -> None:
    """Remove the results of a visit, as those of another recipe; the sidecars first, which mark it as complete."""
    _clear(_anat(folder, row))


def clear_others(folder: Path, keys: Collection[str]) -> int:
    """Leave only the results of some visits: those of others, all tables, partial files and empty folders are removed.

    Args:
        folder: of the derivative.
        keys: of the visits to keep.

    Returns:
        The number of visits that were removed.
    """
    removed = 0
    for anat in [*folder.glob("sub-*/anat/"), *folder.glob("sub-*/ses-*/anat/")]:
        if "_".join(anat.relative_to(folder).parts[:-1]) not in keys:
            removed += _clear(anat)
    for pattern in (*TABLES, "**/.*.part"):
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in ("sub-*/ses-*/anat/", "sub-*/ses-*/", "sub-*/anat/", "sub-*/"):
        for place in folder.glob(pattern):
            if not any(place.iterdir()):
                place.rmdir()
    return removed


def _clear(anat: Path) -> bool:
    """Remove the results in a visit's folder; whether there were any."""
    files = sorted(anat.glob("sub-*"), key=lambda path: path.suffix != ".json")
    for path in files:
        path.unlink()
    return bool(files)


def _anat(folder: Path, row: Row) -> Path:
    session = row.key[len(row.subject) + 1 :]  # empty without sessions
    return folder / row.subject / session / "anat"


def _write_volume(path: Path, volume: Volume, dtype: type[Any]) -> None:
    image = nib.Nifti1Image(volume.voxels.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=4, mtime=0, filename="") as packed:
        packed.write(image.to_bytes())
    write_bytes(path, stream.getvalue())
