"""Reading NIfTI and MGH files: voxels and affine, nothing else of the file."""

import hashlib
import io
import logging
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from shards.files import sha256
from shards.foreground import Foreground, cut, faces, most_frequent, place_foreground
from shards.headers import affine_mm, compare_forms, millimetres, shear_degrees
from shards.qc.figures import measure

LARGEST = 2**33  # bytes of an unpacked file; a larger one is damaged, or not a structural scan
GZIP = 31  # zlib's window bits for a gzip stream with its checksum
POINTER = re.compile(rb"^version https://git-lfs\.github\.com/spec/|annex[/\\]objects[/\\]")  # in place of content
SMALL = 1024  # bytes; pointers, and links that were checked out as text, are shorter
PAIR = (".hdr", ".img")
MGH = 1  # version in the first four bytes of an MGH file, in the place of the header size of NIfTI
PLAUSIBLE = (0.05, 50.0)  # mm, of a voxel


@dataclass(frozen=True)
class Scan:
    """A volume as read from a file.

    Attributes:
        voxels: float32 (X, Y, Z), axes nearest to right, anterior, superior, contiguous.
        affine: (4, 4), voxel to mm in the scanner's space.
        sha256: of the file.
        header: figures of quality control, see :func:`shards.headers.compare_forms`, and ``shear_degrees``.
    """

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]
    sha256: str
    header: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Figures of quality control of voxels and header."""
        return measure(self.voxels, self.affine) | self.header


@dataclass(frozen=True)
class RawScan:
    """A volume as its file stores it.

    Attributes:
        stored: (X, Y, Z), of the file's type, axes nearest to right, anterior, superior, in the file's order in memory.
        slope, intercept: the voxels are ``slope * stored + intercept``.
        affine, sha256, header: see :class:`Scan`.
    """

    stored: NDArray[Any]
    slope: float
    intercept: float
    affine: NDArray[np.float64]
    sha256: str
    header: dict[str, float]

    def voxels(self) -> NDArray[np.float32]:
        """All voxels, contiguous, so that sums do not depend on the file's orientation.

        Raises:
            ValueError: NaN or infinite voxels.
        """
        return _finite(self._scaled(self.stored))

    def foreground(self) -> Foreground:
        """The foreground; voxels beyond it are not converted.

        Raises:
            ValueError: as :meth:`voxels`.
        """
        stored = faces(self.stored)
        outer = self._scaled(stored)
        if not np.isfinite(outer).all():
            _finite(self._scaled(self.stored))
        empty = most_frequent(outer)
        box = cut(self.stored, stored[np.flatnonzero(outer == np.float32(empty))[0]])
        return place_foreground(_finite(self._scaled(self.stored[box])), box, self.stored.shape, empty, outer)

    def _scaled(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            scaled = apply_read_scaling(np.ascontiguousarray(stored), self.slope, self.intercept)
            return np.ascontiguousarray(scaled, np.float32)


def _finite(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    if bad:
        raise ValueError(f"{bad} voxels are NaN or infinite")
    return voxels


def read(path: Path) -> Scan:
    """Read a NIfTI file, its axes reordered to those nearest to right, anterior, superior.

    Args:
        path: ``.nii``, ``.nii.gz``, either file of a pair ``.hdr`` and ``.img``, or FreeSurfer's ``.mgz`` or ``.mgh``.

    Raises:
        ValueError: not such a file, damaged, not 3D, not real numbers, NaN voxels, or an affine that cannot be used;
            the message gives the reason without the path.
    """
    raw = read_raw(path)
    return Scan(raw.voxels(), raw.affine, raw.sha256, raw.header)


def read_raw(path: Path) -> RawScan:
    """:func:`read`, before the voxels are scaled.

    Raises:
        ValueError: as :func:`read`, but for NaN voxels.
    """
    raw, voxels = _pair(path) if path.suffix in PAIR else (_content(path), b"")
    digest = hashlib.sha256(raw)
    digest.update(voxels)
    image, header = _parse(raw, voxels)
    try:
        stored = np.asarray(image.dataobj.get_unscaled())
        stored = stored.reshape(stored.shape[:3], order="F")
    except Exception:
        raise ValueError("voxels cannot be read: damaged or truncated file") from None
    turn = io_orientation(image.affine)
    unit = millimetres(image)
    affine = np.diag([unit, unit, unit, 1.0]) @ (image.affine @ inv_ornt_aff(turn, stored.shape))
    scale = image.dataobj.slope, image.dataobj.inter
    return RawScan(apply_orientation(stored, turn), *scale, affine, digest.hexdigest(), header)


def file_sha256(path: Path) -> str:
    """:attr:`Scan.sha256` of a file; of a pair, of header and image.

    Raises:
        ValueError: half of a pair.
        OSError: the file cannot be read.
    """
    return sha256(path) if path.suffix not in PAIR else hashlib.sha256(b"".join(_pair(path))).hexdigest()


def _unzip(raw: bytes) -> bytes:
    """The content of a gzip file, all its members, checksums verified; more than :data:`LARGEST` bytes are cut off."""
    parts, left = [], LARGEST + 1
    while raw and left > 0:
        stream = zlib.decompressobj(GZIP)
        try:
            parts.append(stream.decompress(raw, left))
        except zlib.error:
            raise ValueError("damaged gzip file") from None
        left -= len(parts[-1])
        if not stream.eof and left > 0:
            raise ValueError("truncated gzip file")
        raw = stream.unused_data.lstrip(b"\0")  # padding after a member
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _content(path: Path) -> bytes:
    """The bytes of a file."""
    raw = path.read_bytes()
    if len(raw) < SMALL and POINTER.search(raw):
        raise ValueError("the file is a pointer whose content was not fetched (git annex get, git lfs pull)")
    return raw


def _pair(path: Path) -> tuple[bytes, bytes]:
    """The bytes of a header and of its image file."""
    files = [path.with_suffix(suffix) for suffix in PAIR]
    for file in files:
        if not file.is_file():
            raise ValueError(f"half of a pair: there is no {file.suffix} file beside it")
    header, voxels = map(_content, files)
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
        raw = _unzip(raw)
    if len(raw) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 30} GiB unpacked")
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
    return image, header | {"shear_degrees": shear_degrees(image.affine)}
