"""How the job of a stage ends near its time limit, and what it goes on from."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers import head
from launchers.allocation import Allocation, Assignment
from launchers.head import Head
from launchers.node import Signals
from launchers.node_group import JobFailed, Requeue
from launchers.site import check_time, load_site
from mvhpc.config import ConfigError
from mvhpc.runs.journal import Journal
from mvhpc.stages import STAGES


def quiet_signals() -> Signals:
    """The signals of a job, without their handlers in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signals = Signals()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return signals


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, **lines: str) -> None:
    """Let commands of SLURM print a line each."""
    for name, line in lines.items():
        (folder / name).write_text(f"#!/bin/sh\necho {line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("stage", "advances", "end"),
    [("predict", True, Requeue), ("pack", True, Requeue), ("pack", False, JobFailed), ("encode", True, JobFailed)],
)
def test_near_the_time_limit_a_stage_that_resumes_and_advances_is_requeued(
    stage: str, advances: bool, end: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 0:30\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    journal = Journal(tmp_path)
    journal.write("metrics", step=1, metrics={})  # of an earlier start
    time.sleep(0.01)
    assignment = Assignment(stage, str(tmp_path), {}, {}, False, False, 1, "/", "", "", 60)
    node_0 = Head(
        assignment, Allocation("7", 0, 0, 1, "n1", 1, 0), tmp_path / "jobs" / "7" / "start-0", quiet_signals()
    )
    time.sleep(0.01)
    if advances:
        journal.write("metrics", step=2, metrics={})
    with pytest.raises(end, match="time limit"):
        node_0._request_stop()


@pytest.mark.parametrize(
    ("left", "event", "reason"),
    [
        ("0:30", "failed", "the time limit ends before joint begins; submit it again with a longer --time"),
        ("9:00:00", "requeue", "preempted before joint began"),
    ],
)
def test_a_warning_before_the_stage_begins_says_whether_it_is_the_time_limits(
    left: str, event: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that its time limit ends before the first step would be requeued for ever."""
    answer(tmp_path, monkeypatch, squeue=left, scontrol="Restarts=1")  # SLURM has requeued it already
    monkeypatch.setattr(head, "REQUEUE_TIMEOUT_S", 0)
    signals = quiet_signals()
    signals.stop = True
    assignment = Assignment("joint", str(tmp_path), {}, {}, False, True, 1, "/", "", "", 60)
    folder = tmp_path / "jobs" / "7" / "start-0"
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit):
        Head(assignment, Allocation("7", 0, 0, 1, "n1", 1, 0), folder, signals).run()
    last = Journal(tmp_path / "jobs" / "7").path.read_text().splitlines()[-1]
    found = json.loads(last)
    assert (found["event"], found["reason"]) == (event, reason)


@pytest.mark.parametrize("stage", ["joint", "predict"])
def test_a_warning_while_ray_starts_again_requeues_a_stage_that_has_advanced(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, squeue="0:30", scontrol="Restarts=1")
    monkeypatch.setattr(head, "REQUEUE_TIMEOUT_S", 0)
    signals = quiet_signals()
    signals.stop = True
    assignment = Assignment(stage, str(tmp_path), {}, {}, False, STAGES[stage].trains, 1, "/", "", "", 60)
    folder = tmp_path / "jobs" / "7" / "start-0"
    folder.mkdir(parents=True)
    node_0 = Head(assignment, Allocation("7", 0, 0, 1, "n1", 1, 0), folder, signals)
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    time.sleep(0.01)
    Journal(tmp_path).write("metrics", step=2, metrics={})
    with pytest.raises(SystemExit):
        node_0.run()
    found = json.loads(Journal(tmp_path / "jobs" / "7").path.read_text().splitlines()[-1])
    assert (found["event"], found["reason"]) == ("requeue", "time limit")


@pytest.mark.parametrize(("before", "looks"), [(["start", "preflight", "requeue"], True), (["start", "boot"], False)])
def test_the_first_driver_of_a_job_looks_for_an_earlier_result(
    before: list[str], looks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a requeue before the stage began: a training of other settings is still to be set aside."""
    assignment = Assignment("vae", str(tmp_path), {}, {}, True, True, 1, "/", "", "", 60)
    folder = tmp_path / "jobs" / "7" / "start-1"
    folder.mkdir(parents=True)
    node_0 = Head(assignment, Allocation("7", 1, 0, 1, "n1", 1, 0), folder, quiet_signals())
    for event in before:
        node_0.job.record(event)
    monkeypatch.setattr(head, "ManagedProcess", lambda *_: SimpleNamespace(poll=lambda: 0, stop=lambda: 0))
    node = SimpleNamespace(environment={}, scratch=tmp_path)
    nodes: Any = SimpleNamespace(with_ray=False, node=node, start_ray=lambda _: None, stop_ray=lambda: None)
    assert node_0._attempt(nodes, 0) == 0
    assert json.loads((folder / "assignment.json").read_text())["chained"] == looks


def test_a_result_that_was_set_aside_is_no_advance_of_a_job(tmp_path: Path) -> None:
    """At the time limit, a training without a checkpoint of its own would be requeued to resume from none."""
    checkpoint = tmp_path / "checkpoints" / "step-00000500"
    checkpoint.mkdir(parents=True)
    assignment = Assignment("joint", str(tmp_path), {}, {}, True, True, 1, "/", "", "", 60)
    node_0 = Head(
        assignment, Allocation("7", 0, 0, 1, "n1", 1, 0), tmp_path / "jobs" / "7" / "start-0", quiet_signals()
    )
    node_0.signals.stop = node_0.out_of_time = True
    checkpoint.rename(tmp_path / "old")
    assert node_0._interrupted()[0] == "failed"
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    with pytest.raises(Requeue, match="time limit"):
        node_0._interrupted()


@pytest.mark.parametrize("advances", [True, False])
def test_a_driver_that_fails_at_the_time_limit_is_started_again_where_it_has_advanced(
    advances: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the request for a checkpoint kills, as for lack of memory, would be requeued for ever."""
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 0:30\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assignment = Assignment("joint", str(tmp_path), {}, {}, True, True, 1, "/", "", "", 60)
    node_0 = Head(
        assignment, Allocation("7", 0, 0, 1, "n1", 1, 0), tmp_path / "jobs" / "7" / "start-0", quiet_signals()
    )
    node_0.signals.stop = True
    if advances:
        (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    monkeypatch.setattr(node_0, "_attempt", lambda *_: 137)
    nodes: Any = SimpleNamespace(gather=lambda: None, preflight=lambda: {"seconds": 1.0})
    if advances:
        with pytest.raises(Requeue, match="status 137"):
            node_0._run_attempts(nodes)
    else:
        event, reason = node_0._run_attempts(nodes)
        assert event == "failed" and reason.startswith("the driver exited with status 137 at the time limit, ")


def test_a_time_limit_that_leaves_no_time_before_the_warning_is_refused() -> None:
    check_time(load_site("default", {"time": "5"}))
    with pytest.raises(ConfigError, match=r"--time 4: .* before its end \(signal_delay\); give at least --time 5"):
        check_time(load_site("default", {"time": "4"}))
