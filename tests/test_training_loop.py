import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mvhpc.checkpoints.consolidate import consolidate
from mvhpc.checkpoints.manifest import CheckpointError
from mvhpc.config import ConfigError, Optimizer
from mvhpc.models.kernels.channels_last import channels_last_weights
from mvhpc.models.kernels.normalization import GroupNorm
from mvhpc.training.engines.base import Average, learning_rate
from mvhpc.training.engines.local import LocalEngine
from mvhpc.training.loop import micro_batch, train
from tests.toy_task import Interrupted, ToyConfig, ToyTask, curves, digest, exported, run_toy, toy_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def final_state(folder: Path) -> dict[str, str]:
    """Hashes of weights, optimiser and average of every network in the newest checkpoint, and of the export."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    states = {str(p.relative_to(newest)): digest(torch.load(p, weights_only=True)) for p in newest.rglob("*.pt")}
    return {**states, "step": newest.name, "model": digest(exported(folder))}


def interrupted(folder: Path, *steps: int, **changes: object) -> dict[str, float]:
    """Train in ``folder``, stopped at each of ``steps`` and resumed."""
    for step in steps:
        with pytest.raises(Interrupted):
            run_toy(toy_config(tracking__fail_at=step, **changes), folder, 0, 1)
    return run_toy(toy_config(**changes), folder, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2},
        {"training__accumulate": 2, "optimizer__schedule": "cosine", "compute__precision": "bfloat16"},
        {"training__checkpoint_every": 5, "training__log_every": 3},
        pytest.param({"compute__compile": True, "dropout": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    full = run_toy(toy_config(**changes), tmp_path / "undisturbed", 0, 1)
    pieces = interrupted(tmp_path / "pieces", 1, 6, 7, 11, 14, **changes)
    assert final_state(tmp_path / "undisturbed") == final_state(tmp_path / "pieces")
    assert curves(tmp_path / "undisturbed") == curves(tmp_path / "pieces")
    for summary in (full, pieces):
        assert summary.pop("system/samples_per_second") > 0
    assert full == pieces


def test_training_lowers_the_error_and_exports_the_best(tmp_path: Path) -> None:
    summary = run_toy(toy_config(training__epochs=20), tmp_path, 0, 1)
    scores = {s: v for (s, name), v in curves(tmp_path).items() if name == "validation/error"}
    assert summary["validation/error"] == min(scores.values()) == scores[int(summary["best_step"])]
    assert min(scores.values()) < 0.2 * scores[5]
    saved = json.loads((tmp_path / "model" / "model.json").read_text())
    assert saved["error"] == summary["validation/error"]
    network = ToyTask(toy_config()).networks["denoiser"]
    network.load_state_dict(exported(tmp_path))  # the averaged weights give the score they were chosen for
    with torch.no_grad():
        errors = ToyTask(toy_config()).validate(list(range(7)), {"denoiser": network})["error"]
    assert errors.mean().item() == pytest.approx(summary["validation/error"], rel=1e-6)
    assert (tmp_path / "figures" / "step.txt").read_text() == str(int(summary["best_step"]))


class TwoNetworks(ToyTask):
    """A task that exports its critic too, each best at another validation; it notes the weights of each."""

    exported = {"denoiser": ("off", "size"), "discriminator": ("off_critic", "size_critic")}  # noqa: RUF012

    def __init__(self, config: ToyConfig, best: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> None:
        super().__init__(config)
        self.best_of = best
        self.seen: list[tuple[dict[str, Tensor], ...]] = []

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        weights = tuple({key: w.clone() for key, w in networks[name].state_dict().items()} for name in self.exported)
        self.seen.append(weights)
        metrics = {}
        for names, now, best in zip(self.exported.values(), weights, self.best_of or weights, strict=True):
            metrics |= dict(zip(names, ((now["0.weight"] - best["0.weight"]).norm(), now["0.weight"].norm())))
        metrics["of both"] = metrics["size"] + metrics["size_critic"]
        return {name: value.expand(len(indices)) for name, value in metrics.items()}


def test_each_network_is_exported_at_its_own_best(tmp_path: Path) -> None:
    config = toy_config(training__epochs=6)
    plain = TwoNetworks(config)
    train(plain, config, tmp_path / "plain")
    best = plain.seen[4][0], plain.seen[2][1]
    summary = train(TwoNetworks(config, best), config, tmp_path / "whole")
    assert summary["validation/off"] == summary["validation/off_critic"] == 0
    for name, weights in zip(("size", "size_critic"), best):
        assert summary[f"validation/{name}"] == pytest.approx(float(weights["0.weight"].norm()))
    assert "validation/of both" not in summary  # of no network
    for step in (13, 24):  # after the one best and after the other
        with pytest.raises(Interrupted):
            stopped = toy_config(training__epochs=6, tracking__fail_at=step)
            train(TwoNetworks(stopped, best), stopped, tmp_path / "pieces")
    train(TwoNetworks(config, best), config, tmp_path / "pieces")
    for run in ("whole", "pieces"):
        for name, weights in zip(TwoNetworks.exported, best):
            assert digest(exported(tmp_path / run, name)) == digest(weights)
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "pieces")


def test_validation_counts_each_sample_once_and_leaves_out_missing_values(tmp_path: Path) -> None:
    summary = run_toy(toy_config(), tmp_path, 0, 1)  # 7 samples in batches of 8: one place is padding
    assert summary["validation/index"] == sum(range(7)) / 7
    assert summary["validation/odd"] == (1 + 3 + 5) / 3


def test_a_finished_run_returns_its_summary_without_training(tmp_path: Path) -> None:
    summary = run_toy(toy_config(), tmp_path, 0, 1)
    lines = (tmp_path / "journal.jsonl").read_text()
    assert run_toy(toy_config(tracking__fail_at=0), tmp_path, 0, 1) == summary
    assert (tmp_path / "journal.jsonl").read_text() == lines


def test_more_epochs_go_on_with_a_constant_schedule_and_are_refused_with_a_cosine(tmp_path: Path) -> None:
    run_toy(toy_config(training__epochs=2), tmp_path / "a", 0, 1)
    run_toy(toy_config(training__epochs=4), tmp_path / "a", 0, 1)
    run_toy(toy_config(training__epochs=4), tmp_path / "b", 0, 1)
    longer, once = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert longer == once
    with pytest.raises(ConfigError, match=r"beyond the 5 steps of training\.epochs=1"):
        run_toy(toy_config(training__epochs=1), tmp_path / "a", 0, 1)
    cosine = {"optimizer__schedule": "cosine"}
    run_toy(toy_config(training__epochs=2, **cosine), tmp_path / "c", 0, 1)
    with pytest.raises(ConfigError, match=r"training\.epochs=2, not 4"):
        run_toy(toy_config(training__epochs=4, **cosine), tmp_path / "c", 0, 1)


@pytest.mark.parametrize("validate_every", [1, 4])
def test_fewer_epochs_end_at_the_checkpoint_where_a_longer_run_was_stopped(tmp_path: Path, validate_every: int) -> None:
    """It is validated there, and the same as a run of that length."""
    changes = {"training__validate_every": validate_every, "training__checkpoint_every": 5}
    with pytest.raises(Interrupted):
        run_toy(toy_config(training__epochs=4, tracking__fail_at=12, **changes), tmp_path / "a", 0, 1)
    shorter = toy_config(training__epochs=2, **changes)
    ended, once = (run_toy(shorter, tmp_path / name, 0, 1) for name in "ab")
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")
    assert ended.pop("system/samples_per_second") > 0 and ended.items() <= once.items()
    assert run_toy(shorter, tmp_path / "a", 0, 1).items() >= ended.items()


def test_a_configuration_that_decides_other_weights_is_refused_by_name(tmp_path: Path) -> None:
    interrupted_at = toy_config(tracking__fail_at=5)
    with pytest.raises(Interrupted):
        run_toy(interrupted_at, tmp_path, 0, 1)
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0\.01, not 0\.02"):
        run_toy(toy_config(optimizer__lr=0.02), tmp_path, 0, 1)
    run_toy(toy_config(training__keep=1, compute__threads=2, out="moved"), tmp_path, 0, 1)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(8, 3, 1), (8, 2, 3), (2, 1, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, accumulate: int, world: int) -> None:
    training = toy_config(training__batch=batch, training__accumulate=accumulate).training
    with pytest.raises(ConfigError, match=f"multiple of {accumulate * world}"):
        micro_batch(training, world)


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    run_toy(toy_config(), tmp_path / "one", 0, 1)
    run_toy(toy_config(training__accumulate=4), tmp_path / "four", 0, 1)
    one, four = exported(tmp_path / "one"), exported(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=0, atol=1e-5)


# --- checkpoints ---


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_last_k_are_kept_and_what_is_incomplete_is_swept(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_toy(toy_config(tracking__fail_at=13), tmp_path, 0, 1)
    # the best validation's is among the last two, or kept beside them
    assert checkpoints(tmp_path) == ["step-00000010", "step-00000012"]
    (tmp_path / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / ".step-00000016.1.part").mkdir()
    with pytest.raises(Interrupted):  # goes on from step 10
        run_toy(toy_config(tracking__fail_at=10), tmp_path, 0, 1)
    assert checkpoints(tmp_path) == ["step-00000010"]
    interrupted(tmp_path)
    run_toy(toy_config(), tmp_path / "undisturbed", 0, 1)
    assert final_state(tmp_path) == final_state(tmp_path / "undisturbed")


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    worse = toy_config(optimizer__lr=2.0, optimizer__clip=0.0, training__epochs=6, training__keep=1, training__seed=2)
    summary = run_toy(worse, tmp_path, 0, 1)
    best, last = int(summary["best_step"]), int(summary["steps"])
    assert best < last  # with that rate the score soon rises
    assert checkpoints(tmp_path) == [f"step-{best:08d}", f"step-{last:08d}"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Interrupted):
        run_toy(toy_config(tracking__fail_at=13), tmp_path, 0, 1)
    path = tmp_path / "checkpoints" / "step-00000012" / "denoiser" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000012/denoiser/state\.pt.*to resume from step-00000010"):
        run_toy(toy_config(), tmp_path, 0, 1)
    shutil.rmtree(path.parent.parent)
    run_toy(toy_config(), tmp_path, 0, 1)


def test_nothing_but_finished_folders_is_visible(tmp_path: Path) -> None:
    run_toy(toy_config(), tmp_path, 0, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "figures", "journal.jsonl", "model"]


# --- closed forms ---


def test_learning_rate_is_its_closed_form() -> None:
    adamw = {"lr": 1.0, "betas": [0.9, 0.95], "weight_decay": 0.0, "clip": 0.0}
    constant = Optimizer(warmup=4, schedule="constant", **adamw)
    assert [learning_rate(s, 10, 2.0, constant) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = Optimizer(warmup=2, schedule="cosine", **adamw)
    rates = [learning_rate(s, 10, 2.0, cosine) for s in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)  # half way between warm-up and end
    assert all(a + b == pytest.approx(2.0) for a, b in zip(rates[2:], [*rates[3:], 0.0][::-1], strict=True))


def test_average_is_its_closed_form_and_exchange_undoes_itself() -> None:
    torch.manual_seed(0)
    history = [torch.randn(5) for _ in range(8)]
    weight = history[0].clone()
    average = Average([weight], decay=0.4)
    expected = history[0].double()
    for s, value in enumerate(history[1:]):
        weight.copy_(value)
        average.update(s)
        d = min(0.4, (1 + s) / (10 + s))
        expected = d * expected + (1 - d) * value.double()
    torch.testing.assert_close(average.values[0].double(), expected, rtol=1e-6, atol=1e-7)
    live, mean = weight.clone(), average.values[0].clone()
    average.exchange()
    assert torch.equal(weight, mean) and torch.equal(average.values[0], live)
    average.exchange()
    assert torch.equal(weight, live) and torch.equal(average.values[0], mean)


def local(module: nn.Module, **changes: object) -> LocalEngine:
    config = toy_config(**changes)
    return LocalEngine(module, 0.1, config.optimizer, config.compute, None, 1)


def test_weights_in_the_order_of_gpus_learn_the_same_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    """The fused optimiser reads memory from end to end: moments in another order would be other weights' moments."""

    def engine(ordered: bool = True) -> LocalEngine:
        torch.manual_seed(0)
        made = local(nn.Sequential(nn.Conv3d(2, 8, 3), GroupNorm(2, 8), nn.Conv3d(8, 2, 3)), optimizer__lr=1e-3)
        if ordered:
            channels_last_weights(made.module)
        return made

    def step(*engines: LocalEngine) -> None:
        for each in engines:
            each.backward(each(torch.linspace(-1, 1, 840).view(2, 2, 6, 5, 7)).square().sum())
            each.step()

    plain, ours, again = engine(ordered=False), engine(), engine()
    step(plain, ours)
    assert not ours.module[2].weight.is_contiguous()
    for name, content in ours.snapshot().items():
        torch.save(content, tmp_path / name)
    full = consolidate(tmp_path)
    assert all(x.is_contiguous() for part in (full.network, *full.moments.values()) for x in part.values())
    again.load(tmp_path, ours.layout)
    step(plain, ours, again)
    assert digest(ours.weights()) == digest(again.weights())
    for name, value in plain.weights().items():
        torch.testing.assert_close(ours.weights()[name], value, rtol=1e-3, atol=1e-3)


