"""Errors of predictions by group of people, and how often predicted quantiles and probabilities hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mvhpc.evaluation.metrics import Estimate, mean_over_subjects
from mvhpc.evaluation.tables import score
from shards.schema import Value, Variable

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of a table of predictions
BINS = 5  # of predicted probabilities
DECADE = 10.0


@dataclass(frozen=True)
class Point:
    """A predicted probability and how often it came true."""

    predicted: float
    observed: Estimate


def by_group(frame: pd.DataFrame, variable: Variable, groups: Mapping[str, str]) -> dict[str, Estimate]:
    """Error or accuracy in each group, in the order of their names.

    Args:
        frame: predictions.
        variable: the predicted one.
        groups: key -> group; people without one are left out.
    """
    own = frame["key"].map(groups)
    found = {name: score(frame[own == name], variable) for name in sorted(own.dropna().unique())}
    return {name: estimate for name, estimate in found.items() if estimate is not None and estimate.n}


def group_of(variable: Variable, value: Value) -> str | None:
    """The group of a value: a class, or of a number the ten units that it lies in, as ``40-49``."""
    if value is None:
        return None
    if variable.kind == "categorical":
        return str(value)
    start = int(float(value) // DECADE * DECADE)
    return f"{start:02d}-{start + int(DECADE) - 1:02d}"


def quantile_points(frame: pd.DataFrame, name: str) -> list[Point]:
    """How many true values lie at or below each predicted quantile; nothing without a predicted distribution."""
    if f"{name}_q05" not in frame:
        return []
    true, subjects = frame[f"{name}_true"].to_numpy(float), frame["subject"].astype(str).tolist()
    points = []
    for level in QUANTILES:
        limit = frame[f"{name}_q{100 * level:02.0f}"].to_numpy(float)
        below = np.where(np.isfinite(true) & np.isfinite(limit), true <= limit, np.nan)
        points.append(Point(level, mean_over_subjects(below, subjects)))
    return points


def coverages(frame: pd.DataFrame, name: str) -> dict[int, Estimate]:
    """How many true values lie within the central intervals of 50 and 90 %; nothing without these."""
    if f"{name}_q05" not in frame:
        return {}
    true, subjects = frame[f"{name}_true"].to_numpy(float), frame["subject"].astype(str).tolist()
    found = {}
    for percent, (start, end) in {50: ("q25", "q75"), 90: ("q05", "q95")}.items():
        low, high = (frame[f"{name}_{quantile}"].to_numpy(float) for quantile in (start, end))
        inside = np.where(np.isfinite(true) & np.isfinite(low), (low <= true) & (true <= high), np.nan)
        found[percent] = mean_over_subjects(inside, subjects)
    return found


def probability_points(frame: pd.DataFrame, name: str, classes: Sequence[str]) -> list[Point]:
    """Predicted probabilities of all classes in :data:`BINS` bins, and how often the class was the true one.

    Of two classes the first alone counts: the other one says the same.
    """
    classes = classes[:1] if len(classes) == 2 else classes
    columns = [f"{name}_p_{c}" for c in classes]
    if not set(columns) <= set(frame):
        return []
    known = frame[frame[f"{name}_true"].notna() & frame[columns[0]].notna()]
    if known.empty:
        return []
    p: NDArray[np.float64] = known[columns].to_numpy(float).ravel()  # (people * classes,)
    hit = np.array([[true == c for c in classes] for true in known[f"{name}_true"]], float).ravel()
    subjects = np.repeat(known["subject"].astype(str).to_numpy(), len(classes))
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    return [
        Point(float(p[place == i].mean()), mean_over_subjects(hit[place == i], subjects[place == i].tolist()))
        for i in range(BINS)
        if (place == i).any()
    ]
