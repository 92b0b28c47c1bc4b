"""The shape of a procedural brain: tissue maps with the volumes of a given anatomy.

A brain consists of a few signed distance functions of position: the intracranial envelope; the sheets of CSF between
and within the hemispheres (fissures, tentorium, sulci); ventricles, deep grey matter and hippocampi. Sulci are the
nodal surfaces of a narrow-band random field, extended inward radially. Each drawn volume is then solved for: head,
hippocampi, ventricles, brain and white matter have one level each, which a root finder moves until the partial volumes
of the rendered voxels add up to the drawn volume.

Positions are in millimetres of a template of average size: x right, y anterior, z superior.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import map_coordinates
from scipy.optimize import brentq
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]

FIELD_OF_VIEW = (160.0, 192.0, 160.0)  # mm; holds heads of up to 2,100 ml
TEMPLATE_ML = 1280.0  # intracranial volume of the template below
SUPERSAMPLING = 2
LATTICE, LATTICE_MM, FOLD_MM = 64, 3.0, 19.0  # the folds' random field: samples per axis, spacing, wavelength
RIM_MM = 0.8  # the CSF over the gyri is that much thinner than half a sulcus


class Tissues(NamedTuple):
    """Share of each voxel, float32 (H, W, D); csf + grey + white is the share inside the head."""

    csf: Array  # including the ventricles
    ventricles: Array  # the lateral ventricles
    grey: Array  # including deep grey matter and hippocampi
    deep: Array
    hippocampus: Array
    white: Array


# --- distance functions: mm, positive inside -----------------------------------------------------------------------


def _column(values: ArrayLike) -> Array:
    return np.asarray(values, np.float32)[:, None]


def _dot(a: Array, b: Array) -> Array:
    """Scalar products over the first axis; einsum, because BLAS threads would compete for the workers' cores."""
    return np.asarray(np.einsum("i...,i...->...", a.reshape(*a.shape, *[1] * (b.ndim - a.ndim)), b), np.float32)


