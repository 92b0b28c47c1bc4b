"""What scalars are read from: pooled channels of a record, and the linear features of these."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mvhpc.models.pooled_features import linear_features, smooth
from mvhpc.records import channels_of, cube, read_pooled
from shards.dataset import Dataset, open_dataset
from shards.schema import Schema
from shards.writer import DatasetWriter
from tests.conftest import SCHEMA

SHAPE = (8, 9, 6)


@pytest.fixture(scope="module")
def with_maps(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two people with a volume and three tissue maps; the second has the volume alone."""
    folder = tmp_path_factory.mktemp("maps") / "packed"
    names = ["image_GM", "image_WM", "image_CSF"]
    arrays = {"image": {"shape": SHAPE, "dtype": "<f2"}} | {n: {"shape": SHAPE, "dtype": "u1"} for n in names}
    grid = {"spacing": 2.0, "shape": list(SHAPE), "affine": np.diag([2.0, 2, 2, 1]).tolist()}
    writer = DatasetWriter(folder, "zarr", "volumes", Schema.from_dict(SCHEMA), arrays, grid)
    g = np.random.default_rng(0)
    for i, stored in enumerate((["image", *names], ["image"])):
        voxels = {n: g.integers(0, 256, SHAPE).astype(np.uint8) for n in stored if n != "image"}
        voxels["image"] = g.random(SHAPE).astype(np.float16)
        writer.add(f"sub-{i}", f"sub-{i}", {"age": 50.0, "sex": "F"}, voxels, f"sub-{i}")
    writer.finish({}, {})
    return open_dataset(folder)


def test_maps_are_read_where_there_are_any(with_maps: Dataset, tiny_dataset: Path) -> None:
    assert channels_of(with_maps.index, "image") == ["image_GM", "image_WM", "image_CSF"]
    assert channels_of(open_dataset(tiny_dataset).index, "image") == ["image"]


def test_pooled_voxels_are_means_of_cubes(with_maps: Dataset) -> None:
    """Also at edges that the cubes do not divide, beyond which there is nothing."""
    assert cube(with_maps.index.grid, 4.0) == 2 and cube(with_maps.index.grid, 1.0) == 1
    names = channels_of(with_maps.index, "image")
    found = read_pooled(with_maps, "sub-0", names, 4.0)
    assert found.shape == (3, 4, 5, 3)
    whole = with_maps.read("sub-0", "image_WM").astype(float) / 255
    assert found[1, 1, 2, 0] == pytest.approx(whole[2:4, 4:6, 0:2].mean(), abs=1e-6)
    assert found[1, 3, 4, 2] == pytest.approx(whole[6:8, 8:9, 4:6].mean() / 2, abs=1e-6)
    same = read_pooled(with_maps, "sub-1", ["image"], 2.0)[0]
    assert np.array_equal(same.numpy(), with_maps.read("sub-1", "image").astype(np.float32))


def test_smoothing_keeps_sums_and_is_a_normal_distribution() -> None:
    x = torch.zeros(1, 1, 31, 31, 31)
    x[0, 0, 15, 15, 15] = 1
    found = smooth(x, 2.0)[0, 0]
    place = torch.arange(31) - 15.0
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert (found.sum((1, 2)) * place.square()).sum() == pytest.approx(4, rel=0.05)
    assert torch.equal(smooth(x, 0.0), x)


def test_linear_features_do_not_see_left_from_right() -> None:
    x = torch.rand(2, 3, 7, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(linear_features(x, 1.0), linear_features(x.flip(2), 1.0), atol=1e-6)
    assert linear_features(x, 1.0).shape == (2, 3 * 4 * 6 * 5)


def test_a_scan_whose_tissue_is_brighter_everywhere_has_the_same_features() -> None:
    """A scanner that shifts the root of one tissue's map by a constant is not seen; one channel alone is as it is."""
    x = 0.2 + 0.1 * torch.rand(1, 3, 8, 6, 4, generator=torch.Generator().manual_seed(1))
    x = x / x.sum(1, keepdim=True)  # all brain
    moved = (x.sqrt() + torch.tensor([0.05, -0.05, 0.0]).reshape(1, 3, 1, 1, 1)).square()
    moved = torch.cat([moved[:, :2], (1 - moved[:, :2].sum(1, keepdim=True)).clamp(min=0)], 1)
    plain, after = (linear_features(v, 0.0).reshape(3, -1)[:2] for v in (x, moved))
    assert torch.allclose(plain, after, atol=0.02)
    voxels = torch.rand(1, 1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(linear_features(voxels, 0.0), ((voxels + voxels.flip(2)) / 2)[:, :, :2].flatten(1))
