"""Ctrl-C: the first one ends training with a checkpoint, and it continues to the same bits; the second ends at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mvhpc.checkpoints.manifest import resumption
from mvhpc.runs.folder import Run
from mvhpc.runtime import watchdog
from mvhpc.runtime.interrupts import interrupts_request, no_interrupt_is_lost
from mvhpc.runtime.watchdog import Interrupted, request_stop, stop_requested
from mvhpc.training import run as training
from tests.test_training_loop import checkpoints, final_state
from tests.toy_task import ToyConfig, ToyTask, curves, run_toy, toy_config

CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test may run with it ignored
    "from pathlib import Path; from tests.test_interrupts import run_with_interrupts\n"
    "run_with_interrupts(Path(sys.argv[1]), **eval(sys.argv[2]))\n"
)


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGINT is not ignored, one thread, and a poll after every step."""
    before, threads = signal.signal(signal.SIGINT, signal.default_int_handler), torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.0)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, before)


class Pressed(ToyTask):
    """Ctrl-C is pressed in step ``tracking.fail_at``, and noticed before the step ends."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.at, config.tracking.fail_at = config.tracking.fail_at, -1

    def step(self, *arguments: Any) -> Any:
        if arguments[2] == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 10
            while not stop_requested():
                assert time.monotonic() < end
                time.sleep(0.001)
        return super().step(*arguments)


def run_with_interrupts(folder: Path, task: str = "tests.toy_task:ToyTask", **changes: Any) -> dict[str, float]:
    """Train as a stage does, less what needs packed data."""
    config = toy_config(**changes)
    with (
        watchdog.stop_file(folder / training.STOP),
        interrupts_request(request_stop, lambda: resumption(folder)),
    ):
        target, settings = "mvhpc.training.run:train_worker", (task, config)
        return training.launch(target, settings, Run(folder).folder, config.compute)


@pytest.mark.parametrize("step", [0, 2, 6, 13])  # before the first checkpoint, in an epoch, before the last step
def test_the_first_one_writes_a_checkpoint_and_the_same_command_ends_with_the_same_bits(
    step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_toy(toy_config(dropout=0.2), tmp_path / "undisturbed", 0, 1)
    folder, pressed = tmp_path / "run", "tests.test_interrupts:Pressed"
    with pytest.raises(Interrupted, match=rf"after step {step + 1} of 15"):
        run_with_interrupts(folder, pressed, dropout=0.2, tracking__fail_at=step)
    assert "Ctrl-C again ends at once" in capsys.readouterr().err
    assert checkpoints(folder)[-1] == f"step-{step + 1:08d}"
    assert resumption(folder) == f"the same command continues after step {step + 1}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not stop_requested()
    assert sorted(p.name for p in folder.iterdir() if p.name not in {"figures", "model"}) == [
        "checkpoints",
        "journal.jsonl",
    ]
    run_with_interrupts(folder, dropout=0.2)
    assert final_state(folder) == final_state(tmp_path / "undisturbed")
    assert curves(folder) == curves(tmp_path / "undisturbed")


def test_where_it_is_ignored_it_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_request(request_stop, str):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not stop_requested()


def start(folder: Path, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(folder), repr(changes)]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)


def lines_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line with ``text``."""
    assert process.stderr is not None
    shown = ""
    for line in process.stderr:
        shown += line
        if text in line:
            return shown
    raise AssertionError(shown)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


@pytest.mark.slow
def test_the_second_one_ends_a_step_that_never_returns_at_once(tmp_path: Path) -> None:
    """Two that come together, as from a terminal and a launcher, count as one."""
    with start(tmp_path, tracking__hang_at=2, tracking__mark=f"{tmp_path}/hangs") as process:
        wait_for(tmp_path / "hangs")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again ends at once" in lines_until(process, "Ctrl-C again")
        time.sleep(1.2)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        shown = lines_until(process, "ended at once")
        assert process.wait(10) == 130 and time.monotonic() - begin < 10
    assert "ended at once; no checkpoint was written, so the same command begins anew" in shown


@pytest.mark.slow
def test_workers_under_ray_end_with_a_checkpoint_and_no_process_is_left(tmp_path: Path) -> None:
    many = {"compute__workers": 2, "training__epochs": 4000, "training__log_every": 10, "compute__zero_stage": 1}
    many |= {"training__checkpoint_every": 10**6, "training__validate_every": 10**6}
    with start(tmp_path, **many) as process:
        wait_for(tmp_path / "position.json")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        shown = lines_until(process, "stopped on request after step")
        assert process.wait(120) == 1 and "Interrupted" in shown  # the exception, which the command line reports
    (name,) = checkpoints(tmp_path)
    assert name > "step-00000000"
    assert not (tmp_path / training.STOP).exists() and not (tmp_path / "position.json").exists()
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


class Falls:
    """Ctrl-C is pressed while it is destroyed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # here Python's handler raises, and Python goes on


def test_one_that_falls_into_a_destructor_is_raised_again() -> None:
    with no_interrupt_is_lost(), pytest.raises(KeyboardInterrupt):
        Falls()
        for _ in range(1000):
            time.sleep(0.01)
