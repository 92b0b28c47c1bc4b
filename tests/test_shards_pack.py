"""Laws of packing: canonical volumes, the reasons for rejecting a row, splits, de-identification, the command line."""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mvhpc.config import load_config
from mvhpc.data_stages import PackConfig
from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError, TooManyRejects
from shards.files import is_complete
from shards.index import Index, Record
from shards.pack import pack
from shards.split import draw_folds, draw_fractions, merge_groups
from shards.verify import verify
from shards.volumes import canonical, grid, read, sample

SIZE = (20, 24, 18)


def head(seed: int = 0) -> np.ndarray:
    """An asymmetric blob in an empty box, int16 (20, 24, 18), RAS, with values from 100 to 1100."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij")
    inside = ((x - 10) / 6) ** 2 + ((y - 12) / 8) ** 2 + ((z - 8) / 5) ** 2 < 1
    values = np.where(inside, 100 + rng.integers(0, 1001, SIZE), 0)
    values[14:16, 15:18, 8:10] = 1100  # brighter on the right, in front
    values[10, 12, 8] = 100
    return values.astype(np.int16)


def save(path: Path, voxels: np.ndarray, spacing: float = 2.0, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([spacing] * 3 + [1]) if affine is None else affine), path)
    return path


def bids(folder: Path, people: list[tuple[str, str, str]], extra: dict[str, str] | None = None) -> Path:
    """A BIDS tree of (id, age, sex); ``extra`` adds a column."""
    lines = ["participant_id\tage\tsex" + ("\tfamily" if extra else "")]
    for i, (name, age, sex) in enumerate(people):
        save(folder / name / "anat" / f"{name}_T1w.nii.gz", head(i))
        lines.append("\t".join([name, age, sex, *([extra.get(name, "n/a")] if extra else [])]))
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def packed(source: Path, out: Path, **options: Any) -> Any:
    return pack(source, out, **{"spacing": 2.0, "shape": SIZE, "max_rejects": "100%", **options})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


PEOPLE = [(f"sub-{i:02d}", str(20 + 5 * i), "FM"[i % 2]) for i in range(7)]

# --- canonical volumes --------------------------------------------------------------------------------------------


def test_equal_spacing_moves_voxels_without_touching_them(tmp_path: Path) -> None:
    """Each voxel is the original's, scaled, moved by whole voxels until the centre of mass is in the middle."""
    voxels = head()
    result = canonical(save(tmp_path / "a.nii", voxels), 2.0, (30, 30, 30))
    high = np.percentile(voxels[voxels > 0], 99.5)
    expected = np.where(voxels > 0, np.clip((voxels - 100.0) / (high - 100), 0, 1), 0).astype(np.float16)
    weight = expected.astype(np.float64)
    centre = [
        round(float((weight.sum(axis=tuple({0, 1, 2} - {a})) * np.arange(n)).sum() / weight.sum()))
        for a, n in enumerate(SIZE)
    ]
    box = tuple(slice(15 - c, 15 - c + n) for c, n in zip(centre, SIZE))
    np.testing.assert_array_equal(result.voxels[box], expected)
    assert result.voxels.astype(np.float64).sum() == weight.sum()  # nothing elsewhere
    assert result.cropped < 1e-6
    assert result.voxels.max() == 1 and result.voxels.dtype == np.float16


@pytest.mark.parametrize("spacing", [2.0, 3.3])
def test_storage_order_of_the_file_does_not_matter(tmp_path: Path, spacing: float) -> None:
    """All 48 axis orders and directions of one volume give the same bits."""
    image = nib.Nifti1Image(head(), np.diag([2.0, 2.0, 2.0, 1.0]) + np.array([[0, 0, 0, v] for v in (-7, 3, 11, 0)]))
    results = set()
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = image.as_reoriented(np.array(list(zip(axes, flips))))
        nib.save(turned, tmp_path / "turned.nii")
        results.add(canonical(tmp_path / "turned.nii", spacing, (16, 18, 14)).voxels.tobytes())
    assert len(results) == 1


def test_axes_point_right_front_up(tmp_path: Path) -> None:
    """A bright spot that lies to the right, in front and above in millimetres does so in the array."""
    voxels = np.zeros((21, 21, 21), np.float32)
    voxels[5:16, 5:16, 5:16] = 0.5
    voxels[5, 5, 5] = 0.01  # becomes 0, so that the rest keeps its weight
    voxels[6:8, 12:14, 13:15] = 1  # stored x runs to the left
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    result = canonical(save(tmp_path / "a.nii", voxels, affine=affine), 2.0, (21, 21, 21)).voxels
    assert set(map(tuple, np.argwhere(result == 1))) == set(itertools.product((13, 14), (12, 13), (13, 14)))


