"""The stage ``scalars``, from packed voxels to answers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.diffusion.laws import log_score, normal
from mvhpc.evaluation.tables import read_predictions
from mvhpc.execute import execute, plan
from mvhpc.inference.prediction_tables import write_predictions
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.models.bundle import load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import LITTLE
from mvhpc.training.engines.base import Engine
from mvhpc.training.engines.local import LocalEngine
from mvhpc.training.scalars import ScalarsConfig, ScalarsTask, mirror
from mvhpc.training.stacking import _mixing, member_weights
from tests.conftest import pack_people, write_bids

SMALL: dict[str, Any] = {
    "encoder.spacing": 16.0,
    "encoder.channels": [8, 8],
    "encoder.embedding": 8,
    "encoder.components": 2,
    "encoder.ensemble_members": 3,
    "linear.smoothing": [0.0, 16.0],
    "training.epochs": 2,
    "training.validate_every": 1,
    "training.batch": 8,
    "compute.precision": "float32",
    "compute.device": "cpu",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 people at 16 x 16 x 16 voxels of 8 mm; a quarter of them test."""
    return pack_people(write_bids(tmp_path_factory.mktemp("scalars") / "bids", 40), (0.65, 0.1, 0.25))


def configure(packed: Path, out: Path, **changes: Any) -> ScalarsConfig:
    values = {"data": str(packed), "out": str(out), **SMALL, **changes}
    return load_config(ScalarsConfig, "scalars", "default", (), values)


@pytest.fixture(scope="module")
def trained(packed: Path) -> Path:
    """The run folder of a trained model."""
    out = packed.parent / "run"
    execute(plan("scalars", configure(packed, out)))
    return out


def predictor(model: Path, packed: Path, **changes: Any) -> ScalarsPredictor:
    values = {"model": str(model), "data": str(packed), "out": "x.tsv", "want": ["age"], **changes}
    config = load_config(PredictConfig, "predict", "default", (), values)
    return ScalarsPredictor(config, load(model, kind=ScalarsModel))


def engines_of(task: ScalarsTask) -> dict[str, Engine]:
    c = task.config
    return {"encoders": LocalEngine(task.networks["encoders"], 0.0, c.optimizer, c.compute, None, 1)}


def test_every_query_is_answered(trained: Path, packed: Path, tmp_path: Path) -> None:
    """Through the stage: a row for everyone, probabilities that sum to 1, quantiles in order."""
    for want, given in ((["age", "sex"], ["image"]), (["age"], ["image", "sex"]), (["sex"], ["age"]), (["age"], [])):
        out = tmp_path / f"{'-'.join([*want, 'given', *given])}.tsv"
        values = {"model": str(trained), "data": str(packed), "out": str(out), "want": want, "given": given, "draws": 3}
        execute(plan("predict", load_config(PredictConfig, "predict", "default", (), values)))
        frame, description = read_predictions(out)
        assert len(frame) == 10 and description["calibrated_on"] == 30
        if "sex" in want:
            assert np.allclose(frame["sex_p_F"] + frame["sex_p_M"], 1)
        if "age" in want:
            quantiles = frame[[f"age_q{q:02d}" for q in (5, 25, 50, 75, 95)]].to_numpy(float)
            assert (np.diff(quantiles, axis=1) > 0).all()
        assert frame["flag"].notna().all()


def test_rows_do_not_depend_on_the_batch(trained: Path, packed: Path) -> None:
    answer = predictor(trained, packed, want=["age", "sex"], given=["image"], draws=2)
    keys = answer.dataset.keys()
    together = answer(keys)
    for key, row in list(zip(keys, together))[::7]:
        (alone,) = answer([key])
        for name, value in row.items():
            assert (
                value == alone[name]
                if isinstance(value, str)
                else np.allclose(
                    np.array([value], float) if not isinstance(value, dict) else value["age"],
                    np.array([alone[name]], float) if not isinstance(value, dict) else alone[name]["age"],
                    rtol=1e-4,
                    equal_nan=True,
                )
            ), name


