"""Jobs that wait or run: neither a second submission nor a command of this machine changes what they work with."""

import dataclasses
import os
from pathlib import Path

import pytest

from launchers import conflicts, jobs
from launchers.jobs import Job, new_job
from launchers.plan import chain, single
from launchers.site import load_site
from launchers.submit import main
from mvhpc.cli import main as mvhpc
from mvhpc.config import ConfigError
from mvhpc.pipeline import busy
from mvhpc.pipeline.project import Request
from mvhpc.runs.folder import exclusive
from mvhpc.runs.holder import process_start, run_folders
from mvhpc.stages import STAGES


@pytest.fixture(autouse=True)
def separate_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder is where the user is, and these runs are not in the user's list."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


CHAIN = ["--stage", "all", "--cluster", "local", "--config", "demo", "root=runs/a"]


@pytest.fixture
def submitted() -> dict[str, Job]:
    """Stage -> its job, of a chain that was submitted before; the process of all of them is this one."""
    number, found = str(os.getpid()), {}
    for step in chain("demo", ["root=runs/a"], 1, 0, False)[1]:
        found[step.stage] = new_job(step.run, number, "local", step.stage, 1, process_start(number))
        with jobs.locked(step.run) as lock:
            lock.set_holder(found[step.stage])
        found[step.stage].save(step.assignment(load_site("default", {})))
    return found


