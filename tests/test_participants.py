"""Tables of participants: no cell moves to another row, and numbers have the unit that the schema says."""

import json
import re
import zipfile
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.participant_rows import Row, Table
from shards.participants import read_table
from shards.preprocess.tables import carried_tables
from shards.schema import Schema
from shards.sheets import read_sheet

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


def carried(source: Path) -> dict[str, str]:
    """The tables that a preprocessing carries over."""
    table = read_table(source, Schema.load("image-only"))
    rows = [row for row in table.rows if isinstance(row, Row)]
    return {name: content.decode() for name, content in carried_tables(source, table.kind, rows).items()}


@pytest.mark.parametrize("comment", ['"tall', 'said "no"', '"', '"a" b', "it's"])
def test_quotation_marks_are_characters_of_a_bids_table(tmp_path: Path, comment: str) -> None:
    source = tree(tmp_path, [f"{comment}\t31\tF", "ok\t45\tM", f"{comment}\t62\tF"])
    assert ages(read_table(source, SCHEMA).rows) == [31, 45, 62]
    assert read_sheet(source / "participants.tsv").rows[0][1]["comment"] == comment
    assert carried(source)["participants.tsv"] == (source / "participants.tsv").read_text()


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


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "participants.tsv"])
def test_a_row_with_a_cell_too_few_or_too_many_is_refused(tmp_path: Path, name: str) -> None:
    between = "\t" if name.endswith("tsv") else ","
    for row in (["a", "31"], ["a", "31", "12", "4"], ["a", "", "31", ""], ["a", "31", "12", ""]):
        lines = ["participant_id,age,score", "b,45,11", "", ",".join(row)]
        (tmp_path / name).write_text("\n".join(lines).replace(",", between) + "\n")
        with pytest.raises(DataError, match=rf"{name}: line 4 has {len(row)} cells of 3 columns"):
            read_sheet(tmp_path / name)


def test_a_decimal_comma_in_each_row_does_not_move_cells(tmp_path: Path) -> None:
    """All rows have one cell more, which is empty, as those of a program that ends lines with a separator."""
    (tmp_path / "s.csv").write_text("participant_id,path,weight,age,height,comment\n1,a.nii,80,5,45,180,\n")
    with pytest.raises(DataError, match=r"line 2 has 7 cells of 6 columns, .* remove commas inside cells and at"):
        read_sheet(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("entry", "accepted"),
    [
        *(({"Units": unit}, True) for unit in ("yr", "years", "Year(s)", "in years", "")),
        *(({"Units": unit}, False) for unit in ("months", "Month(s)", "age in months", "Day", "gestational weeks")),
        ({"units": "months"}, False),
        ({"Unit": ["months"]}, False),
        ({"Description": "Age at the scan, in months"}, False),
        ({"Description": "Age (months)"}, False),
        ({"Description": "Age (in months)"}, False),
        ({"Description": "Age [in months]"}, False),
        ({"Description": "Age at the scan (in d)"}, False),
        ({"Description": "AGE IN WHOLE MONTHS"}, False),
        ({"Description": "age, measured in months"}, False),
        ({"Description": "Age at the scan, months"}, False),
        ({"Description": "age: weeks since birth"}, False),
        ({"Description": "Months of age at scan"}, False),
        ({"Description": "age in completed months"}, False),
        ({"Description": "age expressed in full calendar months"}, False),
        ({"Description": "Months since birth, in a series"}, False),
        ({"LongName": "Age (months)"}, False),
        ({"LongName": "Age in months"}, False),
        ({"LongName": "Age in months", "Units": "years"}, True),
        ({"Description": "age in years (rounded to months)"}, True),
        ({"Description": "age at the first scan in a series"}, True),
        ({"Description": "Age in years at the 6-month visit"}, True),
        ({"Description": "age in years, rounded to months"}, True),
        ({"Description": "Age in months", "Units": "years"}, True),
        ({"Description": "age at the visit that took place in May"}, True),
    ],
)
@pytest.mark.parametrize("column", ["age", "Age"])
def test_the_unit_of_the_table_is_that_of_the_schema(tmp_path: Path, entry: dict, accepted: bool, column: str) -> None:
    source = tree(tmp_path, ["ok\t84\tF"])
    (source / "participants.json").write_text(json.dumps({column: entry, "sex": {"Levels": {"F": "female"}}}))
    if accepted:
        found = read_table(source, SCHEMA)
        assert ages(found.rows) == [84] and found.notes == []
    else:
        with pytest.raises(DataError, match=r"column 'age' is in .*, the schema has age in years"):
            read_table(source, SCHEMA)


