"""Calibration at a new site: what it recovers, and that its intervals hold."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.diffusion.density import quantile
from mvhpc.diffusion.laws import normal
from mvhpc.evaluation.against_mean import AgainstMean
from mvhpc.evaluation.tables import subject_of
from mvhpc.execute import execute, plan
from mvhpc.inference.calibrate import CalibrateConfig
from mvhpc.models.bundle import load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.site_calibration import calibrate_site
from mvhpc.models.training_people import TrainingPeople
from shards.dataset import open_dataset
from shards.sheets import read_sheet
from tests.conftest import SCHEMA, pack_people, write_bids
from tests.test_scalars import packed, predictor, trained

__all__ = ["packed", "trained"]
EVERYONE = torch.ones(1, dtype=torch.bool)


def site(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means predicted for n people, and truths: shifted by 1, stretched by 0.8, with errors of SD 0.5."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, generator=g, dtype=torch.float64)
    return mean, 1 + 0.8 * mean + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)


def test_shift_stretch_and_width_are_recovered() -> None:
    """The model says SD 0.1; the calibrated laws have the errors' SD."""
    mean, truth = site(2000, 0)
    law = normal(mean, torch.full_like(mean, 0.1))
    found = calibrate_site(law, truth[:, None])
    assert found.shift[0] == pytest.approx(1, abs=0.05) and found.stretch == pytest.approx(0.8, abs=0.05)
    after = found.apply(law, EVERYONE.expand(2000))
    assert after.stddev.mean() == pytest.approx(0.5, abs=0.03)  # type: ignore[union-attr]
    same = found.apply(law, ~EVERYONE.expand(2000))
    assert torch.equal(same.mean, law.mean) and torch.equal(same.stddev, law.stddev)  # type: ignore[union-attr]


def test_the_interval_holds_with_twenty_people() -> None:
    """On average over sites the 90 % interval covers at least 90 % of new people, whatever width the model gave."""
    covered = []
    for seed in range(200):
        mean, truth = site(20, seed)
        new, hidden = site(50, 1000 + seed)
        width = 0.05 + 0.3 * torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = calibrate_site(normal(mean, width), truth[:, None])
        law = found.apply(normal(new, torch.full_like(new, 0.2)), EVERYONE.expand(50))
        low, high = quantile(law, torch.tensor([0.05, 0.95], dtype=torch.float64)).T  # type: ignore[arg-type]
        covered.append(float(((low <= hidden) & (hidden <= high)).double().mean()))
    assert 0.89 <= np.mean(covered) <= 0.97


def test_a_category_gets_the_shares_of_the_site() -> None:
    """Probabilities that favour one class by a constant are corrected."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 2, generator=g, dtype=torch.float64) * 2
    truth = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    biased = (logits + torch.tensor([1.5, 0.0])).softmax(1)
    found = calibrate_site(biased, truth)
    after = found.apply(biased, EVERYONE.expand(1000))
    assert isinstance(after, torch.Tensor)
    assert (after - logits.softmax(1)).abs().mean() < 0.03


def test_nine_people_are_too_few() -> None:
    mean, truth = site(9, 0)
    with pytest.raises(ValueError, match="at least 10"):
        calibrate_site(normal(mean, torch.ones_like(mean)), truth[:, None])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 people from whom the model did not learn."""
    return pack_people(write_bids(tmp_path_factory.mktemp("others") / "bids", 40, seed=7), (0, 0, 1))


