"""Predictions do not depend on how they were computed, and every bad query is refused with its reason."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import mvhpc
from mvhpc.config import ConfigError, load_config
from mvhpc.evaluation.tables import constant_predictions, read_predictions, scoreboard
from mvhpc.inference import predict
from mvhpc.inference.answers import Answered
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.parquet import read_rows
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.ray_pool import Pool
from mvhpc.inference.rows import ROWS
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_grid
from mvhpc.runs.folder import Run
from mvhpc.runtime.ray_cluster import ray_session
from shards.dataset import open_dataset
from shards.schema import Schema
from shards.volumes import Space, grid
from tests.conftest import pack_people


def configuration(model: Path, data: Path, out: Path, **values: Any) -> PredictConfig:
    few = {"sampling.conditioning": "clean", "sampling.steps": 5, "sampling.stride": 200}
    few |= {"split": "all", "compute.device": "cpu"}
    places = {"model": str(model), "data": str(data), "out": str(out)}
    return load_config(PredictConfig, "predict", "default", (), few | places | values)


def answer(config: PredictConfig, folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """Run the stage; its summary and the cells of its table."""
    folder.mkdir(exist_ok=True)
    summary = predict.run(config, Run(folder))
    return summary, [line.split("\t") for line in Path(config.out).read_text().splitlines()]


def test_rows_are_one_a_subject_in_order_and_say_what_was_missing(tiny_early, tiny_dataset, tmp_path) -> None:
    config = configuration(
        tiny_early, tiny_dataset, tmp_path / "a.tsv", given=["image", "age"], want=["sex"], samples=4
    )
    summary, lines = answer(config, tmp_path / "run")
    dataset = open_dataset(tiny_dataset)
    assert [line[0] for line in lines[1:]] == dataset.keys()
    columns = ["sex", "sex_p_F", "sex_p_M", "sex_true", "not_given", "flag"]
    assert lines[0] == ["participant_id", "session_id", *columns]
    frame, description = read_predictions(tmp_path / "a.tsv")
    assert (frame["sex_p_F"] + frame["sex_p_M"]).to_numpy() == pytest.approx(1)
    assert set(frame["sex_p_F"]) <= {0, 0.25, 0.5, 0.75, 1}
    lacking = frame.loc[frame["not_given"].notna(), ["key", "not_given"]].to_numpy().tolist()
    assert lacking == [["sub-03", "age"]]
    assert frame.loc[frame["sex_true"].isna(), "key"].tolist() == ["sub-04"]
    known = frame.dropna(subset=["sex_true"])
    assert summary["all/sex_accuracy"] == pytest.approx((known["sex"] == known["sex_true"]).mean())
    assert description["data"] == dataset.index.digest and description["network_calls"] == 20


@pytest.mark.parametrize("model", ["tiny_model", "tiny_early"])
def test_what_all_people_of_the_training_share_is_not_predicted(request, model, tiny_dataset, tmp_path) -> None:
    """A model of women of 50 answers women of 50, for certain, whatever the scan shows."""
    values = {"given": ["image"], "want": ["age", "sex"]} | (EXACT if model == "tiny_model" else {"samples": 1})
    predictor = open_predictor(
        configuration(request.getfixturevalue(model), tiny_dataset, tmp_path / "a.tsv", **values)
    )
    facts = {"age": {"people": 9, "range": [50.0, 50.0], "mean": 50.0}, "sex": {"people": 8, "classes": {"F": 8}}}
    predictor.training = dataclasses.replace(predictor.training, variables=facts)
    (row,) = predictor(predictor.dataset.keys()[:1])
    assert {value for name, value in row.items() if name.startswith(("age", "sex")) and "_true" not in name} == {None}
    assert row["age_true"] is not None and "age is not predicted: all 9 people" in row["flag"]
    assert "sex is not predicted: all 8 people of the training that have it have F" in row["flag"]
    predictor.training = dataclasses.replace(predictor.training, variables=facts | {"age": {}})
    assert predictor(predictor.dataset.keys()[:1])[0]["age"] is not None


def test_mean_and_sd_are_those_of_the_chains(tiny_early, tiny_dataset, tmp_path) -> None:
    """Chain c of a subject is the same whatever the number of chains, so three means give away three chains."""
    means = {}
    for samples in (1, 2, 3):
        config = configuration(
            tiny_early, tiny_dataset, tmp_path / f"{samples}.tsv", given=["image"], want=["age"], samples=samples
        )
        answer(config, tmp_path / "run")
        means[samples], _ = read_predictions(config.out)
    m1, m2, m3 = (means[samples]["age"].to_numpy() for samples in (1, 2, 3))
    chains = np.stack([m1, 2 * m2 - m1, 3 * m3 - 2 * m2])
    assert means[3]["age_sd"].to_numpy() == pytest.approx(chains.std(0, ddof=1), rel=1e-3)
    assert means[1]["age_sd"].isna().all()
    assert not [column for column in means[1] if "_q" in column or "_crps" in column]
    reach = stats.t.ppf(0.95, 2) * np.sqrt(4 / 3) * means[3]["age_sd"]
    assert means[3]["age_q95"].to_numpy() == pytest.approx(
        (means[3]["age"] + reach).clip(upper=120).to_numpy(), rel=1e-4
    )  # the schema's range ends there
    assert (means[3]["age_crps"].isna() == means[3]["age_true"].isna()).all()
    inside = m1[(m1 > 0) & (m1 < 120)].round(3)
    assert len(set(inside)) == len(inside) > 6


def content(out: str | Path) -> list[bytes]:
    """The bytes of a table and of its rows in full precision."""
    return [Path(out).with_suffix(end).read_bytes() for end in (".tsv", ".parquet")]


@pytest.mark.parametrize(("given", "want"), [(["image", "age"], "sex"), (["sex"], "age")])
def test_no_bit_of_a_row_depends_on_the_batch_the_order_or_the_threads(
    tiny_early, tiny_dataset, tmp_path, given, want
) -> None:
    config = configuration(tiny_early, tiny_dataset, tmp_path / "a.tsv", given=given, want=[want])
    answer(config, tmp_path / "run")
    first = content(config.out)
    for values in ({"batch": 1}, {"batch": 5, "compute.threads": 3}):
        again = configuration(tiny_early, tiny_dataset, tmp_path / "b.tsv", given=given, want=[want], **values)
        answer(again, tmp_path / "run")
        assert content(again.out) == first
    predictor = open_predictor(config)
    rows = {row["key"]: row for row in read_rows(tmp_path / "a.parquet")}
    keys = predictor.dataset.keys()
    for some in (keys[::-1], keys[3:5], keys[:1]):
        assert predictor(some) == [rows[key] for key in some]


EXACT = {"sampling.conditioning": "auto"}


def test_a_model_of_scalars_answers_with_whole_laws_in_one_call(tiny_model, tiny_dataset, tmp_path) -> None:
    config = configuration(
        tiny_model, tiny_dataset, tmp_path / "a.tsv", given=["image"], want=["age", "sex"], draws=400, **EXACT
    )
    summary, _ = answer(config, tmp_path / "run")
    frame, description = read_predictions(tmp_path / "a.tsv")
    assert description["network_calls"] == 1 and description["calibrated_on"] == 6
    quantiles = frame[[f"age_q{q:02d}" for q in (5, 25, 50, 75, 95)]].to_numpy()
    steps = np.diff(quantiles)
    assert (steps >= 0).all() and (steps[:, 1:3] > 0).all() and quantiles.min() >= 0 and quantiles.max() <= 120
    known = frame.dropna(subset=["age_true"])
    inside = (known["age_q05"] <= known["age_true"]) & (known["age_true"] <= known["age_q95"])
    assert summary["all/age_in_90"] == pytest.approx(inside.mean())
    assert frame.loc[frame["age_crps"].isna(), "key"].tolist() == ["sub-03"]

    draws = pd.read_csv(tmp_path / "a.draws.tsv", sep="\t")
    assert draws.groupby("participant_id", sort=False).size().tolist() == [400] * len(frame)
    drawn = draws.groupby("participant_id", sort=False)["age"]
    assert (np.abs(drawn.mean().to_numpy() - frame["age"]) < 4.5 * frame["age_sd"] / 20).all()
    women = draws.assign(F=draws["sex"] == "F").groupby("participant_id", sort=False)["F"].mean().to_numpy()
    assert np.abs(women - frame["sex_p_F"]).max() < 0.12


def test_a_model_calibrated_on_few_says_so(tiny_model, tiny_dataset, tmp_path, capsys) -> None:
    """On the terminal and in the description, also where many were learnt from and few of them have the number."""
    shutil.copytree(tiny_model, tmp_path / "joint")
    manifest = tmp_path / "joint" / "model" / "model.json"
    meta = json.loads(manifest.read_text())
    for people, with_age in ((19, 19), (20, 20), (100, 19)):
        meta["scalars"]["extra"]["calibrated on"] = people
        meta["scalars"]["training"]["variables"]["age"]["people"] = with_age
        manifest.write_text(json.dumps(meta))
        config = configuration(
            tmp_path / "joint", tiny_dataset, tmp_path / "a.tsv", given=["image"], want=["age"], **EXACT
        )
        answer(config, tmp_path / f"run-{people}")
        description = read_predictions(config.out)[1]
        assert description["calibrated_on"] == people
        texts = [capsys.readouterr().err, " ".join(description["warnings"])]
        assert ["age: calibrated on 19 held-out people" in text for text in texts] == [with_age < 20] * 2
    assert mvhpc.load(tmp_path / "joint").predict_people(tiny_dataset, ["image"], ["age"], ["sub-01"])
    assert "age: calibrated on 19 held-out people" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny_model", "tiny_early"])
def test_who_lacks_all_that_is_given_has_no_answer(request, model, tiny_dataset, tmp_path) -> None:
    """It would be one about nobody in particular."""
    how = EXACT if model == "tiny_model" else {"samples": 2}
    values = {"given": ["age"], "want": ["sex"], **how}
    predictor = open_predictor(
        configuration(request.getfixturevalue(model), tiny_dataset, tmp_path / "a.tsv", **values)
    )
    row, other = predictor(["sub-03", "sub-01"])
    assert (row["sex"], row["flag"]) == (None, "nothing that is given is known") and other["sex"] is not None


def packed_again(tiny_bids: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """The twelve people packed after a change of their folder."""
    shutil.copytree(tiny_bids, folder / "bids")
    change(folder / "bids")
    return pack_people(folder / "bids", (0, 0, 1))


@pytest.mark.parametrize("model", ["tiny_model", "tiny_early"])
def test_doubts_about_a_scan_stand_with_the_answers_that_read_it(
    request, model, tiny_bids, tmp_path, monkeypatch
) -> None:
    """Of quality control; that the scan is another person's too; and that it was preprocessed otherwise."""

    def copy(bids: Path) -> None:
        shutil.copy(bids / "sub-06" / "anat" / "sub-06_T1w.nii.gz", bids / "sub-07" / "anat" / "sub-07_T1w.nii.gz")

    monkeypatch.setattr("mvhpc.inference.scalars_predictor.recipe_flag", lambda *_: ["of another preprocessing"])
    data, how = packed_again(tiny_bids, tmp_path, copy), EXACT if model == "tiny_model" else {"samples": 2}
    flags = {}
    for given in ("image", "sex"):
        values = {"given": [given], "want": ["age"], **how}
        predictor = open_predictor(configuration(request.getfixturevalue(model), data, tmp_path / "a.tsv", **values))
        flags[given] = [row["flag"] for row in predictor(["sub-06", "sub-07", "sub-08"])]
    for flag, other in zip(flags["image"], ("sub-07", "sub-06", "")):
        assert "image: " in flag and (f"image is the same scan as that of {other}" in flag) == bool(other)
        assert ("of another preprocessing" in flag) == (model == "tiny_model")
    assert not any(word in flag for flag in flags["sex"] for word in ("image", "preprocessing"))


