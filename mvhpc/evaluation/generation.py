"""The quality of drawn volumes beside real ones, as rows of a table with intervals, floors and numbers of people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvhpc.evaluation.frechet import Extrapolation, Sets, at_half, extrapolate, intervals
from mvhpc.evaluation.metrics import Estimate, absolute_errors, hits, mean_over_subjects, share_of_subjects
from mvhpc.evaluation.neighbours import Copies, precision_recall
from mvhpc.evaluation.ridge import read_classes, read_numbers
from mvhpc.evaluation.sharpness import PLANES as AXES
from mvhpc.evaluation.tables import MISSING, Table
from mvhpc.evaluation.volume_measures import Measures
from mvhpc.variables import Value
from shards.schema import Variable

HALVES = 10  # random ones, of precision and recall
HEADER = ["measure", "plane", "drawn", "drawn_low", "drawn_high", "real", "real_low", "real_high", "n", "digits"]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        measure: its short name.
        label: what it is.
        plane: of the slices; empty where there are none.
        drawn: of drawn people, beside real ones where the measure compares sets.
        real: the same of real people in the place of the drawn ones: the best to expect; None where it says nothing.
        digits: after the point.
    """

    measure: str
    label: str
    plane: str
    drawn: Estimate
    real: Estimate | None = None
    digits: int = 2

    @property
    def cells(self) -> list[str]:
        """Of the TSV, see :data:`HEADER`."""
        real = self.real.interval if self.real else (np.nan,) * 3
        numbers = [MISSING if not np.isfinite(v) else f"{v:.6g}" for v in (*self.drawn.interval, *real)]
        return [self.measure, self.plane or MISSING, *numbers, str(self.drawn.n), str(self.digits)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""

        def values(estimate: Estimate | None) -> dict[str, float | None] | None:
            if estimate is None:
                return None
            ends = zip(("value", "low", "high"), estimate.interval, strict=True)
            return {name: value if np.isfinite(value) else None for name, value in ends}

        return {
            "measure": self.measure,
            "label": self.label,
            "plane": self.plane,
            "drawn": values(self.drawn),
            "real": values(self.real),
            "n": self.drawn.n,
        }


def table(rows: Sequence[Row]) -> Table:
    """Rows for a page."""
    lines = [
        [
            f"{row.label}{', ' if row.plane else ''}{row.plane}",
            row.drawn.format(row.digits),
            row.real.format(row.digits) if row.real else "",
            str(row.drawn.n),
        ]
        for row in rows
    ]
    return Table(["", "drawn", "real", "n"], lines)


def distance_rows(
    sets: Sets, name: str, planes: Sequence[str], resamples: int, seed: int
) -> tuple[list[Row], dict[str, Extrapolation]]:
    """Rows of the FID: of all people, extrapolated, and at half of them beside its floor.

    Args:
        sets: features of drawn and of real people.
        name: of the distance.
        planes: their names.
        resamples: of the bootstrap.
        seed: of what is drawn by chance.

    Returns:
        The rows, and the extrapolations ``drawn`` (against real) and ``real`` (against real).
    """
    rng, key = np.random.default_rng(seed), name.lower().replace("-", "_").replace(" ", "_")
    names = [*planes, "mean"] if len(planes) > 1 else [""]
    found = intervals(sets, resamples, rng)
    lines = {"drawn": extrapolate(sets, rng), "real": extrapolate(sets.floor(rng), rng)}
    half, floor = (at_half(sets, draw, rng) for draw in (Sets.halves, Sets.floor))
    rows = []
    for i, plane in enumerate(names):
        limits = [float(lines[side].limit[i]) for side in ("drawn", "real")]
        shift, digits = limits[0] - found[i].value, 3 if floor[i].value < 1 else 1
        moved = Estimate(limits[0], found[i].low + shift, found[i].high + shift, sets.people)
        rows += [
            Row(key, name, plane, found[i], digits=digits),
            Row(f"{key}_half", f"{name} at half of n", plane, half[i], floor[i], digits),
            Row(
                f"{key}_extrapolated",
                f"{name}, extrapolated",
                plane,
                moved,
                Estimate(limits[1], np.nan, np.nan, sets.people // 2),
                digits,
            ),
        ]
    return rows, lines


def overlap_rows(drawn: NDArray, real: NDArray, seed: int) -> list[Row]:
    """Precision and recall of all people, and at half of them beside those of real people.

    Args:
        drawn, real: features (N, F) of people.
        seed: of the halves.
    """
    names, rng, half = ("precision", "recall"), np.random.default_rng(seed), len(real) // 2
    found = [share_of_subjects(inside, seed=seed) for inside in precision_recall(drawn, real)]
    halves = []
    for _ in range(HALVES):
        order = rng.permutation(len(real))
        first, second = order[:half], order[half : 2 * half]
        of_both = (precision_recall(x, real[second]) for x in (drawn[first], real[first]))
        halves.append([[inside.mean() for inside in of_one] for of_one in of_both])  # drawn or real, measure
    ends = np.quantile(halves, [0.025, 0.975], axis=0)
    means = np.mean(halves, 0)
    rows = []
    for i, name in enumerate(names):
        both = [Estimate(float(means[k, i]), float(ends[0, k, i]), float(ends[1, k, i]), half) for k in (0, 1)]
        rows += [Row(name, name, "", found[i]), Row(f"{name}_half", f"{name} at half of n", "", both[0], both[1])]
    return rows


def diversity_row(drawn: Measures, real: Measures, seed: int) -> Row:
    """MS-SSIM of pairs: larger where the people of a set are more alike."""
    both = [mean_over_subjects(x.similarity, seed=seed) for x in (drawn, real)]
    return Row("ms_ssim", "MS-SSIM of pairs", "", both[0], both[1], 3)


def sharpness_rows(drawn: Measures, real: Measures, seed: int) -> list[Row]:
    """Energy of fine detail, the mean of real people being 1."""
    unit = real.sharpness.mean(0)
    rows = []
    for i, plane in enumerate(AXES):
        both = [mean_over_subjects(x.sharpness[:, i] / unit[i], seed=seed) for x in (drawn, real)]
        rows.append(Row("sharpness", "sharpness", plane, both[0], both[1]))
    return rows


def copy_rows(copies: Copies, floor: Copies | None, seed: int) -> list[Row]:
    """Whether people of the training were copied.

    Args:
        copies: of drawn people.
        floor: of held-out people in the place of the drawn ones; None: not measured.
        seed: of the bootstrap.
    """

    def estimate(found: Copies | None, key: str) -> Estimate | None:
        mean = share_of_subjects if key in ("nearer", "copied") else mean_over_subjects
        return mean(getattr(found, key).astype(float), seed=seed) if found else None

    rows = []
    for measure, label, key, beside, digits in (
        ("nearest_in_training", "nearest person is of the training (expected: 0.5)", "nearer", floor, 2),
        ("copies", "copies of people of the training", "copied", floor, 3),
        ("distance_training", "distance to the nearest of the training", "training", floor, 4),
        ("distance_held_out", "distance to the nearest held-out person", "held_out", None, 4),  # fewer for the floor
    ):
        drawn = estimate(copies, key)
        assert drawn is not None
        rows.append(Row(measure, label, "", drawn, estimate(beside, key), digits))
    return rows


@dataclass(frozen=True)
class Reading:
    """What an independent reader finds in drawn and in real brains.

    Attributes:
        variable: that is read.
        reader: how.
        wanted, drawn: of drawn people, the value that was asked for and the one read, (N,).
        true, real: of real people, the recorded value and the one read, (M,).
    """

    variable: Variable
    reader: str
    wanted: list[Any]
    drawn: list[Any]
    true: list[Any]
    real: list[Any]

    def rows(self, seed: int) -> list[Row]:
        """Errors or accuracies of the reader."""
        name, by = self.variable.name, self.reader.split()[0].lower()
        pairs = ((self.drawn, self.wanted), (self.real, self.true))
        if self.variable.kind == "categorical":
            right = [share_of_subjects(hits(read, wanted), seed=seed) for read, wanted in pairs]
            label = f"{name} read is that asked for, by {self.reader}"
            return [Row(f"{name}_accuracy_{by}", label, "", right[0], right[1])]
        unit = f" ({self.variable.unit})" if self.variable.unit else ""
        errors = [mean_over_subjects(absolute_errors(read, wanted), seed=seed) for read, wanted in pairs]
        linked = [correlation(np.array(wanted, float), np.array(read, float), seed) for read, wanted in pairs]
        error = f"{name} read, difference from that asked for{unit}, by {self.reader}"
        link = f"{name} read, correlation with that asked for, by {self.reader}"
        return [
            Row(f"{name}_error_{by}", error, "", errors[0], errors[1], 1),
            Row(f"{name}_correlation_{by}", link, "", linked[0], linked[1]),
        ]


def correlation(x: NDArray, y: NDArray, seed: int) -> Estimate:
    """Pearson's correlation of (N,) and (N,), with its 95 % interval by Fisher's transformation."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, len(x))
    r = float(np.corrcoef(x, y)[0, 1])
    z, width = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)), 1.96 / np.sqrt(len(x) - 3)
    return Estimate(r, float(np.tanh(z - width)), float(np.tanh(z + width)), len(x))


def ridge_reading(
    variable: Variable,
    known: tuple[NDArray, Sequence[Value]],
    drawn: tuple[NDArray, Sequence[Value]],
    real: tuple[NDArray, Sequence[Value]],
) -> Reading | None:
    """Read a variable by ridge regression on voxels; None where fewer than 10 people have it.

    Args:
        variable: to read.
        known: voxels (N, V) and values of the people whom the reader learns from.
        drawn: voxels of drawn people, and the values that were asked for.
        real: voxels of real people, and their values.
    """
    parts = []
    for voxels, values in (known, drawn, real):
        rows = [i for i, value in enumerate(values) if value is not None]
        parts.append((voxels[rows], [values[i] for i in rows]))
    (x, y), (a, wanted), (b, true) = parts
    if min(len(y), len(wanted), len(true)) < 10 or len(set(y)) < 2:
        return None
    read: Any = read_classes if variable.kind == "categorical" else read_numbers
    of_drawn, of_real = read(x, y, a), read(x, y, b)
    return Reading(variable, "ridge regression", wanted, list(of_drawn), true, list(of_real))
