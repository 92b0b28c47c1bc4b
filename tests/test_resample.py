"""Laws of resampling and of order statistics: the short ways give what SciPy and NumPy give."""

import numpy as np
import pytest
from scipy import ndimage

from shards.foreground import foreground
from shards.intensity import rescale
from shards.percentiles import Ordered
from shards.qc.outline import _block_means, _depth, _within
from shards.resample import sample, sample_part

SIZE, CORNER, SHAPE = (30, 34, 28), (5, 7, 4), (40, 36, 44)


@pytest.fixture(scope="module")
def part() -> np.ndarray:
    return np.random.default_rng(0).random((18, 20, 16), np.float32)


@pytest.fixture(scope="module")
def whole(part: np.ndarray) -> np.ndarray:
    """The part within a volume of zeros."""
    volume = np.zeros(SIZE, np.float32)
    volume[tuple(slice(c, c + n) for c, n in zip(CORNER, part.shape))] = part
    return volume


def by_scipy(volume: np.ndarray, step: np.ndarray, offset: np.ndarray, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    coarser = np.maximum(np.linalg.norm(step, axis=1) ** 2 - 1, 0)
    smooth = ndimage.gaussian_filter(volume, np.sqrt(coarser) / np.sqrt(8 * np.log(2)), mode="grid-constant")
    return ndimage.affine_transform(smooth, step, offset, output_shape=shape, order=1, mode="grid-constant")


@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 2, 2), (1, 2, 3), (0.5, 0.5, 0.25), (0.5, 1, 2)])
@pytest.mark.parametrize("offset", [(-4, 3, 0), (2, -40, 1), (0.5, 0.25, -3)])
def test_slicing_and_axes_give_the_bits_of_an_affine_transform(
    part: np.ndarray, whole: np.ndarray, factors: tuple[float, ...], offset: tuple[float, ...]
) -> None:
    """Where positions are exact in floating point: whole ones are copied, others are interpolated axis by axis."""
    step, start = np.diag(factors), np.array(offset, float)
    expected = by_scipy(whole, step, start)
    assert expected.any() or offset[1] == -40
    np.testing.assert_array_equal(sample(whole, step, start, SHAPE), expected)
    np.testing.assert_array_equal(sample_part(part, CORNER, SIZE, step, start, SHAPE), expected)


def test_other_grids_are_equal_within_rounding(part: np.ndarray, whole: np.ndarray) -> None:
    a = np.radians(8)
    oblique = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0.1], [0, 0, 1]])
    for step in (np.diag([0.7, 1.1, 1.9]), oblique, 0.6 * oblique, 2.3 * oblique):
        start = np.array([-3.3, 1.7, -0.6])
        expected = by_scipy(whole, step, start)
        for found in (sample(whole, step, start, SHAPE), sample_part(part, CORNER, SIZE, step, start, SHAPE)):
            np.testing.assert_allclose(found, expected, atol=3e-7)


@pytest.mark.parametrize("kind", ["positive", "signed", "few", "constant", "one"])
def test_quantiles_have_the_bits_of_numpy(kind: str) -> None:
    rng = np.random.default_rng(1)
    values = {
        "positive": rng.gamma(2, 300, 50_000),
        "signed": rng.normal(0, 1e-3, 50_000),
        "few": rng.integers(-3, 4, 9_999) * 0.37,
        "constant": np.full(17, -0.0),
        "one": np.array([4.2]),
    }[kind].astype(np.float32)
    ordered, by_rank = Ordered(values), np.sort(values)
    for percent in (0, 5, 37.3, 95, 99, 99.5, 100):
        for q in (np.float32(percent) / np.float32(100), np.float64(percent) / 100):
            for start, stop in ((0, None), (len(values) // 3, None), (len(values) // 4, len(values) // 2 + 1)):
                found = ordered.quantile(q, start, stop)
                expected = np.quantile(by_rank[start:stop], np.array([q]))[0]
                assert float(found) == float(expected)
    for bound in (-1e9, float(values[0]), 0.0, 1e-7, float(values.max()), np.inf):
        assert ordered.below(bound) == (values < np.float32(bound)).sum()
        assert ordered.below(bound, inclusive=True) == (values <= np.float32(bound)).sum()


@pytest.mark.parametrize("empty", [0.0, -1024.0, 7.5])
@pytest.mark.parametrize("negative", [False, True])
def test_a_box_of_background_around_a_volume_changes_nothing(empty: float, negative: bool) -> None:
    volume = np.full((20, 22, 24), empty, np.float32)
    volume[4:16, 5:18, 3:20] += np.random.default_rng(2).gamma(3, 50, (12, 13, 17)).astype(np.float32)
    if negative:
        volume[6, 6, 6:9] = empty - 3
    small, large = foreground(volume), foreground(np.pad(volume, 5, constant_values=empty))
    assert small.corner == (4, 5, 3) and large.corner == (9, 10, 8) and small.empty == large.empty == empty
    np.testing.assert_array_equal(rescale(small), rescale(large))
    values = volume[volume != empty]
    tissue = values[values >= empty]
    low, high = float(tissue.min()), float(np.percentile(tissue, 99.5))
    expected = np.where(volume != empty, np.clip((volume - low) / (high - low), 0, 1), 0)[4:16, 5:18, 3:20]
    np.testing.assert_array_equal(rescale(small), expected)


def test_distances_and_means_are_those_of_scipy_and_numpy(whole: np.ndarray) -> None:
    size = np.array([3.0, 2.5, 4.0])
    outline = ndimage.gaussian_filter(whole, 2) > 0.3
    for distance in (0.0, 2.5, 9.0, 13.1):
        expected = ndimage.distance_transform_edt(~outline, sampling=size) <= distance
        np.testing.assert_array_equal(_within(outline, distance, size), expected)
    expected = ndimage.distance_transform_edt(np.pad(outline, 1), sampling=size)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(_depth(outline, size), expected)
    means = whole[:, :33].reshape(10, 3, 11, 3, 14, 2).mean((1, 3, 5))
    np.testing.assert_allclose(_block_means(whole[:, :33], (3, 3, 2)), means, rtol=1e-6)
