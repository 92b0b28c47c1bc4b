"""Laws of launching: a dry run shows what a run does and does nothing; a job's end is the command's end."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from launchers.submit import main
from mvhpc.config import CONFIGS, load_config, to_dict
from mvhpc.data_stages import PackConfig
from shards.index import Index
from shards.phantom.make import make_phantoms


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No note of these runs among the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


SUBMIT = CONFIGS.parent / "launchers" / "submit.py"


def test_dry_run_prints_the_resolved_configuration_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"source={tmp_path}/scans", f"out={tmp_path}/packed", "spacing=3.5"]
    assert main(["--stage", "pack", "--cluster", "local", "--config", "demo", "--dry-run", *keys]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == to_dict(load_config(PackConfig, "pack", "demo", keys))
    assert f"submitit.core._submit {tmp_path}/packed.run/jobs" in shown
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--stage jiont", "Did you mean 'joint'?"),
        (
            "--stage baseline --cluster local data=d want=age given=[i] out=o compute.workers=3",
            "training.batch=16",
        ),
        ("--stage pack sorce=a out=b", "Did you mean 'source'?"),
        ("--stage pack --config dmo source=a out=b", "Did you mean 'demo'?"),
        ("--stage pack --cluster locl source=a out=b", "Did you mean 'local'?"),
        ("--stage pack --nodes 2 --cluster local source=a out=b", "compute.workers"),
        ("--stage pack out=b", "source=VALUE"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(arguments: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_end_as_the_command_does(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "scans", 6, (32, 32, 32), 0)

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SUBMIT), "--stage", "pack", "--cluster", "local", "--config", "demo", *arguments],
            cwd=tmp_path,  # relative paths are the caller's
            capture_output=True,
            text=True,
            check=False,
        )

    good = submit("source=scans", "out=packed")
    assert good.returncode == 0, good.stderr
    assert len(Index.load(tmp_path / "packed").records) == 6
    assert ["packed", "6"] in [line.split() for line in good.stdout.splitlines()]
    assert len(list((tmp_path / "packed.run" / "jobs").glob("*.out"))) == 1

    bad = submit("source=nowhere", "out=other")
    assert bad.returncode == 1
    assert "FileNotFoundError: nowhere" in bad.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_interrupt_ends_the_job_and_leaves_no_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SUBMIT),
        "--stage",
        "phantom",
        "--cluster",
        "local",
        f"out={tmp_path}/scans",
        "subjects=9999",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as submit:
        assert submit.stderr is not None
        assert "phantom" in submit.stderr.readline()
        wait_for(lambda: (tmp_path / "scans.run" / "tracking.json").exists())
        submit.send_signal(signal.SIGINT)  # to it alone, as from a scheduler; a terminal's reaches all
        assert submit.wait(30) == 130
    wait_for(lambda: not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(words(p))])
    assert not (tmp_path / "scans").exists()


def words(process: psutil.Process) -> list[str]:
    """The command line of a process; empty where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
