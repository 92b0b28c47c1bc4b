"""Several workers: the laws of the loop hold at every stage of ZeRO (processes on gloo), and under Ray."""

import os
import pickle
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile

from mvhpc.checkpoints.consolidate import MOMENTS, consolidate, read_weights
from mvhpc.config import ConfigError, Optimizer
from mvhpc.runs.journal import read
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.ray_cluster import WorkerError, launch, ray_session
from mvhpc.runtime.watchdog import Interrupted as StoppedOnRequest
from mvhpc.training.engines.make import make_engine
from tests.conftest import listening
from tests.toy_task import Interrupted, curves, digest, exported, join, run_toy, toy_config
from tests.workers import start_workers

pytestmark = pytest.mark.slow

POISON = {"tracking__poison": [3, 6]}  # steps that every worker leaves out, though one alone has the bad sample
RUNS: dict[str, dict[str, Any]] = {
    "zero0": {"compute__zero_stage": 0, **POISON},
    "zero1": {"compute__zero_stage": 1, "training__accumulate": 2, **POISON},
    "zero2": {"compute__zero_stage": 2, "optimizer__clip": 0.0, **POISON},
    "zero3": {"compute__zero_stage": 3, "optimizer__schedule": "cosine", "width": 15, **POISON},  # halves are padded
    "bfloat16": {"compute__zero_stage": 3, "compute__precision": "bfloat16", "dropout": 0.1},
    "compiled": {"compute__zero_stage": 2, "compute__compile": True},
    "offload": {"compute__zero_stage": 2, "compute__offload": "cpu", **POISON},
}
EXACT = [name for name in RUNS if name not in {"bfloat16", "compiled"}]  # whose sums do not depend on the partition
STOPS = (3, 11)  # before the first checkpoint, and between those of steps 8 and 12
ELASTIC = {"zero0": 3, "zero1": 2, "zero2": 0, "zero3": 1}  # stage that goes on where one worker left off
PARTITIONED = ("zero1", "zero2", "zero3")


class UsedTwice(nn.Module):
    """A network of which one layer is used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.last = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(x).tanh()).tanh())


def one_step_of_a_layer_used_twice(rank: int, world: int, zero: int, accumulate: int, folder: Path) -> None:
    """One update in bfloat16 with a global batch of 16; writes this worker's part of a checkpoint."""
    optimizer = Optimizer(
        lr=1e-3, betas=[0.0, 0.9], weight_decay=0.0, warmup=0, schedule="constant", clip=0.0
    )  # without momentum the first moment is the gradient
    compute = toy_config(compute__precision="bfloat16", compute__workers=world, compute__zero_stage=zero).compute
    micro = 16 // world // accumulate
    engine = make_engine(UsedTwice(), 1e-3, optimizer, compute, None, accumulate, micro, Collectives(rank, world))
    batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    for part in batch.chunk(world)[rank].chunk(accumulate):
        engine.backward((engine(part) - 1).square().mean())
        engine.step()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in engine.snapshot().items():
        torch.save(content, folder / name)


