"""A model that has learnt nothing is said to be no better than the mean, whatever its errors look like."""

import numpy as np
import pandas as pd
import pytest

from mvhpc.evaluation.against_mean import compare
from shards.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
        "sex": {"kind": "categorical", "classes": ["F", "M"]},
    }
)


def table(predicted: list, true: list, name: str = "age") -> pd.DataFrame:
    keys = [f"sub-{i}" for i in range(len(true))]
    return pd.DataFrame({"key": keys, "subject": keys, name: predicted, f"{name}_true": true})


@pytest.mark.parametrize(("skill", "better"), [(0.9, True), (0.0, False)])
def test_the_verdict_is_that_of_the_paired_differences(skill: float, better: bool) -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(20, 80, 200)
    predicted = 50 + skill * (true - 50) + rng.normal(0, 1, 200)
    found = compare(table(list(predicted), list(true)), [50.0] * 200, SCHEMA["age"])
    assert found is not None and found.better == better
    assert found.gain.value == pytest.approx(np.mean(np.abs(true - 50) - np.abs(true - predicted)))
    assert found.gain.value == pytest.approx(found.constant.value - found.own.value)
    assert ("NOT better than predicting the mean" in found.text()) != better


def test_a_gain_that_may_be_chance_is_not_called_better_nor_none() -> None:
    true = [20.0, 30.0, 45.0, 55.0, 70.0, 80.0]
    errors = [1.0, 1.0, 20.0, 20.0, 1.0, 1.0]  # those near the mean are predicted badly
    found = compare(table([t + e for t, e in zip(true, errors)], true), [50.0] * 6, SCHEMA["age"])
    assert found is not None and found.gain.low < 0 < found.gain.value and not found.better
    assert "not shown to be better than predicting the mean (gain 11.00 [" in found.text()


@pytest.mark.parametrize(("n", "better"), [(5, False), (6, True)])
def test_a_gain_of_everybody_may_be_chance_where_people_are_few(n: int, better: bool) -> None:
    true = [20.0 + i for i in range(n)]
    found = compare(table(true, true), [50.0] * n, SCHEMA["age"])
    assert found is not None and found.better == better
    assert found.verdict().startswith("better") == better and ("too few people" in found.verdict()) != better


def test_rounding_is_no_gain() -> None:
    true = list(np.linspace(20, 80, 50))
    found = compare(table([50.0 + 1e-5 * np.sign(x - 50) for x in true], true), [50.0] * 50, SCHEMA["age"])
    assert found is not None and found.gain.low > 0 and not found.better


def test_categories_are_compared_with_the_most_frequent_class() -> None:
    true = ["F"] * 70 + ["M"] * 30
    everybody = compare(table(["F"] * 100, true, "sex"), ["F"] * 100, SCHEMA["sex"])
    assert everybody is not None and everybody.own.value == everybody.constant.value == 0.7
    assert not everybody.better and "NOT better than predicting the most frequent class" in everybody.text()
    right = compare(table(true, true, "sex"), ["F"] * 100, SCHEMA["sex"])
    assert right is not None and right.better and right.gain.value == pytest.approx(0.3)


def test_only_people_whose_value_is_known_and_who_were_answered_count() -> None:
    frame = table([30.0, None, 40.0], [31.0, 50.0, None])
    found = compare(frame, [50.0] * 3, SCHEMA["age"])
    assert found is not None and found.own.n == 1 and found.gain.value == 18
    assert "too few people" in found.verdict()
    assert compare(table([30.0], [None]), [50.0], SCHEMA["age"]) is None
