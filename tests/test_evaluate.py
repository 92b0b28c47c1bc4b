"""Stage ``evaluate``: every model is asked what it can answer, once, and everything stands in the tables."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from mvhpc.config import ConfigError, load_config
from mvhpc.evaluation.generation import Row
from mvhpc.evaluation.metrics import Estimate
from mvhpc.evaluation.tables import read_predictions
from mvhpc.execute import execute, plan
from mvhpc.inference import methods
from mvhpc.inference.evaluate import EvaluateConfig
from mvhpc.inference.methods import LINEAR, MEAN, Method, answer_query, open_methods, queries_of
from mvhpc.inference.predictor import PredictConfig
from mvhpc.parsers import parser_of
from mvhpc.runs.folder import identity
from mvhpc.training.baseline import BaselineConfig
from mvhpc.training.scalars import ScalarsConfig
from shards.dataset import open_dataset
from shards.errors import IntegrityError
from shards.split import record_split
from tests.conftest import SMALL_SCALARS
from tests.test_predict import copy_of, damage

OURS, PAPER, VIT = "model of scalars", "the chains", "3D ViT (MSE)"
TABLES = ["table-1", "table-2-age", "table-2-sex", "comparisons-age", "comparisons-sex"]
TABLES += ["calibration", "groups", "dependence"]  # nobody has two visits
FIGURES = [
    "scores-age",
    "calibration-age",
    "predicted-age",
    "groups-age",
    "scores-sex",
    "reliability-sex",
    "groups-sex",
]


@pytest.fixture(scope="module")
def vit(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of one step, for the age given the image and the sex."""
    out = tmp_path_factory.mktemp("evaluate") / "vit"
    few = ["name=vit", "vit.hidden=24", "vit.layers=1", "vit.mlp=24", "want=age", "given=[image,sex]"]
    few += ["training.epochs=1", "training.batch=4", "compute.device=cpu", f"data={tiny_dataset}", f"out={out}"]
    execute(plan("baseline", load_config(BaselineConfig, "baseline", "default", few)))
    return out


def evaluate(data: Path, out: Path, runs: list[Path], **values: Any) -> dict[str, Any]:
    """Run the stage, by default on the test part, with chains of two steps."""
    places = {"data": str(data), "out": str(out), "runs": [str(run) for run in runs], "compute.device": "cpu"}
    few = {"sampling.steps": 2, "sampling.stride": 500, "samples": 2}
    return execute(plan("evaluate", load_config(EvaluateConfig, "evaluate", "default", (), places | few | values)))


def drawn_volumes(model: Path, folder: Path) -> Path:
    """What `mvhpc evaluate-generation` writes of a model, with an FID of 10.94."""
    rows = [
        Row("fid", "FID", plane, Estimate(value, 9.0, 12.0, 20)) for plane, value in (("axial", 9), ("mean", 10.94))
    ]
    folder.mkdir()
    recipe = {"Distance": "FID", "Model": identity(model)}
    (folder / "generation.json").write_text(json.dumps({"rows": [row.to_dict() for row in rows], "recipe": recipe}))
    return folder


def table(folder: Path, name: str) -> pd.DataFrame:
    """The numbers of one table."""
    return pd.read_csv(folder / "tables" / f"{name}.tsv", sep="\t", na_values=["n/a"], keep_default_na=False)


@pytest.fixture(scope="module")
def compared(tiny_dataset: Path, tiny_scalars: Path, tiny_early: Path, vit: Path) -> Path:
    """The folder of a comparison of three kinds of models."""
    out = vit.parent / "comparison"
    drawn = drawn_volumes(tiny_early, out.parent / "quality")
    evaluate(tiny_dataset, out, [tiny_scalars, tiny_early, vit], names=[OURS, PAPER, VIT], generation=[str(drawn)])
    return out