def _worker(rank: int, folder: Path) -> None:
    """Every run, undisturbed and in pieces; the process group and DeepSpeed start once for all of them."""
    join(rank, 2, folder / "rendezvous")
    for zero, accumulate in product((1, 2, 3), (1, 2)):
        one_step_of_a_layer_used_twice(rank, 2, zero, accumulate, folder / f"twice-{zero}-{accumulate}")
    for name, changes in RUNS.items():
        run_toy(toy_config(**changes), folder / name, rank, 2)
        torch.use_deterministic_algorithms(name == "zero3")  # fills uninitialised memory with NaN
        for stop in STOPS:
            _pieces(rank, 2, folder / f"{name}-pieces", tracking__fail_at=stop, **changes)
        run_toy(toy_config(**changes), folder / f"{name}-pieces", rank, 2)
        torch.use_deterministic_algorithms(False)
    for name, stage in ELASTIC.items():
        where, changes = folder / f"{name}-elastic", RUNS[name]
        _pieces(rank, 2, where, tracking__fail_at=6, **changes)
        if rank == 0:
            _pieces(rank, 1, where, tracking__fail_at=11, **changes)
        dist.barrier()
        run_toy(toy_config(**{**changes, "compute__zero_stage": stage}), where, rank, 2)
    # The disc is full for one worker, and later a stop is requested.
    faults = {"tracking__full": [5, 9], "tracking__stop_at": 11}
    _pieces(rank, 2, folder / "zero2-faults", **RUNS["zero2"], **faults)
    (folder / "stop").unlink(missing_ok=True)
    dist.barrier()
    run_toy(toy_config(**RUNS["zero2"]), folder / "zero2-faults", rank, 2)
    # Five consecutive gradients are not finite, once.
    lost = {"tracking__poison": [9, 10, 11, 12, 13], "tracking__transient": True}
    for stage in range(4):
        clean = {"compute__zero_stage": stage}
        with profile(profile_memory=True) as events:
            run_toy(toy_config(**clean), folder / f"clean{stage}", rank, 2)
        largest = max(event.self_cpu_memory_usage for event in events.events())
        (folder / f"clean{stage}" / f"largest-{rank}.txt").write_text(str(largest))
        run_toy(toy_config(**clean, **lost), folder / f"lost{stage}", rank, 2)
    try:
        run_toy(toy_config(compute__zero_stage=4), folder / "stage 4", rank, 2)
    except ConfigError:
        (folder / f"stage 4-{rank}.txt").write_text(traceback.format_exc())
    dist.destroy_process_group()


def _one_of_four_or_two(rank: int, world: int, stop: int, folder: Path) -> None:
    """The stages with partitions, until a stop is requested in step ``stop``; -1: to the end."""
    join(rank, world, folder / f"rendezvous-{stop}")
    for name in PARTITIONED:
        if stop < 0:
            run_toy(toy_config(**RUNS[name]), folder / f"{name}-four", rank, world)
            continue
        _pieces(rank, world, folder / f"{name}-four", tracking__stop_at=stop, **RUNS[name])
        (folder / "stop").unlink(missing_ok=True)
        dist.barrier()
    dist.destroy_process_group()


def _pieces(rank: int, world: int, folder: Path, **changes: Any) -> None:
    """A run that is interrupted."""
    try:
        run_toy(toy_config(**changes), folder, rank, world)
    except (Interrupted, StoppedOnRequest):
        if world > 1:
            dist.barrier()
    else:
        raise AssertionError("not interrupted")


@dataclass
class _Malicious:
    """A pickle that runs code."""

    mark: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    start_workers(_worker, (folder,), 2)
    return folder


