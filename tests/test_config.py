"""Every preset resolves; what is misspelt is refused with the nearest right name."""

import dataclasses
import re
from pathlib import Path

import pytest

from mvhpc.cli import main
from mvhpc.config import CONFIGS, ConfigError, fingerprint, load_config, to_yaml
from mvhpc.inference.generate import GenerateConfig
from mvhpc.inference.predictor import PredictConfig
from mvhpc.parsers import COMMANDS, parser_of
from mvhpc.pipeline.plan import PipelineConfig
from mvhpc.stages import STAGES
from mvhpc.training.joint import JointConfig
from mvhpc.training.scalars import ScalarsConfig

INPUTS = {"data", "features", "runs", "source", "vae", "latents", "scalars", "model", "image", "mask"}
MANDATORY = INPUTS | {"out", "given", "want"}
PRESETS = [(p.parent.name, p.stem) for p in sorted(CONFIGS.glob("*/*.yaml")) if p.parent.name in STAGES]
JOINT = ["out=o", "latents=l", "vae=v", "scalars=s"]


@pytest.mark.parametrize(("stage", "preset"), PRESETS)
def test_preset_fills_every_key_but_places(stage: str, preset: str) -> None:
    """A preset leaves open at most paths and the query."""
    kind = STAGES[stage].config_class()
    fields = {field.name: field for field in dataclasses.fields(kind)}
    places = {
        name: [] if "list" in str(fields[name].type) else {} if "dict" in str(fields[name].type) else "x"
        for name in MANDATORY & set(fields)
        if fields[name].type in (str, list[str], dict[str, str])
    }
    config = load_config(kind, stage, preset, (), places)
    assert type(config) is kind


def test_later_layers_win_and_round_trip(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("ema: 0.5\ntraining: {epochs: 3, batch: 7}\n")
    config = load_config(JointConfig, "joint", str(preset), [*JOINT, "training.epochs=4"], {"training.batch": 8})
    assert (config.ema, config.training.epochs, config.training.batch) == (0.5, 4, 8)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(JointConfig, "joint", str(resolved)) == config


def test_fingerprint_sees_every_value() -> None:
    base = load_config(JointConfig, "joint", "demo", JOINT)
    other = load_config(JointConfig, "joint", "demo", [*JOINT, "optimizer.lr=0.5"])
    assert fingerprint(base) == fingerprint(load_config(JointConfig, "joint", "demo", JOINT)) != fingerprint(other)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("demo", [*JOINT, "training.epohcs=3"], "training.epochs"),
        ("demo", [*JOINT, "clean_volume_prob=0.5"], "`clean_volume_prob` is no key any more: .* model of scalars"),
        ("demo", [*JOINT, "optimiser.lr=3"], "optimizer"),
        ("dmeo", JOINT, "'demo'"),
        ("demo", [*JOINT, "training.epochs=many"], "training.epochs=many"),
        ("demo", [*JOINT, "epochs"], "key=value"),
        ("demo", ["out=o", "vae=v", "scalars=s"], "latents"),
        ("demo", [*JOINT, "training.log_every=0"], "training.log_every=0: at least 1"),
        ("demo", [*JOINT, "optimizer.schedule=cosin"], "optimizer.schedule 'cosin'.*'cosine'"),
        ("demo", [*JOINT, "optimizer.betas=[0.9]"], r"optimizer\.betas=\[0\.9\]: two numbers"),
        ("demo", [*JOINT, "optimizer.betas=[0.9,1.0]"], r"optimizer\.betas=\[0\.9, 1\.0\]: two numbers"),
        ("demo", [*JOINT, "optimizer.warmup=-1"], "optimizer.warmup=-1: at least 0"),
        ("demo", [*JOINT, "optimizer.clip=-0.5"], "optimizer.clip=-0.5: at least 0"),
        ("demo", [*JOINT, "training.epochs=1_2"], "epochs=1_2: a number has no _"),
        ("demo", [*JOINT, "optimizer.betas=[0_9,0.99]"], "0_9.*: a number has no _"),
        ("demo", [*JOINT, "optimizer.betas=0_9,0.99"], "0_9.*: a number has no _"),
        ("nowhere/x.yaml", JOINT, "nowhere/x.yaml"),
    ],
)
def test_what_is_wrong_is_named(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(JointConfig, "joint", preset, overrides)


def test_words_keep_their_underscores() -> None:
    """YAML reads 2024_01 as the number 202401."""
    assert load_config(JointConfig, "joint", "demo", [*JOINT, "split=2024_01"]).split == "2024_01"


def test_a_variable_is_given_or_wanted() -> None:
    paths = ["out=o", "model=m", "data=d"]
    with pytest.raises(ConfigError, match="sex is both given and wanted"):
        load_config(PredictConfig, "predict", "default", [*paths, "given=image,sex", "want=sex"])


def test_the_message_says_what_was_renamed_or_removed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`encoder\.readers` is called encoder\.ensemble_members now"):
        load_config(ScalarsConfig, "scalars", "demo", ["out=o", "data=d", "encoder.readers=2"])
    with pytest.raises(ConfigError, match=r"`predict_by` is no key any more: a joint model predicts by.*leave it out"):
        load_config(PipelineConfig, "pipeline", "demo", ["predict_by=joint"])
    file = tmp_path / "project.yaml"
    file.write_text("preset: demo\npredict_by: joint\n")
    with pytest.raises(ConfigError, match=rf"{file}: `predict_by` is no key .*; delete its line from {file}"):
        load_config(PipelineConfig, "pipeline", str(file))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch=-1", "batch=-1: at least 1"),
        ("count=0", "count=0: at least 1"),
        ("sampling.steps=0", "sampling.steps=0: at least 1"),
        ("sampling.stride=-1", "sampling.stride=-1: at least 0"),
        ("compute.workers=4", "unknown key 'compute.workers'"),
        ("sampling.resample=2", "unknown key 'sampling.resample'"),
    ],
)
def test_counts_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GenerateConfig, "generate", "default", ["out=o", "model=m", override])


