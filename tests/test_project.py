"""A stage started by itself is a stage of a project; what the user gives goes over what the project says."""

import os
from pathlib import Path

import pytest

from launchers.plan import chain
from mvhpc.cli import main
from mvhpc.config import ConfigError, load_config
from mvhpc.execute import plan
from mvhpc.pipeline.plan import Pipeline, PipelineConfig
from mvhpc.pipeline.project import Configured, Request, configure_pipeline, find_root, open_project, record_project
from mvhpc.pipeline.run import do, run_pipeline
from mvhpc.runs.folder import read_record
from mvhpc.stages import STAGES
from tests.test_pipeline import SMALL


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is where the user is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def project(root: str, preset: str = "demo", **values: object) -> Pipeline:
    """A project on disk."""
    config = load_config(PipelineConfig, "pipeline", preset, (), {"root": root, **values})
    record_project(config)
    return Pipeline(config)


def configure(
    stage: str, *overrides: str, preset: str | None = None, root: str | None = None, **flags: str
) -> Configured:
    return Request(STAGES[stage], preset, overrides, flags, root).configure()


def test_a_stage_is_configured_as_the_pipeline_would(home: Path) -> None:
    pipeline = project("runs/demo", joint={"training": {"epochs": 3}})
    for stage, config in pipeline.steps():
        if not STAGES[stage].command:
            continue
        flags = {"want": ",".join(config.want), "given": ",".join(config.given)} if stage == "predict" else {}
        assert configure(stage, **flags).config == config


def test_what_is_given_goes_over_the_project(home: Path) -> None:
    project("runs/demo", joint={"training": {"epochs": 3}})
    mine = home / "mine.yaml"
    mine.write_text("training: {epochs: 5}\n")
    assert configure("joint").config.training.epochs == 3
    assert configure("joint", preset=str(mine), root="runs/demo").config.training.epochs == 5
    changed = configure("joint", "training.epochs=7", "vae=elsewhere").config
    assert (changed.training.epochs, changed.vae, changed.out) == (7, "elsewhere", "runs/demo/joint")
    assert configure("predict", want="age", given="image", out="age.tsv").config.out == "age.tsv"


def test_a_stage_whose_paths_are_all_given_is_in_no_project(home: Path) -> None:
    project("runs/demo")
    alone = configure("joint", "latents=l", "vae=v", "scalars=s", "out=o")
    assert alone.project is None and alone.config.tracking.uri == ""
    assert alone.config == load_config(
        STAGES["joint"].config_class(), "joint", "default", ["latents=l", "vae=v", "scalars=s", "out=o"]
    )


def test_the_project_worked_on_last_is_taken(home: Path) -> None:
    assert find_root() == Path("runs/main")
    for number, name in enumerate(("first", "second")):
        project(f"runs/{name}")
        os.utime(f"runs/{name}/project.yaml", (number, number))
    assert find_root() == Path("runs/second")
    folder = home / "runs" / "first" / "vae"
    folder.mkdir()
    (folder / "stage.json").write_text("{}")
    assert find_root() == Path("runs/first")
    assert find_root("runs/second") == Path("runs/second")


def test_lists_and_mappings_are_written_one_way(home: Path) -> None:
    project("runs/demo")
    flags = configure("predict", want="age", given="image,sex").config
    assert flags == configure("predict", "want=age", "given=image,sex").config
    assert flags == configure("predict", "want=[age]", "given=[image,sex]").config
    assert configure("generate", given="age=70,sex=F").config.given == {"age": "70", "sex": "F"}
    assert configure("generate", "given=age=70,sex=F").config.given == {"age": "70", "sex": "F"}
    with pytest.raises(ConfigError, match="age is named twice"):
        configure("generate", given="age=70,age=71")


