"""Measures of drawn volumes: distances agree with independent ones and with closed forms, and copies are found."""

import numpy as np
import pytest
import scipy.linalg
import torch
from monai.metrics.fid import FIDMetric
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from mvhpc.evaluation.frechet import Sets, at_half, extrapolate, fid, frechet_distance, intervals
from mvhpc.evaluation.generation import copy_rows
from mvhpc.evaluation.neighbours import find_copies, precision_recall
from mvhpc.evaluation.ridge import STRENGTHS, Ridge, read_classes
from mvhpc.evaluation.sharpness import sharpness
from mvhpc.evaluation.similarity import ms_ssim, scales


def normal(seed: int, n: int, sd: NDArray, mean: float = 0.0) -> NDArray:
    """N draws (N, F) of a normal distribution with a random rotation that depends on F alone."""
    turn = scipy.linalg.qr(np.random.default_rng(len(sd)).standard_normal((len(sd), len(sd))))[0]
    return (np.random.default_rng(seed).standard_normal((n, len(sd))) * sd + mean) @ turn


def by_square_root(x: NDArray, y: NDArray) -> float:
    """The formula of pytorch-fid: the matrix square root of the product of the covariances."""
    apart, first, second = x.mean(0) - y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(apart @ apart + np.trace(first + second - 2 * root))