def test_a_unit_stands_in_the_name_of_a_column_or_is_noted(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(b"")
    for column in ("age_months", "AgeInMonths", "age (days)", "agemonths", "AGEDAYS", "age_mths", "agemo"):
        (tmp_path / "s.csv").write_text(f"participant_id,path,{column},sex\np,x.nii,84,F\n")
        with pytest.raises(DataError, match=r"column 'age' is in (months|days), the schema has age in years"):
            read_table(tmp_path / "s.csv", SCHEMA, rename={column: "age"})
    source = tree(tmp_path, ["ok\t84\tF"])
    for entry, note in (
        ({"Units": "decades"}, "column 'age' has the unit 'decades' in its JSON, which is read as years"),
        ({"Units": "years, months"}, "column 'age' is read as years; its JSON or name has months too"),
        ({"Description": "age in years and months"}, "column 'age' is read as years; its JSON or name has months too"),
        ({"LongName": "age (years)", "Description": "in days"}, "column 'age' is read as years; .* has days too"),
        ({"Description": "age at the 6-month visit"}, "column 'age' is read as years; its JSON or name has months too"),
        ({"Description": "Age at MRI (at 12 months follow-up)"}, "column 'age' is read as years; .* has months too"),
        ({"Description": "age on the day of the scan"}, "column 'age' is read as years; its JSON or name has days too"),
    ):
        (source / "participants.json").write_text(json.dumps({"age": entry}))
        (found,) = read_table(source, SCHEMA).notes
        assert re.match(note, found)
    (source / "participants.json").write_text(json.dumps({"age": {"Description": "age in months and days"}}))
    with pytest.raises(DataError, match="column 'age' is in days or months, the schema has age in years"):
        read_table(source, SCHEMA)


@pytest.mark.parametrize(
    ("name", "header", "words"),
    [
        ("participants.tsv", "participant_id,age,sex", "separated by commas; save the table with tabs"),
        ("participants.tsv", "participant_id   age   sex", "separated by spaces; save the table with tabs"),
        ("participants.tsv", "participant_id age sex", "separated by spaces; save the table with tabs"),
        ("participants.tsv", '"participant_id"\t"age"\t"sex"', "names of the columns stand in quotation marks; remove"),
        ("x.csv", "sep=,\nparticipant_id,age,sex", r"line 1 \('sep=,'\) must hold the names of the columns; remove it"),
        ("x.csv", "# of May, 2020\nparticipant_id,age,sex", r"line 1 \('# of May, 2020'\) must hold the names"),
        ("x.csv", "Export\nparticipant_id,age,sex", r"line 2 has 3 cells of 1 columns, .* in line 1 \('Export'\)"),
        ("x.csv", "participant_id;age;sex", "separated by semicolons; save the table with commas"),
        ("x.csv", "participant_id\tage\tsex", "separated by tabs; save the table with commas"),
        ("x.csv", "", "no names of columns"),
    ],
)
def test_a_first_line_without_names_is_explained(tmp_path: Path, name: str, header: str, words: str) -> None:
    (tmp_path / name).write_text(f"{header}\n")
    with pytest.raises(DataError, match=words):
        read_sheet(tmp_path / name)


def test_a_spreadsheet_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.xlsx", "w") as file:
        file.writestr("xl/workbook.xml", bytes(range(256)))
    with pytest.raises(DataError, match=r"x.xlsx: a spreadsheet, not text; save it as CSV"):
        read_sheet(tmp_path / "x.xlsx")


@pytest.mark.parametrize("between", ["\r", "\r\n", "\n   \n", "\n\t\t\n"])
def test_ends_of_lines_and_empty_lines_do_not_matter(tmp_path: Path, between: str) -> None:
    (tmp_path / "x.tsv").write_bytes(between.join(["\ufeffparticipant_id\tage\tsex", "a\t31\tF"]).encode())
    assert [cells for _, cells in read_sheet(tmp_path / "x.tsv").rows] == [
        {"participant_id": "a", "age": "31", "sex": "F"}
    ]


def test_a_table_is_needed_for_scalars_alone(tmp_path: Path) -> None:
    source = tree(tmp_path, ["ok\t31\tF"])
    (source / "participants.tsv").unlink()
    assert [row.key for row in read_table(source, Schema.load("image-only")).rows] == ["sub-0"]
    with pytest.raises(DataError, match=r"participants\.tsv"):
        read_table(source, SCHEMA)


@pytest.mark.parametrize("session", ["", "n/a"])
def test_a_csv_without_sessions_becomes_a_table_of_participants(tmp_path: Path, session: str) -> None:
    (tmp_path / "x.nii").write_bytes(b"")
    (tmp_path / "scans.csv").write_text(f"participant_id,session_id,path,age\nx,{session},x.nii,31\n")
    assert carried(tmp_path / "scans.csv") == {"participants.tsv": "participant_id\tage\nsub-x\t31\n"}


def test_no_value_of_a_csv_is_lost_where_a_visit_has_no_session(tmp_path: Path) -> None:
    """That visit has the participant's values, and the others those of their session."""
    (tmp_path / "x.nii").write_bytes(b"")
    scans = tmp_path / "scans.csv"
    scans.write_text("participant_id,session_id,path,age\nx,,x.nii,31\nx,2,x.nii,33\nx,2,x.nii,35\n")
    assert carried(scans) == {  # the last row is a duplicate
        "participants.tsv": "participant_id\tage\nsub-x\t31\n",
        "sub-x/sub-x_sessions.tsv": "session_id\tage\nses-2\t33\n",
    }
    scans.write_text("participant_id,session_id,path,age\nx,,x.nii,31\nx,2,x.nii,n/a\n")
    with pytest.raises(DataError, match=r"scans.csv: line 3, column 'age': no value, .* give all visits a session"):
        carried(scans)
    scans.write_text("participant_id,session_id,path,age\nx,1,x.nii,31\nx,2,x.nii,n/a\n")
    assert carried(scans)["participants.tsv"] == "participant_id\tage\nsub-x\tn/a\n"


@pytest.mark.parametrize(("name", "between"), [("scans.tsv", "\t"), ("scans.csv", ",")])
def test_the_description_of_a_table_is_read_and_carried_with_its_values(
    tmp_path: Path, name: str, between: str
) -> None:
    (tmp_path / "x.nii").write_bytes(b"")
    (tmp_path / name).write_text("participant_id,path,age,sex\nx,x.nii,31,F\n".replace(",", between))
    (tmp_path / "scans.json").write_text(json.dumps({"age": {"Units": "months"}}))
    with pytest.raises(DataError, match="column 'age' is in months"):
        read_table(tmp_path / name, SCHEMA)
    found = carried(tmp_path / name)
    assert found["participants.json"] == found["sessions.json"] == (tmp_path / "scans.json").read_text()


def test_cells_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "a", "participant_id\tAge\tyears\tsex", "sub-1\t31\t30\tF")
    with pytest.raises(DataError, match=r"participants.tsv: line 1: --rename gives 'Age' and 'years' the name 'age'"):
        read_table(source, SCHEMA, rename={"Age": "age", "years": "age"})
    (tmp_path / "s.csv").write_text("participant_id,t1,t2,age,sex\np,x.nii,y.nii,31,F\n")
    with pytest.raises(DataError, match=r"s.csv: line 1: --rename gives 't1' and 't2' the name 'path'"):
        read_table(tmp_path / "s.csv", SCHEMA, rename={"t1": "path", "t2": "path"})
    source = table(tmp_path / "b", "participant_id\tsex", "sub-1\tF")
    (source / "sub-1" / "anat").rename(source / "sub-1" / "ses-1")
    anat = source / "sub-1" / "ses-1" / "anat"
    anat.mkdir()
    (anat / "sub-1_ses-1_T1w.nii.gz").write_bytes(b"")
    sessions = source / "sub-1" / "sub-1_sessions.tsv"
    sessions.write_text("session_id\tage\trun\nses-1\t30\ta\n1\t30\tb\n")
    assert values(read_table(source, SCHEMA)) == [(30, "F")]  # the column `run` is not read
    sessions.write_text("session_id\tage\nses-1\t30\n1\t60\n")
    with pytest.raises(DataError, match=r"sub-1_sessions.tsv: line 3: 'age' of ses-1 is '60' here and '30' in a line"):
        read_table(source, SCHEMA)


