"""Laws of packing: canonical volumes, the reasons for rejecting a row, de-identification."""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from shards.dataset import open_dataset
from shards.errors import DataError, TooManyRejects
from shards.index import Index
from shards.nifti import read
from shards.pack import pack_part
from shards.resample import sample
from shards.verify import verify
from shards.volumes import canonical, grid
from tests.packing import PEOPLE, SIZE, bids, content, head, packed, save

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
    ("empty", lambda p: p.write_bytes(b""), "the file is empty"),
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
    note = "skipped 1 subject folder that has no row in participants.tsv, until one is added: sub-unlisted"
    assert note in summary["notes"]
    assert list(verify(tmp_path / "out")) == []


def test_equal_scans_of_different_subjects_are_noted(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    scan = source / "sub-01/anat/sub-01_T1w.nii.gz"
    (source / "sub-04/anat/sub-04_T1w.nii.gz").write_bytes(scan.read_bytes())
    notes = packed(source, tmp_path / "out")["notes"]
    assert [note for note in notes if "same volume" in note] == [
        "1 rows have the same volume as another subject (sub-04 is sub-01), which may be in another part of the split: "
        "remove the wrong rows from the source, or give one person's rows one id"
    ]
    visits = tmp_path / "visits.csv"
    rows = "".join(f"sub-1,{visit},{scan},40,F\n" for visit in "ab")
    visits.write_text(f"participant_id,session_id,path,age,sex\n{rows}")
    assert not any("same volume" in note for note in packed(visits, tmp_path / "visits")["notes"])


def test_too_many_rejects_fail_and_leave_the_list(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-03/anat/sub-03_T1w.nii.gz").unlink()
    for limit in ("5%", "0", "14%"):
        with pytest.raises(TooManyRejects, match=r"1 of 7 rows .* sub-03: no file") as refused:
            packed(source, tmp_path / "out", max_rejects=limit)
        assert "(`shards pack --max-rejects 1`, or `mvhpc run pack.max_rejects=1`)" in str(refused.value)
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
        ("participant_id,path,age,sex\na,b,1,F,9\n", "line 2 has 5 cells of 4 columns"),
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"folds": 1}, "1 folds: at least 2"),
        ({"folds": -3}, "-3 folds"),
        ({"folds": 3, "group": "family"}, "3 folds of 2 groups of subjects: at least 3 groups"),
        ({"workers": -1}, "workers -1: expected"),
        ({"worker": 1}, "unknown option 'worker'. Did you mean 'workers'"),
        ({"shap": 1}, "unknown option 'shap'. Did you mean 'shape'"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_a_file_is_read(
    tmp_path: Path, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_now(*_: object) -> None:
        raise AssertionError("a volume was read")

    families = dict(zip([name for name, *_ in PEOPLE], "aabbbbb"))
    source = bids(tmp_path / "bids", PEOPLE, families)
    monkeypatch.setattr("shards.convert.canonical", read_now)
    for use in (packed, lambda *args, **options: pack_part(*args, "1/2", spacing=2, shape=SIZE, **options)):
        with pytest.raises(DataError, match=reason):
            use(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_not_written_into_a_source(tmp_path: Path) -> None:
    source, other = bids(tmp_path / "bids", PEOPLE[:3]), bids(tmp_path / "other", PEOPLE[:3])
    (other / "rejected.tsv").write_text("of a derivative")
    before = content(tmp_path)
    for out, reason in (
        (source, "is the source"),
        (tmp_path / "other/../bids", "is the source"),
        (other, r"is a BIDS folder: it holds participants\.tsv; choose another folder"),
        (other / "rejected.tsv", "is a file; choose a folder"),
    ):
        for use in (packed, lambda *args: pack_part(*args, "1/2", spacing=2, shape=SIZE)):
            with pytest.raises(DataError, match=reason):
                use(source, out)
    assert content(tmp_path) == before


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
    (tmp_path / "sub-two/sub-two_sessions.tsv").write_text("session_id\tage\nses-1\tn/a\nses-2\t72.5\n")
    with (source / "participants.tsv").open("a") as table:
        table.write("sub-two\t70\tF\n")
    summary = packed(source, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.keys() == ["sub-00", "sub-01", "sub-two_ses-1", "sub-two_ses-2"]
    assert [dataset.values(f"sub-two_ses-{i}")["age"] for i in (1, 2)] == [70.0, 72.5]
    assert len({dataset.index.split().assignment[f"sub-two_ses-{i}"] for i in (1, 2)}) == 1
    assert summary["notes"][0] == "skipped 1 session without any of the volumes: sub-two/ses-3"


# --- reproducible, interrupted, de-identified ---------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_workers_and_interruptions_leave_no_trace(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)
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

    monkeypatch.setattr("shards.convert.canonical", dies)
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "three", storage=storage)
    packed(source, tmp_path / "three", storage=storage)
    assert len(calls) == 6 + 3  # four rows were in complete shards, one of them faulty
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