@pytest.mark.parametrize(("n", "features"), [(400, 5), (300, 64), (80, 64)])
def test_the_distance_agrees_with_independent_implementations(n: int, features: int) -> None:
    sd = np.arange(1, features + 1) ** -0.5
    x, y = normal(1, n, sd), normal(2, n + 7, 1.3 * sd, 0.1)
    ours = frechet_distance(x, y)
    assert ours == pytest.approx(by_square_root(x, y), rel=1e-3)
    assert ours == pytest.approx(float(FIDMetric()(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-3)
    assert ours == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_with_fewer_samples_than_features_it_is_that_of_the_samples_own_subspace() -> None:
    """Adding features that do not vary changes nothing, and the root of a singular product is not needed."""
    sd = np.arange(1, 13) ** -0.5
    x, y = normal(1, 40, sd), normal(2, 40, 1.3 * sd, 0.2)
    wide = scipy.linalg.qr(np.random.default_rng(0).standard_normal((500, 12)), mode="economic")[0].T  # (12, 500)
    assert frechet_distance(x @ wide, y @ wide) == pytest.approx(by_square_root(x, y), rel=1e-6)


def test_the_distance_of_a_set_to_itself_is_zero() -> None:
    for n, features in ((50, 8), (20, 300)):
        x = normal(3, n, np.ones(features))
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * features)
        assert frechet_distance(x, x[::-1] + 2.0) == pytest.approx(4 * features, rel=1e-9)


def test_counts_stand_for_repeated_rows() -> None:
    x, y = normal(4, 30, np.ones(6)), normal(5, 40, np.ones(6), 0.3)
    counts = np.random.default_rng(0).integers(0, 3, 30)
    assert frechet_distance(x, y, counts) == pytest.approx(frechet_distance(np.repeat(x, counts, 0), y), rel=1e-9)


def test_the_distance_of_normal_laws_has_a_closed_form() -> None:
    """With the same axes it is the squared distance of the means and of the SDs."""
    sd, other, shift = np.array([1.0, 0.5, 2.0]), np.array([0.8, 0.7, 1.5]), 0.4
    x, y = normal(6, 40_000, sd), normal(7, 40_000, other, shift)
    assert frechet_distance(x, y) == pytest.approx(3 * shift**2 + np.square(sd - other).sum(), rel=0.03)


def people(seed: int, n: int, sd: NDArray, mean: float = 0.0, slices: int = 1) -> list[NDArray]:
    """One plane of features, (N, S, F)."""
    return [normal(seed, n * slices, sd, mean).reshape(n, slices, -1)]


def test_the_extrapolated_distance_is_that_of_the_laws() -> None:
    """Of few people the distance is far too large; the line in 1 / n removes the bias, of real people too."""
    sd = np.full(16, 0.5)
    truth = 16 * 0.15**2 + np.square(0.3 * sd).sum()
    plain, limits, floors = [], [], []
    for seed in range(8):
        sets = Sets(people(3 * seed, 120, 1.3 * sd, 0.15), people(3 * seed + 1, 120, sd), False)
        found = extrapolate(sets, np.random.default_rng(seed))
        plain.append(found.values[-1, -1])
        limits.append(found.limit[-1])
        both = Sets(people(3 * seed + 2, 120, sd), sets.real, False)
        floors.append(extrapolate(both, np.random.default_rng(seed)).limit[-1])
        assert found.sizes[0] == 60 and found.sizes[-1] == 120
    error = np.std(limits) / np.sqrt(8)
    assert np.mean(plain) > truth + 5 * error and abs(np.mean(limits) - truth) < 3 * error + 0.02 * truth
    assert abs(np.mean(floors)) < 0.05 * truth


def test_intervals_hold_the_expected_distance() -> None:
    """95 % intervals, of 25 pairs of sets: the mean over pairs lies in most of them."""
    sd, n = np.array([1.0, 0.7, 0.4, 0.2]), 40
    found = []
    for seed in range(25):
        sets = Sets(people(2 * seed, n, sd, 0.3), people(2 * seed + 1, n, sd), False)
        found.append(intervals(sets, 60, np.random.default_rng(seed))[-1])
    expected = np.mean([estimate.value for estimate in found])
    assert sum(estimate.low <= expected <= estimate.high for estimate in found) >= 20
    assert all(estimate.low <= estimate.value <= estimate.high and estimate.n == n for estimate in found)


def test_planes_are_averaged_and_slices_of_a_person_stay_together() -> None:
    sd = np.ones(3)
    first, second = people(1, 20, sd, slices=4), people(2, 20, sd, 1.0, slices=2)
    sets = Sets(first + second, people(3, 20, sd, slices=4) + people(4, 20, sd, slices=2), True)
    planes = fid(sets)
    rows = [(x.reshape(-1, 3), y.reshape(-1, 3)) for x, y in zip(sets.drawn, sets.real)]
    assert planes[:2].tolist() == [frechet_distance(x, y) for x, y in rows]
    assert planes[2] == pytest.approx(planes[:2].mean())
    some = np.arange(5, 15)
    counts = np.isin(np.arange(20), some).astype(int)
    assert fid(sets, counts, counts) == pytest.approx(fid(sets.take(some, some, True)))


def test_the_floor_is_reached_by_draws_of_the_same_law_and_not_by_others() -> None:
    sd = np.ones(8)
    for mean, close in ((0.0, True), (1.0, False)):
        sets = Sets(people(1, 200, sd, mean), people(2, 200, sd), True)
        halves, floor = (at_half(sets, way, np.random.default_rng(0))[-1] for way in (Sets.halves, Sets.floor))
        assert halves.n == floor.n == 100
        assert (halves.low < floor.high) == close
        assert halves.value == pytest.approx(floor.value, rel=0.3) or not close
    with pytest.raises(ValueError, match="equal numbers"):
        Sets(people(1, 20, sd), people(2, 21, sd), False)


def test_precision_and_recall_of_equal_disjoint_and_partial_sets() -> None:
    x = normal(1, 60, np.ones(4))
    for drawn, expected in ((x, (1.0, 1.0)), (x + 100, (0.0, 0.0))):
        assert tuple(inside.mean() for inside in precision_recall(drawn, x)) == expected
    modes = np.concatenate([x, x + 100])  # drawn people are of one mode, some of them of none
    precision, recall = precision_recall(np.concatenate([x, x[:20] - 100]), modes)
    assert precision.tolist() == [True] * 60 + [False] * 20
    assert recall.tolist() == [True] * 60 + [False] * 60
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(x[:3], x)


def test_the_manifold_is_that_of_the_paper() -> None:
    """On a line: points at 0, 1, 3 and 7 with the distances to their next neighbour as radii."""
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    drawn = np.array([[-1.0], [-1.1], [4.9], [5.1], [11.0], [11.1]])
    precision, _ = precision_recall(drawn, real, nearest=1)
    assert precision.tolist() == [True, False, True, True, True, False]


def test_copies_are_found_and_new_people_are_not() -> None:
    rng = np.random.default_rng(0)
    training, held_out, new = (rng.standard_normal((n, 50)).astype(np.float32) for n in (200, 60, 60))
    copies = training[:60] + 0.05 * rng.standard_normal((60, 50)).astype(np.float32)
    found = find_copies(np.concatenate([copies, training[:3]]), training, held_out)
    assert found.copied.all() and found.nearest.tolist() == [*range(60), 0, 1, 2]
    assert (found.training[-3:] == 0).all()
    chosen = 60 / 200  # of the training; where the one that was copied is not, either side is as near
    assert found.nearer.mean() == pytest.approx(chosen + (1 - chosen) / 2, abs=0.05)
    fresh = find_copies(new, training, held_out)
    assert not fresh.copied.any() and 0.35 < fresh.nearer.mean() < 0.65


def test_no_copy_among_few_people_is_not_none_among_many() -> None:
    rng = np.random.default_rng(0)
    found = find_copies(rng.normal(size=(20, 50)), rng.normal(size=(40, 50)), rng.normal(size=(20, 50)))
    copies = next(row for row in copy_rows(found, None, 0) if row.measure == "copies")
    assert copies.drawn.value == copies.drawn.low == 0 and copies.drawn.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_as_many_of_the_training_are_compared_as_there_are_held_out_people() -> None:
    """The closed form is the mean over all choices of so many people of the training."""
    from itertools import combinations

    rng = np.random.default_rng(1)
    drawn, training, held_out = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)), rng.standard_normal((3, 3))
    found = find_copies(drawn, training, held_out)
    for i, x in enumerate(drawn):
        near, far = (np.linalg.norm(rows - x, axis=1) for rows in (training, held_out))
        wins = [near[list(chosen)].min() < far.min() for chosen in combinations(range(7), 3)]
        assert found.nearer[i] == pytest.approx(np.mean(wins))