def _ellipsoid(p: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    size = _column(radii)
    q = (p - _column(centre)) / size
    k0 = np.sqrt(_dot(q, q)) + np.float32(1e-4)
    q /= size
    distance = k0 * (1 - k0) / (np.sqrt(_dot(q, q)) + np.float32(1e-6))
    return distance.astype(np.float32, copy=False)


def _union(*parts: Array, blend: float = 5.0) -> Array:
    """Union with seams rounded over ``blend`` mm."""
    out = parts[0]
    for part in parts[1:]:
        h = np.maximum(blend - np.abs(out - part), 0) / blend
        out = np.maximum(out, part) + h * h * (blend / 4)
    return out


def _tube(p: Array, knots: Sequence[tuple[float, float, float, float]], flat: float = 1.0) -> tuple[Array, Array]:
    """Distance to, and radius of, the nearest part of a tube through ``knots`` (x, y, z, radius).

    ``flat`` > 1 makes it that much wider along its side's oblique direction, up and outward in a coronal section.
    """
    metric = np.eye(3, dtype=np.float32)
    wing = np.asarray((0.77, 0, 0.64), np.float32)
    metric -= np.outer(wing, wing) * np.float32(1 - 1 / flat)
    p = np.einsum("ij,jn->in", metric, p)
    points = np.asarray(knots, np.float32)
    points[:, :3] = points[:, :3] @ metric
    squared = _dot(p, p)
    distance, radius = np.full_like(squared, np.inf), np.ones_like(squared)
    for a, b in pairwise(points):
        axis = b[:3] - a[:3]
        length = axis @ axis
        along = _dot(axis, p) - axis @ a[:3]
        t = np.clip(along / length, 0, 1)
        d = squared - 2 * _dot(a[:3], p) + a[:3] @ a[:3] - t * (2 * along - t * length)
        r = a[3] + (b[3] - a[3]) * t
        nearer = d * radius**2 < distance * r**2
        distance, radius = np.where(nearer, d, distance), np.where(nearer, r, radius)
    return np.sqrt(np.maximum(distance, 0)), radius


def _excess(x: Array, limit: float = 0.0) -> Array:
    return np.maximum(x - np.float32(limit), 0)


VENTRICLE = [  # one side: frontal horn and body; atrium with occipital horn; temporal horn. Last: how flat
    ([(14, 37, 3, 1.6), (9, 25, 10, 2.6), (8, 6, 16, 2.6), (10, -14, 18, 2.4), (18, -32, 14, 3.0)], 2.2),
    ([(18, -32, 14, 3.4), (25, -43, 5, 4.4), (22, -64, 3, 1.6)], 1.0),
    ([(25, -43, 5, 4.0), (35, -27, -11, 2.0), (34, -8, -19, 1.2)], 1.0),
]
HIPPOCAMPUS = [(22, -3, -20, 4.2), (27, -13, -19, 5.2), (28, -23, -15, 4.4), (25, -33, -8, 3.4), (18, -38, 0, 2.2)]


class _Surfaces(NamedTuple):
    """The surfaces that the levels are solved over, at N positions in the head."""

    pial: Array  # distance to the CSF around and between the gyri
    medullar: Array  # the same, grown where no cortex lies below the CSF: corpus callosum, brain stem
    deep: Array  # signed distance of the deep grey matter
    cisterns: Array  # third and fourth ventricle
    ventricle: tuple[Array, Array]  # distance, radius
    hippocampus: tuple[Array, Array]


def _parts(p: Array) -> tuple[Array, Array, Array]:
    """Signed distances of cerebrum, cerebellum and brain stem."""
    egg = p.copy()
    egg[0] /= 1 - np.float32(0.0011) * p[1]  # the frontal lobes are narrower than the parietal ones
    body = _ellipsoid(egg, (0, -3, 13), (68, 77, 52))
    base = p[2] + 17 + _excess(-p[1] - 40) * np.float32(0.15)
    body = -_union(-body, -base, blend=14.0)
    mirrored = np.stack([np.abs(p[0]), p[1], p[2] - np.float32(0.12) * p[1]])
    temporal = _ellipsoid(mirrored, (41, 0, -17), (23, 42, 20))
    cerebellum = _union(
        _ellipsoid(mirrored, (24, -53, -30), (29, 28, 22)), _ellipsoid(p, (0, -48, -32), (16, 30, 22)), blend=8.0
    )
    distance, radius = _tube(p, [(0, -12, -8, 14), (0, -16, -30, 15), (0, -25, -42, 11), (0, -29, -58, 8)])
    return _union(body, temporal, blend=10.0), cerebellum, radius - distance


def _surfaces(p: Array, envelope: Array, parts: Sequence[Array], folds: Array, depth: Array) -> _Surfaces:
    """Distances at template positions ``p`` (3, N), given the ``depth`` (N,) of sulci in mm and the folds' field."""
    x, y, z = p
    side = np.stack([np.abs(x), y, z])  # one hemisphere serves for both
    cerebrum, cerebellum, stem = parts

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

    crowns = np.minimum(cerebrum, fissure)  # sulci go down from here
    sheet, length = _fold_distance(p, folds)
    ganglia = _ellipsoid(side, (0, -8, 0), (27, 37, 27))
    hippocampus = _tube(side, HIPPOCAMPUS)
    rim = 7 + hippocampus[1] - hippocampus[0]  # white matter around the hippocampus sets it off from the cortex
    inner = np.maximum.reduce([ganglia - 2, np.float32(0.7) * depth - length, rim])  # where no sulcus reaches
    sulci = np.sqrt(sheet**2 + _excess(crowns - depth) ** 2 + _excess(inner) ** 2)
    folia = np.sqrt(_folia_distance(side) ** 2 + _excess(outer - 9) ** 2)
    gyri = np.where(in_stem, 1e3, np.where(in_cerebellum, folia, sulci))
    pial = np.minimum(outer + RIM_MM, gyri)
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
    horns = [_tube(side, knots, flat) for knots, flat in VENTRICLE]
    distance, radius = horns[0]
    for d, r in horns[1:]:
        nearer = d * radius < distance * r
        distance, radius = np.where(nearer, d, distance), np.where(nearer, r, radius)
    return _Surfaces(pial, medullar, deep, cisterns, (distance, radius), hippocampus)


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    k0 = np.sqrt((u / a) ** 2 + (v / b) ** 2) + np.float32(1e-4)
    distance = k0 * (1 - k0) / (np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2) + 1e-6)
    return distance.astype(np.float32)