def test_a_batch_is_the_mean_of_its_halves(packed: Path) -> None:
    """Mirroring and queries belong to (seed, step, sample): the loss does not see how a batch is divided."""
    task = ScalarsTask(configure(packed, Path("unused")))
    for weights in task.networks["encoders"].parameters():  # output layers start at zero
        weights.data += 0.05 * torch.randn_like(weights)
    engines = engines_of(task)

    def losses(indices: list[int]) -> dict[str, torch.Tensor]:
        found = task.step(task.load(indices), engines, step=7, indices=indices)
        return {name: value.detach().clone() for name, value in found.items()}

    whole, first, second = losses([0, 1, 2, 3]), losses([0, 1]), losses([2, 3])
    for name, value in whole.items():
        assert torch.isclose(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6), name
    assert any(not torch.isclose(first[name], second[name]) for name in whole)


def test_only_chosen_volumes_are_mirrored() -> None:
    x = torch.randn(2, 1, 3, 4, 5)
    found = mirror(x, torch.tensor([True, False]))
    assert torch.equal(found[0], x[0].flip(1)) and torch.equal(found[1], x[1])


def test_a_tenth_of_the_volumes_and_half_of_the_scalars_are_hidden(packed: Path) -> None:
    task = ScalarsTask(configure(packed, Path("unused"), **{"training.batch": 16}))
    found: list[dict[str, torch.Tensor]] = []

    def losses(*args: Any) -> dict[str, torch.Tensor]:
        found.append(args[-1])
        return {"age": sum(p.sum() for p in task.networks["encoders"].parameters()) * torch.zeros(16)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "_losses", losses)
        engines, people = engines_of(task), list(range(16))
        for step in range(30):
            task.step(task.load(people), engines, step=step, indices=people)
    hidden = {name: torch.cat([of[name] for of in found]) for name in task.variables.names}
    for v in task.variables.volumes:
        assert hidden[v.name].shape == (30 * 16,)
        assert abs(hidden[v.name].float().mean() - 0.1) < 0.05
    for s in task.variables.scalars:
        assert hidden[s.name].shape == (30 * 16 * task.config.queries_per_volume,)
        assert abs(hidden[s.name].float().mean() - 0.5) < 0.05


def test_nobody_is_held_out_from_what_was_fitted_to_them(packed: Path) -> None:
    """No gradient of a person reaches the encoder that they are held out from, nor does their age the linear member."""
    task = ScalarsTask(configure(packed, Path("unused")))
    for weights in task.networks["encoders"].parameters():
        weights.data += 0.05 * torch.randn_like(weights)
    engines = engines_of(task)
    for person in range(6):
        (held_out,) = (~task.in_fold[person]).nonzero()[:, 0].tolist()
        with pytest.MonkeyPatch.context() as patch:
            task.networks["encoders"].zero_grad()
            patch.setattr(engines["encoders"], "step", lambda: None)  # leaves the gradients
            for step in range(3):
                task.step(task.load([person]), engines, step=step, indices=[person])
        moved = {
            int(name.split(".")[1])
            for name, weights in task.networks["encoders"].named_parameters()
            if weights.grad is not None and weights.grad.any()
        }
        assert moved <= {0, 1, 2} - {held_out}
        before = [m.moments.sums.clone() for m in task.held_out_linear[held_out]]
        others = [m.moments.sums.clone() for m in task.held_out_linear[(held_out + 1) % 3]]
        del task.held_out_linear
        task.people.values["age"][person] += 1
        assert all(torch.equal(a, m.moments.sums) for a, m in zip(before, task.held_out_linear[held_out]))
        if task.people.present["age"][person]:
            assert not torch.equal(others[0], task.held_out_linear[(held_out + 1) % 3][0].moments.sums)


def test_the_same_seed_gives_the_same_model(trained: Path, packed: Path, tmp_path: Path) -> None:
    execute(plan("scalars", configure(packed, tmp_path / "again")))
    first, second = (load(run, kind=ScalarsModel).meta for run in (trained, tmp_path / "again"))
    assert first["networks"] == second["networks"] and first["mixing"] == second["mixing"]


def test_the_mixture_is_not_worse_on_held_out_people_than_its_members(packed: Path, trained: Path) -> None:
    """Weights sum to 1; a model that was never exported with a useless encoder leaves it out."""
    model = load(trained, kind=ScalarsModel)
    for of in model.stack.mixing.values():
        for how in of.values():
            assert abs(sum(how.weights) - 1) < 1e-9 and how.temperature > 0
            assert all(w == 0 or w > 0.04 for w in how.weights)