@pytest.mark.parametrize("shape", ["[32,32]", "[32]", "[32,32,32,32]"])
def test_phantoms_have_three_axes(shape: str) -> None:
    with pytest.raises(ConfigError, match=r"^shape=\[32.*three numbers"):
        load_config(STAGES["phantom"].config_class(), "phantom", "default", ["out=o", f"shape={shape}"])


def test_a_renamed_key_of_the_pipeline_is_refused_with_its_new_name() -> None:
    with pytest.raises(ConfigError, match="`questions` is called queries now"):
        load_config(PipelineConfig, "pipeline", "default", ["questions=[]"])


def test_a_preset_may_ask_for_what_the_default_leaves_empty() -> None:
    with pytest.raises(ConfigError, match="give a value for source"):
        load_config(PipelineConfig, "pipeline", "small")
    assert load_config(PipelineConfig, "pipeline", "small", ["source=/data"]).source == "/data"


def test_an_empty_override_is_the_empty_word_or_list() -> None:
    assert load_config(JointConfig, "joint", "default", [*JOINT, "tracking.uri="]).tracking.uri == ""
    predict = STAGES["predict"].config_class()
    values = {"out": "o.tsv", "model": "m", "data": "d", "want": "age"}
    assert load_config(predict, "predict", "default", ["given="], values).given == []


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    """A configuration from outside is data: tags that would call Python are refused."""
    file, witness = tmp_path / "evil.yaml", tmp_path / "witness"
    file.write_text(f"out: !!python/object/apply:os.mkdir ['{witness}']\n")
    with pytest.raises(ConfigError, match="evil"):
        load_config(JointConfig, "joint", str(file))
    assert not witness.exists()


def test_a_password_in_a_tracking_uri_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be written to run folders and logs."""
    uri = "https://reader:s3cret@store.example:5000"
    for command in (["train", "joint", *JOINT, f"tracking.uri={uri}"], ["mlflow-sync", "nowhere", "--uri", uri]):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert "MLFLOW_TRACKING_PASSWORD" in printed and "store.example" in printed and "s3cret" not in printed
    config = load_config(JointConfig, "joint", "default", [*JOINT, "tracking.uri=https://store.example:5000"])
    assert config.tracking.uri == "https://store.example:5000"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["pedict"], "'predict'"),
        (["train", "jiont"], "'train joint'"),
        (["run", "--config", "dmeo"], "'demo'"),
        (["run", "vae.training.epohcs=3"], "training.epochs"),
        (["run", "training.epochs=3"], "STAGE.key=value"),
        (["train", "joint", *JOINT, "emma=3"], "'ema'"),
    ],
)
def test_command_line_names_the_nearest(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_nothing_is_suggested_where_nothing_is_close(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "epochs=3"]) == 2
    message = capsys.readouterr().err
    assert "Did you mean" not in message and "Known: preset" in message


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_sentences_of_help_are_wrapped(command: str) -> None:
    about = parser_of(command).description or ""
    assert about.split() == COMMANDS[command].about.split() and max(map(len, about.splitlines())) <= 100


def test_help_has_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    table = capsys.readouterr().out.partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    starts = {re.match(r"  (\w[\w-]*( \w[\w-]*)?) {2,}", line).end() for line in table}  # type: ignore[union-attr]
    assert len(starts) == 1 and "see mvhpc" not in "".join(table)


def test_help_covers_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for stage in set(STAGES) - {"phantom", "preprocess", "pack"}:
        assert stage in text