def copy_of(data: Path, folder: Path) -> Path:
    """A copy of a packed data set, to be damaged."""
    return Path(shutil.copytree(data, folder))


def damage(data: Path, key: str) -> None:
    """Change a byte of a packed volume."""
    record, file = open_dataset(data).record(key), data / "data.zarr/image/c/0/0/0/0"
    raw = bytearray(file.read_bytes())
    raw[record.offsets["image"] + record.sizes["image"] // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_early"])
def test_a_subject_that_fails_is_reported_and_stops_nobody(request, model, tiny_dataset, tmp_path, capsys) -> None:
    data = copy_of(tiny_dataset, tmp_path / "packed")
    values = {"given": ["image"], "want": ["age"], **(EXACT if model == "tiny_model" else {})}
    config = configuration(request.getfixturevalue(model), data, tmp_path / "a.tsv", **values)
    answer(config, tmp_path / "run")
    before = {row["key"]: row for row in read_rows(tmp_path / "a.parquet")}
    damage(data, "sub-05")
    summary, lines = answer(config, tmp_path / "run")
    after = {row["key"]: row for row in read_rows(tmp_path / "a.parquet")}
    assert list(after) == list(before) == [line[0] for line in lines[1:]]
    failed = after.pop("sub-05")
    assert failed["flag"].startswith("failed: ") and "sub-05 image is damaged" in failed["flag"]
    assert {failed[name] for name in failed.keys() - {"key", "subject", "flag"}} == {None}
    assert after == {key: row for key, row in before.items() if key != "sub-05"}
    assert summary["failed"] == 1 and summary["answered"] == 11
    assert "1 of 12 failed: sub-05" in capsys.readouterr().err
    _, description = read_predictions(config.out)
    assert failed["flag"] in {group["reason"] for group in description["answered"]["left_out"]}


def test_an_interrupted_query_continues_and_another_one_begins_anew(
    tiny_model, tiny_dataset, tmp_path, monkeypatch
) -> None:
    query = {"given": ["image"], "want": ["age", "sex"], "draws": 3, **EXACT}
    config = configuration(tiny_model, tiny_dataset, tmp_path / "a.tsv", **query)
    answer(config, tmp_path / "whole")
    first = content(config.out)
    answered: list[str] = []
    own = ScalarsPredictor.answer

    def spy(self: Any, keys: Any, inputs: Any) -> Any:
        if len(answered) == limit:
            raise KeyboardInterrupt
        answered.extend(keys)
        return own(self, keys, inputs)

    monkeypatch.setattr(ScalarsPredictor, "answer", spy)
    monkeypatch.setattr("mvhpc.inference.row_store.EVERY_S", 0.0)
    monkeypatch.setattr("mvhpc.inference.row_store.SHARE", 0.0)
    again = configuration(tiny_model, tiny_dataset, tmp_path / "b.tsv", **query)
    limit = 4
    with pytest.raises(KeyboardInterrupt):
        answer(again, tmp_path / "run")
    live = (tmp_path / "run" / ROWS / "rows.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in live] == ["participant_id", *answered[: len(live) - 1]]
    assert len(live) > 1
    answered, limit = [], 99
    answer(again, tmp_path / "run")
    assert content(again.out) == first and len(answered) == 12 - (len(live) - 1)
    assert not (tmp_path / "run" / ROWS).exists()
    limit = 4
    answered = []
    with pytest.raises(KeyboardInterrupt):
        answer(again, tmp_path / "run")
    other = configuration(tiny_model, tiny_dataset, tmp_path / "b.tsv", **query | {"draws": 2})
    answered, limit = [], 99
    answer(other, tmp_path / "run")
    assert len(answered) == 12 and len(read_rows(tmp_path / "b.parquet")[0]["draws"]["age"]) == 2


@pytest.mark.slow
def test_kills_leave_the_rows_of_an_undisturbed_run(tiny_early, tiny_dataset, tmp_path) -> None:
    """SIGKILL once rows are on disk, twice; benchmarks/faults/predictions.py does so at random moments."""
    query = {"given": ["image"], "want": ["age", "sex"], "samples": 8, "sampling.steps": 40}
    config = configuration(tiny_early, tiny_dataset, tmp_path / "whole.tsv", **query)
    answer(config, tmp_path / "whole")
    values = {"sampling.conditioning": "clean", "sampling.steps": 40, "sampling.stride": 200, "samples": 8}
    places = ["--model", str(tiny_early), "--data", str(tiny_dataset), "--out", str(tmp_path / "a.tsv")]
    words = [*places, "--split", "all", "--given", "image", "--want", "age,sex", "compute.device=cpu"]
    command = [sys.executable, "-m", "mvhpc", "predict", *words, *(f"{key}={value}" for key, value in values.items())]
    live, size = tmp_path / "a.tsv.run" / ROWS / "rows.tsv", 0
    for _ in range(2):
        process = subprocess.Popen(command)
        while process.poll() is None and not (live.is_file() and live.stat().st_size > size):
            time.sleep(0.02)
        size = live.stat().st_size if live.is_file() else 0
        process.kill()
        process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert content(tmp_path / "a.tsv") == content(config.out)


@pytest.mark.slow
def test_two_workers_write_what_one_writes(tiny_model, tiny_dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tiny_dataset.parent)  # workers read relative paths from where the driver is
    written = []
    for workers in (1, 2):
        config = configuration(
            Path(tiny_model.name),
            Path(tiny_dataset.name),
            tmp_path / f"{workers}.tsv",
            given=["image"],
            want=["age", "sex"],
            draws=2,
            batch=4,
            **EXACT,
            **{"compute.workers": workers, "compute.threads": 1},
        )
        answer(config, tmp_path / "run")
        written.append([*content(config.out), Path(config.out).with_suffix(".draws.tsv").read_bytes()])
    assert written[0] == written[1]


class Mortal:
    """A worker that is killed at some subjects: at ``once`` the first time, at ``always`` every time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ready(self) -> None: ...

    def answer(self, keys: list[str]) -> Iterator[Answered]:
        for part in (keys[i : i + 2] for i in range(0, len(keys), 2)):
            if "always" in part or ("once" in part and not (self.folder / "once").exists()):
                (self.folder / part[0]).touch()
                (self.folder / "once").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield Answered([{"key": key, "length": len(key)} for key in part])


@pytest.mark.slow
def test_subjects_of_workers_that_die_are_answered_once_and_one_that_kills_them_has_failed(tmp_path) -> None:
    keys = [*(f"sub-{i:02d}" for i in range(9)), "once", *(f"sub-{i:02d}" for i in range(9, 18)), "always", "sub-18"]
    with ray_session(2, tmp_path):
        import ray  # which reads the session's settings on import

        start = ray.remote(Mortal).options(num_cpus=1, max_restarts=0).remote
        found = list(Pool(lambda: start(tmp_path), 2, 2).answer([keys[i : i + 7] for i in range(0, len(keys), 7)]))
    assert sorted(row["key"] for one in found for row in one.rows) == sorted({*keys} - {"always"})
    assert [one.failed for one in found if one.failed] == [{"always": "its worker died 5 times"}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"given": ["imag"], "want": ["age"]}, "Did you mean 'image'"),
        ({"given": ["image"], "want": ["agee"]}, "Did you mean 'age'"),
        ({"given": ["image", "age"], "want": ["age"]}, "both given and wanted"),
        ({"given": ["sex", "sex"], "want": ["age"]}, "named twice"),
        ({"given": ["sex"], "want": []}, "nothing is wanted"),
        ({"given": ["sex"], "want": ["image"]}, "mvhpc generate"),
        ({"given": [], "want": ["age"], "split": "tets"}, "Did you mean 'test'"),
        ({"given": [], "want": ["age"], "split_name": "fold-1"}, "unknown split"),
        ({"given": [], "want": ["age"], "sampling.conditioning": "repant"}, "Did you mean 'repaint'"),
        ({"given": [], "want": ["age"], "draws": 3}, "draws come from a model of scalars"),
        ({"given": [], "want": ["age"], "sampling.guidance": 0}, "above 0"),
    ],
)
def test_a_bad_query_is_refused_with_its_reason(tiny_early, tiny_dataset, tmp_path, values, words) -> None:
    with pytest.raises(ConfigError, match=words):
        predict.run(configuration(tiny_early, tiny_dataset, tmp_path / "a.tsv", **values), Run(tmp_path))
    assert not list(tmp_path.glob("a.*"))


def test_answers_go_to_a_table(tiny_early, tiny_dataset, tmp_path) -> None:
    config = configuration(tiny_early, tiny_dataset, tmp_path / "a.csv", given=[], want=["age"])
    with pytest.raises(ConfigError, match=r"name it with \.tsv"):
        predict.run(config, Run(tmp_path))


def test_data_on_another_grid_are_refused(tiny_early, tiny_bids, tmp_path) -> None:
    from shards.pack import pack

    schema = Schema.from_dict(json.loads((tiny_early / "model" / "model.json").read_text())["schema"])
    options = {"storage": "zarr", "schema": schema, "max_rejects": "0", "fractions": (0.4, 0.1, 0.5)}
    options["keep_suspect"] = True
    pack(tiny_bids, tmp_path / "coarse", spacing=10.0, shape=(16, 16, 16), **options)
    config = configuration(tiny_early, tmp_path / "coarse", tmp_path / "a.tsv", given=["image"], want=["age"])
    with pytest.raises(ConfigError, match=r"spacing.*pack again with spacing 8"):
        open_predictor(config)
    dataset = open_dataset(tmp_path / "coarse")
    registered = grid(10.0, (16, 16, 16), Space("MNI", (0.0, -18.0, 4.0)))
    with pytest.raises(ConfigError, match=r"affine.*pack again .* what `shards preprocess` registers to MNI$"):
        check_grid(registered, dataset)


def test_a_category_that_the_model_does_not_know_affects_no_other_query(tiny_early, tiny_bids, tmp_path) -> None:
    from shards.pack import pack

    schema = json.loads((tiny_early / "model" / "model.json").read_text())["schema"]
    schema["sex"] |= {"classes": ["woman", "man"], "aliases": {"F": "woman", "M": "man"}}
    options = {"storage": "zarr", "schema": Schema.from_dict(schema), "max_rejects": "0", "fractions": (0.4, 0.1, 0.5)}
    options["keep_suspect"] = True
    pack(tiny_bids, tmp_path / "packed", spacing=8.0, shape=(16, 16, 16), **options)
    config = configuration(tiny_early, tmp_path / "packed", tmp_path / "a.tsv", given=["image"], want=["age"])
    assert answer(config, tmp_path / "run")[0]["subjects"] == 12
    config = configuration(tiny_early, tmp_path / "packed", tmp_path / "b.tsv", given=["image", "sex"], want=["age"])
    with pytest.raises(ConfigError, match=r"packed: sub-.*: sex: unknown category '(wo)?man' \(known: "):
        answer(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("age", {"range": [0, 1440], "unit": "months"}, "age has the unit months there, years to the model"),
        ("sex", {"kind": "continuous", "range": [0, 1], "values": {"F": 0, "M": 1}}, "sex is continuous there"),
        ("image", {"suffix": "FLAIR"}, "image has the contrast FLAIR there, T1w to the model"),
    ],
)
def test_data_of_another_unit_kind_or_contrast_are_refused(tiny_early, tiny_bids, tmp_path, name, change, words):
    from shards.pack import pack

    shutil.copytree(tiny_bids, tmp_path / "bids")
    for path in [*(tmp_path / "bids").rglob("*_T1w.nii.gz")] if name == "image" else ():
        path.rename(path.with_name(path.name.replace("T1w", "FLAIR")))
    schema = json.loads((tiny_early / "model" / "model.json").read_text())["schema"]
    schema[name] = change if "kind" in change else {**schema[name], **change}
    options = {"storage": "zarr", "schema": Schema.from_dict(schema), "max_rejects": "0", "fractions": (0.4, 0.1, 0.5)}
    options["keep_suspect"] = True
    pack(tmp_path / "bids", tmp_path / "packed", spacing=8.0, shape=(16, 16, 16), **options)
    for given, want in ((["image", "age"], ["sex"]), (["image", "sex"], ["age"])):
        config = configuration(tiny_early, tmp_path / "packed", tmp_path / "a.tsv", given=given, want=want)
        with pytest.raises(ConfigError, match=words):
            answer(config, tmp_path / "run")


def test_draws_go_with_the_table_they_belong_to(tiny_model, tiny_dataset, tmp_path) -> None:
    draws = tmp_path / "a.draws.tsv"
    for n in (2, 0):
        config = configuration(
            tiny_model, tiny_dataset, tmp_path / "a.tsv", given=["image"], want=["age"], draws=n, **EXACT
        )
        answer(config, tmp_path / "run")
        assert draws.exists() == (n > 0)


def test_models_and_data_of_another_kind_are_refused(tiny_model, tiny_vae, tiny_dataset, tiny_latents, tmp_path):
    for model, data, words in [
        (tiny_model, tiny_latents, "holds latents; give the packed volumes"),
        (tiny_vae, tiny_dataset, "is an autoencoder; give the run folder of stage scalars, joint or"),
        (tiny_dataset, tiny_dataset, "no trained model there"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_predictor(configuration(model, data, tmp_path / "a.tsv", given=["image"], want=["age"], **EXACT))


def test_a_model_of_scalars_predicts_without_chains(tiny_model, tiny_dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match="predicts without chains"):
        open_predictor(configuration(tiny_model, tiny_dataset, tmp_path / "a.tsv", given=["image"], want=["age"]))


def test_a_model_is_opened_once(tiny_model, tiny_dataset, tmp_path, monkeypatch) -> None:
    """Each of its files is read at most once."""
    opened: list[str] = []
    for method in ("read_bytes", "read_text"):
        plain = getattr(Path, method)
        spy = lambda path, *a, plain=plain, **k: (opened.append(str(path)), plain(path, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(Path, method, spy)
    open_predictor(configuration(tiny_model, tiny_dataset, tmp_path / "a.tsv", given=["image"], want=["age"], **EXACT))
    assert opened.count(str(tiny_model / "model" / "model.json")) == 1
    assert max(opened.count(str(path)) for path in (tiny_model / "model").iterdir()) == 1


def test_predicting_the_mean_is_that_of_the_people_whom_models_learn_from(tiny_dataset, tiny_scalars) -> None:
    """The results table, `predict` and `evaluate` have one constant."""
    dataset = open_dataset(tiny_dataset)
    frame = constant_predictions(dataset, dataset.index.schema, ["age", "sex"])
    learnt = TrainingPeople.read(json.loads((tiny_scalars / "model" / "model.json").read_text()))
    assert frame["key"].tolist() == dataset.keys("test")
    assert all(set(frame[name]) == {learnt.constant(name)} for name in ("age", "sex"))
    table = scoreboard([("predicting the mean", frame)], dataset.index.schema, ["age", "sex"])
    assert table.header[1:3] == ["age error (years)", "sex accuracy"]
