"""Verdicts of an audit leave rows out of a packing."""

from pathlib import Path

import pytest

from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError, TooManyRejects
from shards.exclusions import read_exclusions
from tests.packing import PEOPLE, bids, head, packed, save


def table(folder: Path, *rows: str) -> Path:
    path = folder / "verdicts.tsv"
    path.write_text("\n".join(["key\tverdict\treason", *rows, ""]))
    return path


def test_rejected_records_are_left_out_and_listed(tmp_path: Path) -> None:
    """They do not count against the limit of rejected rows; accepted ones and others are packed."""
    verdicts = table(tmp_path, "sub-02\treject\tmotion", "sub-03\taccept\t", "sub-05\treject\t", "sub-77\treject\t")
    summary = packed(bids(tmp_path / "bids", PEOPLE), tmp_path / "out", exclusions=verdicts, max_rejects="0")
    data = open_dataset(tmp_path / "out")
    assert data.keys() == ["sub-00", "sub-01", "sub-03", "sub-04", "sub-06"]
    listing = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()[1:]
    assert listing == ["4\tsub-02\texcluded by verdicts.tsv: motion", "7\tsub-05\texcluded by verdicts.tsv"]
    assert summary["packed"] == 5 and summary["rejected"] == 2
    assert any("1 keys to exclude are in no row of the table: sub-77" in note for note in summary["notes"])
    assert data.index.provenance["excluded"] == 2


def test_the_rest_is_packed_as_without_them(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "all")
    packed(source, tmp_path / "some", exclusions=table(tmp_path, "sub-02\treject\t"))
    every, some = open_dataset(tmp_path / "all"), open_dataset(tmp_path / "some")
    assert len(some) == len(every) - 1
    for record in some.index.records:
        key = record.key
        assert (every.read(key, "image") == some.read(key, "image")).all()
        assert every.record(key).checksums == some.record(key).checksums


def test_faulty_rows_still_count(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    save(source / "sub-04" / "anat" / "sub-04_T1w.nii.gz", head() * 0)
    with pytest.raises(TooManyRejects, match=r"1 of 7 rows are faulty \(0 allowed\), first sub-04"):
        packed(source, tmp_path / "out", exclusions=table(tmp_path, "sub-02\treject\t"), max_rejects="0")


def test_the_command_and_a_table_that_excludes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    verdicts = table(tmp_path, *(f"{key}\treject\tno" for key, *_ in PEOPLE))
    options = ["--spacing", "2", "--shape", "20", "24", "18", "--workers", "1", "--keep-suspect"]
    assert main(["pack", str(source), str(tmp_path / "out"), *options, "--exclude", str(verdicts)]) == 1
    assert "none of 7 rows can be packed, first sub-00: excluded by verdicts.tsv: no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["sub-01\trejct\t"], "line 2: unknown verdict 'rejct'. Did you mean 'reject'"),
        (["\treject\t"], "line 2: no key"),
        (["sub-01\treject\t", "sub-01\taccept\t"], "line 3: sub-01 is accepted and rejected"),
    ],
)
def test_a_wrong_verdict_is_refused_with_its_line(tmp_path: Path, rows: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_exclusions(table(tmp_path, *rows))


def test_a_table_without_verdicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tage\nsub-01\t3\n")
    with pytest.raises(DataError, match="no column 'key'"):
        read_exclusions(path)
