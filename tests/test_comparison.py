"""Comparisons of methods against closed forms: paired intervals, calibration, slopes, groups, visits."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mvhpc.diffusion.laws import normal
from mvhpc.evaluation import ensembles
from mvhpc.evaluation.answers import Answers, read_answers
from mvhpc.evaluation.calibration import SHARES, calibrated_error, inside, reliability
from mvhpc.evaluation.comparison import Comparison, draw_figures, make_tables
from mvhpc.evaluation.comparison_figures import colours
from mvhpc.evaluation.comparisons import compare_all
from mvhpc.evaluation.paper_tables import (
    by_group,
    calibration,
    comparisons,
    digits_of,
    retest,
    score_of,
    score_text,
    table_1,
)
from mvhpc.evaluation.systematic import between_visits, corrected, error_line, group_order, groups_of, slope
from mvhpc.evaluation.tables import Table
from mvhpc.inference.law_cells import law_cells
from mvhpc.variables import Continuous
from shards.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T1w"},
        "height": {"kind": "continuous", "range": [0, 3], "unit": "m"},
        "blood": {"kind": "categorical", "classes": ["A", "B", "0"]},
    }
)
AS_NUMBER = Schema.from_dict({"blood": {"kind": "continuous", "range": [0, 2], "values": {"A": 0, "B": 1, "0": 2}}})


def people(n: int) -> list[str]:
    return [f"sub-{i:03d}" for i in range(n)]


def test_all_intervals_hold_together_as_often_as_they_say() -> None:
    """Five equal methods: in 95 % of trials no interval of the ten differences leaves out 0."""
    rng, names = np.random.default_rng(0), people(60)
    together, first = [], []
    for _ in range(200):
        found = compare_all(rng.exponential(4.0, (60, 5)) + rng.exponential(2.0, (60, 1)), names, resamples=400)
        assert len(found) == 10
        together.append(all(d.gap.low <= 0 <= d.gap.high for d in found))
        first.append(found[0].gap.low <= 0 <= found[0].gap.high)
        assert all((d.p < 0.05) == (not d.gap.low <= 0 <= d.gap.high) or abs(d.p - 0.05) < 0.02 for d in found)
    assert 0.89 < np.mean(together) < 0.99  # the standard error of 200 trials at 0.95 is 0.015
    assert np.mean(first) > np.mean(together)


def test_the_interval_of_one_pair_is_that_of_its_mean() -> None:
    scores = np.random.default_rng(1).normal(0, 1, (400, 2))
    (found,) = compare_all(scores, people(400))
    gap = scores[:, 0] - scores[:, 1]
    assert found.gap.value == pytest.approx(gap.mean())
    assert found.gap.high - found.gap.value == pytest.approx(1.96 * gap.std() / 20, rel=0.05)
    z = abs(gap.mean()) / (gap.std() / 20)
    assert found.p == pytest.approx(2 * stats.norm.sf(z), abs=0.02)


def test_pairs_are_over_shared_people_and_equal_methods_do_not_differ() -> None:
    rng = np.random.default_rng(2)
    scores = rng.exponential(4.0, (30, 4))
    scores[:, 1] = scores[:, 0]  # the same answers
    scores[:, 2] = scores[:, 0] + 1  # one worse for everybody
    scores[5:, 3] = np.nan
    scores[:5, 0] = np.nan  # nobody is shared with the last
    found = {(d.first, d.second): d for d in compare_all(scores, people(30), resamples=500)}
    assert (0, 3) not in found and list(found) == sorted(found)
    assert found[0, 1].gap.interval == (0, 0, 0) and found[0, 1].p == 1
    assert found[0, 2].gap.interval == pytest.approx((-1, -1, -1)) and found[0, 2].p == 0.5**24
    assert found[0, 2].gap.n == 25
    gap = scores[:5, 1] - scores[:5, 3]
    assert found[1, 3].gap.value == pytest.approx(gap.mean()) and found[1, 3].gap.n == 5
    assert np.isnan([found[1, 3].gap.low, found[1, 3].gap.high, found[1, 3].p]).all()


@pytest.mark.parametrize(("n", "shown"), [(2, False), (5, False), (6, True), (40, True)])
def test_one_better_for_everybody_is_so_by_chance_where_people_are_few(n: int, shown: bool) -> None:
    """Of five people all differences have one sign by chance with a probability of 6 %."""
    frames = [pd.DataFrame({"key": people(n), "subject": people(n), "value": v, "true": 1.0}) for v in (1.0, 2.0)]
    both = [Answers(name, SCHEMA["height"], (), frame) for name, frame in zip(("first", "second"), frames)]
    result = comparisons(SCHEMA["height"], [()], both)
    assert result is not None
    row = dict(zip(result.text.header, result.text.rows[0]))
    assert row["better"] == ("first" if shown else "–") and row["people"] == str(n)
    assert (row["p"] == "–") == (not shown)
    if shown:
        assert result.numbers["p_adjusted"][0] >= 0.5 ** (n - 1)


def test_rows_of_one_person_are_one_subject_of_a_comparison() -> None:
    scores = np.random.default_rng(3).exponential(4.0, (40, 2))
    (once,) = compare_all(scores, people(40))
    (thrice,) = compare_all(np.repeat(scores, 3, 0), np.repeat(people(40), 3).tolist())
    assert thrice.gap.interval == pytest.approx(once.gap.interval) and thrice.gap.n == 40


def test_intervals_hold_the_truth_where_the_pit_says() -> None:
    pit = (np.arange(1000) + 0.5) / 1000
    assert [inside(pit, share).mean() for share in SHARES] == pytest.approx([0.5, 0.8, 0.9, 0.95])
    assert np.isnan(inside(np.array([np.nan, 0.5]), 50)).tolist() == [True, False]
    assert inside(np.array([0.05, 0.95, 0.049]), 90).tolist() == [1, 1, 0]


@pytest.mark.parametrize(("m", "bins"), [(3, 10), (30, 31)])
def test_pit_of_draws_is_uniform_and_that_of_their_quantiles(m: int, bins: int) -> None:
    drawn = np.random.default_rng(0).normal(50, 8, (20_000, m + 1))
    pit = ensembles.pit(drawn[:, 1:], drawn[:, 0])
    assert np.histogram(pit, bins, (0, 1))[0] / 20_000 == pytest.approx(np.full(bins, 1 / bins), abs=0.01)
    below = drawn[:, 0] < ensembles.quantiles(drawn[:, 1:], [0.05, 0.25])[:, 1]
    assert (below == (pit < 0.25)).mean() > 0.98
    assert np.isnan(ensembles.pit(drawn[:2, 1:], np.array([np.nan, 1.0]))).tolist() == [True, False]


def test_pit_of_a_law_is_its_distribution_function() -> None:
    import torch

    law = normal(torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64))
    height = Continuous("height", 0.0, 3.0)  # z = 0 is 1.5 m, z = 0.5 is 2.25 m
    rows = law_cells(height, law, [1.5, 2.25, None])
    assert [row["height_pit"] for row in rows] == [pytest.approx(0.5), pytest.approx(stats.norm.cdf(1)), None]


def test_calibration_error_is_the_gap_of_each_bin() -> None:
    sure = np.array([0.91] * 10 + [0.65] * 10)
    right = np.array([1.0] * 6 + [0.0] * 4 + [1.0] * 7 + [0.0] * 3)
    found = reliability(sure, right)
    assert found.people.tolist() == [10, 10] and found.accuracy.tolist() == [0.7, 0.6]
    assert found.error == pytest.approx((0.05 + 0.31) / 2)


def test_few_calibrated_people_have_a_calibration_error() -> None:
    """What a measured error is held against: it is as large as that of drawn classes, and falls with the people."""
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 100)
    measured = [reliability(sure, (rng.random(100) < sure).astype(float)).error for _ in range(300)]
    assert calibrated_error(sure) == pytest.approx(np.mean(measured), rel=0.05)
    assert calibrated_error(np.tile(sure, 100)) < 0.15 * calibrated_error(sure)


def test_slope_is_that_of_least_squares_and_its_interval_that_of_theory() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(20, 80, 300)
    errors = 3 - 0.4 * (true - 50) + rng.normal(0, 5, 300)
    found = slope(true, errors, people(300))
    assert found.value == pytest.approx(np.polyfit(true, errors, 1)[0])
    assert found.high - found.value == pytest.approx(1.96 * 5 / (true.std() * np.sqrt(300)), rel=0.2)
    constant = slope(true, 50 - true, people(300))
    assert constant.interval == pytest.approx((-1, -1, -1))
    assert slope(np.append(true, 9.0), np.append(errors, np.nan), people(301)).value == pytest.approx(
        found.value, abs=1e-9
    )


def test_the_correction_of_other_people_removes_the_slope() -> None:
    rng = np.random.default_rng(1)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        true = rng.uniform(20, 80, n)
        return true, 3 - 0.4 * (true - 50) + rng.normal(0, 5, n)

    line = error_line(*draw(2000))
    assert line == pytest.approx((-0.4, 23), abs=1.0) and line[0] == pytest.approx(-0.4, abs=0.02)
    true, errors = draw(500)
    after = slope(true, corrected(true, errors, line), people(500))
    assert after.low < 0 < after.high
    assert error_line(true[:2], errors[:2]) is None and error_line(np.full(9, 1.0), errors[:9]) is None


def test_groups_are_decades_of_ages_and_classes_of_categories() -> None:
    age = Schema.from_dict({"age": {"kind": "continuous", "range": [0, 120]}})["age"]
    ages = [20.0, 29.9, 30.0, 82.0, None, 55.5]
    labels = groups_of(ages, age)
    assert labels == ["20 to 30", "20 to 30", "30 to 40", "80 to 90", None, "50 to 60"]
    assert group_order([*labels, "100 to 110"], age)[-2:] == ["80 to 90", "100 to 110"]
    assert groups_of([5.0], age) == [groups_of([5.0, None], age)[0]] and groups_of([None], age) == [None]
    assert group_order(groups_of(["0", "A", None], SCHEMA["blood"]), SCHEMA["blood"]) == ["A", "0"]
    for value, label in zip(ages, labels):
        if value is not None and label is not None:
            low, high = map(float, label.split(" to "))
            assert low <= value < high


def test_visits_of_one_person_are_compared_and_others_left_out() -> None:
    keys = ["sub-a_ses-1", "sub-a_ses-2", "sub-b_ses-1", "sub-b_ses-2", "sub-c"]
    apart, within = between_visits(keys, ["sub-a", "sub-a", "sub-b", "sub-b", "sub-c"], np.array([1.0, 4, 2, 1, 9]))
    assert apart.value == 2 and apart.n == 2 and within == pytest.approx(np.sqrt((9 + 1) / 2 / 2))
    classes, _ = between_visits(keys, ["sub-a", "sub-a", "sub-b", "sub-b", "sub-c"], np.array([0.0, 2, 1, 1, 0]), True)
    assert classes.value == 0.5
    nobody, none = between_visits(["sub-a", "sub-b"], ["sub-a", "sub-b"], np.array([1.0, 2.0]))
    assert nobody.n == 0 and np.isnan(none)


def test_consecutive_visits_are_so_by_number() -> None:
    keys = ["sub-a_ses-1", "sub-a_ses-10", "sub-a_ses-2"]
    assert between_visits(keys, ["sub-a"] * 3, np.array([0.0, 2, 1]))[0].value == 1


def test_a_category_predicted_as_a_number_is_the_nearest_class() -> None:
    frame = pd.DataFrame({"key": list("abcd"), "subject": list("abcd"), "blood": [0.4, 0.6, 1.7, np.nan]})
    frame["recorded"] = ["A", "A", "0", "B"]
    found = read_answers("number", SCHEMA["blood"], ["scan"], frame, AS_NUMBER["blood"])
    assert found.frame["value"].tolist()[:3] == ["A", "B", "0"]
    assert found.scores[:3].tolist() == [1, 0, 1] and np.isnan(found.scores[3])


def test_whoever_has_no_true_value_is_left_out_and_answers_of_folds_are_joined() -> None:
    frame = pd.DataFrame({"key": ["a", "b"], "subject": ["a", "b"], "height": [1.0, 2.0], "recorded": [1.5, None]})
    first = read_answers("m", SCHEMA["height"], ["scan"], frame, SCHEMA["height"])
    assert first.frame["key"].tolist() == ["a"] and not first.has("pit")
    comparison = Comparison(SCHEMA, ["m"], [("height", ("scan",))])
    second = read_answers("m", SCHEMA["height"], ["scan"], frame.assign(key=["c", "d"]), SCHEMA["height"])
    for answers in (first, second):
        comparison.add(comparison.found, answers)
    (joined,) = comparison.of("height")
    assert joined.frame["key"].tolist() == ["a", "c"] and score_text(joined) == "0.5000 ± 0.0000"
    assert [v.name for v in comparison.variables] == ["height"]


def test_table_1_has_a_row_for_everybody_and_joins_what_was_generated() -> None:
    frame = pd.DataFrame({"key": people(4), "subject": people(4), "value": [1.0, 2, 1, 2], "true": [1.5, 1.5, 2, 1]})
    answers = Answers("ours", SCHEMA["height"], ("scan", "blood"), frame)
    drawn = pd.DataFrame({"measure": ["FID"], "value": [10.94], "low": [10.1], "high": [11.6]})
    result = table_1(["ours", "LDM"], [[answers]], {"LDM": drawn})
    assert result.text.header == ["method", "FID", "height error (m), given scan, blood"]
    ours, ldm = result.text.rows
    assert ours[:2] == ["ours", "–"] and ours[2].startswith("0.7500 ± 0.2500 [0.5")
    assert ldm == ["LDM", "10.94 [10.10, 11.60]", "–"]
    assert result.numbers["height_error"].tolist()[0] == 0.75 and result.numbers["FID"].tolist()[1] == 10.94


def test_the_sd_of_one_person_is_not_zero_and_nobody_has_no_score() -> None:
    frame = pd.DataFrame({"key": ["sub-a"], "subject": ["sub-a"], "value": [1.0], "true": [1.5]})
    assert score_text(Answers("ours", SCHEMA["height"], (), frame)) == "0.5000"
    assert score_text(Answers("ours", SCHEMA["height"], (), frame[:0])) == "–"


def test_a_share_of_all_or_none_is_not_certain() -> None:
    """The interval is that of the binomial law: 12 of 12 can well be 80 %."""
    frame = pd.DataFrame({"key": people(12), "subject": people(12), "value": "A", "true": "A", "pit": 0.5})
    answers = Answers("ours", SCHEMA["blood"], (), frame)
    low = stats.binomtest(12, 12).proportion_ci(0.95, "exact").low
    assert score_of(answers).interval == pytest.approx((1, low, 1))
    wrong = Answers("ours", SCHEMA["blood"], (), frame.assign(true="B"))
    assert score_of(wrong).interval == pytest.approx((0, 0, 1 - low))
    number = Answers("ours", SCHEMA["height"], (), frame.assign(value=1.0, true=1.0, crps=0.1))
    table = calibration([number])
    assert table is not None and table.numbers["coverage_90_low"][0] == pytest.approx(low)
    assert score_of(number).interval == (0, 0, 0)  # an error has no binomial law


def test_groups_are_those_of_everybody_whom_some_method_answers() -> None:
    """Otherwise two methods would have other decades."""
    height = {name: 1.2 + 0.02 * i for i, name in enumerate(people(30))}

    def answers(method: str, names: list[str]) -> Answers:
        frame = pd.DataFrame({"key": names, "subject": names, "true": [height[name] for name in names]})
        return Answers(method, SCHEMA["height"], (), frame.assign(value=1.5))

    few = answers("few", people(30)[10:13])
    result = by_group([[answers("many", people(30)), few]], [SCHEMA["height"]], lambda key, name: height[key])
    assert result is not None
    groups = result.numbers.groupby("method")["group"].apply(set)
    assert groups["few"] < groups["many"]
    assert "fewer than 20 people are too narrow" in result.note


def test_nobody_with_a_known_value_leaves_dashes_and_no_figure(tmp_path: Path) -> None:
    frame = pd.DataFrame({"key": [], "subject": [], "value": [], "true": []})
    comparison = Comparison(SCHEMA, ["ours", "other"], [("height", ("scan",)), ("height", ())])
    for method in comparison.methods:
        for _, given in comparison.queries:
            comparison.add(comparison.found, Answers(method, SCHEMA["height"], given, frame))
    results = list(make_tables(comparison, {}, lambda key, name: None))
    assert results[0].text.rows == [["ours", "–"], ["other", "–"]]
    assert draw_figures(comparison, results, tmp_path / "figures") == ["scores-height"]


@pytest.mark.parametrize("n", [10, 11, 20])
def test_every_method_has_its_own_colour(n: int) -> None:
    assert len(set(colours(people(n)).values())) == n


def test_names_end_no_cell_and_are_no_markup(tmp_path: Path) -> None:
    names = ["a|b", "<script>x</script>", "[best]", "*", "two\nlines", "$5 and $%", "50 % & x_y^2~\\"]
    table = Table(["", "n"], [[name, "1 < 2"] for name in names])
    lines = table.markdown().splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines) and len(lines) == 2 + len(names)
    assert not re.search(r"(?<!\\)<\w", table.markdown()) and lines[2] == r"| a\|b | 1 < 2 |"
    rows = table.latex().splitlines()[4:-2]
    assert len(rows) == len(names) and all(row.endswith(r" & 1 $<$ 2 \\") for row in rows)
    assert rows[2].startswith("{}[best]") and rows[3].startswith("{}*")  # no arguments of the row before
    assert rows[6].startswith(r"50 \% \& x\_y\textasciicircum{}2\textasciitilde{}\textbackslash{}")
    frame = pd.DataFrame({"key": people(9), "subject": people(9), "value": 1.0, "true": 1.5, "pit": 0.2, "crps": 0.1})
    comparison = Comparison(SCHEMA, names, [("height", ())])
    for method in names:
        comparison.add(comparison.found, Answers(method, SCHEMA["height"], (), frame))
    draw_figures(comparison, [], tmp_path / "figures")


def test_latex_is_escaped_and_has_a_column_for_each() -> None:
    text = Table(["a & b", "50 %"], [["x_1", "4.5 ± 3"], ["y", "-2"]]).latex().splitlines()
    assert text[0] == r"\begin{tabular}{lr}" and text[2] == r"a \& b & 50 \% \\"
    assert text[4] == r"x\_1 & 4.5 $\pm$ 3 \\" and text[5] == r"y & $-$2 \\"
    age = Schema.from_dict({"age": {"kind": "continuous", "range": [0, 120]}})["age"]
    assert (digits_of(age), digits_of(SCHEMA["height"])) == (2, 4)


def test_visits_are_in_the_table_of_retests_alone() -> None:
    keys = ["sub-a_ses-1", "sub-a_ses-2", "sub-b_ses-1", "sub-b_ses-2", "sub-c"]
    frame = pd.DataFrame({"key": keys, "subject": [key.split("_")[0] for key in keys]})
    number = Answers(
        "m", SCHEMA["height"], ("scan",), frame.assign(value=[1.0, 1.5, 2, 2, 1], true=[1.0, 1.25, 2, 2, 1])
    )
    words = Answers("m", SCHEMA["blood"], ("scan",), frame.assign(value=list("AAB0A"), true=list("AABBA")))
    result = retest([number, words])
    assert result is not None
    assert [row[3].split(" ")[0] for row in result.text.rows] == ["0.1250", "0.500"]
    assert result.numbers["people"].tolist() == [2, 2]
    assert retest([Answers("m", SCHEMA["height"], (), number.frame[4:])]) is None
