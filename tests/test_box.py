"""The box of packed volumes: the smallest that holds every brain, and a note for each brain that reaches its edge."""

import errno
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from shards.__main__ import main
from shards.box import MULTIPLE, Profile, smallest_shape, touched
from shards.errors import DataError
from shards.index import Index
from shards.volumes import brain_extent
from tests.packing import PEOPLE, bids, content, head, packed, save


def brick(low: tuple[int, int, int], high: tuple[int, int, int], n: int = 60) -> np.ndarray:
    """A bright brick from layer ``low`` to layer ``high``, both inside, and one stray voxel in a corner."""
    voxels = np.zeros((n, n, n), np.float32)
    voxels[tuple(slice(a, b + 1) for a, b in zip(low, high))] = 1
    voxels[0, 0, 0] = 1
    return voxels


def test_the_extent_leaves_out_stray_voxels_and_follows_the_axes_of_the_grid() -> None:
    low, high = (10, 14, 20), (39, 49, 37)
    brain = Profile(brick(low, high))
    centre = np.array([30.0, 30, 30])
    assert (brain.extent(np.eye(3), centre) == np.array([low, high]).T - 30).all()
    doubled = brain.extent(2 * np.eye(3), centre)  # a grid of twice the spacing
    assert (np.abs(doubled - (np.array([low, high]).T - 30) / 2) <= 0.5).all()
    turned = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # grid axis 0 is the volume's axis 1
    assert (brain.extent(turned, centre)[0] == np.array([low[1], high[1]]) - 30).all()


def test_sums_over_axes_give_what_the_voxels_give() -> None:
    """Centre of mass and extent of a part of a volume, along the axes and oblique to them."""
    rng = np.random.default_rng(0)
    whole = np.zeros((40, 44, 36), np.float32)
    part = rng.random((20, 25, 18), np.float32)
    whole[8:28, 10:35, 6:24] = part
    brain, centre = Profile(part, (8, 10, 6)), np.array([18.0, 22, 15])
    assert brain.centre() == pytest.approx(ndimage.center_of_mass(whole), abs=1e-4)
    for step in (np.diag([0.7, 1.3, 2.0]), np.diag([0.7, 1.3, 2.0]) @ turn(10)):
        where = np.stack(np.nonzero(whole))
        layers = np.rint(np.linalg.inv(step) @ (where - centre[:, None])).astype(int)
        for axis, (first, last) in zip(layers, brain.extent(step, centre)):
            beyond = [float(whole[tuple(where)][side].sum()) for side in (axis < first, axis > last)]
            assert max(beyond) <= 1e-3 * whole.sum()
            assert [float(whole[tuple(where)][s].sum()) > 1e-3 * whole.sum() for s in (axis <= first, axis >= last)]


def turn(degrees: float) -> np.ndarray:
    """Of the first two axes."""
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])


def test_the_smallest_box_holds_all_and_the_next_smaller_one_does_not() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        extents = [np.sort(rng.integers(-40, 40, (3, 2)), 1) for _ in range(3)]
        shape = smallest_shape(extents)
        assert all(n % MULTIPLE == 0 for n in shape)
        assert not any(touched(bounds, shape) for bounds in extents)
        for axis in range(3):
            smaller = tuple(n - MULTIPLE * (i == axis) for i, n in enumerate(shape))
            assert any(touched(bounds, smaller) for bounds in extents)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "sides"), [((32, 40, 24), []), ((32, 34, 24), ["anterior"])])
def test_sides_are_named(shape: tuple[int, int, int], sides: list[str]) -> None:
    assert touched(np.array([[-10, 10], [-14, 17], [-8, 8]]), shape) == sides


def test_auto_packs_whole_brains_and_a_small_box_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["participant_id,path,age,sex"]
    grid = np.stack(np.meshgrid(*[np.arange(60) - 29.5] * 3, indexing="ij"))
    for i, length in enumerate((16, 20, 24)):
        inside = (grid[0] / 14) ** 2 + (grid[1] / length) ** 2 + (grid[2] / 12) ** 2 < 1
        voxels = np.where(inside, 100 + np.random.default_rng(i).integers(0, 900, inside.shape), 0).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), tmp_path / f"p{i}.nii.gz")
        lines.append(f"p{i},p{i}.nii.gz,4{i},F")
    source = tmp_path / "scans.csv"
    source.write_text("\n".join(lines) + "\n")
    whole = packed(source, tmp_path / "auto", shape="auto", fractions=(0.4, 0.3, 0.3))
    assert (whole["shape"], whole["touching"], whole["cropped"]) == ([32, 56, 32], 0, 0)
    assert [r.figures["image.box"] for r in Index.load(tmp_path / "auto").records] == [0, 0, 0]
    cut = packed(source, tmp_path / "cut", shape=(32, 48, 32), fractions=(0.4, 0.3, 0.3))
    assert cut["touching"] == 1
    assert any("1 of 3 brains reach the edge of the box" in note and "sub-p2" in note for note in cut["notes"])
    assert [r.figures["image.box"] for r in Index.load(tmp_path / "cut").records] == [0, 0, 1]
    command = ["pack", str(source), str(tmp_path / "x"), "--spacing", "2", "--keep-suspect", "--workers", "1"]
    assert main([*command, "--shape", "auto"]) == 0 and "32 x 56 x 32 voxels" in capsys.readouterr().out
    assert main([*command, "--shape", "32", "40"]) == 2 and "three numbers of voxels" in capsys.readouterr().err


def test_a_scan_that_cannot_be_read_for_a_while_does_not_change_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bids(tmp_path / "bids", PEOPLE[:4])
    save(source / "sub-02/anat/sub-02_T1w.nii.gz", np.repeat(head(), 2, 1))
    right = packed(source, tmp_path / "right", shape="auto")["shape"]

    def failing(path: Path, *arguments: Any) -> Any:
        if path.name.startswith("sub-02"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return brain_extent(path, *arguments)

    monkeypatch.setattr("shards.convert.brain_extent", failing)
    with pytest.raises(DataError, match="sub-02: image: Input/output error; --shape auto depends on this scan"):
        packed(source, tmp_path / "out", shape="auto")
    monkeypatch.undo()
    assert packed(source, tmp_path / "out", shape="auto")["shape"] == right != [24, 24, 24]
    assert content(tmp_path / "out") == content(tmp_path / "right")
