"""Procedural T1w-like brains whose anatomy follows a known joint law with age and sex (:mod:`shards.anatomy`).

A brain is a handful of signed distance functions of its position: the intracranial envelope; the sheets of CSF between
and within the hemispheres (fissures, tentorium, sulci); ventricles, deep grey matter and hippocampi. Sulci are the
nodal surfaces of a random field of narrow spatial frequency, carried inward radially. Every volume that was drawn is
then *solved for*: head size, ventricles, hippocampi, brain and white matter each have one level, moved until the
partial volumes of the rendered image add up to the draw. Whatever else varies between subjects (folds, pose, aspect,
asymmetry, intensity scale, bias field, noise) comes from a stream of its own that knows nothing of age or sex.

Positions are in millimetres of a template of average size: x right, y anterior, z superior.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import map_coordinates
from scipy.optimize import brentq

from shards.anatomy import LAW, Anatomy, draw_anatomy, draw_person
from shards.progress import progress

Array = NDArray[np.float32]

FIELD_OF_VIEW = (160.0, 192.0, 160.0)  # mm; holds heads of up to 2,100 ml
TEMPLATE_ML = 1400.0  # intracranial volume of the template below
SUPERSAMPLING = 2
LATTICE, LATTICE_MM, FOLD_MM = 64, 3.0, 23.0  # the folds' random field: samples per axis, spacing, wavelength
INTENSITY = {"csf": 0.16, "grey": 0.56, "deep": 0.64, "white": 0.90}
NOISE = 0.02  # SD, in the units above


class Tissues(NamedTuple):
    """Share of each output voxel, float32 (H, W, D); they add up to the share inside the head."""

    csf: Array  # all of it, the ventricles included
    ventricles: Array  # lateral ones
    grey: Array  # deep grey matter and hippocampi included
    deep: Array
    hippocampus: Array
    white: Array


# --- distance functions: mm, positive inside -----------------------------------------------------------------------


def _column(values: ArrayLike) -> Array:
    return np.asarray(values, np.float32)[:, None]


def _ellipsoid(p: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    size = _column(radii)
    q = (p - _column(centre)) / size
    k0 = np.sqrt((q**2).sum(0)) + np.float32(1e-4)
    q /= size
    return k0 * (1 - k0) / (np.sqrt((q**2).sum(0)) + np.float32(1e-6))


def _union(*parts: Array, blend: float = 5.0) -> Array:
    """Union whose seams are rounded over ``blend`` mm."""
    out = parts[0]
    for part in parts[1:]:
        h = np.maximum(blend - np.abs(out - part), 0) / blend
        out = np.maximum(out, part) + h * h * (blend / 4)
    return out


def _tube(p: Array, knots: Sequence[tuple[float, float, float, float]]) -> tuple[Array, Array]:
    """Distance to, and radius of, the nearest part of a tube through ``knots`` (x, y, z, radius)."""
    best = np.full(p.shape[1], np.inf, np.float32)
    distance, radius = np.zeros_like(best), np.ones_like(best)
    for a, b in pairwise(np.asarray(knots, np.float32)):
        axis = b[:3] - a[:3]
        offset = p - a[:3, None]
        along = np.clip(axis @ offset / (axis @ axis), 0, 1)
        d = np.sqrt(((offset - axis[:, None] * along) ** 2).sum(0))
        r = a[3] + (b[3] - a[3]) * along
        nearer = d < best * r
        best[nearer] = (d / r)[nearer]
        distance[nearer], radius[nearer] = d[nearer], r[nearer]
    return distance, radius


def _excess(x: Array, limit: float = 0.0) -> Array:
    return np.maximum(x - np.float32(limit), 0)


VENTRICLE = [  # one side: frontal horn, body, atrium; then occipital and temporal horns
    [(15, 36, 4, 1.8), (9, 24, 12, 3.4), (7, 6, 17, 3.6), (9, -14, 19, 3.4), (17, -32, 15, 4.2), (24, -42, 5, 4.4)],
    [(24, -42, 5, 4.4), (22, -64, 3, 1.6)],
    [(24, -42, 5, 4.2), (35, -27, -11, 2.0), (34, -8, -19, 1.2)],
]
HIPPOCAMPUS = [(22, -3, -20, 4.2), (27, -13, -19, 5.2), (28, -23, -15, 4.4), (25, -33, -8, 3.4), (18, -38, 0, 2.2)]


class _Surfaces(NamedTuple):
    """Everything about the voxels (N,) near the head that its levels are solved over."""

    envelope: Array  # distance to the outside of the head, positive inside
    pial: Array  # distance to the CSF around and between the gyri
    medullar: Array  # the same, grown where no cortex lies below the CSF: corpus callosum, brain stem
    deep: Array  # signed distance of the deep grey matter
    cisterns: Array  # third and fourth ventricle
    ventricle: tuple[Array, Array]  # distance, radius
    hippocampus: tuple[Array, Array]


def _parts(p: Array) -> tuple[Array, Array, Array]:
    """Signed distances of cerebrum, cerebellum and brain stem."""
    egg = p.copy()
    egg[0] /= 1 - np.float32(0.0017) * p[1]  # the frontal lobes are narrower than the parietal ones
    body = _ellipsoid(egg, (0, -3, 13), (66, 83, 52))
    base = p[2] + 17 + _excess(-p[1] - 40) * np.float32(0.15)
    body = -_union(-body, -base, blend=14.0)
    mirrored = np.stack([np.abs(p[0]), p[1], p[2] - np.float32(0.12) * p[1]])
    temporal = _ellipsoid(mirrored, (41, 0, -17), (23, 42, 20))
    cerebellum = _union(
        _ellipsoid(mirrored, (24, -53, -30), (29, 28, 22)), _ellipsoid(p, (0, -48, -32), (16, 30, 22)), blend=8.0
    )
    distance, radius = _tube(p, [(0, -12, -8, 15), (0, -17, -30, 15), (0, -27, -62, 9)])
    return _union(body, temporal, blend=10.0), cerebellum, radius - distance


def _surfaces(p: Array, folds: Array, depth: Array) -> _Surfaces:
    """Distances at template positions ``p`` (3, N), given the ``depth`` (N,) of sulci in mm and the folds' field."""
    x, y, z = p
    side = np.stack([np.abs(x), y, z])  # one hemisphere serves for both
    cerebrum, cerebellum, stem = _parts(p)
    envelope = _union(cerebrum, cerebellum, stem, blend=8.0)

    # Sheets of CSF: distances to the fissures that part the brain.
    core = np.maximum(_ellipse(y + 6, z - 2, 40, 25), np.minimum(-8 - z, 14 - y))  # where hemispheres are joined
    fissure = np.sqrt(x**2 + _excess(core) ** 2)
    callosal = np.sqrt(x**2 + 9 * _excess(core) ** 2)
    tentorium = np.abs(cerebrum - cerebellum) / 2
    ambient = np.sqrt((np.maximum(cerebrum, -30) - stem) ** 2 / 4 + _excess(z + 12) ** 2)
    sylvian = np.sqrt(
        (z + 5 + np.float32(0.35) * (y - 5)) ** 2
        + _excess(38 - side[0]) ** 2
        + _excess(y - 24) ** 2
        + _excess(-32 - y) ** 2
    )
    in_stem = stem > np.maximum(cerebrum, cerebellum)
    in_cerebellum = (cerebellum > cerebrum) & ~in_stem
    hull = np.minimum(np.minimum(envelope, sylvian), np.where(in_stem | (stem > cerebellum), 1e3, tentorium))
    hull = np.minimum(hull, np.where(in_cerebellum, 1e3, ambient))
    outer = np.minimum(hull, np.where(in_cerebellum, 1e3, fissure))

    sulci = np.sqrt(_fold_distance(p, folds) ** 2 + _excess(outer - depth) ** 2)
    folia = np.sqrt(_folia_distance(side) ** 2 + _excess(outer - 9) ** 2)
    gyri = np.where(in_stem, 1e3, np.where(in_cerebellum, folia, sulci))
    pial = np.minimum(outer, gyri)
    medullar = np.minimum(np.minimum(hull, np.where(in_cerebellum, 1e3, callosal)), gyri)
    medullar = np.where(in_stem, outer + 8, medullar - np.where(in_cerebellum, np.float32(0.8), 0))

    deep = np.maximum.reduce(
        [
            _ellipsoid(side, (11, -17, 7), (9, 15, 9)),  # thalamus
            _ellipsoid(side, (15, 17, 6), (6, 11, 10)),  # head of the caudate
            _ellipsoid(side, (26, 2, 2), (6, 17, 11)),  # putamen and pallidum
        ]
    )
    cisterns = np.maximum(_ellipsoid(p, (0, -9, 3), (2.4, 15, 11)), _ellipsoid(p, (0, -35, -30), (7, 4.5, 9)))
    horns = [_tube(side, knots) for knots in VENTRICLE]
    distance, radius = horns[0]
    for d, r in horns[1:]:
        nearer = d * radius < distance * r
        distance, radius = np.where(nearer, d, distance), np.where(nearer, r, radius)
    return _Surfaces(envelope, pial, medullar, deep, cisterns, (distance, radius), _tube(side, HIPPOCAMPUS))


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    k0 = np.sqrt((u / a) ** 2 + (v / b) ** 2) + np.float32(1e-4)
    distance = k0 * (1 - k0) / (np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2) + 1e-6)
    return distance.astype(np.float32)