def test_the_stage_writes_a_model_that_names_its_site(trained: Path, others: Path, tmp_path: Path) -> None:
    values = {"model": str(trained), "data": str(others), "out": str(tmp_path / "new"), "site": "clinic"}
    config = load_config(CalibrateConfig, "calibrate", "default", (), values)
    summary = execute(plan("calibrate", config))
    assert summary["age_people"] == 39
    answers = [predictor(m, others, want=["age"], given=["image"]) for m in (trained, tmp_path / "new")]
    assert answers[0].facts["site"] is None and answers[1].facts["site"] == {
        "name": "clinic",
        "people": 40,
        "scalars": ["age", "sex"],
    }
    keys = answers[0].dataset.keys("test")
    assert not set(keys) & answers[0].learnt.keys() and set(keys) <= answers[1].learnt.keys()
    before, after = ([row["age"] for row in answer(keys)] for answer in answers)
    found = load(tmp_path / "new", kind=ScalarsModel).stack.site["age"]
    age = answers[0].model.variables["age"]
    middle, half = (age.high + age.low) / 2, (age.high - age.low) / 2  # type: ignore[union-attr]
    expected = middle + half * (found.shift[0] + found.stretch * (np.array(before) - middle) / half)
    assert np.allclose(after, expected)
    with pytest.raises(ConfigError, match="calibrated for clinic already"):
        again = {**values, "model": str(tmp_path / "new"), "out": str(tmp_path / "twice")}
        execute(plan("calibrate", load_config(CalibrateConfig, "calibrate", "default", (), again)))


def relabelled(people: Path, out: Path, ages: Sequence[float], sexes: str = "FM") -> Path:
    """The people of :func:`write_bids` packed with other ages, as often repeated as is needed, and sexes."""
    lines = ["participant_id\tage\tsex"]
    scans = sorted((people.parent / "bids").glob("sub-*"))
    for i, folder in enumerate(scans):
        lines.append(f"{folder.name}\t{ages[i % len(ages)]}\t{sexes[i % len(sexes)]}")
    shutil.copytree(people.parent / "bids", out / "bids")
    (out / "bids" / "participants.tsv").write_text("\n".join(lines) + "\n")
    return pack_people(out / "bids", (0, 0, 1))


