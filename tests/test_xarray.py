"""The Zarr store of a packed data set in zarr-python and xarray: volumes by key, coordinates in mm, scalars."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from shards.dataset import open_dataset
from shards.schema import Schema
from shards.verify import verify
from shards.volumes import grid
from shards.writer import DatasetWriter

SHAPE = (4, 5, 6)
KEYS = ["sub-0", "sub-1_ses-2", "sub-2"]


def write(
    folder: Path, arrays: dict[str, Any], place: dict[str, Any], names: tuple[str, str] = ("age", "hand")
) -> Path:
    """Three records; the second has no volume, the third no scalars."""
    number, category = names
    schema = Schema.from_dict(
        {
            **{name: {"kind": "volume", "suffix": "T1w"} for name in arrays},
            number: {"kind": "continuous", "range": [0, 120], "unit": "years"},
            category: {"kind": "categorical", "classes": ["L", "R"]},
        }
    )
    writer = DatasetWriter(folder, "zarr", "volumes", schema, arrays, place)
    for i, key in enumerate(KEYS):
        volumes = {name: np.full(a["shape"], i + 1, a["dtype"]) for name, a in arrays.items()}
        values = {} if i == 2 else {number: 20.5 + i, category: "LR"[i]}
        writer.add(key, key[:5], values, {} if i == 1 else volumes)
    writer.finish()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, {"scan": {"shape": SHAPE, "dtype": "float16"}}, grid(2.0, SHAPE))


@pytest.mark.filterwarnings("error")
def test_zarr_python_reads_the_store_with_its_names(folder: Path) -> None:
    group: Any = zarr.open_group(folder / "data.zarr", mode="r")
    assert sorted(group.array_keys()) == ["age", "hand", "key", "scan", "x", "y", "z"]
    assert group.metadata.consolidated_metadata is not None
    assert group["scan"].metadata.dimension_names == ("key", "x", "y", "z")
    np.testing.assert_array_equal(group["scan"][2], open_dataset(folder).read("sub-2", "scan"))
    np.testing.assert_array_equal(group["scan"][1], 0)
    assert list(group["key"][:]) == KEYS
    assert list(verify(folder)) == []


def test_xarray_reads_volumes_by_key_and_position(folder: Path) -> None:
    xarray = pytest.importorskip("xarray")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_zarr(folder / "data.zarr", chunks=None)
    scan = data["scan"].sel(key="sub-2")
    assert scan.dims == ("x", "y", "z") and float(scan[0, 0, 0]) == 3
    affine = np.asarray(open_dataset(folder).index.grid["affine"])
    np.testing.assert_allclose([data[axis][0] for axis in "xyz"], affine[:3, 3])
    np.testing.assert_allclose(data["y"].diff("y"), 2)
    assert data["x"].attrs == {"units": "mm"} and data["age"].attrs == {"units": "years"}
    assert float(data["scan"].sel(key="sub-0").sel(x=0.4, y=0, z=0, method="nearest")) == 1
    np.testing.assert_array_equal(data["age"], [20.5, 21.5, np.nan])
    assert data["hand"].values.tolist() == ["L", "R", ""]


def test_names_that_variables_have_are_left_to_them(tmp_path: Path) -> None:
    """A volume named as a dimension, arrays of other sizes, a scalar named as a coordinate."""
    xarray = pytest.importorskip("xarray")
    arrays = {"y": {"shape": SHAPE, "dtype": "uint8"}, "latent": {"shape": (2, 4, 3, 3), "dtype": "float32"}}
    data = xarray.open_zarr(write(tmp_path, arrays, grid(2.0, SHAPE), ("x", "key")) / "data.zarr", chunks=None)
    assert data["y"].dims == ("key", "x", "y_axis", "z")
    assert data["latent"].dims == ("key", "channel", "x", "latent_y", "latent_z")
    assert data["key"].values.tolist() == KEYS and data["x"].attrs == {"units": "mm"}
    assert int(data["y"].sel(key="sub-2").max()) == 3
