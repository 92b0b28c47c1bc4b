"""Whom a query is about: all of new data, the test part of the training's own; whoever was learnt from is known."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mvhpc.cli import main
from mvhpc.config import load_config
from mvhpc.evaluation.tables import read_predictions
from mvhpc.inference import generate, predict
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.selection import Selection
from mvhpc.models.training_people import PERSON, SCAN, TrainingPeople
from mvhpc.runs.folder import Run
from shards.dataset import open_dataset
from tests.conftest import pack_people, write_bids
from tests.test_generate import configuration as people

CPU = "compute.device=cpu"


def answer(model: Path, data: Path, out: Path, **values: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Run stage ``predict`` with its own default part: summary, table, and how it was made."""
    query = {"given": ["image"], "want": ["age"], **values, "compute.device": "cpu"}
    places = {"model": str(model), "data": str(data), "out": str(out)}
    out.parent.mkdir(exist_ok=True, parents=True)
    summary = predict.run(load_config(PredictConfig, "predict", "default", (), places | query), Run(out.parent))
    return summary, *read_predictions(out)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine other people, who have the names of people of the training; one of them is in the test part."""
    return pack_people(write_bids(tmp_path_factory.mktemp("new") / "bids", 9, seed=7), (0.8, 0.1, 0.1))


def test_everybody_of_new_data_is_answered(
    tiny_model: Path, strangers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, frame, description = answer(tiny_model, strangers, tmp_path / "a.tsv")
    assert len(frame) == summary["answered"] == 9 and description["part"] == "all"
    assert description["answered"] == {"people": 9, "of": 9, "left_out": [], "rejected": "", "learnt_from": []}
    printed = capsys.readouterr().err
    assert "9 of 9 people answered" in printed and "the model learnt from" not in printed
    assert "have the name of a person of the training and another scan" in printed
    assert not frame["flag"].str.contains("the model learnt").any()


def test_of_the_own_data_the_test_part_is_answered_and_the_others_are_named(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(tiny_dataset)
    summary, frame, description = answer(tiny_model, tiny_dataset, tmp_path / "a.tsv")
    assert frame["key"].tolist() == dataset.keys("test") and summary["left_out"] == 6
    out = {entry["reason"]: entry["people"] for entry in description["answered"]["left_out"]}
    assert out == {f"in the {part} part": dataset.keys(part) for part in ("train", "validation")}
    printed = capsys.readouterr().err
    assert "6 of 12 people answered; left out: " in printed and "the model learnt from" not in printed
    _, frame, description = answer(tiny_model, tiny_dataset, tmp_path / "b.tsv", split="all")
    learnt = {key: PERSON in flag or SCAN in flag for key, flag in zip(frame["key"], frame["flag"])}
    assert [key for key, known in learnt.items() if known] == [k for k in learnt if k not in dataset.keys("test")]
    assert "warning: the model learnt from 6 of these 12 people" in capsys.readouterr().err


def test_people_of_the_training_are_known_in_other_data(tiny_model: Path, tiny_bids: Path, tmp_path: Path) -> None:
    """Three people of the training and two others, packed anew under other names: by their scans."""
    dataset = open_dataset(tiny_model.parent / "packed")
    chosen = [*dataset.keys("train")[:3], *dataset.keys("test")[:2]]
    for number, key in enumerate(chosen):
        file = tmp_path / "bids" / f"sub-new{number}" / "anat" / f"sub-new{number}_T1w.nii.gz"
        file.parent.mkdir(parents=True)
        shutil.copy(tiny_bids / key / "anat" / f"{key}_T1w.nii.gz", file)
    rows = "\n".join(f"sub-new{number}\t50\tF" for number in range(5))
    (tmp_path / "bids" / "participants.tsv").write_text(f"participant_id\tage\tsex\n{rows}\n")
    _, frame, description = answer(tiny_model, pack_people(tmp_path / "bids", (0.6, 0.2, 0.2)), tmp_path / "a.tsv")
    assert (frame["flag"].str.contains(SCAN)).tolist() == [True] * 3 + [False] * 2
    assert description["answered"]["learnt_from"] == ["sub-new0", "sub-new1", "sub-new2"]


def test_another_visit_of_a_person_of_the_training_is_known_beside_the_first(tiny_dataset: Path) -> None:
    """In data where somebody has name and scan of the training, a name alone is the same person too."""
    dataset = open_dataset(tiny_dataset)
    keys = dataset.keys("train")
    rows = [dataset.values(key) for key in keys]
    training = TrainingPeople.of(dataset.index, keys, dataset.index.schema, rows)
    records = [dataclasses.replace(r, checksums={"image": f"{r.key}, later"}) for r in dataset.index.records]
    later = dataclasses.replace(dataset.index, records=records)
    assert training.learnt(later) == {} and training.namesakes(later) == len(keys)
    again = dataclasses.replace(later, records=[dataset.record(keys[0]), *records[1:]])
    assert training.learnt(again) == dict.fromkeys(keys, PERSON) | {keys[0]: SCAN}


def test_a_model_names_nobody_and_says_who_stands_behind_each_variable(tiny_model: Path, tiny_dataset: Path) -> None:
    text = (tiny_model / "model" / "model.json").read_text()
    assert "sub-" not in text
    dataset = open_dataset(tiny_dataset)
    keys = [key for part in ("train", "validation") for key in dataset.keys(part)]
    assert not any(dataset.record(key).checksums["image"] in text for key in keys)
    facts = json.loads(text)["training"]["variables"]
    ages = [age for key in keys if (age := dataset.values(key)["age"]) is not None]
    assert facts["age"]["people"] == len(ages) and facts["age"]["range"] == [min(ages), max(ages)]
    assert sum(facts["sex"]["classes"].values()) == facts["sex"]["people"] and facts["image"]["people"] == len(keys)


def test_a_model_of_an_earlier_version_says_what_it_does_not_know(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "joint")
    manifest = tmp_path / "joint" / "model" / "model.json"
    meta = json.loads(manifest.read_text())
    del meta["scalars"]["training"]
    manifest.write_text(json.dumps(meta))
    _, frame, description = answer(tmp_path / "joint", tiny_dataset, tmp_path / "a.tsv")
    assert len(frame) == 12 and description["part"] == "all"
    assert "warning: the model does not say from whom it learnt" in capsys.readouterr().err


def test_rows_rejected_in_packing_are_counted(tiny_dataset: Path, tmp_path: Path) -> None:
    dataset = open_dataset(tiny_dataset)
    dataset.index.provenance.update(rows=14, rejected=2)
    words = Selection.of(dataset, "all", "default", TrainingPeople()).words({"sub-00": "no image"})
    assert words.startswith("11 of 12 people answered; left out: 1 no image (sub-00); 2 of 14 rows of the source")


def test_values_beyond_the_training_are_warned_of(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((tiny_model / "model" / "model.json").read_text())["training"]["variables"]["age"]
    low, high = facts["range"]
    span = f"lies outside of the training's {low:g} to {high:g} years ({facts['people']} people)"
    for age, beyond in ((110.0, True), ((low + high) / 2, False)):
        config = people(tiny_model, tmp_path / f"people-{beyond}", count=1, **{"given.age": str(age)})
        generate.run(config, Run(tmp_path))
        assert (f"warning: age {age:g} {span}" in capsys.readouterr().err) == beyond
        about = json.loads((tmp_path / f"people-{beyond}" / "dataset_description.json").read_text())
        assert bool(about["GeneratedBy"][0]["Warnings"]) == beyond
    _, frame, _ = answer(tiny_model, tiny_dataset, tmp_path / "a.tsv", given=["age"], want=["sex"], split="all")
    ages = {key: open_dataset(tiny_dataset).values(key)["age"] for key in frame["key"]}
    for key, flag in zip(frame["key"], frame["flag"]):
        assert (span in flag) == (ages[key] is not None and not low <= ages[key] <= high)


def test_another_query_sets_a_table_aside(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, description and draws keep one number; the same query is not answered again; a stranger's file stays."""
    out = tmp_path / "a.tsv"
    command = ["predict", "--model", str(tiny_model), "--data", str(tiny_dataset), "--given", "image", CPU]
    command += ["tracking.uri=sqlite:///" + str(tmp_path / "mlflow.db")]
    assert main([*command, "--want", "age", "--draws", "2", "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a.*") if path.is_file()}
    assert set(before) == {"a.tsv", "a.json", "a.parquet", "a.draws.tsv", "a.draws.json"}
    assert main([*command, "--want", "age", "--draws", "2", "--out", str(out)]) == 0
    assert "complete and unchanged" in capsys.readouterr().err and not list(tmp_path.glob("*.old-*"))
    assert main([*command, "--want", "sex", "--out", str(out)]) == 0
    assert {p.name.removesuffix(".old-1"): p.read_bytes() for p in tmp_path.glob("a.*.old-1") if p.is_file()} == before
    assert list(read_predictions(out)[0])[2] == "sex" and not (tmp_path / "a.draws.tsv").exists()
    (tmp_path / "mine.json").write_text("{}")
    assert main([*command, "--want", "sex", "--out", str(tmp_path / "mine.tsv")]) == 2
    assert "mine.json exists, and no record says" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_predictions_are_a_derivative_that_describes_itself(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Every column has a description and a unit, and nothing that was not used is named."""
    folder = tmp_path / "answers"
    answer(tiny_model, tiny_dataset, folder / "age.tsv", draws=2)
    about = json.loads((folder / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"][0]["Name"] == "mvhpc"
    for table in ("age", "age.draws"):
        columns = (folder / f"{table}.tsv").read_text().partition("\n")[0].split("\t")
        content = json.loads((folder / f"{table}.json").read_text())
        made = content.pop("GeneratedBy", {})
        assert columns[:2] == ["participant_id", "session_id"] and list(content) == columns
        assert all(about["Description"] and about["Units"] for about in content.values())
        assert content["age"]["Units"] == "years" and "sex" not in json.dumps(content)
        assert None not in made.values()
    assert list(json.loads((folder / "age.json").read_text())["GeneratedBy"]["schema"]) == ["image", "age"]
    (folder / "dataset_description.json").write_text('{"Name": "mine"}')
    answer(tiny_model, tiny_dataset, folder / "sex.tsv", want=["sex"])
    assert json.loads((folder / "dataset_description.json").read_text()) == {"Name": "mine"}


def test_tables_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    schema = {"age": {"kind": "continuous", "range": [0, 120], "unit": "years"}}
    (tmp_path / "a.json").write_text(json.dumps({"given": [], "want": ["age"], "schema": schema}))
    (tmp_path / "a.tsv").write_text("key\tsubject\tage\nsub-1_ses-2\tsub-1\t30\n")
    frame, description = read_predictions(tmp_path / "a.tsv")
    assert frame.iloc[0].tolist() == ["sub-1_ses-2", "sub-1", 30] and description["want"] == ["age"]
