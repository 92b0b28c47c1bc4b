"""Whether the intensities of the volumes go with a scalar variable, in numbers and words."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from shards.schema import Schema

INTENSITIES = {"brightness": "Brightness", "contrast": "Contrast"}  # measure -> its name in a sentence
FEWEST = 10  # records; no statistics of fewer
LEVEL = 0.05  # of a test of groups


def sentences(measures: pd.DataFrame, scalars: pd.DataFrame, schema: Schema) -> Iterator[str]:
    """One sentence for each intensity of each volume variable, and each scalar.

    Args:
        measures: columns ``VARIABLE.MEASURE``, a row for each record.
        scalars: a column for each scalar of the schema, a row for each record; None or nan where missing.
        schema: of the data set.
    """
    for volume in schema.volumes:
        for intensity, word in INTENSITIES.items():
            column = f"{volume.name}.{intensity}"
            if column not in measures:
                continue
            subject = f"{word} of {volume.name}"
            for scalar in schema.scalars:
                both = pd.DataFrame({"x": scalars[scalar.name], "y": measures[column]}).dropna()
                if scalar.kind == "categorical":
                    yield _of_groups(subject, scalar.name, both)
                else:
                    yield _of_numbers(subject, scalar.name, both)


def _of_numbers(subject: str, scalar: str, both: pd.DataFrame) -> str:
    """The correlation of an intensity with a number."""
    x, y = both["x"].to_numpy(float), both["y"].to_numpy(float)
    if len(both) < FEWEST or not np.ptp(x) or not np.ptp(y):
        return f"{subject} and {scalar}: too few different values."
    result = stats.pearsonr(x, y)
    low, high = result.confidence_interval(0.95)
    interval = f"95 % interval {_signed(low)} to {_signed(high)}"
    numbers = f"correlation {_signed(result.statistic)}, {interval}, {len(both):,} records"
    if low <= 0 <= high:
        return f"{subject} shows no correlation with {scalar} ({numbers})."
    verb = "rises" if result.statistic > 0 else "falls"
    return f"{subject} {verb} with {scalar} ({numbers}): a model can read some of {scalar} from it."


def _of_groups(subject: str, scalar: str, both: pd.DataFrame) -> str:
    """The share of an intensity's variance that lies between groups."""
    groups = [g.to_numpy(float) for _, g in both.groupby("x")["y"] if len(g) > 1]
    values = np.concatenate(groups) if groups else np.zeros(0)
    if len(groups) < 2 or len(values) < FEWEST or not np.ptp(values):
        return f"{subject} and {scalar}: too few different values."
    between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups)
    share = between / float(((values - values.mean()) ** 2).sum())
    p = float(stats.f_oneway(*groups).pvalue)
    numbers = (
        f"{100 * share:.0f} % of its variance, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'}, {len(values):,} records"
    )
    if p >= LEVEL:
        return f"{subject} shows no difference by {scalar} ({numbers})."
    return f"{subject} differs by {scalar} ({numbers}): a model can read some of {scalar} from it."


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # without -0.00