def test_frozen_passes_gradients_to_its_input_alone() -> None:
    engine = local(nn.Linear(3, 1))
    x = torch.randn(4, 3, requires_grad=True)
    engine.frozen(x).sum().backward()
    assert torch.equal(x.grad, engine.module.weight.detach().expand(4, 3))
    assert all(p.grad is None for p in engine.module.parameters())
    assert torch.equal(engine.frozen(x), engine(x))


def test_clipping_bounds_the_gradient_and_reports_its_norm() -> None:
    for clip in (0.0, 0.5):
        engine = local(nn.Linear(3, 1, bias=False), optimizer__clip=clip, optimizer__weight_decay=0.0)
        seen = {}
        engine.optimizer.register_step_pre_hook(
            lambda *_, e=engine, s=seen: s.update(norm=e.module.weight.grad.norm().item())
        )
        engine.backward((engine(torch.tensor([[3.0, 0.0, 4.0]]))).sum())
        engine.step()
        assert engine.grad_norm.item() == pytest.approx(5.0)
        assert seen["norm"] == pytest.approx(clip or 5.0, rel=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_and_outputs_in_float32() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 8, bias=False)
    x = torch.randn(16, 64)
    exact = module(x)
    engine = local(module, compute__precision="bfloat16")
    y = engine(x)
    assert y.dtype == torch.float32 and module.weight.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())  # the values are bfloat16's
    assert 0 < (y - exact).abs().max() < 0.05
    assert math.isfinite(y.sum().item())


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_bfloat16_gradients_of_thin_volumes_are_those_of_float32(first: int) -> None:
    """Within bfloat16's 1 %, also where memory was dirty before: oneDNN's own are garbage at a first axis of 2."""
    gradients = {}
    x = torch.randn(4, 16, first, 4, 4, generator=torch.Generator().manual_seed(0))
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        network = nn.Conv3d(16, 16, 3, padding=1)
        engine = local(network, compute__precision=precision)
        dirty = [torch.full((1 << 16,), torch.inf) for _ in range(8)]
        del dirty
        engine(x).square().mean().backward()
        gradients[precision] = network.weight.grad
    torch.testing.assert_close(gradients["bfloat16"], gradients["float32"], rtol=0.03, atol=1e-3)
