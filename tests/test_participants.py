"""Tables of participants: no cell moves to another row, and numbers have the unit that the schema says."""

import json
import re
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.participants import Reject, Row, read_sheet, read_table
from shards.preprocess.tables import carry_tables
from shards.schema import Schema

SCHEMA = Schema.load()


def tree(folder: Path, rows: list[str]) -> Path:
    """A BIDS folder with one line per person: comment, age, sex."""
    for i in range(len(rows)):
        anat = folder / f"sub-{i}" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{i}_T1w.nii.gz").write_bytes(b"")
    lines = [f"sub-{i}\t{row}" for i, row in enumerate(rows)]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tcomment\tage\tsex", *lines]) + "\n")
    return folder


def ages(table_rows: list) -> list:
    return [row.values["age"] for row in table_rows if isinstance(row, Row)]


@pytest.mark.parametrize("comment", ['"tall', 'said "no"', '"', '"a" b', "it's"])
def test_quotation_marks_are_characters_of_a_bids_table(tmp_path: Path, comment: str) -> None:
    source = tree(tmp_path, [f"{comment}\t31\tF", "ok\t45\tM", f"{comment}\t62\tF"])
    assert ages(read_table(source, SCHEMA).rows) == [31, 45, 62]
    assert read_sheet(source / "participants.tsv").rows[0][1]["comment"] == comment
    (tmp_path / "out").mkdir()
    carry_tables(source, tmp_path / "out", "bids", {"sub-0", "sub-1", "sub-2"})
    assert read_sheet(tmp_path / "out" / "participants.tsv").rows == read_sheet(source / "participants.tsv").rows


@pytest.mark.parametrize(
    "comments", [['"left handed', "ok", "ok"], ["ok", '"a', 'b"'], ['"a" b', "ok", "ok"], ["ok", "ok", '"a']]
)
def test_a_csv_with_an_open_quotation_mark_is_refused(tmp_path: Path, comments: list[str]) -> None:
    lines = [f"sub-{i},sub-{i}.nii,{30 + i},F,{comment}" for i, comment in enumerate(comments)]
    (tmp_path / "scans.csv").write_text("\n".join(["participant_id,path,age,sex,comment", *lines]) + "\n")
    with pytest.raises(DataError, match="quotation mark"):
        read_table(tmp_path / "scans.csv", SCHEMA)


def test_a_balanced_quotation_keeps_its_commas(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('participant_id,comment\na,"one, two"\nb,"says ""no"""\n')
    assert [cells["comment"] for _, cells in read_sheet(tmp_path / "x.csv").rows] == ["one, two", 'says "no"']


@pytest.mark.parametrize(
    ("unit", "accepted"), [("months", False), ("Day", False), ("yr", True), ("years", True), ("?", True)]
)
def test_the_unit_of_the_table_is_that_of_the_schema(tmp_path: Path, unit: str, accepted: bool) -> None:
    source = tree(tmp_path, ["ok\t84\tF"])
    (source / "participants.json").write_text(json.dumps({"age": {"Units": unit}, "sex": {"Levels": {"F": "female"}}}))
    if accepted:
        assert ages(read_table(source, SCHEMA).rows) == [84]
    else:
        with pytest.raises(DataError, match=r"column 'age' is in .*, the schema has age in years"):
            read_table(source, SCHEMA)


def test_a_table_is_needed_for_scalars_alone(tmp_path: Path) -> None:
    source = tree(tmp_path, ["ok\t31\tF"])
    (source / "participants.tsv").unlink()
    assert [row.key for row in read_table(source, Schema.load("image-only")).rows] == ["sub-0"]
    with pytest.raises(DataError, match=r"participants\.tsv"):
        read_table(source, SCHEMA)


@pytest.mark.parametrize("session", ["", "n/a"])
def test_a_csv_without_sessions_becomes_a_table_of_participants(tmp_path: Path, session: str) -> None:
    (tmp_path / "scans.csv").write_text(f"participant_id,session_id,path,age\nx,{session},x.nii,31\n")
    carry_tables(tmp_path / "scans.csv", tmp_path, "csv", {"sub-x"})
    assert read_sheet(tmp_path / "participants.tsv").rows == [(2, {"participant_id": "sub-x", "age": "31"})]


@pytest.mark.parametrize(
    ("there", "listed", "reason"),
    [
        ("sub-01/anat/sub-01_T1w.nii.gz", "1", "no folder sub-1, but sub-01: write the id with its zeros"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "07", "no folder sub-07"),
        ("sub-01/sub-01_T1w.nii.gz", "01", r"looked for anat/\*_T1w.nii.gz, found sub-01/sub-01_T1w.nii.gz"),
        ("sub-01/anat/sub-01_t1w.nii.gz", "01", r"looked for .*, found sub-01/anat/sub-01_t1w.nii.gz"),
        ("sub-01/anat/sub-01_T1w.json", "01", r"looked for anat/\*_T1w.nii.gz in sub-01"),
        ("sub-01/anat/sub-01_T2w.nii.gz", "01", r"looked for anat/\*_T1w.nii.gz in sub-01"),
    ],
)
def test_a_missing_file_is_explained(tmp_path: Path, there: str, listed: str, reason: str) -> None:
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).write_bytes(b"x")
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\tsex\n{listed}\t30\tF\n")
    (row,) = read_table(tmp_path, SCHEMA).rows
    assert isinstance(row, Reject)
    assert re.match(f"no file: image; .*{reason}", row.reason), row.reason