def test_affine_decides_the_size(tmp_path: Path) -> None:
    """A cube of 12 voxels of 2 mm is 24 voxels of 1 mm, 6 of 4 mm; and metres are read as metres."""
    voxels = np.zeros((24, 24, 24), np.float32)
    voxels[6:18, 6:18, 6:18] = 1
    voxels[12, 12, 12] = 0.5  # the foreground needs contrast
    for spacing in (1.0, 2.0, 4.0):
        result = canonical(save(tmp_path / "a.nii", voxels), spacing, (40, 40, 40)).voxels
        extent = result.astype(float).sum() ** (1 / 3) * spacing
        assert extent == pytest.approx(24, abs=0.3)
    image = nib.Nifti1Image(voxels, np.diag([0.002, 0.002, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    expected = canonical(save(tmp_path / "a.nii", voxels), 4.0, (20, 20, 20)).voxels
    np.testing.assert_allclose(canonical(tmp_path / "metres.nii", 4.0, (20, 20, 20)).voxels, expected, atol=1e-3)


def test_coarser_grid_does_not_alias(tmp_path: Path) -> None:
    """Stripes of one voxel are beyond a grid four times coarser: they average out instead of beating."""
    voxels = np.zeros((48, 48, 48), np.float32)
    voxels[4:44, 4:44, 4:44] = 0.01 + np.arange(40)[:, None, None] % 2
    inner = canonical(save(tmp_path / "a.nii", voxels, 1.0), 4.0, (12, 12, 12)).voxels[4:9, 4:9, 4:9].astype(float)
    np.testing.assert_allclose(inner, 0.5, atol=0.02)


def test_intensity_scale_and_background_do_not_matter(tmp_path: Path) -> None:
    voxels = head().astype(np.float64)
    expected = canonical(save(tmp_path / "a.nii", voxels), 2.0, SIZE).voxels
    for slope, offset in [(2.7, 0), (0.001, 0), (1, -1024), (1, 500)]:
        other = canonical(save(tmp_path / "b.nii", voxels * slope + offset), 2.0, SIZE).voxels
        np.testing.assert_allclose(other, expected, atol=2e-3)


def test_crop_loss_is_measured(tmp_path: Path) -> None:
    voxels = np.zeros((24, 24, 24), np.float32)
    voxels[2:22, 2:22, 2:22] = 1
    voxels[12, 12, 12] = 0.5
    path = save(tmp_path / "a.nii", voxels)
    assert canonical(path, 2.0, (24, 24, 24)).cropped < 1e-6
    assert canonical(path, 2.0, (10, 24, 24)).cropped == pytest.approx(0.5, abs=0.01)


def test_origin_is_where_the_grid_came_from(tmp_path: Path) -> None:
    """Reading the scan at the grid's positions in the scanner's space gives the stored volume back."""
    affine = nib.affines.from_matvec(np.diag([-2.0, 2, 2]), [33, -21, 8])
    path = save(tmp_path / "a.nii", head()[::-1], affine=affine)
    result, scan = canonical(path, 4.0, (11, 12, 13)), read(path)
    whole = canonical(path, 2.0, (60, 60, 60))  # at the scan's own spacing
    np.testing.assert_array_equal(whole.origin, result.origin)
    to_scan = (
        np.linalg.inv(scan.affine)
        @ nib.affines.from_matvec(np.eye(3), whole.origin)
        @ grid(2.0, (60, 60, 60))["affine"]
    )
    matrix, offset = nib.affines.to_matvec(to_scan)
    mine = sample((scan.voxels > 0).astype(np.float32), matrix, offset, (60, 60, 60))
    assert ((mine > 0.5) >= (whole.voxels > 0)).all() and (mine > 0.5).sum() == (scan.voxels > 0).sum()


def test_grid_affine_puts_the_centre_at_zero() -> None:
    affine = np.array(grid(2.0, (80, 96, 80))["affine"])
    np.testing.assert_array_equal(affine @ [40, 48, 40, 1], [0, 0, 0, 1])
    assert nib.aff2axcodes(affine) == ("R", "A", "S")


# --- faulty rows --------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)


def _shorten(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:2000]))


def _rewrite(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        save(path, change(head().astype(np.float32)))

    return apply


def _singular(path: Path) -> None:
    image = nib.load(path)
    image.header.set_sform(np.diag([2.0, 2.0, 0.0, 1.0]), 1)
    image.header.set_qform(None, 0)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[: len(image.header.binaryblock)] = image.header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))