def test_people_of_the_training_are_left_out(
    trained: Path, packed: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The errors about them are smaller than those about new people, and the intervals would be too narrow."""
    both = tmp_path / "both.csv"
    lines = ["participant_id,path,age,sex"]
    for name, folder in (("old", packed.parent), ("new", others.parent)):
        for row in read_sheet(folder / "bids" / "participants.tsv").rows:
            scan = folder / "bids" / row[1]["participant_id"] / "anat" / f"{row[1]['participant_id']}_T1w.nii.gz"
            lines.append(f"{name}{row[1]['participant_id'][4:]},{scan},{row[1]['age']},{row[1]['sex']}")
    both.write_text("\n".join(lines) + "\n")
    _, model = calibrated(trained, pack_people(both, (0, 0, 1)), tmp_path / "new")
    assert model.meta["site"]["people"] == 40 + 10  # the others and the test part
    assert "30 of 80 are left out, as the model learnt from them (sub-old" in capsys.readouterr().err
    dataset = open_dataset(packed)
    values = {"model": str(trained), "data": str(dataset.folder), "out": str(tmp_path / "none"), "split": "train"}
    with pytest.raises(ConfigError, match="the model learnt from all of these people"):
        execute(plan("calibrate", load_config(CalibrateConfig, "calibrate", "default", (), values)))


def test_people_of_one_value_calibrate_nothing(
    trained: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everybody would get that value, with a narrow interval."""
    data = relabelled(others, tmp_path, [40])
    _, model = calibrated(trained, data, tmp_path / "new")
    assert set(model.meta["site"]["scalars"]) == {"sex"}
    assert "warning: not calibrated: age: all people have one value" in capsys.readouterr().err
    facts = predictor(tmp_path / "new", data, want=["age"], given=["image"]).facts
    assert facts["site"]["scalars"] == ["sex"]
    shutil.rmtree(tmp_path / "bids")
    shutil.rmtree(tmp_path / "packed")
    with pytest.raises(
        ConfigError, match=r"nothing can be calibrated\. age: all people have one value.*; sex: all people"
    ):
        calibrated(trained, relabelled(others, tmp_path, [40], "F"), tmp_path / "none")


def test_ages_that_do_not_go_with_the_scans_shift_alone(
    trained: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ages of other people, or of people of nearly the same age: stretched, the answers would be their mean."""
    ages = [20 + 1.5 * i for i in range(40)]
    random.Random(0).shuffle(ages)
    _, model = calibrated(trained, relabelled(others, tmp_path / "shuffled", ages), tmp_path / "new")
    assert model.stack.site["age"].stretch == 1 and model.stack.site["age"].temperature > 1.5
    (note,) = predictor(tmp_path / "new", others, want=["age"], given=["image"]).notes
    assert "NOT better than predicting the mean" in note and "so answers are shifted alone" in note
    assert note in capsys.readouterr().err


def test_a_calibration_that_may_be_chance_is_named_with_every_answer(
    trained: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one by scans of another preprocessing."""
    monkeypatch.setattr(AgainstMean, "better", False)
    calibrated(trained, others, tmp_path / "new")
    notes = predictor(tmp_path / "new", others, want=["age", "sex"], given=["image"]).notes
    assert len(notes) == 1 and notes[0].startswith("age: calibrated by 39 people, each left out in turn: age error ")
    notes = predictor(tmp_path / "new", others, want=["age"], given=["sex"]).notes
    assert not any("calibrated" in note for note in notes)  # only answers about scans are
    monkeypatch.setattr("mvhpc.inference.calibrate.recipe_flag", lambda *_: ["the scans were not preprocessed"])
    calibrated(trained, others, tmp_path / "raw")
    notes = predictor(tmp_path / "raw", others, want=["age", "sex"], given=["image"]).notes
    assert [note.split(";")[0] for note in notes] == [f"{v}: the scans were not preprocessed" for v in ("age", "sex")]


def calibrated(model: Path, data: Path, out: Path) -> tuple[dict[str, Any], ScalarsModel]:
    """The summary of the stage on everybody, and the model."""
    values = {"model": str(model), "data": str(data), "out": str(out), "split": "all"}
    summary = execute(plan("calibrate", load_config(CalibrateConfig, "calibrate", "default", (), values)))
    return summary, load(out, kind=ScalarsModel)


def test_people_are_counted_once_and_only_where_they_are_learnt_from(trained: Path, tmp_path: Path) -> None:
    """Eleven of twelve people have labels, and two visits each."""
    bids = write_bids(tmp_path / "bids", 12, seed=1)
    lines = ["participant_id,session_id,path,age,sex"]
    for i in range(12):
        labels = "n/a,n/a" if i == 11 else f"{30 + 5 * i},{'FM'[i % 2]}"
        scan = bids / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_T1w.nii.gz"
        lines += [f"new{i},{visit},{scan},{labels}" for visit in (1, 2)]
    (tmp_path / "visits.csv").write_text("\n".join(lines) + "\n")
    data = pack_people(tmp_path / "visits.csv", (0, 0, 1))
    summary, model = calibrated(trained, data, tmp_path / "new")
    assert summary["age_people"] == summary["sex_people"] == model.meta["site"]["people"] == 11
    learnt = TrainingPeople.read(model.meta).learnt(open_dataset(data).index)
    assert {subject_of(key) for key in learnt} == {f"sub-new{i}" for i in range(11)}


def test_data_without_the_volume_are_refused(trained: Path, packed: Path, tmp_path: Path) -> None:
    schema = {{"image": "scan"}.get(name, name): spec for name, spec in SCHEMA.items()}
    data = pack_people(packed.parent / "bids", (0, 0, 1), tmp_path / "packed", schema=schema)
    with pytest.raises(ConfigError, match=r"data=.*packed has no image, from which the model predicts"):
        calibrated(trained, data, tmp_path / "new")


def test_the_model_of_scalars_of_a_joint_model_is_calibrated_as_by_itself(
    tiny_model: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    written, data = [], pack_people(write_bids(tmp_path / "bids", 14, seed=7), (0, 0, 1))
    for number, model in enumerate((tiny_model, tiny_scalars)):
        values = {"model": str(model), "data": str(data), "out": str(tmp_path / f"{number}"), "split": "all"}
        execute(plan("calibrate", load_config(CalibrateConfig, "calibrate", "default", (), values)))
        written.append({file.name: file.read_bytes() for file in (tmp_path / f"{number}").iterdir()})
    assert written[0] == written[1] and len(written[0]) > 2