def test_unknown_subjects_get_no_answer(trained: Path, packed: Path, tmp_path: Path) -> None:
    """A person who has nothing of what is given has empty cells, no draws, and the reason."""
    answer = predictor(trained, packed, want=["age"], given=["sex"], draws=2)
    rows = {row["key"]: row for row in answer(answer.dataset.keys())}
    lacking = [key for key in rows if answer.dataset.values(key)["sex"] is None]
    assert lacking
    for key in lacking:
        assert rows[key]["age"] is None and rows[key]["age_q05"] is None
        assert rows[key]["flag"] == "nothing that is given is known"
    drawn = {key: len(row["draws"]["age"]) for key, row in rows.items()}
    assert drawn == {key: 0 if key in lacking else 2 for key in rows}
    write_predictions(tmp_path / "a.tsv", [*rows.values()], answer.schema, {"given": ["sex"], "want": ["age"]})
    written = (tmp_path / "a.draws.tsv").read_text()
    assert all((f"{key}\t" in written) == (key not in lacking) for key in rows)


def test_a_scan_of_noise_is_flagged_and_held_out_people_are_not(trained: Path, packed: Path) -> None:
    answer = predictor(trained, packed, want=["age"], given=["image"])
    rows = answer(answer.dataset.keys("test"))
    assert np.mean([("unlike" in row["flag"]) for row in rows]) <= 0.2
    read, g = answer.dataset.read, np.random.default_rng(0)

    def noise(key: str, name: str) -> Any:
        return g.random(read(key, name).shape).astype(np.float16)

    answer.dataset.read = noise  # type: ignore[method-assign]
    assert all(
        "image is unlike the scans of the training" in row["flag"] for row in answer(answer.dataset.keys("test"))
    )


def test_ages_outside_of_the_training_are_flagged(trained: Path, packed: Path) -> None:
    answer = predictor(trained, packed, want=["sex"], given=["age"])
    key = next(key for key in answer.dataset.keys(None) if answer.dataset.values(key)["age"] is not None)
    values = answer.dataset.values
    answer.dataset.values = lambda key: {**values(key), "age": 110.0}  # type: ignore[method-assign]
    assert "age 110 lies outside of the training's" in answer([key])[0]["flag"]


def test_data_that_cannot_be_used_are_refused(packed: Path, tiny_dataset: Path) -> None:
    config = configure(packed, Path("unused"))
    with pytest.raises(ConfigError, match="6 subjects to train on"):
        ScalarsTask.check(dataclasses.replace(config, data=str(tiny_dataset)))
    with pytest.raises(ConfigError, match="variable of the data"):
        ScalarsTask.check(dataclasses.replace(config, schema="rich"))


def test_a_model_knows_which_variables_it_predicts_no_better_than_by_the_mean() -> None:
    g = torch.Generator().manual_seed(0)
    signal, noise = (torch.randn(100, generator=g).double() for _ in range(2))
    truth, sd = (signal + noise)[:, None], torch.ones(100).double()
    marginal, seeing = normal(0 * sd, 2**0.5 * sd), normal(signal, sd)
    number = _mixing([[marginal, marginal], [seeing, seeing]], truth).saved
    assert number[0] < LITTLE < 0.2 < number[1]
    classes, p = (signal > 0).long(), torch.full((100, 2), 0.5).double()
    seen = torch.nn.functional.one_hot(classes, 2).double() * 0.8 + 0.1
    category = _mixing([[p, p], [seen, seen]], classes).saved
    assert category[0] < LITTLE < 0.2 < category[1]


def test_encoders_get_weight_only_where_they_help_by_more_than_chance() -> None:
    """Predictions of a normal truth: by its law, without what decides it, and by a law that is as good by itself."""
    g = torch.Generator().manual_seed(0)
    signal, noise = (torch.randn(100, generator=g).double() for _ in range(2))
    truth, sd = signal + noise, torch.ones(100).double()
    marginal, seeing = (log_score(normal(*law), truth[:, None]) for law in ((0 * sd, 2**0.5 * sd), (signal, sd)))
    same = marginal + 0.05 * torch.randn(100, generator=g).double()
    for linear, encoders, expected in ((marginal, seeing, False), (seeing, marginal, True), (marginal, same, True)):
        weights = member_weights(torch.stack([linear, encoders], 1)[None])
        assert sum(weights) == pytest.approx(1) and (weights[-1] == 0) == expected