BAD_FILES: list[tuple[str, Callable[[Path], None], str]] = [
    ("gone", Path.unlink, "no file: image"),
    ("truncated", _truncate, "truncated gzip"),
    ("damaged", _flip, "damaged gzip"),
    ("short", _shorten, "truncated: too short"),
    ("text", lambda p: p.write_text("hello"), "not a NIfTI file"),
    ("empty", lambda p: p.write_bytes(b""), "not a NIfTI file"),
    ("4d", _rewrite(lambda v: np.stack([v, v], -1)), "4D volume"),
    ("nan", _rewrite(lambda v: np.where(v == v.max(), np.nan, v)), "NaN or infinite"),
    ("constant", _rewrite(lambda v: np.full_like(v, 3)), "constant volume: all voxels are 3"),
    ("binary", _rewrite(lambda v: (v > 0).astype(np.float32)), "no contrast"),
    ("complex", _rewrite(lambda v: v.astype(np.complex64)), "expected real numbers"),
    ("singular", _singular, "singular affine"),
    ("second", lambda p: save(p.with_name(p.name.replace("_T1w", "_run-1_T1w")), head()) and p.rename(
        p.with_name(p.name.replace("_T1w", "_run-2_T1w"))), "2 files"),
]  # fmt: skip
BAD_ROWS = [
    ("sub-young", "-3", "F", "age: -3 is outside the range 0 to 120"),
    ("sub-word", "old", "F", "age: 'old' is not a number"),
    ("sub-sex", "40", "Q", "sex: unknown category 'Q'"),
    ("sub-00", "40", "F", "duplicate id: sub-00 stands in line 2 already"),
    ("n/a", "40", "F", "no participant_id"),
    ("sub-a.b", "40", "F", "an id may hold"),
    ("sub-../../etc", "40", "F", "an id may hold"),
]