@pytest.fixture(scope="module")
def four_two_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    for world, stop in ((4, 6), (2, 11), (4, -1)):
        start_workers(_one_of_four_or_two, (world, stop, folder), world)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Hash of all numbers in every file of the newest checkpoint and in the export."""
    newest = max((folder / "checkpoints").glob("step-*"))
    states = {str(p.relative_to(folder)): digest(read_weights(p)) for p in newest.rglob("*.pt")}
    return {**states, "model": digest(exported(folder))}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs: Path, name: str) -> None:
    full, pieces = digests(runs / name), digests(runs / f"{name}-pieces")
    assert len(full) >= 5 - (name == "zero0")
    assert full == pieces
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


@pytest.mark.parametrize(("zero", "accumulate"), product((1, 2, 3), (1, 2)))
def test_a_layer_used_twice_in_bfloat16_gets_its_whole_gradient(
    runs: Path, tmp_path: Path, zero: int, accumulate: int
) -> None:
    """ZeRO-2 of DeepSpeed before 0.19.8 loses a part of it (DeepSpeed#7718, #8224)."""
    one_step_of_a_layer_used_twice(0, 1, 0, accumulate, tmp_path)
    one, two = consolidate(tmp_path).moments, consolidate(runs / f"twice-{zero}-{accumulate}").moments
    assert one.keys() == two.keys() and len(one) == 4
    for name in one:
        gradient = one[name]["exp_avg"]
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(two[name]["exp_avg"], gradient, rtol=0, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ELASTIC)
def test_two_workers_then_one_then_two_of_another_stage_change_nothing(runs: Path, name: str) -> None:
    full, elastic = curves(runs / name), curves(runs / f"{name}-elastic")
    assert full.keys() == elastic.keys()
    for key in full:
        assert elastic[key] == pytest.approx(full[key], abs=1e-5), key
    compare(exported(runs / name), exported(runs / f"{name}-elastic"))


@pytest.mark.parametrize("name", PARTITIONED)
def test_four_workers_then_two_then_four_change_nothing(runs: Path, four_two_four: Path, name: str) -> None:
    full, elastic = curves(runs / name), curves(four_two_four / f"{name}-four")
    assert [e["step"] for e in read(four_two_four / f"{name}-four") if e["event"] == "start"] == [0, 7, 12]
    assert full.keys() == elastic.keys()
    for key in full:
        assert elastic[key] == pytest.approx(full[key], abs=1e-5), key
    compare(exported(runs / name), exported(four_two_four / f"{name}-four"))


def test_storage_that_fails_one_worker_costs_checkpoints_and_a_stop_costs_nothing(runs: Path) -> None:
    events = read(runs / "zero2-faults")
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert warnings and all(
        "could not be written: File too large" in text and "(worker 1)" in text for text in warnings
    )
    assert [event["step"] for event in events if event["event"] in {"start", "stopped"}] == [0, 12, 12]
    assert digests(runs / "zero2-faults") == digests(runs / "zero2")
    assert curves(runs / "zero2-faults") == curves(runs / "zero2")


@pytest.mark.parametrize("stage", range(4))
def test_going_back_after_five_lost_gradients_leaves_no_trace(runs: Path, stage: int) -> None:
    assert any("goes back to step 8" in e.get("text", "") for e in read(runs / f"lost{stage}"))
    assert digests(runs / f"lost{stage}") == digests(runs / f"clean{stage}")


def test_an_unknown_stage_is_refused(runs: Path) -> None:
    for rank in range(2):
        assert "compute.zero_stage=4: DeepSpeed ZeRO has stages 0 to 3" in (runs / f"stage 4-{rank}.txt").read_text()


def test_whole_weights_are_those_of_deepspeeds_own_converter(runs: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name in ("zero1", "zero2", "zero3"):
        newest = max((runs / name / "checkpoints").glob("step-*"))
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(newest), tag="denoiser")
        assert digest(consolidate(newest / "denoiser").network) == digest(dict(theirs))


@pytest.mark.parametrize("name", PARTITIONED)
def test_the_universal_checkpoint_holds_every_number_of_all_workers_once(runs: Path, name: str) -> None:
    newest = max((runs / name / "checkpoints").glob("step-*")) / "denoiser"
    full = consolidate(newest)
    shards = [read_weights(file)["optimizer_state_dict"] for file in newest.glob("*_optim_states.pt")]
    for key in MOMENTS:
        states = [shard.get("base_optimizer_state") or shard["optimizer_state_dict"] for shard in shards]
        theirs = torch.cat([group[key] for state in states for group in state["state"].values()])
        ours = torch.cat([moments[key].flatten() for moments in full.moments.values()])
        assert len(ours) <= len(theirs)
        for values in (theirs, ours):
            assert values.count_nonzero() > 0.5 * len(values)
        theirs, ours = (values[values != 0].sort().values for values in (theirs, ours))  # what rounds up is zero
        assert torch.equal(theirs, ours), key


@pytest.mark.parametrize("name", PARTITIONED)
def test_no_pickle_in_a_checkpoint_is_run(runs: Path, tmp_path: Path, name: str) -> None:
    """Neither by us nor by DeepSpeed's converter."""
    newest = max((runs / name / "checkpoints").glob("step-*")) / "denoiser"
    evil = _Malicious(tmp_path / "mark")
    for victim in sorted(newest.glob("*.pt")):
        folder = tmp_path / victim.stem / "denoiser"
        shutil.copytree(newest, folder)
        torch.save({"optimizer_state_dict": evil, "module": evil}, folder / victim.name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            consolidate(folder)
    assert not evil.mark.exists()
    torch.load(folder / victim.name, weights_only=False)
    assert evil.mark.exists(), "and it would do harm"


@pytest.mark.parametrize("stage", range(4))
def test_no_allocation_is_out_of_proportion(runs: Path, stage: int) -> None:
    """DeepSpeed's own buffer for gradients is 2 GB for a network of any size."""
    for rank in range(2):
        assert 0 < int((runs / f"clean{stage}" / f"largest-{rank}.txt").read_text()) < 2**20


def test_no_average_and_no_master_copy_is_whole_under_zero_3(runs: Path) -> None:
    """Each worker's file of the average holds half of it (plus padding)."""
    folder = max((runs / "zero3" / "checkpoints").glob("step-*")) / "denoiser"
    parts = [torch.load(folder / f"average-{rank:05d}.pt", weights_only=True) for rank in range(2)]
    total = sum(value.numel() for value in exported(runs / "zero3").values())
    halves = [part.numel() for part in parts]
    assert halves[0] == halves[1] < 0.55 * total
    assert sum(halves) >= total


# --- Ray ---


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """No process of a launch outlives it; what other fixtures started before (SLURM's daemons) is not the launch's."""

    def alive() -> set[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return {p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE}

    before = alive()
    yield
    for _ in range(50):
        left = [p for p in alive() - before if "resource_tracker" not in " ".join(p.cmdline())]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_a_killed_worker_under_ray_changes_not_one_bit(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], nothing_is_left: None
) -> None:
    config = toy_config(
        **RUNS["zero1"],
        compute__workers=2,
        compute__retries=1,
        tracking__kill_at=10,
        tracking__mark=os.path.relpath(tmp_path / "killed"),  # read from where the driver is
    )
    handler = signal.getsignal(signal.SIGINT)
    summary = launch("tests.toy_task:run_toy", config, tmp_path / "run", config.compute)
    assert signal.getsignal(signal.SIGINT) is handler  # a later interrupt is none of Ray's
    assert (tmp_path / "killed").is_file()
    assert digests(tmp_path / "run") == digests(runs / "zero1")
    assert curves(tmp_path / "run") == curves(runs / "zero1")
    starts = [e["step"] for e in read(tmp_path / "run") if e["event"] == "start"]
    assert starts[0] == 0 and starts[1] in {0, 4, 8}  # whichever checkpoint was complete by then
    assert summary["validation/error"] == curves(runs / "zero1")[15, "validation/error"]
    assert sorted(p.name for p in (tmp_path / "run" / "logs").iterdir()) == ["worker-0.log", "worker-1.log"]
    printed = "".join(capfd.readouterr())
    assert len(printed.splitlines()) <= 2, printed  # Ray, DeepSpeed and torch keep to the logs


def test_ray_on_this_machine_listens_on_loopback_alone(tmp_path: Path, nothing_is_left: None) -> None:
    before = set(psutil.Process().children(recursive=True))
    with ray_session(1, tmp_path):
        rays = set(psutil.Process().children(recursive=True)) - before
        assert set.union(*map(listening, rays)) == {"127.0.0.1"}


def note_listening(config: Any, folder: Path, rank: int, world: int) -> dict[str, float]:
    """``run_toy``, and a file with the addresses on which the worker listens: Ray's server, gloo, PyTorch's store."""
    (folder / f"listening-{rank}").write_text(" ".join(listening(psutil.Process())))
    return run_toy(config, folder, rank, world)


def test_an_error_of_a_worker_comes_back_as_one_sentence(tmp_path: Path, nothing_is_left: None) -> None:
    """And workers of one machine listen on loopback alone."""
    config = toy_config(compute__workers=2, training__batch=7)
    with pytest.raises(WorkerError, match=r"worker [01]: .*ConfigError: training\.batch=7 does not.*worker-[01]\.log"):
        launch("tests.test_training_workers:note_listening", config, tmp_path, config.compute)
    assert {(tmp_path / f"listening-{rank}").read_text() for rank in range(2)} == {"127.0.0.1"}
    assert "ConfigError" in (tmp_path / "logs" / "worker-0.log").read_text()