def _radial(p: Array) -> tuple[Array, Array]:
    """Offset of ``p`` from the long axis of its hemisphere, (3, ...), and its length."""
    offset = np.stack([p[0] - np.where(p[0] < 0, -27, 27), p[1] - np.clip(p[1], -48, 42), p[2] - 8]).astype(np.float32)
    return offset, np.sqrt((offset**2).sum(0)) + np.float32(1e-3)


def _fold_distance(p: Array, folds: Array) -> Array:
    """Distance to the nearest sulcal sheet: a field on the surface, carried inward along the radii."""
    offset, length = _radial(p)
    reach = np.float32(42)
    pull = (reach + (length - reach) * np.float32(0.25)) / length
    index = (p + offset * (pull - 1)) / np.float32(LATTICE_MM) + LATTICE / 2
    return map_coordinates(folds, index, order=1, mode="grid-wrap") / pull


def _folia_distance(side: Array) -> Array:
    """Distance to the fissures of the cerebellum, which fan out around the fourth ventricle."""
    y, z = side[1] + 36, side[2] + 28
    angle = np.arctan2(z, y) + np.float32(0.006) * side[0]
    pitch = np.float32(2 * np.pi / 17)
    return np.abs((angle / pitch) % 1 - np.float32(0.5)) * pitch * np.hypot(y, z)