def test_each_faulty_row_gets_its_reason_and_the_rest_is_packed(tmp_path: Path) -> None:
    people = [*PEOPLE, ("sub-noage", "n/a", ""), *((f"sub-{name}", "50", "M") for name, *_ in BAD_FILES)]
    source = bids(tmp_path / "bids", people)
    for name, spoil, _ in BAD_FILES:
        spoil(source / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz")
    with (source / "participants.tsv").open("a") as table:
        table.writelines(f"{name}\t{age}\t{sex}\n" for name, age, sex, _ in BAD_ROWS)
    save(source / "sub-unlisted" / "anat" / "sub-unlisted_T1w.nii.gz", head())
    summary = packed(source, tmp_path / "out")
    wanted = [(f"sub-{name}", reason) for name, _, reason in BAD_FILES] + [(row[0], row[3]) for row in BAD_ROWS]
    lines = [line.split("\t") for line in (tmp_path / "out" / "rejected.tsv").read_text().splitlines()]
    assert lines[0] == ["line", "key", "reason"]
    for (_, key, found), (name, reason) in zip(lines[1:], wanted, strict=True):
        assert key in (name, "") and reason in found
    assert [int(line[0]) for line in lines[1:]] == list(range(10, 10 + len(wanted)))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.keys() == [name for name, _, _ in PEOPLE] + ["sub-noage"]
    assert dataset.values("sub-noage") == {"age": None, "sex": None}
    assert dataset.values("sub-01") == {"age": 25.0, "sex": "M"}
    assert (summary["packed"], summary["rejected"]) == (8, len(wanted))
    assert summary["missing"] == {"image": 0, "age": 1, "sex": 1}
    assert "1 subject folders have no row" in summary["notes"][0]
    assert list(verify(tmp_path / "out")) == []


def test_too_many_rejects_fail_and_leave_the_list(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-03/anat/sub-03_T1w.nii.gz").unlink()
    for limit in ("5%", "0", "14%"):
        with pytest.raises(TooManyRejects, match=r"1 of 7 rows .* sub-03: no file"):
            packed(source, tmp_path / "out", max_rejects=limit)
        assert "sub-03" in (tmp_path / "out" / "rejected.tsv").read_text()
        with pytest.raises(DataError, match="no packed data set"):
            open_dataset(tmp_path / "out")
    assert packed(source, tmp_path / "out", max_rejects="15%")["packed"] == 6  # into the same folder
    assert packed(source, tmp_path / "out1", max_rejects=1)["packed"] == 6
    for limit in ("five", "-1", "1.5", "101%"):
        with pytest.raises(DataError, match="max-rejects"):
            packed(source, tmp_path / "no", max_rejects=limit)


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        packed(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match=r"participants.tsv: No such file"):
        packed(tmp_path, tmp_path / "out")
    table = tmp_path / "t.csv"
    for text, reason in [
        ("participant_id,path,age\n", "unknown column 'sex'"),
        ("participant,path,age,sex\n", "Did you mean 'participant'"),
        ("participant_id,file,age,sex\na,b,1,F\n", "unknown column 'path'"),
        ("participant_id,path,age,sex\na,b,1,F,9\n", "line 2 has more cells"),
        ("participant_id,path,age,sex,age\n", "two columns named 'age'"),
        ("participant_id,path,age,sex\n", "no rows"),
    ]:
        table.write_text(text)
        with pytest.raises(DataError, match=reason):
            packed(table, tmp_path / "out")
    source = bids(tmp_path / "bids", PEOPLE)
    for bad, reason in [
        ({"shape": (4, 4)}, "shape"),
        ({"spacing": 0.0}, "spacing"),
        ({"fractions": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"group": "famly"}, "unknown column 'famly'"),
        ({"schema": "defalt"}, "Did you mean 'default'"),
    ]:
        with pytest.raises(DataError, match=reason):
            packed(source, tmp_path / "out", **bad)


# --- sources ------------------------------------------------------------------------------------------------------


def test_csv_and_bids_pack_to_the_same_data(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    rows = [f"{name[4:]},bids/{name}/anat/{name}_T1w.nii.gz,{age},{sex}" for name, age, sex in PEOPLE]
    (tmp_path / "t.csv").write_text("participant_id,path,age,sex\n" + "\n".join(rows))
    packed(source, tmp_path / "a")
    packed(tmp_path / "t.csv", tmp_path / "b", storage="webdataset")
    assert Index.load(tmp_path / "a").digest == Index.load(tmp_path / "b").digest


def test_csv_with_several_volumes_of_which_some_are_missing(tmp_path: Path) -> None:
    schema = tmp_path / "s.yaml"
    schema.write_text("a: {kind: volume, suffix: T1w}\nb: {kind: volume, suffix: FLAIR}\n")
    for i, name in enumerate("xyz"):
        save(tmp_path / f"{name}.nii", head(i))
    (tmp_path / "t.csv").write_text("participant_id,b,a\n1,y.nii,x.nii\n2,n/a,z.nii\n3,,\n4,q.nii,x.nii\n")
    packed(tmp_path / "t.csv", tmp_path / "out", schema=schema)
    dataset = open_dataset(tmp_path / "out")
    assert {k: [dataset.has(k, v) for v in "ab"] for k in dataset.keys()} == {  # noqa: SIM118 - not a dictionary
        "sub-1": [True, True],
        "sub-2": [True, False],
    }
    np.testing.assert_array_equal(dataset.read("sub-1", "b"), canonical(tmp_path / "y.nii", 2.0, SIZE).voxels)
    np.testing.assert_array_equal(dataset.read("sub-2", "a"), canonical(tmp_path / "z.nii", 2.0, SIZE).voxels)
    rejected = (tmp_path / "out" / "rejected.tsv").read_text()
    assert "sub-3\tno file: a, b" in rejected and "sub-4\tb: no file where column b points" in rejected


def test_sessions_are_records_with_their_own_values(tmp_path: Path) -> None:
    source = bids(tmp_path, PEOPLE[:2])
    for session in ("ses-1", "ses-2", "ses-3"):
        save(tmp_path / "sub-two" / session / "anat" / f"sub-two_{session}_T1w.nii.gz", head(int(session[-1])))
    (tmp_path / "sub-two/ses-3/anat/sub-two_ses-3_T1w.nii.gz").unlink()
    (tmp_path / "sub-two/sub-two_sessions.tsv").write_text("session_id\tage\nses-2\t72.5\n")
    with (source / "participants.tsv").open("a") as table:
        table.write("sub-two\t70\tF\n")
    summary = packed(source, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.keys() == ["sub-00", "sub-01", "sub-two_ses-1", "sub-two_ses-2"]
    assert [dataset.values(f"sub-two_ses-{i}")["age"] for i in (1, 2)] == [70.0, 72.5]
    assert len({dataset.index.split().assignment[f"sub-two_ses-{i}"] for i in (1, 2)}) == 1
    assert summary["notes"] == ["1 sessions hold none of the volumes and were skipped"]


# --- reproducible, interrupted, de-identified ---------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_workers_and_interruptions_leave_no_trace(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.writer.SHARD_RECORDS", 2)
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-02/anat/sub-02_T1w.nii.gz").write_bytes(b"x")
    packed(source, tmp_path / "one", storage=storage, workers=1)
    packed(source, tmp_path / "two", storage=storage, workers=2)
    calls = []

    def dies(path: Path, *args: Any) -> Any:
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return canonical(path, *args)

    monkeypatch.setattr("shards.pack.canonical", dies)
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "three", storage=storage)
    packed(source, tmp_path / "three", storage=storage)
    assert len(calls) == 6 + 2  # five rows were known, one of them faulty; the fifth stood in no complete shard
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_nothing_of_header_path_or_group_reaches_the_dataset(tmp_path: Path, storage: str) -> None:
    secrets = ["Jane^Doe", "19620303", "StMaryHospital", "SecretFolder", "DoeFamily", "ChildhoodEpilepsy"]
    source = bids(tmp_path / secrets[3], PEOPLE, {"sub-00": secrets[4], "sub-01": secrets[4]})
    for name, *_ in PEOPLE:
        image = nib.Nifti1Image(head(), np.diag([2.0, 2, 2, 1]))
        image.header["descrip"], image.header["db_name"] = secrets[0].encode(), secrets[1].encode()
        image.header["aux_file"], image.header["intent_name"] = secrets[2].encode(), secrets[0].encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secrets[5].encode()))
        nib.save(image, source / name / "anat" / f"{name}_T1w.nii.gz")
    (source / "sub-06/anat/sub-06_T1w.nii.gz").write_bytes(b"x")
    packed(source, tmp_path / "out", storage=storage, group="family")
    everything = b"".join(content(tmp_path / "out").values())
    for secret in [*secrets, str(tmp_path), source.name, "T1w.nii"]:
        assert secret.encode() not in everything
    assert b"sub-00" in everything


# --- splits -------------------------------------------------------------------------------------------------------


def people(n: int, per_group: int = 1, visits: int = 1) -> list[Record]:
    return [
        Record(f"sub-{i}_ses-{v}", f"sub-{i}", f"sub-{i - i % per_group}", {}, {}, "", {})
        for i in range(n)
        for v in range(visits)
    ]


def sides(assignment: dict[str, str]) -> dict[str, set[str]]:
    return {part: {k for k, p in assignment.items() if p == part} for part in ("train", "validation", "test")}


@pytest.mark.parametrize(("n", "per_group", "visits"), [(3, 1, 1), (4, 1, 2), (10, 1, 1), (100, 1, 3), (200, 7, 2)])
def test_splits_are_by_group_never_empty_and_of_the_configured_size(n: int, per_group: int, visits: int) -> None:
    records = people(n, per_group, visits)
    for seed in range(20):
        assignment = draw_fractions(records, (0.89, 0.01, 0.10), seed).assignment
        assert list(assignment) == [r.key for r in records]
        for attribute in ("group", "subject"):
            assert len({(getattr(r, attribute), assignment[r.key]) for r in records}) == len(
                {getattr(r, attribute) for r in records}
            )
        assert all(sides(assignment).values())
        tested = len({r.subject for r in records if assignment[r.key] == "test"})
        assert tested == max(1, round(n / 10)) if per_group == 1 else 14 <= tested <= 20


def test_splits_are_stable() -> None:
    records = people(300)
    split = draw_fractions(records, (0.8, 0.1, 0.1), 5)
    assert draw_fractions(records[::-1], (0.8, 0.1, 0.1), 5).assignment == split.assignment
    assert draw_fractions(records, (0.8, 0.1, 0.1), 6).assignment != split.assignment
    more = draw_fractions(people(303), (0.8, 0.1, 0.1), 5).assignment
    assert sum(more[k] != part for k, part in split.assignment.items()) <= 6
    assert not sides(draw_fractions(records, (0.9, 0.0, 0.1), 5).assignment)["validation"]
    for n in (1, 2):
        assert "train" in draw_fractions(people(n), (0.89, 0.01, 0.1), 0).assignment.values()


@pytest.mark.parametrize(("n", "folds", "per_group"), [(141, 5, 1), (6, 3, 1), (3, 3, 1), (60, 4, 5), (900, 3, 1)])
def test_folds_test_everyone_once(n: int, folds: int, per_group: int) -> None:
    records = people(n, per_group, visits=2)
    splits = draw_folds(records, folds, seed=0)
    assert list(splits) == [f"fold-{k}-of-{folds}" for k in range(1, folds + 1)]
    tests = [sides(s.assignment)["test"] for s in splits.values()]
    assert sorted(itertools.chain(*tests)) == sorted(r.key for r in records)
    assert max(map(len, tests)) - min(map(len, tests)) <= 2 * per_group
    for split, test in zip(splits.values(), tests, strict=True):
        assert all(sides(split.assignment).values())
        rest = len(records) - len(test)
        validation = len(sides(split.assignment)["validation"])
        expected = 2 * max(rest / 2 * 0.05, min(20, rest / 2 * 0.2))  # of two visits each
        assert abs(validation - max(2, expected)) <= 2 * per_group
        for group in {r.group for r in records}:
            assert len({split.assignment[r.key] for r in records if r.group == group}) == 1


def test_groups_chain() -> None:
    rows = [("a", "1"), ("b", ""), ("c", "1"), ("d", "2"), ("c", "2"), ("e", "3"), ("b", "")]
    assert merge_groups(rows) == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}