def _radial(p: Array) -> tuple[Array, Array]:
    """Offset of ``p`` from the nearer axis, frontal-occipital or temporal, of its hemisphere, (3, ...); its length."""
    left = np.where(p[0] < 0, np.float32(-1), np.float32(1))
    upper = np.stack([p[0] - 27 * left, p[1] - np.clip(p[1], -50, 42), p[2] - 12])
    along = np.clip((p[1] + 40) / 65, 0, 1)
    lower = np.stack([p[0] - (30 + 12 * along) * left, p[1] - (65 * along - 40), p[2] - (2 - 22 * along)])
    lengths = np.sqrt((upper**2).sum(0)), np.sqrt((lower**2).sum(0))
    offset = np.where(lengths[0] < lengths[1], upper, lower)
    return offset.astype(np.float32), np.minimum(*lengths).astype(np.float32) + np.float32(1e-3)


def _fold_distance(p: Array, folds: Array) -> tuple[Array, Array]:
    """Distance to the nearest sulcal sheet: a field on the surface, extended inward along the radii."""
    offset, length = _radial(p)
    reach = np.float32(36)
    pull = (reach + (length - reach) * np.float32(0.25)) / length
    index = (p + offset * (pull - 1)) / np.float32(LATTICE_MM) + LATTICE / 2
    return map_coordinates(folds, index, order=1, mode="grid-wrap") / pull, length


def _folia_distance(side: Array) -> Array:
    """Distance to the fissures of the cerebellum, which fan out around the fourth ventricle."""
    y, z = side[1] + 36, side[2] + 28
    angle = np.arctan2(z, y) + np.float32(0.006) * side[0]
    pitch = np.float32(2 * np.pi / 17)
    return np.abs((angle / pitch) % 1 - np.float32(0.5)) * pitch * np.hypot(y, z)


@lru_cache(1)
def _fold_lattice() -> tuple[tuple[NDArray[np.intp], ...], Array, Array]:
    """Of the folds' random field: its waves' indices on the half lattice of frequencies, their amplitudes (waves,), and
    the radial directions (3, n, n, n) on the lattice of positions.
    """
    k = [fft.fftfreq(LATTICE, LATTICE_MM), fft.fftfreq(LATTICE, LATTICE_MM), fft.rfftfreq(LATTICE, LATTICE_MM)]
    frequency = np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*k, indexing="ij")))
    amplitude = np.exp(-0.5 * ((frequency * FOLD_MM - 1) / 0.16) ** 2)
    shell = np.nonzero(amplitude > 1e-3)
    grid = (np.indices((LATTICE,) * 3, np.float32) - LATTICE / 2) * np.float32(LATTICE_MM)
    offset, length = _radial(grid)
    return shell, amplitude[shell].astype(np.float32), offset / length