def test_another_scan_of_the_same_person_is_no_other_person() -> None:
    rng = np.random.default_rng(2)
    training, held_out = rng.standard_normal((20, 30)), rng.standard_normal((10, 30))
    twice = np.concatenate([training, training[:1] + 0.01])
    subjects = np.array([*range(20), 0])
    assert find_copies(training[:1], twice, held_out, subjects).copied.all()
    paired = find_copies(held_out, training, held_out, paired=True)
    assert (paired.held_out > 0).all() and find_copies(held_out, training, held_out).held_out.max() == 0


def test_ridge_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 90)) @ np.diag(np.arange(1, 91) ** -0.7)
    y = x[:, :3].sum(1) + 0.3 * rng.standard_normal(40)
    new = rng.standard_normal((10, 90))
    ours = Ridge(x, y[:, None])
    scale = np.linalg.eigvalsh(np.cov(x) * 0 + (x - x.mean(0)) @ (x - x.mean(0)).T).clip(min=0).mean()
    theirs = RidgeCV(alphas=scale * STRENGTHS).fit(x, y)
    assert ours.strength == pytest.approx(theirs.alpha_, rel=1e-6)
    assert ours.predict(new)[:, 0] == pytest.approx(theirs.predict(new), rel=1e-6)
    names = ["high" if value > 0 else "low" for value in y]
    assert np.mean([a == b for a, b in zip(read_classes(x, names, x), names)]) > 0.9


def test_a_volume_without_a_brain_has_no_detail() -> None:
    assert sharpness(np.zeros((16, 16, 16), np.float32)).tolist() == [0, 0, 0]


def test_sharpness_falls_with_smoothing_and_similarity_with_difference() -> None:
    from scipy.ndimage import gaussian_filter

    x = np.random.default_rng(0).random((24, 24, 24)).astype(np.float32)
    assert (sharpness(gaussian_filter(x, 0.7)) < sharpness(x)).all()
    assert sharpness(x / 2) == pytest.approx(sharpness(x) / 4, rel=0.05)
    a, b = torch.from_numpy(x)[None, None], torch.from_numpy(x[::-1].copy())[None, None]
    assert float(ms_ssim(a, a)) == pytest.approx(1) and float(ms_ssim(a, b)) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_ssim(a, a), torch.ones(1))
    assert [scales((n, n, n)) for n in (11, 22, 48, 160, 192)] == [1, 2, 3, 4, 5]
