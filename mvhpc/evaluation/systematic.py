"""What errors depend on: the true value itself, groups of people, and the visit."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from mvhpc.evaluation.metrics import Estimate, Floats, mean_over_subjects, over_subjects
from shards.schema import Variable

GROUPS = 8  # of a number, at most


def slope(true: Floats, errors: Floats, subjects: Sequence[str]) -> Estimate:
    """Slope of the errors on the true values, by least squares, with its interval: -1 for a constant prediction.

    Args:
        true, errors: (N,); rows with a NaN are left out.
        subjects: (N,).
    """
    x = true - np.nanmean(true)

    def statistic(sums: Floats) -> Floats:
        n, sx, sy, sxx, sxy = np.moveaxis(sums, -1, 0)
        varied = n * sxx - sx * sx
        steep = (n * sxy - sx * sy) / np.where(varied > 0, varied, 1)
        return np.where(varied > 0, steep, everybody)  # a sample of one person only has no slope

    known = np.isfinite(x) & np.isfinite(errors)
    everybody = float(np.polyfit(x[known], errors[known], 1)[0]) if np.unique(x[known]).size > 1 else np.nan
    return over_subjects(np.stack([np.ones_like(x), x, errors, x * x, x * errors], 1), statistic, subjects)


def error_line(true: Floats, errors: Floats) -> tuple[float, float] | None:
    """(slope, intercept) of the errors on the true values, by least squares; None of fewer than three people.

    Args:
        true, errors: (N,), of people whom the correction is not applied to.
    """
    known = np.isfinite(true) & np.isfinite(errors)
    if known.sum() < 3 or np.ptp(true[known]) == 0:
        return None
    found = np.polyfit(true[known], errors[known], 1)
    return float(found[0]), float(found[1])


def corrected(true: Floats, errors: Floats, line: tuple[float, float]) -> Floats:
    """Errors less what a line says of people of that true value (Beheshti et al. 2019, for brain age): (N,).

    The correction uses the true value: a corrected prediction is none, and its mean absolute error means nothing.
    """
    return errors - (line[0] * true + line[1])


def groups_of(values: Sequence[float | str | None], variable: Variable) -> list[str | None]:
    """The group of each person: the class of a category, a round interval of a number (decades of adults' ages).

    Args:
        values: recorded ones, None where missing.
        variable: of these values.

    Returns:
        Labels, ``20 to 30`` for 20 <= value < 30, None where the value is missing. A number that everybody has is its
        own label.
    """
    if variable.kind == "categorical":
        return [None if v is None else str(v) for v in values]
    numbers = np.array([np.nan if v is None else float(v) for v in values])
    if not np.isfinite(numbers).any():
        return [None] * len(numbers)
    if np.nanmin(numbers) == np.nanmax(numbers):
        return [f"{x:g}" if np.isfinite(x) else None for x in numbers]
    edges = MaxNLocator(GROUPS, steps=[1, 2, 5, 10]).tick_values(np.nanmin(numbers), np.nanmax(numbers))
    places = np.clip(np.digitize(numbers, edges), 1, len(edges) - 1)
    return [f"{edges[k - 1]:g} to {edges[k]:g}" if np.isfinite(x) else None for k, x in zip(places, numbers)]


def group_order(labels: Sequence[str | None], variable: Variable) -> list[str]:
    """The groups that occur, in the order of the classes or of the numbers."""
    found = {label for label in labels if label is not None}
    if variable.kind == "categorical":
        return [c for c in variable.classes if c in found]
    return sorted(found, key=lambda label: float(label.split(" to ")[0]))


def between_visits(
    keys: Sequence[str], subjects: Sequence[str], values: Floats, category: bool = False
) -> tuple[Estimate, float]:
    """Test and retest: how much values differ between two visits of one person.

    Args:
        keys, subjects: (N,).
        values: (N,), for a number its errors, so that what a person ages between the visits is no difference; NaN
            rows are left out.
        category: whether values are numbers of classes.

    Returns:
        Mean absolute difference of visits that follow each other by the numbers in their keys, or of classes how often
        they differ, with its interval over people; SD within a person, NaN of nobody.
    """
    frame = pd.DataFrame({"key": keys, "subject": subjects, "value": values}).dropna()
    frame = frame.sort_values("key", key=lambda column: column.map(_in_order))
    groups = frame.groupby("subject")["value"]
    apart = groups.diff().abs()
    if category:
        apart = apart.where(apart.isna(), (apart > 0).astype(float))
    variances = groups.var(ddof=1).dropna()
    within = float(np.sqrt(variances.mean())) if len(variances) else float("nan")
    return mean_over_subjects(apart.to_numpy(float), frame["subject"].tolist()), within


def _in_order(key: str) -> str:
    """A key that sorts by its numbers: ses-2 before ses-10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(40), key)
