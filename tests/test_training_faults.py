"""Laws of one worker under faults: it ends with the bits of an undisturbed run."""

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvhpc.checkpoints.manifest import CheckpointError
from mvhpc.runs.journal import read
from mvhpc.runtime import watchdog
from mvhpc.runtime.watchdog import Interrupted
from mvhpc.training import loop
from tests.test_training_loop import checkpoints, final_state
from tests.toy_task import Interrupted as Broken
from tests.toy_task import curves, exported, run_toy, toy_config


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, a poll after every step, no waiting for storage, and no limit on files afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.0)
    monkeypatch.setattr(loop, "RETRY_FOR_S", 0.0)
    monkeypatch.setattr(loop, "RETRY_EVERY_S", 0.0)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.set_num_threads(threads)


def warnings(folder: Path) -> list[str]:
    return [event["text"] for event in read(folder) if event["event"] == "warning"]


def test_stopped_on_request_and_resumed_equals_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(toy_config(dropout=0.2), tmp_path / "undisturbed", 0, 1)
    file = tmp_path / "stop"
    monkeypatch.setenv("MVHPC_STOP_FILE", str(file))
    step = random.randrange(14)
    for at in sorted({step, min(step + 3, 13)}):
        with pytest.raises(Interrupted, match=rf"after step {at + 1} of 15"):
            run_toy(toy_config(dropout=0.2, tracking__stop_at=at), tmp_path / "run", 0, 1)
        assert checkpoints(tmp_path / "run")[-1] == f"step-{at + 1:08d}", step
        file.unlink()
    run_toy(toy_config(dropout=0.2), tmp_path / "run", 0, 1)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "undisturbed"), step
    assert curves(tmp_path / "run") == curves(tmp_path / "undisturbed"), step


def test_a_poisoned_step_is_skipped_and_counted_also_after_a_resumption(tmp_path: Path) -> None:
    poison = [2, 6, 7]
    run_toy(toy_config(tracking__poison=poison), tmp_path / "undisturbed", 0, 1)
    with pytest.raises(Broken):  # between the poisoned steps
        run_toy(toy_config(tracking__poison=poison, tracking__fail_at=7), tmp_path / "pieces", 0, 1)
    run_toy(toy_config(tracking__poison=poison), tmp_path / "pieces", 0, 1)
    assert final_state(tmp_path / "undisturbed") == final_state(tmp_path / "pieces")
    assert curves(tmp_path / "undisturbed") == curves(tmp_path / "pieces")
    counted = {
        step: value
        for (step, name), value in curves(tmp_path / "undisturbed").items()
        if name.endswith("skipped_steps")
    }
    assert [counted[step] for step in (2, 4, 6, 8, 15)] == [0, 1, 1, 3, 3]
    assert all(value == value for value in curves(tmp_path / "undisturbed").values())
    assert all(value.isfinite().all() for value in exported(tmp_path / "undisturbed").values())


def test_after_five_consecutive_skips_training_goes_back_and_where_they_recur_stops(tmp_path: Path) -> None:
    run_toy(toy_config(), tmp_path / "undisturbed", 0, 1)
    poison = [9, 10, 11, 12, 13]
    run_toy(toy_config(tracking__poison=poison, tracking__transient=True), tmp_path / "run", 0, 1)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "undisturbed")
    expected = "the gradients of steps 10 to 14 are not finite or explode; training goes back to step 8"
    assert warnings(tmp_path / "run") == [expected]
    with pytest.raises(FloatingPointError, match=r"steps 10 to 14 are not finite.*lower optimizer\.lr"):
        run_toy(toy_config(tracking__poison=poison), tmp_path / "twice", 0, 1)
    assert sum("goes back" in text for text in warnings(tmp_path / "twice")) == 1


def test_a_full_disc_costs_checkpoints_alone(tmp_path: Path) -> None:
    run_toy(toy_config(), tmp_path / "undisturbed", 0, 1)
    run_toy(toy_config(tracking__full=[5, 12]), tmp_path / "run", 0, 1)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "undisturbed")
    assert curves(tmp_path / "run") == curves(tmp_path / "undisturbed")  # the journal's lines waited in memory
    texts = warnings(tmp_path / "run")
    assert any("the checkpoint of step" in text and "File too large" in text for text in texts), texts
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "figures", "journal.jsonl", "model"]
    assert all(name.startswith("step-") for name in checkpoints(tmp_path / "run"))

    full = toy_config(tracking__full=[5, 1000])
    with pytest.raises(CheckpointError, match=r"File too large.*free or repair the storage"):
        run_toy(full, tmp_path / "late", 0, 1)
    assert checkpoints(tmp_path / "late")[0] == "step-00000004"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run_toy(toy_config(), tmp_path / "late", 0, 1)
    assert final_state(tmp_path / "late") == final_state(tmp_path / "undisturbed")


# --- a process of its own ---


def start(folder: Path, **changes: object) -> subprocess.Popen[str]:
    code = (
        "import sys, torch; from pathlib import Path; from tests.toy_task import run_toy, toy_config\n"
        "torch.set_num_threads(1); run_toy(toy_config(**eval(sys.argv[2])), Path(sys.argv[1]), 0, 1)\n"
    )
    command = [sys.executable, "-c", code, str(folder), repr(changes)]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The one before stays valid; the result stays the same."""
    large = {"width": 1_000_000, "adversarial": False}  # 80 MB a checkpoint
    process = start(tmp_path / "run", **large)
    part, complete = "checkpoints/.step-*.part/*/*", "checkpoints/step-*/manifest.json"
    end = time.monotonic() + 100
    while not (list((tmp_path / "run").glob(complete)) and list((tmp_path / "run").glob(part))):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "run").glob(part))
    for folder in ("run", "undisturbed"):
        run_toy(toy_config(**large), tmp_path / folder, 0, 1)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "undisturbed")
    assert not list((tmp_path / "run").glob(part))


@pytest.mark.slow
def test_a_hang_prints_all_stacks_and_ends_the_process(tmp_path: Path) -> None:
    process = start(tmp_path, tracking__hang_at=9, tracking__mark=f"{tmp_path}/hung", compute__hang_minutes=0.1)
    _, printed = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Timeout" in printed and "_inject_faults" in printed and printed.count("(most recent call first)") > 1
    with pytest.raises(Broken):  # what was written before is there
        run_toy(toy_config(tracking__fail_at=9), tmp_path, 0, 1)
    assert [event["step"] for event in read(tmp_path) if event["event"] == "start"][1] >= 4
