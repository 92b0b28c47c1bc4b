"""Two workers: the laws of the loop hold at every stage of ZeRO (two processes on gloo), and under Ray."""

import os
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mvhpc.journal import read
from mvhpc.training.cluster import WorkerError, launch
from mvhpc.training.engine import weights_only_engine
from tests.toy_task import Interrupted, curves, digest, exported, run_toy, toy_config

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "zero0": {"compute__zero_stage": 0},
    "zero1": {"compute__zero_stage": 1, "training__accumulate": 2},
    "zero2": {"compute__zero_stage": 2, "optimizer__clip": 0.0},
    "zero3": {"compute__zero_stage": 3, "optimizer__schedule": "cosine"},
    "bfloat16": {"compute__zero_stage": 3, "compute__precision": "bfloat16", "dropout": 0.1},
}
EXACT = [name for name in RUNS if name != "bfloat16"]  # whose sums do not depend on how they are divided
STOPS = (3, 11)  # before the first checkpoint, and between those of steps 8 and 12


def _worker(rank: int, folder: Path) -> None:
    """Every run, undisturbed and in pieces; the process group and DeepSpeed start once for all of them."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, changes in RUNS.items():
        run_toy(toy_config(**changes), folder / name, rank, 2)
        for stop in STOPS:
            try:
                run_toy(toy_config(tracking__fail_at=stop, **changes), folder / f"{name}-pieces", rank, 2)
            except Interrupted:
                dist.barrier()
        run_toy(toy_config(**changes), folder / f"{name}-pieces", rank, 2)
    for name, changes in {"other stage": {"compute__zero_stage": 2}, "stage 4": {"compute__zero_stage": 4}}.items():
        try:
            where = folder / ("zero1-pieces" if name == "other stage" else name)
            epochs = {"training__epochs": 4}  # it has further to go
            run_toy(toy_config(**{**RUNS["zero1"], **changes, **epochs}), where, rank, 2)
        except Exception:
            (folder / f"{name}-{rank}.txt").write_text(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.multiprocessing.spawn(_worker, (folder,), 2)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Hash of all numbers in every file of the newest checkpoint and in the export."""
    newest = max((folder / "checkpoints").glob("step-*"))
    load = weights_only_engine().load
    states = {str(p.relative_to(folder)): digest(load(p, "cpu")) for p in newest.rglob("*.pt")}
    return {**states, "model": digest(exported(folder))}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs: Path, name: str) -> None:
    whole, pieces = digests(runs / name), digests(runs / f"{name}-pieces")
    assert len(whole) >= 5 - (name == "zero0")
    assert whole == pieces
    assert curves(runs / name) == curves(runs / f"{name}-pieces")


@pytest.mark.parametrize("name", EXACT)
def test_two_workers_equal_one_at_the_same_global_batch(runs: Path, tmp_path: Path, name: str) -> None:
    run_toy(toy_config(**RUNS[name]), tmp_path, 0, 1)
    one, two = curves(tmp_path), curves(runs / name)
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    compare(exported(tmp_path), exported(runs / name))


def compare(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_stage_is_refused_and_named(runs: Path) -> None:
    for rank in range(2):
        told = (runs / f"other stage-{rank}.txt").read_text()
        assert "step-00000015 was written by 2 workers, ZeRO-1, and this run has 2 workers, ZeRO-2" in told
        assert "compute.zero_stage=4: DeepSpeed ZeRO has stages 0 to 3" in (runs / f"stage 4-{rank}.txt").read_text()


def test_no_average_and_no_master_copy_is_whole_under_zero_3(runs: Path) -> None:
    """Each worker's file of the average holds half of it (plus padding)."""
    folder = max((runs / "zero3" / "checkpoints").glob("step-*")) / "denoiser"
    parts = [torch.load(folder / f"average-{rank:05d}.pt", weights_only=True) for rank in range(2)]
    total = sum(value.numel() for value in exported(runs / "zero3").values())
    halves = [sum(value.numel() for value in part) for part in parts]
    assert halves[0] == halves[1] < 0.55 * total
    assert sum(halves) >= total


# --- Ray ---


def nothing_is_left() -> None:
    """No process of a launch outlives it."""
    for _ in range(50):
        left = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
        left = [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_a_worker_killed_under_ray_changes_not_one_bit(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(
        **RUNS["zero1"],
        compute__workers=2,
        compute__retries=1,
        tracking__kill_at=10,
        tracking__mark=os.path.relpath(tmp_path / "killed"),  # read from where the driver is
    )
    summary = launch("tests.toy_task:run_toy", config, tmp_path / "run", 2)
    assert (tmp_path / "killed").is_file()
    assert digests(tmp_path / "run") == digests(runs / "zero1")
    assert curves(tmp_path / "run") == curves(runs / "zero1")
    starts = [e["step"] for e in read(tmp_path / "run") if e["event"] == "start"]
    assert starts == [0, 8]
    assert summary["validation/error"] == curves(runs / "zero1")[15, "validation/error"]
    assert sorted(p.name for p in (tmp_path / "run" / "logs").iterdir()) == ["worker-0.log", "worker-1.log"]
    printed = "".join(capfd.readouterr())
    assert len(printed.splitlines()) <= 2, printed  # Ray, DeepSpeed and torch keep to the logs
    nothing_is_left()


def test_an_error_of_a_worker_comes_back_as_one_sentence(tmp_path: Path) -> None:
    config = toy_config(compute__workers=2, training__batch=7)
    with pytest.raises(WorkerError, match=r"worker [01]: .*ConfigError: training\.batch=7 does not.*worker-[01]\.log"):
        launch("tests.toy_task:run_toy", config, tmp_path, 2)
    assert "ConfigError" in (tmp_path / "logs" / "worker-0.log").read_text()
    nothing_is_left()