def test_every_model_answers_what_it_can_and_every_file_is_there(compared: Path) -> None:
    first, age = table(compared, "table-1"), table(compared, "table-2-age")
    assert first["method"].tolist() == [OURS, PAPER, VIT, LINEAR, MEAN]
    assert first["FID"].notna().tolist() == [False, True, False, False, False]
    assert first["sex_accuracy"].notna().tolist() == [True, True, False, True, True]
    given = age.groupby("method", sort=False)["given"].apply(list)
    every = ["image, sex", "image", "sex", "nothing"]
    assert given[OURS] == given[PAPER] == given[LINEAR] == every
    assert given[VIT] == ["image, sex"] and given[MEAN] == every
    assert age.set_index(["method", "given"]).loc[(PAPER, "nothing"), "sample_variance"] > 0
    for name in TABLES:
        text = [(compared / "tables" / f"{name}.{ending}").read_text() for ending in ("md", "tex")]
        assert text[0].startswith("| ") and text[1].startswith(r"\begin{tabular}")
    assert sorted(path.stem for path in (compared / "figures").iterdir()) == sorted(FIGURES)
    assert all((compared / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in FIGURES)
    page = (compared / "results.md").read_text()
    assert (
        page.count("\n## ") == len(TABLES) + 1 and "people, 6 visits in all, the test part of the split default" in page
    )
    assert page.count("warning") == 2 and "age is known of 6 people; bootstrap intervals of fewer than 20" in page
    assert "sex is known of 5 people" in page


def test_scores_are_those_of_predict_and_the_mean_is_that_of_the_training(
    compared: Path, tiny_dataset: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    values = {"model": str(tiny_scalars), "data": str(tiny_dataset), "out": str(tmp_path / "p.tsv"), "want": ["age"]}
    config = load_config(PredictConfig, "predict", "default", (), values | {"given": ["image", "sex"]})
    summary = execute(plan("predict", config))
    frame, _ = read_predictions(tmp_path / "p.tsv")
    rows = table(compared, "table-2-age").set_index(["method", "given"])
    row = rows.loc[(OURS, "image, sex")]
    assert row["error"] == pytest.approx(summary["test/age_mae"], rel=1e-4)
    assert (row["error_low"], row["coverage_90"]) == pytest.approx(
        (summary["test/age_mae_low"], summary["test/age_in_90"]), rel=1e-4
    )
    assert row["crps"] == pytest.approx(frame["age_crps"].mean(), rel=1e-4)
    assert row["sample_variance"] == pytest.approx((frame["age_sd"] ** 2)[frame["age_true"].notna()].mean(), rel=1e-4)
    assert rows.loc[(MEAN, "nothing"), "error"] == pytest.approx(summary["test/age_mae_of_mean"], rel=1e-4)
    answers = pd.read_csv(compared / "answers.tsv", sep="\t")
    known = frame["age"][frame["age_true"].notna()].tolist()
    own = answers[(answers["method"] == OURS) & (answers["variable"] == "age") & (answers["given"] == "image,sex")]
    assert own["value"].astype(float).tolist() == pytest.approx(known, rel=1e-4)


def test_a_further_model_leaves_the_answers_of_the_others(
    compared: Path, tiny_dataset: Path, tiny_scalars: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is made anew beside the old one; models that answered are not asked again."""
    before = table(compared, "table-2-age")
    monkeypatch.setattr(methods, "open_predictor", lambda config: pytest.fail(f"{config.model} is asked again"))
    again = load_config(
        EvaluateConfig,
        "evaluate",
        "default",
        (),
        {"data": str(tiny_dataset), "out": str(compared), "runs": [str(tiny_scalars), str(vit)]}
        | {"names": [OURS, VIT], "sampling.steps": 2, "sampling.stride": 500, "samples": 2},
    )
    planned = plan("evaluate", again)
    assert planned.state() == "changed"
    from mvhpc.pipeline.run import do

    do(planned)
    assert plan("evaluate", again).state() == "finished"
    after = table(compared, "table-2-age")
    pd.testing.assert_frame_equal(
        after, before[before["method"] != PAPER].reset_index(drop=True)[list(after)], check_dtype=False
    )
    assert compared.with_name("comparison.old-1").is_dir()


def test_answers_in_another_precision_are_not_taken(tiny_dataset: Path, tiny_early: Path, tmp_path: Path) -> None:
    method, dataset = Method.open(str(tiny_early)), open_dataset(tiny_dataset)

    def ages(precision: str) -> list[float]:
        values = {"out": "o", "data": str(tiny_dataset), "runs": [str(tiny_early)], "compute.precision": precision}
        values |= {"sampling.steps": 2, "sampling.stride": 500, "samples": 2, "compute.device": "cpu"}
        config = load_config(EvaluateConfig, "evaluate", "default", (), values).predictions()
        found = answer_query(method, config, ("age", ("image",)), dataset, dataset.keys("test"), tmp_path)
        return found.frame["value"].tolist()

    exact = ages("float32")
    assert ages("bfloat16") != exact == ages("float32")


def test_the_split_of_a_run_is_that_of_its_model_folder(tiny_scalars: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_scalars, tmp_path / "run")
    settings = OmegaConf.load(run / "config.yaml")
    settings.split = "fold-1-of-3"
    OmegaConf.save(settings, run / "config.yaml")
    assert Method.open(str(run)).split == Method.open(str(run / "model")).split == "fold-1-of-3"


def test_people_whom_a_model_learnt_from_are_named(
    tiny_dataset: Path, tiny_scalars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(tiny_dataset, tmp_path / "train", [tiny_scalars], split="train")
    page = (tmp_path / "train" / "results.md").read_text()
    assert "warning: model of scalars learnt from" in page and f"no {LINEAR}" in page
    assert "warning: model of scalars learnt from" in capsys.readouterr().err
    assert LINEAR not in table(tmp_path / "train", "table-2-age")["method"].tolist()


def test_somebody_without_an_answer_ends_the_comparison(tiny_dataset: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    data = copy_of(tiny_dataset, tmp_path / "packed")
    key = open_dataset(data).keys("test")[0]
    damage(data, key)
    with pytest.raises(IntegrityError, match=rf"model of scalars: age given .*{key} has no answer .*is damaged"):
        evaluate(data, tmp_path / "out", [tiny_scalars])


def test_the_queries_are_those_of_table_2_and_of_the_baselines(tiny_dataset: Path, tiny_scalars: Path) -> None:
    schema = open_dataset(tiny_dataset).index.schema
    ours = Method.open(str(tiny_scalars))
    assert queries_of(schema, [ours]) == [
        *(("age", given) for given in (("image", "sex"), ("image",), ("sex",), ())),
        *(("sex", given) for given in (("image", "age"), ("image",), ("age",), ())),
    ]
    only = Method("x", "x", schema, ("sex", ("age", "image")), "default", ours.training)
    assert [want for want, _ in queries_of(schema, [only])] == ["sex"] * 4  # nobody predicts the age
    assert only.answers(("sex", ("image", "age"))) and not only.answers(("sex", ("image",)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"names": ["one"]}, "names: 1 names of 2 runs"),
        ({"runs": ["a", "a"]}, "runs: a is named twice"),
        ({"split": "tset"}, "Did you mean 'test'"),
    ],
)
def test_rows_are_checked_before_anything_is_set_aside(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(EvaluateConfig, "evaluate", values={"out": "o", "data": "d", "runs": ["a", "b"]} | values)
    assert words in str(refused.value)


def test_runs_are_checked_and_distinguished(
    tiny_vae: Path, tiny_scalars: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="autoencoder, which predicts nothing"):
        open_methods([str(tiny_vae)], [])
    copies = [str(tiny_scalars), str(tiny_scalars / "model")]
    assert [m.name for m in open_methods(copies, [])] == [f"model of scalars, {path}" for path in copies]
    with pytest.raises(ConfigError, match="have one name and one split"):
        open_methods(copies, ["one", "one"])
    with pytest.raises(ConfigError, match="name the run folders"):
        open_methods([], [])
    with pytest.raises(ConfigError, match=r"runs=.*nowhere: no such file"):
        evaluate(tiny_dataset, tmp_path / "x", [tiny_scalars, tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"generation.json: no result of `mvhpc evaluate-generation`"):
        evaluate(tiny_dataset, tmp_path / "y", [tiny_scalars], generation=[str(tiny_vae)])
    drawn = drawn_volumes(tiny_vae, tmp_path / "quality")
    with pytest.raises(ConfigError, match=r"generation.json: its volumes were drawn by a model that is not among"):
        evaluate(tiny_dataset, tmp_path / "z", [tiny_scalars], generation=[str(drawn)])


def test_several_runs_are_words_of_one_option() -> None:
    options = parser_of("evaluate").parse_intermixed_args(
        ["samples=4", "--runs", "a", "b", "--out", "o", "--names", "A", "B"]
    )
    assert options.runs == ["a", "b"] and options.names == ["A", "B"] and options.overrides == ["samples=4"]


def test_a_sex_predicted_as_a_number_is_scored_as_a_class(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's continuous sex: its accuracy is that of the nearest class, and it has no mean of its own."""
    monkeypatch.setattr("mvhpc.training.scalars.FEWEST", 6)
    places = {"data": str(tiny_dataset), "out": str(tmp_path / "number"), "schema": "continuous-sex", **SMALL_SCALARS}
    execute(plan("scalars", load_config(ScalarsConfig, "scalars", "default", (), places)))
    evaluate(tiny_dataset, tmp_path / "compared", [tmp_path / "number"])
    answers = pd.read_csv(tmp_path / "compared" / "answers.tsv", sep="\t")
    sex = answers[(answers["variable"] == "sex") & (answers["method"] == OURS)]
    assert len(sex) == 4 * 5 and set(sex["value"]) <= {"F", "M"}  # four queries, one person has no recorded sex
    first = table(tmp_path / "compared", "table-1").set_index("method")
    own = sex[sex["given"] == "image,age"]
    assert first.loc[OURS, "sex_accuracy"] == pytest.approx((own["value"] == own["true"]).mean())
    assert np.isnan(first.loc[MEAN, "sex_accuracy"])


def test_folds_are_one_row_each_with_its_own_test_part(tiny_dataset: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    """The runs are copies of one model, which says who learnt; here it counts who is asked about whom."""
    data = shutil.copytree(tiny_dataset, tmp_path / "packed")
    names = record_split(data, None, 2, 0, None, None)
    runs = []
    for name in names:
        runs.append(shutil.copytree(tiny_scalars, tmp_path / name))
        settings = OmegaConf.load(runs[-1] / "config.yaml")
        settings.split = name
        OmegaConf.save(settings, runs[-1] / "config.yaml")
    evaluate(data, tmp_path / "folds", runs)
    answers = pd.read_csv(tmp_path / "folds" / "answers.tsv", sep="\t")
    everybody = sorted(set(open_dataset(data).keys("all")) - {"sub-03"})  # who has no age
    for method in (OURS, LINEAR, MEAN):
        own = answers[(answers["method"] == method) & (answers["variable"] == "age") & (answers["given"] == "image")]
        assert sorted(own["key"]) == everybody
    with pytest.raises(ConfigError, match=r"folds of the row 'model of scalars', but both .* --names"):
        evaluate(data, tmp_path / "x", runs, split_name=names[0])
    with pytest.raises(ConfigError, match=r"splits fold-1-of-2 and fold-2-of-2, and \d+ visits .* split_name=fold-1"):
        evaluate(data, tmp_path / "x", runs, split="all", names=["one", "other"])
    page = (tmp_path / "folds" / "results.md").read_text()
    assert "12 people, 12 visits in all, the test part of the splits fold-1-of-2, fold-2-of-2" in page
    evaluate(data, tmp_path / "first", runs[:1], split_name=names[1])
    assert "the test part of the split fold-2-of-2" in (tmp_path / "first" / "results.md").read_text()