@lru_cache(1)
def _fold_lattice() -> tuple[Array, Array]:
    """Amplitude spectrum of the folds' field on the half lattice, and radial directions (3, n, n, n) on the lattice."""
    k = [fft.fftfreq(LATTICE, LATTICE_MM), fft.fftfreq(LATTICE, LATTICE_MM), fft.rfftfreq(LATTICE, LATTICE_MM)]
    frequency = np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*k, indexing="ij")))
    spectrum = np.exp(-0.5 * ((frequency * FOLD_MM - 1) / 0.16) ** 2)
    grid = (np.indices((LATTICE,) * 3, np.float32) - LATTICE / 2) * np.float32(LATTICE_MM)
    offset, length = _radial(grid)
    return spectrum.astype(np.float32), offset / length


def _fold_field(rng: np.random.Generator) -> Array:
    """Distance in mm to the nodal surfaces of a narrow-band random field, on the lattice."""
    spectrum, radial = _fold_lattice()
    white = rng.standard_normal((LATTICE,) * 3, np.float32)
    field = fft.irfftn(fft.rfftn(white) * spectrum, s=white.shape).astype(np.float32)
    slope = np.stack([(np.roll(field, -1, a) - np.roll(field, 1, a)) / np.float32(2 * LATTICE_MM) for a in range(3)])
    along = (slope * radial).sum(0)
    squared = (slope**2).sum(0) - along**2  # what counts is how fast it changes along the surface
    wave = np.float32(2 * np.pi / FOLD_MM)
    return np.abs(field) / np.sqrt(np.maximum(squared, 0) + (np.float32(0.5) * wave * field) ** 2 + 1e-20)


# --- rendering -------------------------------------------------------------------------------------------------------


def spacing(shape: tuple[int, int, int]) -> float:
    """Edge of the cubic voxels in mm with which ``shape`` holds every head: 6 at 32 cubed, 3 at 64, 2 at 96."""
    return max(extent / n for extent, n in zip(FIELD_OF_VIEW, shape))