def test_names_of_columns_are_taken_as_they_are(home: Path) -> None:
    """Those of R have dots."""
    rename = {"Age.at.scan": "age", "Sex (m/f)": "sex"}
    pipeline = project("runs/demo", pack={"rename": rename, "compute": {"workers": 2}, "seed": 3})
    stages = dict(pipeline.steps())
    assert stages["pack"].rename == rename and (stages["pack"].compute.workers, stages["pack"].seed) == (2, 3)
    assert configure("pack", root="runs/demo").config.rename == rename
    mapping = "pack.rename={Age.at.scan: age}"
    changed = Pipeline(configure_pipeline(None, ["root=runs/new", mapping, "pack.compute.workers=2"], "demo"))
    packed = changed.configure("pack", "default")
    assert (packed.rename, packed.compute.workers) == ({"Age.at.scan": "age"}, 2)


def test_folds_have_models_of_their_own_beside_the_one_to_keep(home: Path) -> None:
    project("runs/small", "small", source="scans")
    steps = list(open_project(Path("runs/small")).steps())
    models = [config.out for stage, config in steps if stage == "joint"]
    assert models == [*(f"runs/small/fold-{k}/joint" for k in (1, 2, 3)), "runs/small/joint"]
    assert all("/fold-" in config.out for stage, config in steps if stage == "predict")
    assert [config.model for stage, config in steps if stage == "generate"] == ["runs/small/joint"]
    kept = configure("vae").config
    assert (kept.split, kept.out) == ("default", "runs/small/vae")
    second = configure("joint", "split=fold-2-of-3").config
    assert (second.latents, second.out) == ("runs/small/fold-2/latents", "runs/small/fold-2/joint")
    config = configure("predict", "split_name=fold-2-of-3", want="age", given="image").config
    assert (config.model, config.split) == ("runs/small/fold-2/joint", "auto")
    assert config.out == "runs/small/fold-2/predictions/age-given-image.tsv"


def test_a_missing_input_is_named_with_the_command_that_makes_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project("runs/demo")
    assert main(["train", "joint"]) == 2
    printed = capsys.readouterr().err
    assert "latents=runs/demo/latents: no such file or folder" in printed
    assert "`mvhpc encode --root runs/demo`, or add --with-inputs" in printed
    assert main(["train", "vae"]) == 2
    assert "`shards pack SOURCE runs/demo/packed`" in capsys.readouterr().err
    assert not (home / "runs" / "demo" / "joint").exists()


def test_a_missing_input_that_the_project_does_not_make_is_named_too(home: Path) -> None:
    """Its joint model needs no model of scalars, and --with-inputs makes none."""
    project("runs/demo", pack={"schema": "image-only"})
    for path in ("latents", "vae"):
        (home / path).mkdir()
    configured = configure("joint", "latents=latents", "vae=vae", "scalars=gone", root="runs/demo")
    with pytest.raises(ConfigError, match=r"^scalars=gone: no such .*`mvhpc train scalars --root runs/demo`$"):
        configured.plan()


def test_data_that_the_user_packed_are_an_input_that_exists(home: Path) -> None:
    """They are neither replaced by procedural brains nor set aside."""
    project("runs/study", "default")
    (home / "runs" / "study" / "packed").mkdir()
    (home / "runs" / "study" / "packed" / "index.json").write_text("{}")
    assert [name for name, _ in configure("joint").before()] == ["vae", "encode", "scalars"]
    (home / "runs" / "study" / "packed").rename("elsewhere")
    assert [name for name, _ in configure("joint").before()] == ["phantom", "pack", "vae", "encode", "scalars"]


