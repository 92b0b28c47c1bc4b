"""NIfTI or MGH file -> canonical array: RAS, given spacing, a box around the brain's centre, intensities in [0, 1].

Only the voxels and the affine are read from a file. Header text, extensions and all other metadata are discarded.
"""

import gzip
import hashlib
import io
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shards.box import extent, touched
from shards.files import sha256
from shards.headers import affine_mm, compare_forms
from shards.qc.figures import background, measure, tissue_bounds
from shards.quantization import quantize

PERCENTILE = 99.5  # of the foreground is scaled to 1
FAINT = 1e-3  # of bright tissue
RINGING = 0.1  # share of the foreground; fewer values below the background are errors of interpolation
LARGEST = 2**33  # bytes of an unpacked file; a larger one is damaged, or not a structural scan
POINTERS = (b"/annex/objects/", b"version https://git-lfs.github.com/spec/")  # in place of a file's content
PAIR = (".hdr", ".img")
MGH = 1  # version in the first four bytes of an MGH file, in the place of the header size of NIfTI
PLAUSIBLE = (0.05, 50.0)  # mm, of a voxel
FWHM_TO_SIGMA = 1 / math.sqrt(8 * math.log(2))


@dataclass(frozen=True)
class Scan:
    """A volume as read from a file.

    Attributes:
        voxels: float32 (X, Y, Z), axes nearest to right, anterior, superior, contiguous.
        affine: (4, 4), voxel to mm in the scanner's space.
        sha256: of the file.
        header: figures of quality control, see :func:`shards.headers.compare_forms`.
    """

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]
    sha256: str
    header: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Figures of quality control of voxels and header."""
        return measure(self.voxels, self.affine) | self.header


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
        path: see :func:`read`.
        spacing: mm, of all axes.
        shape: voxels.
        space: of a registered volume, which the box is then placed in; its probability maps lie beside the file.
        dtype: of the voxels.

    Raises:
        ValueError: the file cannot be used; the message gives the reason without the path.
    """
    scan = read(path)
    figures = scan.figures()
    signal = _rescale(scan.voxels)  # (X, Y, Z) in [0, 1]
    step, centre = _place(scan, signal, spacing, space)
    offset = centre - step @ [n // 2 for n in shape]
    box = sample(signal, step, offset, shape)
    inside = float(box.sum(dtype=np.float64)) * abs(np.linalg.det(step)) / float(signal.sum(dtype=np.float64))
    return Canonical(
        voxels=quantize(np.clip(box, 0, 1), dtype),
        origin=(scan.affine @ [*centre, 1])[:3],
        sha256=scan.sha256,
        cropped=max(0.0, 1 - inside),
        touches=(touches := touched(extent(signal, step, centre), shape)),
        figures={**figures, "box": float(len(touches))},
        maps={label: _map(path, label, scan, step, offset, shape) for label in (space.maps if space else ())},
    )


def brain_extent(path: Path, spacing: float, space: Space | None = None) -> tuple[NDArray[np.int64], dict[str, float]]:
    """The layers of the common grid that the brain of a file fills, and its figures of quality control.

    Args:
        path, spacing, space: see :func:`canonical`.

    Returns:
        See :func:`shards.box.extent` and :func:`shards.qc.figures.measure`.

    Raises:
        ValueError: as :func:`canonical`.
    """
    scan = read(path)
    signal = _rescale(scan.voxels)
    return extent(signal, *_place(scan, signal, spacing, space)), scan.figures()


def _place(
    scan: Scan, signal: NDArray[np.float32], spacing: float, space: Space | None
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Scan voxels per step of the grid, (3, 3), and the scan's voxel at the grid's centre, (3,)."""
    centre = ndimage.center_of_mass(signal) if space is None else _voxel(scan.affine, space.centre)
    return np.linalg.inv(scan.affine[:3, :3]) * spacing, np.rint(np.asarray(centre, np.float64))


def _voxel(affine: NDArray[np.float64], millimetres: tuple[float, float, float]) -> NDArray[np.float64]:
    """(3,), the voxel at a place."""
    return np.linalg.solve(affine, np.array([*millimetres, 1.0]))[:3].astype(np.float64)


def _map(
    path: Path,
    label: str,
    scan: Scan,
    step: NDArray[np.floating[Any]],
    offset: NDArray[np.floating[Any]],
    shape: tuple[int, int, int],
) -> NDArray[np.uint8]:
    """The probability map of a label beside a registered volume, sampled as the volume is, uint8."""
    file = path.with_name(f"{path.name.rpartition('_desc-')[0]}_label-{label}_probseg.nii.gz")
    if not file.is_file():
        raise ValueError(f"no map *_label-{label}_probseg.nii.gz beside it; run shards preprocess again")
    found = read(file)
    if found.voxels.shape != scan.voxels.shape or not np.allclose(found.affine, scan.affine, atol=1e-3):
        raise ValueError(f"its map of {label} has another grid")
    if found.voxels.min() < -1e-3 or found.voxels.max() > 1 + 1e-3:
        raise ValueError(f"its map of {label} holds values outside of 0 to 1")
    return np.rint(255 * np.clip(sample(found.voxels, step, offset, shape), 0, 1)).astype(np.uint8)


def read(path: Path) -> Scan:
    """Read a NIfTI file, its axes reordered to those nearest to right, anterior, superior.

    Args:
        path: ``.nii``, ``.nii.gz``, either file of a pair ``.hdr`` and ``.img``, or FreeSurfer's ``.mgz`` or ``.mgh``.

    Raises:
        ValueError: not such a file, damaged, not 3D, not real numbers, NaN voxels, or an affine that cannot be used;
            the message gives the reason without the path.
    """
    raw, voxels = _pair(path) if path.suffix in PAIR else (path.read_bytes(), b"")
    image, header = _parse(raw, voxels)
    image = nib.as_closest_canonical(image)
    return Scan(_voxels(image), affine_mm(image), hashlib.sha256(raw + voxels).hexdigest(), header)


def file_sha256(path: Path) -> str:
    """:attr:`Scan.sha256` of a file; of a pair, of header and image.

    Raises:
        ValueError: half of a pair.
        OSError: the file cannot be read.
    """
    return sha256(path) if path.suffix not in PAIR else hashlib.sha256(b"".join(_pair(path))).hexdigest()


def sample(
    voxels: NDArray[np.float32],
    step: NDArray[np.floating[Any]],
    offset: NDArray[np.floating[Any]],
    shape: tuple[int, int, int],
    beyond: str = "grid-constant",
) -> NDArray[np.float32]:
    """Sample a volume linearly at ``step @ index + offset``, without aliasing.

    For a coarser target the volume is smoothed first, with the Gaussian by which the point spread functions of the two
    voxel sizes differ (Cardoso et al., MICCAI 2015).

    Args:
        voxels: (X, Y, Z).
        step: (3, 3), voxels per step along each target axis, in columns.
        offset: (3,), voxel at target index 0.
        shape: of the result.
        beyond: SciPy's mode outside the volume: ``grid-constant`` for zeros, ``nearest`` for its edge. (``constant``
            would set the outermost voxels to zero where rounding moves them out of the volume.)

    Returns:
        float32 of ``shape``.
    """
    coarser = np.maximum(np.linalg.norm(step, axis=1) ** 2 - 1, 0)  # (3,), of the volume's axes
    smooth = ndimage.gaussian_filter(voxels, np.sqrt(coarser) * FWHM_TO_SIGMA, mode=beyond)
    return ndimage.affine_transform(smooth, step, offset, output_shape=shape, order=1, mode=beyond)


def _pair(path: Path) -> tuple[bytes, bytes]:
    """The bytes of a header and of its image file."""
    files = [path.with_suffix(suffix) for suffix in PAIR]
    for file in files:
        if not file.is_file():
            raise ValueError(f"half of a pair: there is no {file.suffix} file beside it")
    header, voxels = (file.read_bytes() for file in files)
    if header[344:347] not in {b"ni1", b"n+1"} and header[4:7] not in {b"ni2", b"n+2"}:
        raise ValueError("in the Analyze format, which does not tell left from right: convert it to NIfTI")
    return header, voxels


def _parse(raw: bytes, voxels: bytes = b"") -> tuple[Any, dict[str, float]]:
    """A NIfTI image from the bytes of a NIfTI or MGH file, gzip checksum verified, and figures of its header.

    Args:
        raw: of the file.
        voxels: of a pair's image.
    """
    if raw[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(raw)) as stream:
                raw = stream.read(LARGEST + 1)
        except EOFError:
            raise ValueError("truncated gzip file") from None
        except (OSError, zlib.error):
            raise ValueError("damaged gzip file") from None
    if len(raw) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB unpacked")
    if raw.startswith(POINTERS):
        raise ValueError("the file is a pointer whose content was not fetched (git annex get, git lfs pull)")
    kind = {348: nib.Nifti1Pair, 540: nib.Nifti2Pair} if voxels else {348: nib.Nifti1Image, 540: nib.Nifti2Image}
    kind[MGH] = nib.MGHImage
    if not raw:
        raise ValueError("the file is empty; copy or download it again")
    size = next((n for n in kind if n in (int.from_bytes(raw[:4], order) for order in ("little", "big"))), 0)
    if not size:
        raise ValueError("not a NIfTI file, nor one of FreeSurfer (.mgz)")
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # it logs every irregularity of every header
    try:
        if voxels:
            files = {
                "header": nib.FileHolder(fileobj=io.BytesIO(raw)),
                "image": nib.FileHolder(fileobj=io.BytesIO(voxels)),
            }
            image = kind[size].from_file_map(files)
        else:
            image = kind[size].from_bytes(raw)
        unoriented = float(size == MGH and int.from_bytes(raw[28:30], "big", signed=True) < 1)  # goodRASFlag
        if size == MGH:
            image = nib.Nifti1Image.from_image(image)
    except Exception:
        raise ValueError("damaged NIfTI header") from None
    dims = image.shape
    while len(dims) > 3 and dims[-1] == 1:
        dims = dims[:-1]
    if len(dims) != 3:
        raise ValueError(f"{len(dims)}D volume of shape {' x '.join(map(str, image.shape))}, expected 3D")
    if min(dims) < 2:
        raise ValueError(f"not a volume: shape {' x '.join(map(str, dims))}")
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"voxels of type {image.get_data_dtype()}, expected real numbers")
    if math.prod(dims) * image.get_data_dtype().itemsize > len(raw) + len(voxels):
        raise ValueError(f"truncated: too short for {' x '.join(map(str, dims))} voxels")
    if not np.isfinite(image.affine).all():
        raise ValueError("affine with NaN or infinite entries")
    directions = affine_mm(image)[:3, :3]
    zooms = np.linalg.norm(directions, axis=0)
    if zooms.min() == 0 or abs(np.linalg.det(directions / zooms)) < 1e-3:
        raise ValueError("singular affine")
    header = {"unoriented": unoriented} if size == MGH else compare_forms(image)
    if zooms.min() < PLAUSIBLE[0] or zooms.max() > PLAUSIBLE[1]:
        raise ValueError(f"voxels of {' x '.join(f'{z:g}' for z in zooms)} mm: wrong units or affine")
    return nib.squeeze_image(image), header


def _voxels(image: Any) -> NDArray[np.float32]:
    """Scaled voxel values, (X, Y, Z), contiguous, so that sums do not depend on the file's orientation."""
    try:
        with np.errstate(over="ignore"):  # counted as infinite below
            voxels = np.ascontiguousarray(image.get_fdata(dtype=np.float32))
    except Exception:
        raise ValueError("voxels cannot be read: damaged or truncated file") from None
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        raise ValueError(f"{bad} voxels are NaN or infinite")
    return voxels


def intensity_scale(voxels: NDArray[np.float32]) -> tuple[float, float]:
    """The values of a scan that become 0 and 1 in its canonical volume.

    Raises:
        ValueError: a constant volume.
    """
    scaled = _rescale(voxels)
    inner = (scaled > 0) & (scaled < 1)
    if not inner.any() or scaled[inner].min() == scaled[inner].max():
        raise ValueError("constant volume: the foreground has no contrast")
    shares, values = scaled[inner].astype(np.float64), voxels[inner].astype(np.float64)
    a, b = int(shares.argmin()), int(shares.argmax())
    span = (values[b] - values[a]) / (shares[b] - shares[a])
    low = values[a] - shares[a] * span
    return float(low), float(low + span)


def _rescale(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Foreground percentiles 0 to 99.5 -> [0, 1], background -> 0.

    The background is the most frequent value on the volume's faces. This holds for brain-extracted volumes with any
    background (0, -1024, 0 among negative values); in a volume with noise in the air it removes almost nothing. What
    differs from it by less than a thousandth of the bright tissue is background too: interpolation leaves it there.

    The percentiles leave out what no tissue has: values below the background where they are few (interpolation beside
    edges), and those outside of :func:`shards.qc.figures.tissue_bounds` (dead pixels, spikes, overflows).
    """
    if voxels.min() == voxels.max():
        raise ValueError(f"constant volume: all voxels are {voxels.flat[0]:g}")
    empty = background(voxels)
    strength = np.abs(voxels - np.float32(empty))
    foreground = strength > FAINT * np.percentile(strength[strength > 0], PERCENTILE)
    values = voxels[foreground]
    lowest, highest = tissue_bounds(values)
    if (values < empty).mean() < RINGING:
        lowest = max(lowest, empty)
    tissue = values[(values >= lowest) & (values <= highest)]
    low, high = float(tissue.min()), float(np.percentile(tissue, PERCENTILE))
    if not high > low:
        raise ValueError(f"constant volume: the foreground has no contrast (all {low:g})")
    scaled = np.clip((voxels - low) / (high - low), 0, 1)
    scaled[~foreground] = 0
    return scaled
