"""A completed volume on the grid of the scan that it completes; the known voxels are the scan's, bit for bit."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from shards import intensity, nifti, resample
from shards.foreground import background

FAINT = 0.02  # of a drawn volume; what is fainter is background
KNOWN = 0.99  # share of known voxels of the mask from which on a voxel is known


@dataclass(frozen=True)
class OwnGrid:
    """A scan as it is stored.

    Attributes:
        raw: (X, Y, Z), as stored.
        image: of the scan, for its header and affine.
        scan: its voxels and affine, axes nearest to right, anterior, superior (RAS).
        known: bool (X, Y, Z) of ``scan``.
        inside: bool of ``scan``, the voxels within the box of the model's grid.
        to_grid: (4, 4), from voxels of ``scan`` to those of the model's grid.
    """

    raw: NDArray
    image: SpatialImage
    scan: nifti.Scan
    known: NDArray[np.bool_]
    inside: NDArray[np.bool_]
    to_grid: NDArray[np.float64]

    def fill(self, drawn: NDArray[np.float32]) -> nib.Nifti1Image:
        """The scan with its unknown voxels drawn, in its own type, grid, header units and intensities.

        Unknown voxels outside of the model's box become background.

        Args:
            drawn: (H, W, D) in [0, 1], on the model's grid.
        """
        low, high = intensity.intensity_scale(self.scan.voxels)
        signal = resample.sample(drawn, self.to_grid[:3, :3], self.to_grid[:3, 3], self.scan.voxels.shape)
        values = np.where(signal > FAINT, low + signal * (high - low), background(self.scan.voxels))
        stored = self._stored(self._native(values.astype(np.float64)))
        whole = np.where(self._native(self.known), self.raw, stored)
        source = self.image.header
        image = nib.Nifti1Image(whole, self.image.affine, dtype=whole.dtype)
        if isinstance(source, nib.Nifti1Header):
            image.header.set_xyzt_units(source.get_xyzt_units()[0])
            for form in ("qform", "sform"):
                affine, code = getattr(source, f"get_{form}")(coded=True)
                getattr(image, f"set_{form}")(affine, code, update_affine=False)
        image.header.set_slope_inter(*self._scale())
        return image

    def _native(self, array: NDArray) -> NDArray:
        """An array on the grid of ``scan`` with the axes of the file."""
        return apply_orientation(array, ornt_transform(axcodes2ornt("RAS"), io_orientation(self.image.affine)))

    def _scale(self) -> tuple[float, float]:
        """Slope and intercept of stored values."""
        proxy = self.image.dataobj
        return float(getattr(proxy, "slope", 1) or 1), float(getattr(proxy, "inter", 0) or 0)

    def _stored(self, values: NDArray[np.float64]) -> NDArray:
        """Values in the type that the file stores."""
        slope, inter = self._scale()
        stored = (values - inter) / slope
        if self.raw.dtype.kind in "iu":
            limits = np.iinfo(self.raw.dtype)
            stored = np.clip(np.rint(stored), limits.min, limits.max)
        return stored.astype(self.raw.dtype)


def open_own_grid(path: Path, mask: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> OwnGrid:
    """Read a scan and the mask of its known voxels.

    Args:
        path: of the scan.
        mask: in the same space, of any voxel size; non-zero where the scan is known.
        affine: (4, 4), from the model's grid to the space of the scan, mm.
        shape: (H, W, D) of the model's grid.

    Raises:
        ValueError: a file that cannot be read, or whose header allows more than one place.
    """
    scan, marked = nifti.read(path), nifti.read(mask)
    try:
        image: Any = nib.load(path)
        raw = np.asanyarray(image.dataobj.get_unscaled())
    except (ImageFileError, OSError) as error:
        raise ValueError(f"{error}; give a file with the ending of its format") from error
    raw = raw.reshape(raw.shape[:3])
    there = np.linalg.inv(marked.affine) @ scan.affine
    weight = (marked.voxels != 0).astype(np.float32)
    size = scan.voxels.shape
    share = resample.sample(weight, there[:3, :3], there[:3, 3], size, beyond="nearest")
    to_grid = np.linalg.inv(affine) @ scan.affine
    places = np.moveaxis(np.indices(size), 0, -1) @ to_grid[:3, :3].T + to_grid[:3, 3]  # (X, Y, Z, 3)
    inside = ((places > -0.5) & (places < np.array(shape) - 0.5)).all(-1)
    found = OwnGrid(raw, image, scan, np.asarray(share > KNOWN), np.asarray(inside), to_grid)
    slope, inter = found._scale()
    if found._native(scan.voxels).shape != raw.shape or not np.allclose(
        found._native(scan.voxels), raw * slope + inter, rtol=1e-4
    ):
        raise ValueError("the order of its axes depends on which of sform and qform is read; correct its header")
    return found


def encode_nifti(image: nib.Nifti1Image, ending: str) -> bytes:
    """The bytes of a file with that ending, compressed where it is ``.nii.gz``; equal for equal images."""
    raw: bytes = image.to_bytes()
    return gzip.compress(raw, mtime=0) if ending.endswith(".gz") else raw
