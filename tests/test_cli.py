"""The command line answers what a user asks first: version, groups, what is required, what results, completion."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mvhpc import __version__
from mvhpc.cli import main
from mvhpc.config import MissingKeys, load_config
from mvhpc.parsers import COMMANDS, commands_elsewhere, parser_of, required_keys
from mvhpc.pipeline.plan import PipelineConfig
from mvhpc.stages import STAGES
from shards.__main__ import main as shards


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, which is where the user is."""
    monkeypatch.chdir(tmp_path)


def test_both_commands_tell_their_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mvhpc {__version__}\n"
    with pytest.raises(SystemExit) as end:
        shards(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"shards {__version__}\n"


def test_the_group_of_trainings_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(stage.command in shown for stage in STAGES.values() if stage.trains)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0 and f"mvhpc {command.split()[0]}" in capsys.readouterr().out.partition("examples:")[2]


def test_required_options_are_shown_as_required() -> None:
    text = parser_of("inpaint").format_help()
    usage = " ".join(text.partition("\n\n")[0].split())
    assert " --image IMAGE" in usage and "[--image" not in usage and "[--out OUT]" in usage
    assert text.count("(required)") == 2 and text.count("(default: the project's)") == 3
    assert "Required: want=VALUE given=VALUE." in " ".join(parser_of("train baseline").format_help().split())
    assert required_keys(STAGES["predict"]) == ["want"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inpaint", "mvhpc: inpaint: give --image VALUE --mask VALUE\n"),
        ("inpaint --image scan.nii.gz", "mvhpc: inpaint: give --mask VALUE\n"),
        ("inpaint mask=m.nii.gz", "mvhpc: inpaint: give --image VALUE\n"),
        ("train baseline", "mvhpc: train baseline: give want=VALUE given=VALUE\n"),
    ],
)
def test_all_that_is_missing_is_named_at_once_in_words_of_the_command_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err.endswith(message)


def test_missing_keys_are_named_all_at_once() -> None:
    with pytest.raises(MissingKeys) as error:
        load_config(STAGES["inpaint"].config_class(), "inpaint", overrides=["mask=m"])
    assert error.value.keys == ["out", "model", "image"]


def test_the_resolved_configuration_is_shown_as_a_file_that_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "joint", "--config", "demo", "latents=l", "vae=v", "scalars=s", "out=o", "training.epochs=3"]
    assert main([*words, "--show-config"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["training"]["epochs"] == 3
    (tmp_path / "own.yaml").write_text(shown)
    kind = STAGES["joint"].config_class()
    assert load_config(kind, "joint", "own.yaml") == load_config(kind, "joint", "demo", words[4:])
    assert list(tmp_path.iterdir()) == [tmp_path / "own.yaml"]  # nothing was run
    assert main(["run", "--config", "demo", "root=r", "--show-config"]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    loaded = load_config(PipelineConfig, "pipeline", "all.yaml")
    assert loaded == load_config(PipelineConfig, "pipeline", "demo", ["root=r"])


def test_the_dashboard_is_that_of_the_project_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "study").mkdir(parents=True)
    (tmp_path / "runs" / "study" / "project.yaml").touch()
    assert main(["dashboard"]) == 2  # nothing was run there
    assert "no MLflow store runs/study/mlflow.db" in capsys.readouterr().err


def test_submit_is_a_command_of_another_package(capsys: pytest.CaptureFixture[str]) -> None:
    """Needs the entry points of this version: install it again after they change."""
    assert commands_elsewhere()["submit"].value == "launchers.submit:main"
    assert main(["submit", "--stage", "jiont"]) == 2
    assert "'joint'" in capsys.readouterr().err


def completed(script: str, words: list[str]) -> list[str]:
    """What bash offers for the last of ``words``."""
    line = f"COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words)}; _shtab_{words[0]}; echo \"${{COMPREPLY[@]}}\""
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_shells_complete_commands_options_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"train", "predict", "run", "submit"} <= set(completed(script, ["mvhpc"]))
    assert completed(script, ["mvhpc", "train"]) == ["vae", "joint", "scalars", "baseline"]
    assert {"demo", "paper"} <= set(completed(script, ["mvhpc", "train", "joint", "--config"]))
    assert "pack" in completed(script, ["shards"])
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef mvhpc") and "--want" in script and "demo" in script