def test_recorded_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = bids(tmp_path / "bids", PEOPLE, {"sub-01": "p", "sub-04": "p", "sub-05": "p"})
    out = str(tmp_path / "out")
    packed(source, Path(out), group="family", folds=2)
    digest = Index.load(out).digest
    assert main(["split", out, "--folds", "3", "--seed", "1"]) == 0
    assert main(["split", out, "--fractions", "0.4", "0.3", "0.3", "--group", "family", "--name", "wide"]) == 0
    assert main(["split", out, "--folds", "3", "--seed", "1"]) == 0  # the same again
    index = Index.load(out)
    names = ["default", "fold-1-of-2", "fold-2-of-2", "fold-1-of-3", "fold-2-of-3", "fold-3-of-3", "wide"]
    assert list(index.splits) == names and index.digest == digest
    for split in index.splits.values():
        assert len({split.assignment[k] for k in ("sub-01", "sub-04", "sub-05")}) == 1
    assert list(verify(out)) == []
    capsys.readouterr()
    for arguments, reason in [
        (["--folds", "3", "--seed", "2"], "another split named 'fold-1-of-3'"),
        (["--fractions", "0.5", "0.25", "0.25", "--name", "default"], "another split named 'default'"),
        (["--fractions", "0.5", "0.25", "0.25"], "--name"),
        (["--folds", "9"], "9 folds"),
        (["--folds", "2", "--group", "site"], "packed with --group family"),
    ]:
        assert main(["split", out, *arguments]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("fractions", [(0, 0, 1), (0, 1, 0), (0, 0.5, 0.5), (0, 0.1, 0.9)])
def test_a_data_set_may_have_no_training_part(fractions: tuple[float, ...]) -> None:
    records = people(40, visits=2)
    found = {
        name: len(keys) / len(records) for name, keys in sides(draw_fractions(records, fractions, 3).assignment).items()
    }
    assert found == dict(zip(("train", "validation", "test"), fractions))


def with_column(table: Path, name: str, cells: list[str]) -> None:
    """Append a column to a table."""
    lines, separator = table.read_text().splitlines(), "," if table.suffix == ".csv" else "\t"
    table.write_text("".join(f"{line}{separator}{cell}\n" for line, cell in zip(lines, [name, *cells], strict=True)))


@pytest.mark.parametrize("kind", ["bids", "csv"])
def test_a_split_is_taken_from_a_column(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "drawn")
    table = source / "participants.tsv"
    if kind == "csv":
        rows = [f"{name},{name}/anat/{name}_T1w.nii.gz,{age},{sex}\n" for name, age, sex in PEOPLE]
        source = table = source / "t.csv"
        table.write_text("participant_id,path,age,sex\n" + "".join(rows))
    with_column(table, "set", ["train", "Training", "val", "dev", "validation", "TEST", "n/a"])
    out = tmp_path / "out"
    command = ["pack", str(source), str(out), "--config", "demo", "--shape", *map(str, SIZE), "--spacing", "2"]
    assert main([*command, "--workers", "1", "--split-column", "set", "--folds", "2"]) == 0
    assert "1 rows have no value in the split column and belong to no part: sub-06\n" in capsys.readouterr().out
    dataset = open_dataset(out)
    assert dataset.keys("train") == ["sub-00", "sub-01"] and dataset.keys("test") == ["sub-05"]
    assert dataset.keys("validation") == ["sub-02", "sub-03", "sub-04"] and len(dataset.keys("all")) == 7
    assert len(dataset.keys("test", "fold-1-of-2")) + len(dataset.keys("test", "fold-2-of-2")) == 7
    assert dataset.index.provenance["arguments"]["split_column"] == "set" and dataset.index.split().method == "column"
    assert dataset.index.digest == Index.load(tmp_path / "drawn").digest


def test_a_split_column_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    family = {"sub-01": "p", "sub-04": "p"}
    for name, cells, reason in [
        ("word", ["train"] * 6 + ["held-out"], r"line 8, sub-06, column 'word': unknown part of a split 'held-out'"),
        ("typo", ["train"] * 6 + ["tets"], "Did you mean 'test'"),
        ("empty", ["n/a", ""] * 3 + ["na"], "column 'empty' has no value"),
        ("group", ["train"] * 4 + ["test"] * 3, r"puts sub-01 and sub-04, one group, into both train and test"),
        ("sett", ["train"] * 7, "Did you mean 'sett'"),
    ]:
        source = bids(tmp_path / name, PEOPLE, family)
        with_column(source / "participants.tsv", name, cells)
        column = "set" if name == "sett" else name
        with pytest.raises(DataError, match=reason):
            packed(source, tmp_path / f"{name}-out", split_column=column, group="family")
        assert not (tmp_path / f"{name}-out").exists()
    packed(tmp_path / "group", tmp_path / "no-group", split_column="group")  # without families it is a good split


def test_sessions_of_one_subject_belong_to_one_part(tmp_path: Path) -> None:
    for session in ("ses-1", "ses-2"):
        save(tmp_path / "sub-two" / session / "anat" / f"sub-two_{session}_T1w.nii.gz", head())
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-two\t70\tF\n")
    sessions = tmp_path / "sub-two/sub-two_sessions.tsv"
    sessions.write_text("session_id\tset\nses-1\ttrain\nses-2\ttest\n")
    with pytest.raises(DataError, match="puts sub-two into both train and test"):
        packed(tmp_path, tmp_path / "out", split_column="set")
    sessions.write_text("session_id\tset\nses-1\ttrain\nses-2\tn/a\n")
    packed(tmp_path, tmp_path / "out", split_column="set")
    assert open_dataset(tmp_path / "out").keys("train") == ["sub-two_ses-1"]


# --- processes that are killed ------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import shards.files, shards.index, shards.writer
from shards.pack import pack
shards.writer.SHARD_RECORDS = 2
moment, source, out, storage = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
writer = shards.writer.DatasetWriter
flush = writer._flush
def second_flush(self):
    if self._saved_records: die()
    flush(self)
def torn(path, content):
    path.with_name(".index.json.part").write_bytes(content[:100])
    die()
if moment == "second shard": writer._flush = second_flush
if moment == "move": Path.replace = lambda self, target: die() if self.is_dir() else os.replace(self, target)
if moment == "index": shards.index.Index.save = die
if moment == "torn index": shards.index.write_bytes = torn
if moment == "clean-up": shutil.rmtree = lambda path, **_: die() if Path(path).name == ".partial" else None
pack(source, out, storage=storage, spacing=2.0, shape=(20, 24, 18), workers=1)
"""


@pytest.mark.parametrize(
    ("moment", "storage"),
    [
        *((moment, "zarr") for moment in ("second shard", "move", "index", "torn index", "clean-up")),
        *((moment, "webdataset") for moment in ("second shard", "index")),
    ],
)
def test_a_killed_packing_is_complete_or_resumes(
    tmp_path: Path, moment: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the process is killed, its output is seen as what it is, and the next one ends with the same bytes."""
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    arguments = [moment, str(source), str(out), storage]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert is_complete(out) == (moment == "clean-up")
    monkeypatch.setattr("shards.writer.SHARD_RECORDS", 2)
    packed(source, tmp_path / "once", storage=storage, max_rejects="5%")
    if moment == "clean-up":
        assert list(verify(out)) == []
        with pytest.raises(DataError, match="already holds"):
            packed(source, out, storage=storage, max_rejects="5%")
        shutil.rmtree(out / ".partial")
    else:
        monkeypatch.setattr("shards.pack.canonical", counted := Counted(canonical))
        packed(source, out, storage=storage, max_rejects="5%")
        assert counted.calls == (5 if moment == "second shard" else 0)  # complete shards are not made again
        (out / ".index.json.part").unlink(missing_ok=True)
    assert content(out) == content(tmp_path / "once") and is_complete(out)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def test_files_of_others_do_not_make_a_result_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_complete(out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert not is_complete(out)
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-03/anat/sub-03_T1w.nii.gz").unlink()
    with pytest.raises(TooManyRejects):
        packed(source, out, max_rejects="0")
    assert (out / "rejected.tsv").exists() and not is_complete(out)
    assert is_complete(out / "rejected.tsv")


# --- command line -------------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = bids(tmp_path / "bids", [*PEOPLE, ("sub-x", "200", "F")]), tmp_path / "out"
    command = ["pack", str(source), str(out), "--spacing", "2", "--shape", "16", "18", "14", "--workers", "1"]
    assert main([*command, "--format", "webdataset"]) == 1
    assert (out / "rejected.tsv").is_file() and "1 of 8 rows are faulty" in capsys.readouterr().err
    assert main([*command, "--format", "webdataset", "--max-rejects", "20%"]) == 0
    assert "packed 7 of 8 rows" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "16 x 18 x 14 float16, 2 mm, RAS" in text and "F 4, M 3" in text and "35.0 ± 10.0 years, 20 to 50" in text
    assert main(["inspect", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["splits"]["default"]["test"] == 1 and described["provenance"]["rejected"] == 1
    raw = bytearray((out / "shards/shard-00000.tar").read_bytes())
    raw[5000] ^= 1
    (out / "shards/shard-00000.tar").write_bytes(raw)
    assert main(["verify", str(out)]) == 1
    assert "shards/shard-00000.tar: sub-00.image.npy" in capsys.readouterr().err


def test_options_come_from_a_preset_and_flags_go_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short form takes spacing and shape from configs/pack, as the stage does."""
    source = bids(tmp_path / "bids", PEOPLE)
    for arguments, preset in ([], "default"), (["--config", "demo"], "demo"):
        out = tmp_path / preset
        assert main(["pack", str(source), str(out), *arguments, "--workers", "1"]) == 0
        stage = load_config(PackConfig, "pack", preset, (), {"source": str(source), "out": str(out)})
        used = Index.load(out).provenance["arguments"]
        assert {"format": stage.format, "spacing": stage.spacing, "shape": stage.shape} | used == used
        assert (used["fractions"], used["seed"], used["max_rejects"]) == (stage.split, stage.seed, stage.max_rejects)
    preset = tmp_path / "mine.yaml"
    preset.write_text("spacing: 4\nshape: [10, 12, 9]\nworkers: 1\nsplit_column: set\nmax_rejects: 3\n")
    flags = ["--split", "0", "0", "1", "--format", "webdataset"]
    assert main(["pack", str(source), str(tmp_path / "mine"), "--config", str(preset), *flags]) == 0
    index = Index.load(tmp_path / "mine")
    assert (index.storage, index.grid["spacing"], index.grid["shape"]) == ("webdataset", 4, [10, 12, 9])
    assert set(index.split().assignment.values()) == {"test"}
    capsys.readouterr()
    for text, reason in [
        ("spacin: 4", "Did you mean 'spacing'"),
        ("spacing: wide", "spacing: 'wide' where a value such as 2.0"),
        ("shape: [10, 12]", "shape: [10, 12] where a value such as [80, 96, 80]"),
        ("folds: true", "folds: True"),
        ("- 4", "expected 'key: value' lines"),
        ("a: b: c", "not readable as YAML"),
    ]:
        preset.write_text(text)
        assert main(["pack", str(source), str(tmp_path / "no"), "--config", str(preset)]) == 2
        assert f"{preset}: " in (message := capsys.readouterr().err) and reason in message
    with pytest.raises(SystemExit, match="2"):
        main(["pack", str(source), str(tmp_path / "no"), "--split", "1", "0", "0", "--split-column", "x"])
    assert "not allowed with argument --split" in capsys.readouterr().err


def test_errors_are_one_line_without_traceback(tmp_path: Path) -> None:
    for arguments, status, reason in [
        (["phantom", str(tmp_path / "p"), "--subjects", "0"], 2, "at least one"),
        (["pakc", "a", "b"], 2, "Did you mean 'pack'?"),
        (["verify", str(tmp_path)], 2, "no packed data set here"),
        (["pack", "nowhere", str(tmp_path), "--spacing", "2", "--shape", "8", "8", "8"], 2, "no such folder"),
        (["pack", "nowhere", "out", "--config", "dmo"], 2, "Did you mean 'demo'?"),
    ]:
        done = subprocess.run([sys.executable, "-m", "shards", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert reason in done.stderr and len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, "-m", "shards", "pack", "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in done.stdout and "--max-rejects" in done.stdout


@pytest.mark.skipif("MVHPC_IXI" not in os.environ, reason="needs real scans: set MVHPC_IXI to their BIDS folder")
def test_real_scans_are_centred_and_whole(tmp_path: Path) -> None:
    summary = pack(os.environ["MVHPC_IXI"], tmp_path, spacing=4, shape=(40, 48, 40), workers=2)
    assert summary["rejected"] == 0 and summary["cropped"] == 0
    dataset = open_dataset(tmp_path)
    for key in dataset.keys():  # noqa: SIM118 - not a dictionary
        voxels = dataset.read(key, "image").astype(np.float64)
        positions = np.indices(voxels.shape).reshape(3, -1)
        centre = positions @ voxels.ravel() / voxels.sum()
        np.testing.assert_allclose(centre, [20, 24, 20], atol=0.3)