def _fold_field(rng: np.random.Generator) -> Array:
    """Distance in mm to the nodal surfaces of a narrow-band random field, on the lattice."""
    shell, amplitude, radial = _fold_lattice()
    waves = np.zeros((LATTICE, LATTICE, LATTICE // 2 + 1), np.complex64)
    waves[shell] = amplitude * (rng.standard_normal((len(amplitude), 2), np.float32) @ np.array([1, 1j], np.complex64))
    field = fft.irfftn(waves, s=(LATTICE,) * 3)
    slope = np.stack(np.gradient(field, LATTICE_MM)).astype(np.float32)
    squared = _dot(slope, slope) - _dot(slope, radial) ** 2  # of the change along the surface only
    wave = np.float32(2 * np.pi / FOLD_MM)
    return np.abs(field) / np.sqrt(np.maximum(squared, 0) + (np.float32(0.5) * wave * field) ** 2 + 1e-20)


# --- the individual ------------------------------------------------------------------------------------------------


def spacing(shape: tuple[int, int, int]) -> float:
    """Edge in mm of the cubic voxels with which ``shape`` holds every head: 6 at 32 cubed, 3 at 64, 2 at 96."""
    return max(extent / n for extent, n in zip(FIELD_OF_VIEW, shape))


def _ripples(rng: np.random.Generator, count: int, wavelength: float) -> Callable[[Array], Array]:
    """A smooth random function of position, (3, N) -> (N,): the sum of ``count`` sine waves."""
    k = rng.normal(0, 2 * np.pi / wavelength / np.sqrt(3), (count, 3)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (count, 1)).astype(np.float32)
    return lambda p: np.sin(np.einsum("wi,in->wn", k, p) + phase).sum(0)


def _solve(volume: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The level at which the monotone ``volume`` meets ``target``; the nearer end where there is none."""
    ends = volume(low) - target, volume(high) - target
    if ends[0] * ends[1] >= 0:
        return low if abs(ends[0]) < abs(ends[1]) else high
    return float(brentq(lambda level: volume(level) - target, low, high, xtol=1e-3))


def render_tissues(
    anatomy: Mapping[str, float], rng: np.random.Generator, shape: tuple[int, int, int] = (32, 32, 32)
) -> Tissues:
    """Tissue maps of one brain whose measured volumes are those of ``anatomy``.

    Args:
        anatomy: icv_ml, ventricles_ml, grey_percent, white_percent and hippocampus_ml
            (:data:`shards.phantom.anatomy.LAW`).
        rng: draws the pose, aspect, asymmetry and folds of the individual.
        shape: voxels (H, W, D) of :func:`spacing` mm.

    Returns:
        Maps of partial volume. An impossible anatomy (more tissue than head) is approximated as well as possible.
    """
    icv, brain = anatomy["icv_ml"], anatomy["grey_percent"] + anatomy["white_percent"]
    step = spacing(shape) / SUPERSAMPLING
    size = (icv / TEMPLATE_ML) ** (1 / 3)

    aspect = rng.normal(0, 0.015, 3)
    stretch = size * np.exp(aspect - aspect.mean())
    turn = Rotation.from_euler("xyz", rng.normal(0, 2.5, 3), degrees=True).as_matrix().astype(np.float32)
    shift = rng.normal((0, 3, 1), 1.0)  # mm
    warps = [_ripples(rng, 4, 150.0) for _ in range(3)]
    deepening = _ripples(rng, 6, 40.0)
    folds = _fold_field(rng)

    def share(distance: Array) -> Array:  # of a voxel that lies within a surface
        return np.clip(np.float32(0.5) + distance * np.float32(size / step), 0, 1)

    def within(tube: tuple[Array, Array], scale: float) -> Array:
        return share(np.float32(scale) * tube[1] - tube[0])

    def ml(part: Array) -> float:
        return float(part.sum()) * step**3 / 1000

    # Position in the image -> position in the template, for all voxels that may lie in the head.
    fine = [n * SUPERSAMPLING for n in shape]
    axes = [(np.arange(n, dtype=np.float32) + np.float32(0.5 - n / 2)) * np.float32(step) for n in fine]
    far = sum(np.abs(u / (limit * size)) ** 3 for u, limit in zip(np.ix_(*axes), (78.0, 92.0, 78.0)))
    index = np.nonzero(far < 1)
    p = np.stack([axis[i] for axis, i in zip(axes, index)]) - _column(shift)
    p = np.einsum("ij,jn->in", turn, p) / _column(stretch)
    p += np.stack([warp(p) for warp in warps])

    parts = _parts(p)
    envelope = _union(*parts, blend=8.0)
    level = _solve(lambda c: ml(share(envelope - np.float32(c))), icv, -10, 10)
    envelope -= np.float32(level)
    inside = envelope > -step / size
    p, envelope = p[:, inside], envelope[inside]
    s = _surfaces(p, envelope, [part[inside] for part in parts], folds, 20 + np.float32(2.2) * deepening(p))
    head = share(envelope)

    level = _solve(lambda c: ml(head * within(s.hippocampus, c)), anatomy["hippocampus_ml"], 0, 4)
    hippocampus = head * within(s.hippocampus, level)
    free = head - hippocampus
    level = _solve(lambda c: ml(free * within(s.ventricle, c)), anatomy["ventricles_ml"], 0, 8)
    ventricles = free * within(s.ventricle, level)
    free = (free - ventricles) * (1 - share(s.cisterns))
    target = icv * brain / 100 - ml(hippocampus)
    level = _solve(lambda c: ml(free * share(s.pial - np.float32(c))), target, -20, 20)
    free = free * share(s.pial - np.float32(level))
    deep = free * share(s.deep)
    target = icv * anatomy["white_percent"] / 100
    level = _solve(lambda c: ml((free - deep) * share(s.medullar - np.float32(c))), target, -20, 20)
    white = (free - deep) * share(s.medullar - np.float32(level))
    grey = free - white + hippocampus

    home = np.ravel_multi_index([i[inside] // SUPERSAMPLING for i in index], shape)

    def coarse(part: Array) -> Array:  # (N,) -> (H, W, D)
        total = np.bincount(home, part, minlength=math.prod(shape))
        return (total / SUPERSAMPLING**3).reshape(shape).astype(np.float32)

    return Tissues(*map(coarse, (head - grey - white, ventricles, grey, deep, hippocampus, white)))
