"""Reading a BIDS folder: the files of each visit, sessions, and what is missing there."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.files import NOT_FETCHED
from shards.participant_rows import Reject, Row
from shards.participants import read_table
from shards.schema import Schema
from tests.test_participants import SCHEMA, table, values


def visits(folder: Path, *sessions: str) -> Path:
    """A BIDS folder with these sessions of sub-01, whose age in ``participants.tsv`` is 31."""
    for session in sessions:
        anat = folder / "sub-01" / session / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-01_{session}_T1w.nii.gz").write_bytes(b"")
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t31\tF\n")
    return folder


@pytest.mark.parametrize(
    ("there", "listed", "reason"),
    [
        ("sub-01/anat/sub-01_T1w.nii.gz", "1", "no folder sub-1, but sub-01: write sub-01 in participants.tsv"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "Sub-01", "no folder sub-Sub-01, but sub-01: write sub-01 in"),
        ("sub-NYU1/anat/sub-NYU1_T1w.nii.gz", "nyu1", "no folder sub-nyu1, but sub-NYU1: write sub-NYU1 in"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "07", "no folder sub-07"),
        ("sub-01/sub-01_T1w.nii.gz", "01", r"looked for anat/\*_T1w.nii.gz, found sub-01/sub-01_T1w.nii.gz"),
        ("sub-01/anat/sub-01_t1w.nii.gz", "01", r"looked for .*, found sub-01/anat/sub-01_t1w.nii.gz"),
        ("sub-01/anat/sub-01_T1w.json", "01", r"looked for anat/\*_T1w.nii.gz in sub-01"),
        ("sub-01/anat/sub-01_T2w.nii.gz", "01", r"looked for anat/\*_T1w.nii.gz in sub-01"),
        ("sub-01/ses-1/sub-01_ses-1_T1w.nii.gz", "01", r"looked for ses-1/anat/\*_T1w.nii.gz, found sub-01/ses-1/sub"),
    ],
)
def test_a_missing_file_is_explained(tmp_path: Path, there: str, listed: str, reason: str) -> None:
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).write_bytes(b"x")
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\tsex\n{listed}\t30\tF\n")
    (row,) = read_table(tmp_path, SCHEMA).rows
    assert isinstance(row, Reject)
    assert re.match(f"no file: image; .*{reason}", row.reason), row.reason


def test_every_session_has_its_own_row_in_a_table_of_sessions(tmp_path: Path) -> None:
    source = visits(tmp_path, "ses-01", "ses-02")
    sessions = source / "sub-01" / "sub-01_sessions.tsv"
    sessions.write_text("session_id\tage\nses-01\t31\n2\t43\nses-03\t50\n")
    found = read_table(source, SCHEMA)
    assert values(found) == [(31, "F"), "sub-01_sessions.tsv has no row ses-02, but ses-2: write ses-02 there"]
    assert found.notes == ["2 rows in tables of sessions have no folder and were skipped, as sub-01/ses-03"]
    sessions.write_text("session_id\tage\nbaseline\t31\nses-02\tn/a\n")
    found = read_table(source, SCHEMA)
    assert values(found) == ["sub-01_sessions.tsv has no row ses-01: add it", (31, "F")]
    sessions.write_text("session_id\tmood\nses-01\t3\n")  # no column that is read
    found = read_table(source, SCHEMA)
    assert values(found) == [(31, "F"), (31, "F")] and not found.notes
    sessions.unlink()
    (source / "participants.tsv").write_text("participant_id\tsession_id\tage\tsex\n01\t1\t31\tF\n")
    (reason,) = values(read_table(source, SCHEMA))
    assert reason.endswith("no folder sub-01/ses-1, but ses-01: write ses-01 in participants.tsv")
    (source / "participants.tsv").write_text("participant_id\tsession_id\tage\tsex\n01\t01\t31\tF\n")
    sessions.write_text("session_id\tage\nses-02\t33\n")
    assert values(read_table(source, SCHEMA)) == [(31, "F")]  # its own row is in participants.tsv


def test_sessions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """The first of them is what follow-ups are registered to."""
    found = read_table(visits(tmp_path, "ses-10", "ses-2", "ses-b", "ses-a1"), SCHEMA)
    assert [row.key for row in found.rows] == [f"sub-01_ses-{name}" for name in ("2", "10", "a1", "b")]


@pytest.mark.parametrize("place", ["sub-01", "sub-01/ses-2/anat"])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    source, scandir = visits(tmp_path, "ses-1", "ses-2"), os.scandir

    def refused(folder: Path) -> Any:
        if Path(folder) == source / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("shards.bids_files.os.scandir", refused)
    (row,) = read_table(source, SCHEMA).rows
    assert row == Reject(2, "sub-01", f"{place} cannot be read: Permission denied")


def test_a_category_that_changes_between_visits_is_noted(tmp_path: Path) -> None:
    source = visits(tmp_path, "ses-1", "ses-2", "ses-3")
    sessions = source / "sub-01" / "sub-01_sessions.tsv"
    sessions.write_text("session_id\tsex\nses-1\tF\nses-2\tfemale\nses-3\tn/a\n")
    assert not read_table(source, SCHEMA).notes
    sessions.write_text("session_id\tsex\nses-1\tF\nses-2\tM\nses-3\tn/a\n")
    assert read_table(source, SCHEMA).notes == [
        "sex differs between the visits of 1 subject: sub-01; correct the table unless it did change"
    ]


@pytest.mark.parametrize("place", ["sub-01", "sub-01/ses-2", "sub-01/ses-2/anat"])
def test_a_folder_that_is_not_fetched_is_a_rejected_visit(tmp_path: Path, place: str) -> None:
    source = visits(tmp_path, "ses-1", "ses-2")
    shutil.rmtree(source / place)
    (source / place).symlink_to(tmp_path / "annex")
    for remove in (False, True):
        if remove:
            (source / "participants.tsv").unlink()
        *others, last = read_table(source, Schema.load("image-only")).rows
        assert len(others) == (place != "sub-01") and all(isinstance(row, Row) for row in others)
        assert isinstance(last, Reject)
        assert last.reason == f"no file: image; {place} is {NOT_FETCHED}"


@pytest.mark.parametrize("name", ["participants.tsv", "participants.json", "sub-01/sub-01_sessions.tsv"])
def test_a_table_that_is_not_fetched_is_not_taken_for_none(tmp_path: Path, name: str) -> None:
    source = visits(tmp_path, "ses-1")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "annex")
    with pytest.raises(DataError, match=rf"{name}: a link whose content is not here; fetch it first \(datalad get"):
        read_table(source, Schema.load("image-only"))


def test_entities_choose_among_the_files_of_one_suffix(tmp_path: Path) -> None:
    source = table(tmp_path, "participant_id\tage\tsex", "sub-1\t31\tF")
    anat = source / "sub-1" / "anat"
    (anat / "sub-1_T1w.nii.gz").unlink()
    space = "space-MNI152NLin2009cAsym_"
    for name in ("desc-preproc_T1w", f"{space}desc-preproc_T1w", "desc-brain_mask", f"{space}desc-brain_mask"):
        (anat / f"sub-1_{name}.nii.gz").write_bytes(b"")

    def file(**entities: str) -> str:
        (row,) = read_table(source, SCHEMA, entities=entities).rows
        return row.files["image"].name if isinstance(row, Row) else row.reason

    assert "choose by --entities, as in --entities space=MNI152NLin2009cAsym,desc=preproc" in file()
    assert file(space="MNI152NLin2009cAsym", desc="preproc") == f"sub-1_{space}desc-preproc_T1w.nii.gz"
    assert file(desc="preproc") == "sub-1_desc-preproc_T1w.nii.gz"  # no entity beside those that are asked for
    assert file(space="MNI152NLin2009cAsym") == f"sub-1_{space}desc-preproc_T1w.nii.gz"
    assert "check --entities" in file(space="T1w")
    masked = Schema.from_dict(
        {"image": {"kind": "volume", "suffix": "T1w"}, "mask": {"kind": "volume", "suffix": "mask"}}
    )
    for chosen, prefix in (({"desc": "preproc"}, ""), ({"desc": "preproc", "space": "MNI152NLin2009cAsym"}, space)):
        (row,) = read_table(source, masked, entities=chosen).rows
        assert isinstance(row, Row) and row.files["mask"].name == f"sub-1_{prefix}desc-brain_mask.nii.gz"
    (anat / "sub-1_desc-preproc_T1w.nii").write_bytes(b"")
    assert file(desc="preproc") == (
        "image: sub-1_desc-preproc_T1w.nii and sub-1_desc-preproc_T1w.nii.gz are one scan in several formats; "
        "remove all but one"
    )
    with pytest.raises(DataError, match="no entity"):
        read_table(source, SCHEMA, entities={"space": "a/b"})