def test_an_id_of_a_spreadsheet_is_explained(tmp_path: Path) -> None:
    source = table(tmp_path, "participant_id\tage\tsex", "sub-1.0\t31\tF")
    (reason,) = values(read_table(source, SCHEMA))
    assert reason.endswith("40 at most; remove the .0")


def test_a_path_that_cannot_be_looked_up_rejects_its_row_alone(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(b"")
    lines = [
        "participant_id,path,age,sex",
        f"a,{'x' * 300}.nii,50,F",
        f"b,/{'y' * 300}/scan.nii,50,F",
        "c,scan.nii,50,F",
    ]
    (tmp_path / "scans.csv").write_text("\n".join(lines) + "\n")
    reason = "image: no file can be read where column path points: File name too long"
    assert values(read_table(tmp_path / "scans.csv", SCHEMA)) == [reason, reason, (50, "F")]


def table(folder: Path, header: str, *rows: str, name: str = "participants.tsv") -> Path:
    """A BIDS folder with a table of these lines, and a scan of each person."""
    for row in rows:
        name_of = row.partition("\t")[0]
        (folder / name_of / "anat").mkdir(parents=True, exist_ok=True)
        (folder / name_of / "anat" / f"{name_of}_T1w.nii.gz").write_bytes(b"")
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def values(found: Table) -> list[tuple]:
    return [(row.values["age"], row.values["sex"]) if isinstance(row, Row) else row.reason for row in found.rows]


def test_other_names_of_columns_are_read_and_noted(tmp_path: Path) -> None:
    source = table(tmp_path / "a", "Participant_ID\tAge\tGENDER", "sub-1\t31\tMale", "sub-2\t45\tf")
    found = read_table(source, SCHEMA)
    assert values(found) == [(31, "M"), (45, "F")]
    assert [note.split()[1:] for note in found.notes] == [
        ["'Participant_ID'", "is", "read", "as", "'participant_id'"],
        ["'Age'", "is", "read", "as", "'age'"],
        ["'GENDER'", "is", "read", "as", "'sex'"],
    ]
    source = table(tmp_path / "b", "participant_id\tage\tgender\tsex", "sub-1\t31\tM\tF")
    assert values(read_table(source, SCHEMA)) == [(31, "F")]  # the exact name comes first, and --rename before it
    assert values(read_table(source, SCHEMA, rename={"gender": "sex"})) == [(31, "M")]
    source = table(tmp_path / "c", "participant_id\tage_at_scan\tAge\tsex", "sub-1\t31\t30\tF")
    with pytest.raises(
        DataError, match="'age_at_scan' and 'Age' could be 'age': choose by --rename age_at_scan=age or"
    ):
        read_table(source, SCHEMA)
    assert values(read_table(source, SCHEMA, rename={"Age": "age"})) == [(30, "F")]
    with pytest.raises(DataError, match="no table has a column 'genre'"):
        read_table(source, SCHEMA, rename={"Age": "age", "genre": "sex"})
    source = table(tmp_path / "d", "participant_id\tage\tsexe", "sub-1\t31\tF")
    with pytest.raises(DataError, match=r"Did you mean 'sexe'\? .* --rename COLUMN=sex"):
        read_table(source, SCHEMA)


def test_renaming_holds_for_a_csv_and_for_sessions(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(b"")
    (tmp_path / "s.csv").write_text("participant_id,path,years,Sex\np,x.nii,31,F\n")
    assert values(read_table(tmp_path / "s.csv", SCHEMA, rename={"years": "age"})) == [(31, "F")]
    source = tmp_path / "t"
    (source / "sub-1" / "ses-1" / "anat").mkdir(parents=True)
    (source / "sub-1" / "ses-1" / "anat" / "sub-1_ses-1_T1w.nii.gz").write_bytes(b"")
    (source / "participants.tsv").write_text("participant_id\tgender\nsub-1\t2\n")
    (source / "participants.json").write_text(json.dumps({"gender": {"Levels": {"2": "female"}}}))
    (source / "sub-1" / "sub-1_sessions.tsv").write_text("session_id\tAge\nses-1\t40\n")
    assert values(read_table(source, SCHEMA)) == [(40, "F")]
    (source / "sessions.json").write_text(json.dumps({"Age": {"Units": "months"}}))
    with pytest.raises(DataError, match=r"column 'age' is in months, the schema has age in years"):
        read_table(source, SCHEMA)


@pytest.mark.parametrize(
    ("levels", "cell", "expected"),
    [
        ({"1": "male", "2": "female"}, "1", "M"),
        ({"1": {"Description": "Female participant"}}, "1", "F"),
        ({"1": "male", "2": "female"}, "2.0", "F"),
        ({"1": "not male"}, "1", "sex: unknown category '1'"),
        ({"1": "male to female"}, "1", "sex: unknown category '1'"),
        ({"M": "man", "F": "woman"}, "F", "F"),
        ({"F": "F: female"}, "F", "F"),
        ({"9": "not reported"}, "9", None),
        ({"1": "male"}, "n/a", None),
        ({"F": "male"}, "F", "sex: 'F' is F by the schema and 'male' by the levels"),
        ({"1": "left"}, "1", "sex: unknown category '1' .* Levels of participants.json"),
        (None, "1", "sex: unknown category '1' .* Levels of participants.json"),
    ],
)
def test_levels_say_what_a_code_stands_for(
    tmp_path: Path, levels: dict | None, cell: str, expected: str | None
) -> None:
    source = table(tmp_path, "participant_id\tage\tsex", f"sub-1\t31\t{cell}")
    (source / "participants.json").write_text(json.dumps({"sex": {"Levels": levels}}))
    (found,) = values(read_table(source, SCHEMA))
    assert found == (31, expected) if not isinstance(found, str) else re.match(str(expected), found)
