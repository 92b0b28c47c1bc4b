"""Errors by group, and how often predicted quantiles and probabilities hold, of predictions with a known law."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from mvhpc.evaluation.groups import by_group, coverages, group_of, probability_points, quantile_points
from shards.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
        "sex": {"kind": "categorical", "classes": ["F", "M"]},
    }
)
N = 600


def predictions(sd: float) -> pd.DataFrame:
    """Normal predictions of SD 10 of ages whose SD about them is ``sd``; probabilities of sex that are right."""
    rng = np.random.default_rng(0)
    mean, p = rng.uniform(30, 80, N), rng.uniform(0, 1, N)
    keys = [f"sub-{i}" for i in range(N)]
    frame = pd.DataFrame({"key": keys, "subject": keys, "age": mean, "age_true": mean + sd * rng.standard_normal(N)})
    for q in (5, 25, 50, 75, 95):
        frame[f"age_q{q:02d}"] = mean + 10 * norm.ppf(q / 100)
    frame["sex_p_F"], frame["sex_p_M"] = p, 1 - p
    frame["sex"] = np.where(p > 0.5, "F", "M")
    frame["sex_true"] = np.where(rng.uniform(0, 1, N) < p, "F", "M")
    return frame


@pytest.mark.parametrize("sd", [5.0, 10.0, 20.0])
def test_coverage_is_that_of_the_normal_law(sd: float) -> None:
    frame = predictions(sd)
    for percent, found in coverages(frame, "age").items():
        expected = 1 - 2 * norm.cdf(10 / sd * norm.ppf((1 - percent / 100) / 2))
        assert abs(found.value - expected) < 0.07
    for point in quantile_points(frame, "age"):
        assert abs(point.observed.value - norm.cdf(10 / sd * norm.ppf(point.predicted))) < 0.07


def test_right_probabilities_lie_on_the_diagonal() -> None:
    points = probability_points(predictions(10), "sex", ["F", "M"])
    assert len(points) == 5
    assert all(abs(point.predicted - point.observed.value) < 0.1 for point in points)
    assert all(point.observed.low < point.observed.value < point.observed.high for point in points)


def test_groups_add_up_to_all_and_leave_out_the_unknown() -> None:
    frame = predictions(10)
    groups = {key: "FM"[i % 2] for i, key in enumerate(frame["key"][:400])}
    found = by_group(frame, SCHEMA["age"], groups)
    assert list(found) == ["F", "M"] and [estimate.n for estimate in found.values()] == [200, 200]
    error = (frame["age"] - frame["age_true"]).abs()[:400].mean()
    assert np.mean([estimate.value for estimate in found.values()]) == pytest.approx(error)


@pytest.mark.parametrize(
    "name, value, group", [("age", 40.0, "40-49"), ("age", 9.99, "00-09"), ("sex", "F", "F"), ("age", None, None)]
)
def test_the_group_of_a_value(name: str, value: float | str | None, group: str | None) -> None:
    assert group_of(SCHEMA[name], value) == group
