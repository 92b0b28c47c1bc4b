"""Submission: what cannot work is refused in one line before it; status and logs say what a job is at."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launchers import jobs, jobs_cli, submit
from launchers.jobs import Job, new_job
from launchers.submit import main
from mvhpc.pipeline.run import summary_lines
from mvhpc.runs import squeue
from mvhpc.runs.holder import process_start
from mvhpc.runs.journal import Journal
from mvhpc.runs.position import Position, write_position
from tests.conftest import SMALL_JOINT


@pytest.fixture(autouse=True)
def separate_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder is where the user is, and these runs are not in the user's list."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


LOCAL = ["--cluster", "local"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--stage joint latents=nowhere vae=here scalars=here out=joint", "latents=nowhere: no such file or folder"),
        ("--stage joint latents=nowhere vae=here scalars=here out=joint --nodes 2", "stage encode makes it"),
        ("--stage joint --root runs/a latents=nowhere", "latents=nowhere: no such file or folder"),
        ("--stage all source=nowhere root=runs/all", "source=nowhere: no such file or folder"),
        ("--stage pack source=here out=a-file/packed", "a-file/packed.run: cannot be made or written"),
        ("--stage pack --root a-file source=here", "a-file: cannot be made or written (File exists)"),
        ("--stage vae --given image data=d out=o", "--given: stage vae has no key given"),
        ("--stage all --want age", "--want is of a single stage"),
        ("--stage pack --nodes 0 source=here out=o", "--nodes 0: give at least 1"),
        ("--stage pack --min-nodes 0 source=here out=o", "--min-nodes 0 --nodes 1: give 1 <= M <= N"),
        ("--stage vae data=damaged out=o", "damaged/index.json: damaged"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_submission(
    arguments: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "index.json").write_text("{}")
    (tmp_path / "a-file").touch()
    assert main([*arguments.split(), *LOCAL]) == 2
    notes = ("joint: ", "pack: ", "vae: ")  # of which project, how many workers
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(notes)]
    assert len(lines) == 1 and lines[0].startswith("mvhpc submit: ") and hint in lines[0], lines
    assert not list(tmp_path.rglob("jobs"))


def test_given_and_want_are_options_as_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--stage", "predict", "model=m", "data=d", "out=o.tsv", "--given", "image,sex", "--want", "age"]
    assert main([*words, *LOCAL, "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["given"] == ["image", "sex"] and shown["want"] == ["age"]


def test_a_project_is_named_alike_for_one_stage_and_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("phantom", "all"):
        assert main(["--stage", stage, "--config", "demo", "--root", "runs/my_own", *LOCAL, "--dry-run"]) == 0
        assert "out: runs/my_own/source\n" in capsys.readouterr().out


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job of this process, as far as `status` can tell."""
    run = tmp_path / "joint"
    made = new_job(run, str(os.getpid()), "local", "joint", 1, process_start(str(os.getpid())))
    made.save()
    return made