def test_the_same_submission_again_leaves_the_work_to_the_jobs(submitted: dict[str, Job], tmp_path: Path) -> None:
    before = {stage: jobs.holder_of(Path(job.run)) for stage, job in submitted.items()}
    assert before == submitted
    respelt = chain("demo", [f"root={tmp_path}/runs/a"], 1, 0, False)[1]  # with other spellings of paths
    conflicts.check_steps(respelt, Path("runs/a"), False)
    (tmp_path / "scratch").symlink_to(tmp_path / "runs")
    conflicts.check_steps(chain("demo", [f"root={tmp_path}/scratch/a"], 1, 0, False)[1], Path("runs/a"), False)
    (step, *_) = chain("demo", ["root=runs/a"], 1, 0, False)[1]
    conflicts.check_holder(step, submitted["phantom"], "pending")
    assert {stage: jobs.holder_of(Path(job.run)) for stage, job in submitted.items()} == before


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        (["joint.training.epochs=7"], "training.epochs there 10, now 7"),
        (["joint={training: {epochs: 7, seed: 3}}"], "training.seed there 0, now 3"),
    ],
)
def test_other_values_than_those_of_a_job_are_refused_before_anything_is_written(
    more: list[str], hint: str, submitted: dict[str, Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    assert main([*CHAIN, *more]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("mvhpc submit: ")]
    number = submitted["joint"].id
    assert f"joint: job {number} (running) has other values: " in line and hint in line
    assert f"`mvhpc submit cancel {number}`" in line
    assert set(tmp_path.rglob("*")) == before


def test_another_number_of_nodes_is_another_value(
    submitted: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    (*_, step) = chain("demo", ["root=runs/a"], 1, 0, False)[1]
    step.nodes = 2
    with pytest.raises(ConfigError, match="nodes there 1, now 2"):
        conflicts.check_steps([step], None, False)


def test_nothing_is_made_anew_under_a_job_that_reads_it(
    submitted: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    """The job of the joint model has ended, and those that use the model wait."""
    with jobs.locked(Path(submitted["joint"].run)) as lock:
        lock.set_holder(None)
    assert main([*CHAIN, "joint.training.epochs=7"]) == 2
    assert "works with " in (shown := capsys.readouterr().err) and "which stage joint would make anew" in shown


def test_one_stage_is_not_made_anew_under_a_job_that_reads_it(submitted: dict[str, Job]) -> None:
    """The jobs that read it are none of the submission's own steps."""
    for stage in ("phantom", "pack"):
        jobs.release(Path(submitted[stage].run), submitted[stage].id)
    (Path("runs") / "a" / "source").mkdir()
    configured = Request(STAGES["pack"], "demo", ["spacing=3"], {}, "runs/a").configure()
    assert configured.project
    steps = single(configured, False, 1, 0, False)
    with pytest.raises(ConfigError, match=r"\(running\) works with .*/packed, which stage pack would make anew"):
        conflicts.check_steps(steps, configured.project.root, False)
    steps = single(dataclasses.replace(configured, project=None), False, 1, 0, False)  # all paths were given
    with pytest.raises(ConfigError, match="works with"):
        conflicts.check_steps(steps, None, False)
    for run in run_folders(Path("runs/a")):
        jobs.release(run, str(os.getpid()))
    conflicts.check_steps(steps, configured.project.root, False)


def test_jobs_of_slurm_are_not_submitted_behind_a_local_one(
    submitted: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would wait for the job of SLURM that has the number of its process."""
    first = submitted["phantom"]
    for run in run_folders(Path("runs/a")):
        if run.absolute() != Path(first.run):
            jobs.release(run, first.id)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"sinfo": "", "srun": "", "sbatch": 'cat "$1" >> script; echo Submitted batch job 7'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert main(["--stage", "all", "--cluster", "slurm", "--config", "demo", "root=runs/a"]) == 2
    assert f"phantom: job {os.getpid()} (running) is a process" in capsys.readouterr().err
    assert not (tmp_path / "script").exists()


def test_a_refused_second_submission_of_one_stage_leaves_the_project_as_it_was(
    submitted: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("runs") / "a" / "source").mkdir()
    assert main(["--stage", "pack", "--root", "runs/a", "--cluster", "local", "--config", "demo", "spacing=3"]) == 2
    assert "has other values: spacing there 6.0, now 3.0; wait" in capsys.readouterr().err
    assert not Path("runs/a/project.yaml").exists()


def test_a_pipeline_does_not_begin_where_jobs_wait_or_run(
    submitted: dict[str, Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    assert mvhpc(["run", "--config", "demo", "root=runs/a"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    number = submitted["phantom"].id
    assert line.startswith("mvhpc: jobs are at work here, or wait: ") and f"{number} (" in line
    assert f"`mvhpc submit cancel {number}`" in line
    assert set(tmp_path.rglob("*")) == before


def test_a_pipeline_does_not_begin_beside_a_process_that_is_at_a_late_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "runs" / "a" / "synthetic.run"
    late.mkdir(parents=True)
    with exclusive(late):
        assert mvhpc(["run", "--config", "demo", "root=runs/a"]) == 2
    assert "synthetic.run: process " in capsys.readouterr().err
    assert not (tmp_path / "runs" / "a" / "project.yaml").exists()


def test_no_job_is_submitted_for_a_stage_that_a_process_is_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would wait in the queue, and then be refused."""
    late = tmp_path / "runs" / "a" / "synthetic.run"
    late.mkdir(parents=True)
    with exclusive(late), pytest.raises(ConfigError, match=r"synthetic\.run: process \d+ of host .* is at work there"):
        conflicts.check_steps(chain("demo", ["root=runs/a"], 1, 0, False)[1], Path("runs/a"), False)


def test_a_job_that_cannot_be_seen_from_here_is_named_with_the_file_that_says_so(
    submitted: dict[str, Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with jobs.locked(Path(submitted["vae"].run)) as lock:
        lock.set_holder(dataclasses.replace(submitted["vae"], id="7", host="elsewhere"))
    for stage, job in submitted.items():
        if stage != "vae":
            jobs.release(Path(job.run), job.id)
    assert mvhpc(["run", "--config", "demo", "root=runs/a"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "job 7 is a process on elsewhere" in line and "remove runs/a/vae/jobs/lock" in line


def test_a_stage_does_not_make_anew_what_a_waiting_job_reads(
    submitted: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("phantom", "pack"):
        jobs.release(Path(submitted[stage].run), submitted[stage].id)
    (Path("runs") / "a" / "packed").mkdir()
    assert mvhpc(["train", "scalars", "--config", "demo", "--root", "runs/a"]) == 2  # its own job
    assert f"{submitted['scalars'].id} (scalars, running)" in capsys.readouterr().err
    jobs.release(Path(submitted["scalars"].run), submitted["scalars"].id)
    assert mvhpc(["train", "scalars", "--config", "demo", "--root", "runs/a"]) == 2  # that of the joint model
    assert f"{submitted['joint'].id} (joint, running)" in capsys.readouterr().err
    for run in run_folders(Path("runs/a")):
        jobs.release(run, submitted["joint"].id)
    busy.check_project(Path("runs/a"), [Path(job.run) for job in submitted.values()])


def test_a_folder_that_may_not_be_entered_holds_no_jobs(
    submitted: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``lost+found``, where the project is the root of a disk."""
    before = list(run_folders(Path("runs/a")))
    (Path("runs") / "a" / "lost+found").mkdir()
    is_dir = Path.is_dir

    def denied(path: Path, **options: bool) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", denied)
    assert list(run_folders(Path("runs/a"))) == before