@pytest.mark.slow
def test_inputs_are_made_first_with_the_flag(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing to predictions by one command; the same again finds all of it done, and so does the pipeline.

    The data have no validation part: there is then no picture of reconstructions, and nothing else is missing.
    """
    pack = {**SMALL["pack"], "split": [0.6, 0.0, 0.4]}
    small = project("runs/small", **{**SMALL, "pack": pack, "queries": [{"want": ["age"], "given": ["image"]}]})
    command = ["predict", "--given", "image", "--want", "age", "--with-inputs"]
    assert main(command) == 0
    table = home / "runs" / "small" / "predictions" / "age-given-image.tsv"
    first = table.read_bytes()
    assert read_record(home / "runs" / "small" / "joint")["status"] == "finished"
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err.count("reused") == 7 and "test/age_mae" in printed.out
    assert table.read_bytes() == first
    run_pipeline(small.config)
    printed = capsys.readouterr()
    assert printed.err.count("reused") == 7 and "predicting the mean" in printed.out
    figures = home / "runs" / "small" / "figures"
    assert {path.name for path in figures.iterdir()} == {
        "people.png",
        "inpainted-half.png",
        "drawn-over-age.png",
        "ventricles-over-age.png",
    }


def test_an_input_that_is_away_is_no_changed_one(home: Path) -> None:
    """A finished stage is reused while the file system of its source is not mounted, and never set aside."""
    pipeline = project("runs/small", source="scans", phantom={"subjects": 4, "shape": [16, 16, 16]})
    phantoms = load_config(
        STAGES["phantom"].config_class(), "phantom", "demo", ["subjects=4", "shape=[16,16,16]"], {"out": "scans"}
    )
    do(plan("phantom", phantoms))
    packed = pipeline.configure("pack", "default")
    packed.shape, packed.spacing, packed.workers = [16, 16, 16], 12.0, 1
    do(plan("pack", packed))
    Path("scans").rename("unmounted")
    assert do(plan("pack", packed)) is None
    packed.spacing = 10.0
    with pytest.raises(ConfigError, match=r"^source=scans: no such .* \(is its file system mounted\?\)$"):
        do(plan("pack", packed))
    assert configure("pack", root="runs/small").plan().missing  # without a word of `shards phantom`
    assert not Path("runs/small/packed.old-1").exists()


def test_a_project_goes_on_with_its_own_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not with the demo's, whose phantoms would replace the packed people; a preset that is named is taken."""

    def shown(*words: str) -> str:
        capsys.readouterr()
        assert main(["run", *words, "--show-config"]) == 0
        return capsys.readouterr().out

    assert "preset: demo" in shown("root=runs/study")
    record_project(configure_pipeline("small", ["root=runs/study", "source=people", "vae.training.epochs=3"], "demo"))
    again = shown("root=runs/study", "folds=2")
    assert "preset: small" in again and "source: people" in again and "epochs: 3" in again and "folds: 2" in again
    assert "preset: demo" in shown("--config", "demo", "root=runs/study")
    assert chain(None, ["root=runs/study"], 1, 0, False)[0].config.source == "people"
    assert chain(None, ["root=runs/new"], 1, 0, False)[0].config.preset == "default"


def test_a_model_of_scalars_is_trained_where_the_design_needs_one(home: Path) -> None:
    """And the joint model answers in any case."""
    for overrides, expected in (([], ["scalars"]), (["preset=paper"], []), (["pack={schema: image-only}"], [])):
        pipeline = Pipeline(load_config(PipelineConfig, "pipeline", "demo", ["root=runs/by", *overrides]))
        steps = list(pipeline.steps())
        between = [stage for stage, _ in steps if stage not in {"predict", "generate"}]
        assert between == ["phantom", "pack", *expected, "vae", "encode", "joint"]
        (joint,) = (config for stage, config in steps if stage == "joint")
        assert joint.scalars == ("runs/by/scalars" if expected else "")
        assert {config.model for stage, config in steps if stage in {"predict", "generate"}} == {"runs/by/joint"}
    alone = configure("joint", "latents=l", "vae=v", "out=o")  # a model of scalars need not be
    assert alone.project is None and alone.config.scalars == ""


def test_a_refused_value_of_a_stage_is_named_and_not_kept(home: Path) -> None:
    for values in (["vae.training.epoch=1"], ["vae={training: {epoch: 1}}"]):
        with pytest.raises(ConfigError, match=r"stage vae: .*unknown key 'training.epoch'. Did you mean"):
            run_pipeline(configure_pipeline("demo", ["root=runs/new", *values], "demo"))
    assert not Path("runs").exists()


def test_a_project_without_its_source_is_none(home: Path) -> None:
    """Commands would take it for the one that was used last."""
    with pytest.raises(ConfigError, match=r"source=people: no such file or folder"):
        run_pipeline(configure_pipeline("small", ["root=runs/new", "source=people"], "demo"))
    assert not Path("runs").exists()