def test_status_is_one_line_a_job_whatever_the_reason(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    over = new_job(Path(job.run), "1", "local", "joint", 1, 1.0)
    over.save()
    over.record("failed", reason="preflight:\nn1: only 0.1 GiB are free\n  n2: cannot write\n")
    assert main(["status", job.run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "failed: preflight: n1: only 0.1 GiB are free; n2: cannot write" in "".join(lines)


@pytest.fixture(params=["absent", "slow"])
def slurm_job(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job of SLURM, whose controller cannot be reached from here."""
    made = new_job(tmp_path / "vae", "7", "slurm", "vae", 1)
    made.save()
    programs = tmp_path / "bin"
    programs.mkdir()
    if request.param == "slow":
        (programs / "squeue").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
        (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(squeue, "COMMAND_TIMEOUT_S", 0.5)
    return made


def test_status_goes_on_with_the_other_jobs_where_slurm_does_not_answer(
    slurm_job: Job, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert any("  unknown (squeue: " in line and slurm_job.run in line for line in lines)
    assert any("  running" in line and job.run in line for line in lines)
    assert main(["cancel", slurm_job.id]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_log_is_followed_to_the_end_that_the_job_records_where_slurm_does_not_answer(slurm_job: Job) -> None:
    slurm_job.log.write_text("first\n")
    lines = jobs_cli.log_lines(slurm_job)
    assert next(lines) == "first"
    with slurm_job.log.open("a") as log:
        log.write("submitit INFO\nsecond\nlast")
    slurm_job.record("finished")
    assert list(lines) == ["second", "last"]
    assert jobs_cli.describe(slurm_job) == "finished"


def test_status_says_what_a_job_does_before_its_first_step_and_how_long_it_takes_then(job: Job) -> None:
    seen = []
    for event in ("start", "preflight", "boot"):
        job.record(event)
        seen.append(jobs_cli.describe(job))
    assert seen == ["running, preflight", "running, starting Ray", "running, loading the stage"]
    run = Path(job.run)
    Journal(run).write("start", step=20, total=100)
    assert jobs_cli.describe(job) == "running, step 20 of 100"
    write_position(run, Position(25, 100, 9000.0))
    assert jobs_cli.describe(job) == "running, step 25 of 100, about 2.5 h left"
    time.sleep(0.01)
    job.record("boot", attempt=1)  # Ray was restarted
    assert jobs_cli.describe(job) == "running, loading the stage"


def test_a_stage_without_training_is_not_called_loading_once_it_is_at_work(job: Job) -> None:
    """Its journal has no start; its record says that it runs."""
    job = dataclasses.replace(job, stage="pack")
    record = Path(job.run) / "stage.json"
    record.write_text('{"status": "running"}')  # of an earlier job
    time.sleep(0.02)
    job.record("boot")
    assert jobs_cli.describe(job) == "running, loading the stage"
    time.sleep(0.02)
    record.write_text('{"status": "running"}')
    assert jobs_cli.describe(job) == "running"


def test_cancel_names_the_jobs_that_go_with_one_and_says_what_another_submission_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fake SLURM, in which a job is over once it was cancelled."""
    waiting = "5 (null)\\n6 afterok:5(unfulfilled)\\n7 afterok:6(unfulfilled)\\n8 (null)\\n"
    scripts = {
        "scancel": 'echo "$1" >> cancelled',
        "scontrol": "",
        "squeue": f"""case "$*" in *%E*) printf "{waiting}";;
*) grep -qx "$3" cancelled || echo "PENDING Dependency";; esac""",
    }
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "cancelled").touch()
    for number, stage in enumerate(("pack", "vae", "encode", "joint"), 5):
        made = new_job(tmp_path / stage, str(number), "slurm", stage, 1)
        made.save()
        with jobs.locked(Path(made.run)) as lock:
            lock.set_holder(made)
    new_job(tmp_path / "other", "6", "local", "vae", 1, 1.0).save()  # a process of that number
    assert main(["cancel", "5"]) == 0
    assert capsys.readouterr().err == (
        "job 5 cancelled, and with it those that waited for it: 6 (vae), 7 (encode); submitted again, it goes on with "
        "what is done\n"
    )
    assert (tmp_path / "cancelled").read_text().split() == ["5", "6", "7"]
    assert jobs.holder_of(tmp_path / "encode") is None and jobs.holder_of(tmp_path / "joint") is not None
    (tmp_path / "joint" / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "joint" / "checkpoints" / "step-00000010" / "manifest.json").touch()
    assert main(["cancel", "8"]) == 0
    assert capsys.readouterr().err == "job 8 cancelled; submit it again to resume from its last checkpoint\n"


@pytest.mark.parametrize(("event", "outcome"), [("finished", "finished"), ("", "ended without reporting a result")])
def test_a_job_that_is_over_is_not_called_cancelled(
    event: str, outcome: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = new_job(tmp_path / "vae", "1", "local", "vae", 1, 1.0)
    over.save()
    over.log.write_text("Killed\n")
    if event:
        over.record(event)
    with jobs.locked(Path(over.run)) as lock:
        lock.set_holder(over)
    assert main(["cancel", "1"]) == 0
    assert capsys.readouterr().err.startswith(f"job 1 was over; {outcome}")
    assert jobs_cli.describe(over).startswith(outcome) and jobs.holder_of(Path(over.run)) is None


@pytest.mark.parametrize(("options", "warned"), [("--nodes 9", True), ("--nodes 9 --min-nodes 4", False), ("", False)])
def test_more_nodes_than_the_partition_has_cost_a_warning(
    options: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shown in {"sinfo": "batch* 3\nbatch* 1\nurgent 20\none 1", "srun": "", "sbatch": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{shown}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "here").mkdir()
    assert main(["--stage", "pack", "source=here", "out=o", *options.split(), "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert ("warning: the default partition has 4 nodes, so a job on 9 waits for ever" in shown) == warned
    assert main(["--stage", "pack", "source=here", "out=o", "--partition", "one", "--nodes", "2", "--dry-run"]) == 0
    assert "warning: partition one has 1 node, so a job on 2 waits for ever" in capsys.readouterr().err
    assert main(["--stage", "pack", "source=here", "out=o", "--partition", "urgent", "--nodes", "9", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_state_of_a_stage_is_that_of_the_newest_job_that_started(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier jobs, one that waits, and one that fails before the stage begins, have finished nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, shown in {"squeue": "PENDING Dependency", "scontrol": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n[ $3 = 8 ] || [ $3 = 9 ] || [ $3 = 11 ] || echo {shown}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    run = Path(job.run)

    def made(number: str, submitted: float) -> Job:
        found = dataclasses.replace(new_job(run, number, "slurm", "joint", 1), submitted=submitted)
        found.save()
        return found

    never, old = made("8", job.submitted - 2), made("9", job.submitted - 1)
    old.record("start")
    old.record("finished")
    job.record("start")
    job.record("boot")
    time.sleep(0.02)
    (run / "stage.json").write_text('{"status": "finished"}')
    assert jobs_cli.describe(job) == "running, stage finished"
    assert jobs_cli.describe(old) == "finished"
    assert jobs_cli.describe(never) == "never started"
    assert jobs_cli.describe(made("10", time.time())) == "pending (Dependency)"
    failed = made("11", time.time())
    failed.record("start")
    failed.record("failed", reason="preflight")
    assert jobs_cli.describe(failed) == "failed: preflight"
    Journal(run).write("start", step=0, total=8)
    write_position(run, Position(4, 8, 31.0))
    assert jobs_cli.describe(failed) == "failed: preflight, step 4 of 8"


@pytest.mark.parametrize(
    ("state", "line", "outcome"),
    [
        ("JobState=CANCELLED Reason=None", "", "cancelled"),
        ("", "slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-30T15:12:42 ***", "cancelled"),
        ("", "slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-30T15:12:42 DUE TO TIME LIMIT ***", "ended"),
        ("", "slurmstepd: error: *** STEP 9.0 ON n1 CANCELLED AT 2026-11-30T15:12:42 ***", "ended"),
    ],
)
def test_a_job_that_slurm_cancelled_says_so(
    state: str, line: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shown in {"squeue": "", "scontrol": state}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {shown}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = new_job(tmp_path / "vae", "9", "slurm", "vae", 1)
    found.save()
    found.log.write_text(f"first\n{line}\nlast\n")
    assert jobs_cli.describe(found).startswith(outcome)


def test_status_of_a_project_has_the_jobs_of_all_its_run_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs" / "a"
    for number, place in enumerate(
        ("vae", "fold-1/predictions/age-given-image.tsv.run", "baselines/vit/age-given-image")
    ):
        new_job(root / place, str(number), "local", "vae", 1, 1.0).save()
    assert main(["status", str(root)]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"0", "1", "2"}
    for place in ("nowhere", "state"):
        assert main(["status", place]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{place}: no job was submitted" in line


def test_a_failed_job_that_is_waited_for_shows_its_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    over = new_job(tmp_path / "vae", "1", "local", "vae", 1, 1.0)
    over.record("failed", reason="ConfigError: no")
    over.log.write_text("first\nConfigError: no\n")
    assert submit._watch(over, "out") == 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown == [f"job 1: vae, log in {over.log}", "first", "ConfigError: no"]
    assert last == f"job 1 failed: ConfigError: no; log in {over.log}"


def test_a_process_that_has_the_number_of_an_earlier_one_does_not_end_as_that_did(tmp_path: Path) -> None:
    """As in containers, where numbers begin anew each time."""
    before = new_job(tmp_path / "vae", "23", "local", "vae", 1, 1.0)
    before.save()
    before.record("finished")
    assert jobs.outcome(before) == "finished"
    now = dataclasses.replace(before, process_start=before.submitted + 60)
    now.save()
    assert jobs.outcome(now) == "never started"


def test_a_summary_is_a_line_for_each_value_without_the_notes() -> None:
    lines = list(summary_lines({"packed": 3, "loss": 0.25, "notes": ["printed before"]}))
    assert [line.split() for line in lines] == [["packed", "3"], ["loss", "0.25"]]


def test_a_process_that_was_gone_when_its_job_was_recorded_is_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    number = str(process.pid)
    made = new_job(tmp_path, number, "local", "joint", 1, process_start(number))
    assert jobs_cli.state(made) == ""


def test_a_job_that_has_started_does_not_fail_where_the_users_list_cannot_be_written(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "a-file"))
    job.save()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"will not list {job.run}" in line and "a-file" in line
    assert main(["status", job.run]) == 0 and job.id in capsys.readouterr().out


def test_the_code_of_a_job_is_never_another_projects(tmp_path: Path) -> None:
    """The packages lie in a virtual environment within a repository of the user."""
    home = Path(jobs.__file__).parent.parent
    site = tmp_path / "venv" / "site-packages"
    for package in ("launchers", "mvhpc", "shards"):
        shutil.copytree(home / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "notes.txt").write_text("first")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "notes.txt"], [*identity, "commit", "--quiet", "--message=first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "notes.txt").write_text("not committed")
    code = "from launchers.jobs import code_state; print(code_state())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "('', '')\n"


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_a_local_job_with_a_checkpoint(tiny_inputs: dict[str, str], tmp_path: Path) -> None:
    """The terminal sends it to all processes of its group, and submit.py sends it to the job once more."""
    keys = {**tiny_inputs, "out": tmp_path / "joint", "compute.threads": 1}
    keys |= {"training.epochs": 9999, "training.batch": 2, "training.validate_every": 9999, **SMALL_JOINT}
    keys |= {"training.checkpoint_every": 10**6}
    words = ["--stage", "joint", *LOCAL, *(f"{key}={value}" for key, value in keys.items())]
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from launchers.submit import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *words]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as submitted:
        end = time.monotonic() + 180
        while not (tmp_path / "joint" / "position.json").exists():
            assert submitted.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.killpg(submitted.pid, signal.SIGINT)
        _, shown = submitted.communicate(timeout=150)
        assert submitted.returncode == 130, shown
    assert "writes a checkpoint first" in shown and "submit it again to resume" in shown
    (checkpoint,) = (tmp_path / "joint" / "checkpoints").iterdir()
    assert checkpoint.name > "step-00000000" and json.loads((checkpoint / "manifest.json").read_text())["step"] > 0
    (job,) = jobs.jobs_of(tmp_path / "joint")
    assert jobs.outcome(job).startswith("stopped: stopped on request after step")
