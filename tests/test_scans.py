"""From scans to answers where the model's data had no preprocessing: every row of the source is accounted for."""

import csv
import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from mvhpc.bids_app import summary
from mvhpc.config import ConfigError
from mvhpc.models.bundle import load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.runs.folder import exclusive
from mvhpc.scans import DERIVATIVE, PACKED, TABLE, Request, predict_scans
from shards.errors import DataError
from shards.preprocess.recipe import Recipe


def write_csv(path: Path, bids: Path, people: list[tuple[str, int]]) -> Path:
    """A table of people with the id and the scan of one of the people of a BIDS tree each."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["participant_id", "path"])
        for name, i in people:
            writer.writerow([name, next((bids / f"sub-{i:02d}" / "anat").glob("*.nii.gz"))])
    return path


def request(source: Path, model: Path, **changes: object) -> Request:
    """About everybody of a table; ellipsoids are no brains."""
    made = Request(source, source.parent / "out", str(model), want=["age"], workers=1, device="cpu", keep_suspect=True)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_every_row_has_its_own_answer_or_reason(tiny_bids: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    """A row that repeats an id, has none, or one that is no label costs no other row its answer, number or page."""
    people = [("01", 1), ("01", 2), ("", 3), ("", 4), ("12/34", 5), ("../../out", 6), ("x" * 300, 7), ("a\tb", 8)]
    query = request(write_csv(tmp_path / "scans.csv", tiny_bids, [*people, ("02", 2)]), tiny_scalars)
    for _ in range(2):  # the second time, there are results
        rows, want = predict_scans(query)
    assert [row["age"] is not None for row in rows] == [True, *[False] * 7, True]
    assert rows[0]["flag"] != rows[1]["flag"] == "duplicate id: sub-01 stands in line 2 already"
    assert [row["flag"] for row in rows[2:4]] == ["line 4: no participant_id", "line 5: no participant_id"]
    assert all("an id may hold letters" in row["flag"] for row in rows[4:8])
    table = pd.read_csv(query.out / TABLE, sep="\t", keep_default_na=False)
    assert table["participant_id"].tolist()[:5] == ["sub-01", "sub-01", "", "", "sub-12/34"] and len(table) == 9
    assert summary(rows, want).startswith("2 of 9 scans answered")
    assert {path.name for path in tmp_path.rglob("*.html")} == {"index.html", "sub-01.html", "sub-02.html"}
    page = (query.out / "index.html").read_text()
    assert page.count("href=") == 2 and "sub-12/34" in page and "2 of 9 scans answered" in page
    assert "not answered" not in (query.out / "sub-01.html").read_text()
    assert not any(str(tiny_scalars) in path.read_text() for path in query.out.glob("*.html"))


def test_a_variable_that_is_predicted_no_better_than_by_the_mean_is_named(
    tiny_bids: Path, tiny_scalars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the page, in the table's description and on the terminal; a model that does not know says nothing."""
    model, note = load(tiny_scalars, kind=ScalarsModel), "this model predicts it no better than the mean of everybody"
    source = write_csv(tmp_path / "scans.csv", tiny_bids, [("01", 1)])
    for name, saved in (("unknown", ()), ("useful", (0.5, 0.0)), ("useless", (0.0, 0.5))):
        how = {context: dataclasses.replace(m, saved=saved) for context, m in model.stack.mixing["age"].items()}
        stack = dataclasses.replace(model.stack, mixing={**model.stack.mixing, "age": how})
        out = tmp_path / name
        predict_scans(request(source, tiny_scalars, out=out), dataclasses.replace(model, stack=stack))
        places = [(out / file).read_text() for file in ("sub-01.html", "index.html", "predictions.json")]
        assert [note in text for text in [*places, capsys.readouterr().err]] == [name == "useless"] * 4


def test_the_first_scan_is_answered_where_nobody_else_is_there(
    tiny_bids: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    source = write_csv(tmp_path / "scans.csv", tiny_bids, [("01", 1), ("01", 2)])
    rows, _ = predict_scans(request(source, tiny_scalars))
    assert [row["age"] is not None for row in rows] == [True, False]


def test_a_source_without_a_usable_row_has_a_table_and_one_without_rows_is_refused(
    tiny_bids: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    rows, _ = predict_scans(request(write_csv(tmp_path / "scans.csv", tiny_bids, [("1/2", 1)]), tiny_scalars))
    assert [row["age"] for row in rows] == [None] and (tmp_path / "out" / TABLE).is_file()
    with pytest.raises(DataError, match="the table has no rows"):
        predict_scans(request(write_csv(tmp_path / "scans.csv", tiny_bids, []), tiny_scalars))


def test_labels_may_have_underscores(tiny_bids: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "scans.csv", tiny_bids, [("OAS1_0001", 1), ("OAS1_0002", 2)])
    for label in ("OAS1_0001", "sub-OAS1_0001"):
        rows, _ = predict_scans(request(source, tiny_scalars, labels=[label]))
        assert [row["key"] for row in rows] == ["sub-OAS1_0001"]
    with pytest.raises(ConfigError, match="no participant OAS1"):
        predict_scans(request(source, tiny_scalars, labels=["OAS1"]))


def test_what_stops_the_preprocessing_stops_the_prediction_also_in_a_used_folder(
    tiny_bids: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    model = load(tiny_scalars, kind=ScalarsModel)
    recipe = Recipe(steps=("brain", "registration"), template="0" * 64).to_dict()
    model = dataclasses.replace(model, meta={**model.meta, "recipe": recipe})
    query = request(write_csv(tmp_path / "scans.csv", tiny_bids, [("01", 1)]), tiny_scalars)
    (query.out / DERIVATIVE).mkdir(parents=True)
    (query.out / DERIVATIVE / "rejected.tsv").write_text("line\tkey\treason\n")  # every preprocessing writes one
    with pytest.raises(DataError, match="give it with --template"):
        predict_scans(query, model)


def test_a_folder_in_which_another_process_works_is_left_alone(
    tiny_bids: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    query = request(write_csv(tmp_path / "scans.csv", tiny_bids, [("01", 1)]), tiny_scalars)
    (query.out / PACKED).mkdir(parents=True)
    with exclusive(query.out), pytest.raises(ConfigError, match="at work there"):
        predict_scans(query)
    assert (query.out / PACKED).is_dir()
