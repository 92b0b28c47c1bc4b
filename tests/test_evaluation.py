"""Intervals of the scoreboard against closed forms and a known law; tables and figures on the way to the reader."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from scipy import stats

from mvhpc.evaluation import ensembles, figures, tables
from mvhpc.evaluation.metrics import Estimate, absolute_errors, hits, mean_over_subjects
from mvhpc.evaluation.ventricles import deep_fluid_ml
from shards.schema import Schema

SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T1w"},
        "height": {"kind": "continuous", "range": [0, 3], "unit": "m"},
        "blood": {"kind": "categorical", "classes": ["A", "B", "0"]},
    }
)


def test_accuracy_interval_is_that_of_the_binomial_law() -> None:
    right = np.array([1.0] * 70 + [0.0] * 30)
    estimate = mean_over_subjects(right)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.7) / 100
    assert estimate.value == pytest.approx(0.7)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=0.011), pytest.approx(high, abs=0.011))


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    errors = rng.exponential(4.0, (400, 80))
    covered = [e.low <= 4.0 <= e.high for row in errors for e in [mean_over_subjects(row, resamples=999)]]
    # 400 trials at 0.95 have a standard error of 0.011; the percentile interval is a little narrow for skewed errors
    assert 0.91 < np.mean(covered) < 0.98


@pytest.mark.parametrize(("law", "m"), [(stats.norm(50, 8), 3), (stats.norm(50, 8), 10), (stats.expon(0, 8), 30)])
def test_intervals_of_draws_hold_one_more_as_often_as_they_say(law: stats.rv_continuous, m: int) -> None:
    """Few draws of a normal law, many of any; standard errors of 20,000 people are 0.2 to 0.35 %."""
    drawn = law.rvs((20_000, m + 1), random_state=np.random.default_rng(0))
    below = drawn[:, :1] <= ensembles.quantiles(drawn[:, 1:], [0.05, 0.25, 0.5, 0.75, 0.95])
    assert below.mean(0) == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95], abs=0.012)


def test_crps_of_draws_is_on_average_that_of_their_law() -> None:
    """However few there are; of a normal law it is known (Gneiting and Raftery 2007, eq. 21)."""
    truth, m, law = 0.7, 3, stats.norm()
    drawn = law.rvs((40_000, m), random_state=np.random.default_rng(0))
    exact = truth * (2 * law.cdf(truth) - 1) + 2 * law.pdf(truth) - 1 / np.sqrt(np.pi)
    assert ensembles.crps(drawn, np.full(40_000, truth)).mean() == pytest.approx(exact, abs=0.01)
    with pytest.raises(ValueError, match="2 or more"):
        ensembles.quantiles(drawn[:, :1], [0.5])


def test_rows_of_one_subject_count_as_one_subject() -> None:
    errors = np.random.default_rng(1).exponential(4.0, 60)
    once = mean_over_subjects(errors)
    thrice = mean_over_subjects(np.repeat(errors, 3), np.repeat([f"{i:02d}" for i in range(60)], 3).tolist())
    assert thrice == Estimate(pytest.approx(once.value), pytest.approx(once.low), pytest.approx(once.high), 60)
    unaware = mean_over_subjects(np.repeat(errors, 3))
    assert unaware.high - unaware.low < 0.7 * (once.high - once.low)


def test_missing_values_are_left_out() -> None:
    assert mean_over_subjects(absolute_errors([1, 2, np.nan, 4], [2, np.nan, 3, 7])).value == 2.0
    assert hits(["A", None, "B", "0"], ["A", "A", None, "B"]).tolist()[::3] == [1.0, 0.0]
    nobody = mean_over_subjects([np.nan])
    assert nobody.n == 0 and nobody.format(2) == "-"
    assert mean_over_subjects([3.0]).format(1) == "3.0"


def test_scoreboard_joins_queries_and_folds() -> None:
    rng = np.random.default_rng(0)
    keys = [f"sub-{i:02d}" for i in range(40)]
    true = rng.uniform(1, 2, 40)
    height = pd.DataFrame({"key": keys, "subject": keys, "height": true + 0.25, "height_true": true})
    blood = pd.DataFrame({"key": keys, "subject": keys, "blood": ["A"] * 40, "blood_true": ["A", "B"] * 20})
    entries = [("scan", height[:25]), ("scan", height[25:]), ("scan", blood), ("nothing", blood)]
    table = tables.scoreboard(entries, SCHEMA, ["height", "blood"])
    assert table.header == ["given", "height error (m)", "blood accuracy", "subjects"]
    assert table.rows[0][1] == "0.25 [0.25, 0.25]" and table.rows[0][2].startswith("0.50 [0.3")
    assert table.rows[0][3] == "40"
    assert table.rows[1][1] == "-"
    lines = table.text().splitlines()
    assert len({len(line) for line in lines}) == 1 and table.markdown().count("\n") == 3


def test_the_count_of_subjects_fits_every_cell_of_its_row() -> None:
    keys = [f"sub-{i}" for i in range(4)]
    frame = pd.DataFrame({"key": keys, "subject": keys, "height": 1.5, "height_true": [1.4, 1.5, 1.6, np.nan]})
    frame = frame.assign(blood="A", blood_true=["A", "B", "A", "A"])
    table = tables.scoreboard([("scan", frame), ("tall", frame[:3])], SCHEMA, ["height", "blood"])
    assert [row[-1] for row in table.rows] == ["3 (height), 4 (blood)", "3"]


def test_slices_put_front_and_top_up_and_left_to_the_left() -> None:
    volume = np.zeros((8, 12, 10), np.float32)
    volume[0, :, :] += 1  # the person's left
    volume[:, 11, :] += 2  # front
    volume[:, :, 9] += 4  # top
    axial, coronal, side = figures.views(volume)
    assert axial.shape == (12, 8) and (axial[:, 0] >= 1).all() and (axial[0] >= 2).all()
    assert coronal.shape == (10, 8) and (coronal[:, 0] % 2 == 1).all() and (coronal[0] >= 4).all()
    assert side.shape == (10, 12) and (side[0] >= 4).all() and (side[:, -1] % 4 >= 2).all()
    assert figures.slices(volume).shape == (12, 8 + 8 + 12)


def test_an_inpainting_shows_the_known_and_hides_the_rest() -> None:
    image, known = np.full((4, 4), 0.8), np.arange(16).reshape(4, 4) < 8
    shaded = figures.shade(image, known)
    assert (shaded[known] == 0.8).all() and (shaded[~known].max(-1) < 0.4).all()


def test_an_inpainting_is_cut_where_something_is_unknown() -> None:
    known = np.ones((8, 12, 10), bool)
    known[:3, 10:, 9:] = False
    assert [figures.most_unknown(known, axis) for axis in range(3)] == [2, 10, 9]
    known[:] = False
    assert [figures.most_unknown(known, axis) for axis in range(3)] == [4, 6, 5]


def test_a_difference_is_black_where_nothing_changed_and_red_where_it_is_brighter() -> None:
    before = np.full((2, 3), 0.5)
    after = before + np.array([[0, 0.3, 0.9], [0, -0.3, -0.9]])
    colours = figures.difference(before, after)
    assert (colours[:, 0] == 0).all()
    assert (colours[0, 1:, 0] > colours[0, 1:, 2]).all() and (colours[1, 1:, 2] > colours[1, 1:, 0]).all()
    assert np.allclose(colours[:, 1], colours[:, 2])  # beyond the full colour


def test_figures_are_written_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    volumes = list(np.random.default_rng(0).random((5, 8, 12, 10)))
    figures.people(volumes, [f"person {i}" for i in range(5)], tmp_path / "people.png")
    figures.predicted_against_true(
        np.arange(5.0),
        np.arange(5.0) + 1,
        (np.arange(5.0), np.full(5, np.nan)),
        tmp_path / "scatter.png",
        "height",
        "m",
    )
    for name in ("people.png", "scatter.png"):
        assert imread(tmp_path / name)[..., :3].std() > 0.01
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("spacing", [2.0, 4.0])
def test_deep_fluid_is_the_volume_of_a_dark_ball_and_not_of_sulci(spacing: float) -> None:
    n = int(140 / spacing)
    radius = np.linalg.norm((np.indices((n, n, n)) - n / 2 + 0.5) * spacing, axis=0)  # mm
    volume = np.where(radius < 60, 0.8, 0.0)
    assert deep_fluid_ml(volume, spacing) == 0
    volume[radius < 20] = 0.2  # a ventricle
    volume[(radius > 45) & (radius < 50)] = 0.2  # sulci
    assert deep_fluid_ml(volume, spacing) == pytest.approx(4 / 3 * np.pi * 20**3 / 1000, rel=0.1)  # voxels
