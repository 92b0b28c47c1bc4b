"""NIfTI or MGH file -> canonical array: RAS, given spacing, a box around the brain's centre, intensities in [0, 1]."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.box import Profile, touched
from shards.intensity import rescale
from shards.nifti import read_raw
from shards.qc.figures import measure_foreground
from shards.quantization import quantize
from shards.resample import sample, sample_part


@dataclass(frozen=True)
class Space:
    """A template's space, which volumes are registered to.

    Attributes:
        name: label of the space in BIDS names.
        centre: (3,), of the template's brain, mm; at a voxel of the registered volumes.
        maps: labels of the probability maps beside each volume, as ``GM``; those of BIDS names.
    """

    name: str
    centre: tuple[float, float, float]
    maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Canonical:
    """A volume ready to store.

    Attributes:
        voxels: (H, W, D), [0, 1] in the type to store (:func:`shards.quantization.quantize`), axes towards right,
            anterior, superior; background 0.
        origin: (3,), where the grid's origin lies in the scanner's space, mm.
        sha256: of the source file.
        cropped: share of the brain's signal that lies outside the box.
        touches: sides of the box whose outermost layer the brain reaches.
        figures: of quality control, see :func:`shards.qc.figures.measure`.
        maps: label -> uint8 (H, W, D), 255 times the probability.
        flags: figures that violated a limit before packing.
    """

    voxels: NDArray[Any]
    origin: NDArray[np.float64]
    sha256: str
    cropped: float
    touches: list[str]
    figures: dict[str, float]
    maps: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


def grid(spacing: float, shape: tuple[int, int, int], space: Space | None = None) -> dict[str, Any]:
    """The common grid of all volumes: voxel ``shape // 2`` is the brain's centre of mass, and 0 mm.

    In a template's space it is the centre of the template's brain, at its place in that space.
    """
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-spacing * (n // 2) for n in shape]
    if space is None:
        return {"spacing": spacing, "shape": list(shape), "affine": affine.tolist()}
    affine[:3, 3] += space.centre
    return {"spacing": spacing, "shape": list(shape), "affine": affine.tolist(), "space": space.name}


def grid_centre(grid: Mapping[str, Any]) -> NDArray[np.float64]:
    """(3,), where voxel ``shape // 2`` of a grid lies, mm."""
    centre: NDArray[np.float64] = np.array(grid["affine"]) @ [*(n // 2 for n in grid["shape"]), 1]
    return centre[:3]


def place(grid: Mapping[str, Any], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4), from the voxels of a grid to mm in the space of a volume of that :attr:`Canonical.origin`."""
    affine = np.array(grid["affine"], float)
    affine[:3, 3] += origin - grid_centre(grid)
    return affine


def canonical(
    path: Path, spacing: float, shape: tuple[int, int, int], space: Space | None = None, dtype: str = "float16"
) -> Canonical:
    """Read a NIfTI file and resample it to the common grid.

    Scales the 0 to 99.5 percentiles of the foreground to [0, 1], then samples the box around the centre of mass. The
    box is shifted by at most half a voxel so that grids of equal spacing coincide and are not interpolated.

    Args:
        path: see :func:`shards.nifti.read`.
        spacing: mm, of all axes.
        shape: voxels.
        space: of a registered volume, which the box is then placed in; its probability maps lie beside the file.
        dtype: of the voxels.

    Raises:
        ValueError: the file cannot be used; the message gives the reason without the path.
    """
    brain = _read_brain(path, spacing, space)
    step, affine, size = brain.step, brain.affine, brain.shape
    offset = brain.centre - step @ [n // 2 for n in shape]
    box = sample_part(brain.signal, brain.corner, size, step, offset, shape)
    inside = float(box.sum(dtype=np.float64)) * abs(np.linalg.det(step)) / brain.profile.total
    touches = touched(brain.profile.extent(step, brain.centre), shape)
    found = Canonical(
        voxels=quantize(np.clip(box, 0, 1, out=box), dtype),
        origin=(affine @ [*brain.centre, 1])[:3],
        sha256=brain.sha256,
        cropped=max(0.0, 1 - inside),
        touches=touches,
        figures={**brain.figures, "box": float(len(touches))},
    )
    if space is None:
        return found
    del brain, box  # maps are read one by one, beside the result alone
    maps = {label: _map(map_file(path, label), label, affine, size, step, offset, shape) for label in space.maps}
    return replace(found, maps=maps)


def brain_extent(path: Path, spacing: float, space: Space | None = None) -> tuple[NDArray[np.int64], dict[str, float]]:
    """The layers of the common grid that the brain of a file fills, and its figures of quality control.

    Args:
        path, spacing, space: see :func:`canonical`.

    Returns:
        See :meth:`shards.box.Profile.extent` and :func:`shards.qc.figures.measure`.

    Raises:
        ValueError: as :func:`canonical`.
    """
    brain = _read_brain(path, spacing, space)
    return brain.profile.extent(brain.step, brain.centre), brain.figures


@dataclass(frozen=True)
class _Brain:
    """A scan on its way to the grid.

    Attributes:
        affine, sha256: see :class:`shards.nifti.Scan`.
        shape: (3,), voxels.
        figures: of quality control.
        signal: (x, y, z) in [0, 1], of the foreground.
        corner: (3,), the first voxel of the foreground.
        profile: of the signal.
        step: (3, 3), scan voxels per step of the grid.
        centre: (3,), the scan's voxel at the grid's centre.
    """

    affine: NDArray[np.float64]
    sha256: str
    shape: tuple[int, int, int]
    figures: dict[str, float]
    signal: NDArray[np.float32]
    corner: tuple[int, int, int]
    profile: Profile
    step: NDArray[np.floating[Any]]
    centre: NDArray[np.float64]


def _read_brain(path: Path, spacing: float, space: Space | None) -> _Brain:
    scan = read_raw(path)
    affine, digest, header = scan.affine, scan.sha256, scan.header
    found = scan.foreground()
    del scan  # the whole volume; from here on the foreground is enough
    figures = measure_foreground(found, affine) | header
    signal = rescale(found)
    profile = Profile(signal, found.corner)
    centre = profile.centre() if space is None else _voxel(affine, space.centre)
    step = np.linalg.inv(affine[:3, :3]) * spacing
    return _Brain(affine, digest, found.shape, figures, signal, found.corner, profile, step, np.rint(centre))


def _voxel(affine: NDArray[np.float64], millimetres: tuple[float, float, float]) -> NDArray[np.float64]:
    """(3,), the voxel at a place."""
    return np.linalg.solve(affine, np.array([*millimetres, 1.0]))[:3].astype(np.float64)


def map_file(path: Path, label: str) -> Path:
    """The probability map of a label beside a registered volume."""
    return path.with_name(f"{path.name.rpartition('_desc-')[0]}_label-{label}_probseg.nii.gz")


def _map(
    file: Path,
    label: str,
    affine: NDArray[np.float64],
    size: tuple[int, int, int],
    step: NDArray[np.floating[Any]],
    offset: NDArray[np.floating[Any]],
    shape: tuple[int, int, int],
) -> NDArray[np.uint8]:
    """A probability map beside a registered volume, which has that affine and size, sampled as the volume is, uint8."""
    if not file.is_file():
        raise ValueError(f"no map *_label-{label}_probseg.nii.gz beside it; run shards preprocess again")
    scan = read_raw(file)
    if scan.stored.shape != size or not np.allclose(scan.affine, affine, atol=1e-3):
        raise ValueError(f"its map of {label} has another grid")
    found = scan.foreground()
    if min(found.voxels.min(), found.empty) < -1e-3 or max(found.voxels.max(), found.empty) > 1 + 1e-3:
        raise ValueError(f"its map of {label} holds values outside of 0 to 1")
    if found.empty:
        box = sample(scan.voxels(), step, offset, shape)
    else:
        del scan
        box = sample_part(found.voxels, found.corner, found.shape, step, offset, shape)
    np.clip(box, 0, 1, out=box)
    box *= 255
    return np.rint(box, out=box).astype(np.uint8)