def _solve(volume: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The level at which the monotone ``volume`` meets ``target``; the nearer end where none does."""
    ends = volume(low) - target, volume(high) - target
    if ends[0] * ends[1] >= 0:
        return low if abs(ends[0]) < abs(ends[1]) else high
    return float(brentq(lambda level: volume(level) - target, low, high, xtol=1e-3))


def render_tissues(anatomy: Anatomy, rng: np.random.Generator, shape: tuple[int, int, int] = (32, 32, 32)) -> Tissues:
    """Partial volumes of one brain whose measured volumes are those of ``anatomy``.

    Args:
        anatomy: the quantities of :data:`shards.anatomy.LAW`.
        rng: draws pose, aspect, asymmetry and folds.
        shape: voxels (H, W, D).
    """
    fine = tuple(n * SUPERSAMPLING for n in shape)
    step = spacing(shape) / SUPERSAMPLING
    size = (anatomy["icv_ml"] / TEMPLATE_ML) ** (1 / 3)
    voxel_ml = step**3 / 1000

    # Pose and shape of the individual: position in the image -> position in the template.
    aspect = rng.normal(0, 0.02, 3)
    stretch = size * np.exp(aspect - aspect.mean())
    angles, shift = np.deg2rad(rng.normal(0, 2.5, 3)), rng.normal((0, 2, 0), 1.2)
    waves = rng.normal(0, 1 / 45, (3, 4, 3)), rng.uniform(0, 2 * np.pi, (3, 4)), rng.normal(0, 1.0, (3, 4))
    depth_waves = rng.normal(0, 1 / 15, (6, 3)), rng.uniform(0, 2 * np.pi, 6)
    folds = _fold_field(rng)

    axes = [(np.arange(n, dtype=np.float32) + 0.5 - n / 2) * np.float32(step) for n in fine]
    inside = sum(
        (axis.reshape([-1 if i == a else 1 for i in range(3)]) / np.float32(limit * size)) ** 2
        for a, (axis, limit) in enumerate(zip(axes, (80, 98, 78)))
    )
    voxels = np.flatnonzero(inside < 1)  # the rest is outside of any head
    index = np.unravel_index(voxels, fine)
    p = np.stack([axis[i] for axis, i in zip(axes, index)]) - _column(shift)
    p = (_rotation(angles) @ p).astype(np.float32) / _column(stretch)
    wave, phase, amplitude = waves
    p = p + np.stack(
        [
            sum(np.float32(a) * np.sin(np.float32(k) @ p + np.float32(f)) for k, f, a in zip(*rows))
            for rows in zip(wave, phase, amplitude)
        ]
    )
    depth = 14 + 1.6 * sum(np.sin(np.float32(k) @ p + np.float32(f)) for k, f in zip(*depth_waves))
    s = _surfaces(p, folds, depth)

    def share(distance: Array) -> Array:  # of a voxel that lies within a surface
        return np.clip(np.float32(0.5) + distance * np.float32(size / step), 0, 1)

    def tube(tube: tuple[Array, Array], level: float) -> Array:
        return share(np.float32(level) * tube[1] - tube[0])

    def ml(part: Array) -> float:
        return float(part.sum(dtype=np.float64)) * voxel_ml

    icv = anatomy["icv_ml"]
    level = _solve(lambda c: ml(share(s.envelope - np.float32(c))), icv, -25, 25)
    head = share(s.envelope - np.float32(level))
    level = _solve(lambda c: ml(head * tube(s.hippocampus, c)), anatomy["hippocampus_ml"], 0, 4)
    hippocampus = head * tube(s.hippocampus, level)
    free = head - hippocampus
    level = _solve(lambda c: ml(free * tube(s.ventricle, c)), anatomy["ventricles_ml"], 0, 8)
    ventricles = free * tube(s.ventricle, level)
    free = (free - ventricles) * (1 - share(s.cisterns))
    target = icv * (anatomy["grey_percent"] + anatomy["white_percent"]) / 100 - ml(hippocampus)
    level = _solve(lambda c: ml(free * share(s.pial - np.float32(c))), target, -25, 25)
    free = free * share(s.pial - np.float32(level))
    deep = free * share(s.deep)
    free = free - deep
    target = icv * anatomy["white_percent"] / 100
    level = _solve(lambda c: ml(free * share(s.medullar - np.float32(c))), target, -25, 25)
    white = free * share(s.medullar - np.float32(level))
    grey = free - white + deep + hippocampus

    def coarse(part: Array) -> Array:  # (N,) -> (H, W, D)
        grid = np.zeros(fine, np.float32)
        grid.flat[voxels] = part
        h, w, d = shape
        return grid.reshape(h, SUPERSAMPLING, w, SUPERSAMPLING, d, SUPERSAMPLING).mean((1, 3, 5))

    return Tissues(*map(coarse, (head - grey - white, ventricles, grey, deep, hippocampus, white)))


def _rotation(angles: NDArray[np.float64]) -> Array:
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = out @ turn
    return out.astype(np.float32)


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
