"""The phantom's law: what is drawn, what the image shows of it, and the exact posterior."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest

from shards.__main__ import main
from shards.files import is_complete
from shards.index import Index
from shards.phantom import make as phantom
from shards.phantom.anatomy import AGES, LAW, best_possible, draw_anatomy, draw_person, posterior, read_tables
from shards.phantom.brain import render_tissues, spacing
from shards.phantom.make import MEMORY, SITES, draw_rich, draw_subject, make_phantoms, render_image

SHAPE = (32, 32, 32)


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    drawn = [draw_person(rng) for _ in range(5000)]
    table = pd.DataFrame([draw_anatomy(rng, age, sex) for age, sex in drawn])
    return table.assign(
        participant_id=[f"sub-{i}" for i in range(len(drawn))],
        age=[age for age, _ in drawn],
        sex=[sex for _, sex in drawn],
    )


# --- the law --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAW)
def test_regressions_are_recovered_from_draws(people: pd.DataFrame, name: str) -> None:
    law, a = LAW[name], (people["age"].to_numpy() - 50) / 10
    design = np.stack([np.ones_like(a), a, a**2, people["sex"] == "M"], 1).astype(float)
    y = np.log(people[name]) if law.log else people[name]
    fit = np.linalg.lstsq(design, y, rcond=None)[0]
    errors = law.sd * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    truth = [law.constant, law.age, law.square, law.male]
    assert np.all(np.abs(fit - truth) < 4 * errors)
    assert np.std(y - design @ fit) == pytest.approx(law.sd, rel=4 / np.sqrt(2 * len(people)))


def test_brain_share_agrees_with_the_measured_ratio() -> None:
    """Grey + white, drawn from IXI's figures, against OASIS-1's regression of the same: slope, sex and spread."""
    grey, white = LAW["grey_percent"], LAW["white_percent"]
    assert grey.age + white.age == pytest.approx(-1.8, abs=0.5)
    assert grey.square + white.square == pytest.approx(-0.2, abs=0.1)
    assert grey.male + white.male == pytest.approx(-1.1, abs=0.2)
    assert np.hypot(grey.sd, white.sd) == pytest.approx(2.3, abs=0.2)


# --- the posterior --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sex_given", [False, True])
def test_posterior_of_age_is_calibrated(people: pd.DataFrame, sex_given: bool) -> None:
    answer = posterior(people, sex=people["sex"] if sex_given else None)
    np.testing.assert_allclose(answer.mass.sum((1, 2)), 1)
    assert kstest(answer.cdf(people["age"]), "uniform").pvalue > 0.001


@pytest.mark.parametrize("age_given", [False, True])
def test_posterior_of_sex_is_calibrated(people: pd.DataFrame, age_given: bool) -> None:
    male = posterior(people, age=people["age"] if age_given else None).sex[:, 1]
    truth = (people["sex"] == "M").to_numpy()
    for low in np.arange(0, 1, 0.2):
        chosen = (male >= low) & (male < low + 0.2)
        error = np.sqrt(np.mean(male[chosen] * (1 - male[chosen])) / chosen.sum())
        assert abs(truth[chosen].mean() - male[chosen].mean()) < 4 * error


def test_posterior_equals_rejection_sampling() -> None:
    """Of many people drawn from the law, those whose anatomy comes close to the given one have the posterior's law."""
    rng = np.random.default_rng(0)
    n = 1_500_000
    age, male = rng.uniform(*AGES, n), rng.integers(2, size=n)
    given = {
        "icv_ml": 1450.0,
        "ventricles_ml": 24.0,
        "grey_percent": 44.5,
        "white_percent": 38.0,
        "hippocampus_ml": 7.9,
    }
    near = np.ones(n, bool)
    for name, law in LAW.items():
        value = law.mean(age, male) + law.sd * rng.standard_normal(n)
        near &= np.abs(value - (np.log(given[name]) if law.log else given[name])) < 0.45 * law.sd
    answer, kept = posterior(given), int(near.sum())
    assert kept > 800
    assert abs(age[near].mean() - answer.mean[0]) < 4 * answer.sd[0] / np.sqrt(kept)
    assert age[near].std() == pytest.approx(answer.sd[0], rel=0.1)
    assert male[near].mean() == pytest.approx(answer.sex[0, 1], abs=4 * 0.5 / np.sqrt(kept))


def test_posterior_of_nothing_is_the_prior_and_a_finer_grid_changes_nothing(people: pd.DataFrame) -> None:
    prior = posterior()
    assert prior.mean[0] == pytest.approx(51)
    assert prior.sd[0] == pytest.approx(62 / np.sqrt(12), rel=1e-4)
    assert prior.quantile(0.9)[0] == pytest.approx(20 + 0.9 * 62)
    np.testing.assert_allclose(prior.sex, 0.5)
    few = people.head(20)
    coarse, fine = posterior(few), posterior(few, cells=6200)
    np.testing.assert_allclose(coarse.mean, fine.mean, atol=2e-3)
    np.testing.assert_allclose(coarse.sex, fine.sex, atol=1e-4)


def test_age_is_no_easier_to_read_than_from_real_brains(people: pd.DataFrame) -> None:
    def error(given: list[str]) -> float:
        return float(np.abs(best_possible(people, given)["age_median"].to_numpy() - people["age"]).mean())

    def accuracy(given: list[str]) -> float:
        return float(((best_possible(people, given)["M"].to_numpy() > 0.5) == (people["sex"] == "M")).mean())

    assert 5.9 < error(["image", "sex"]) < error(["image"]) < 6.6
    assert error([]) == pytest.approx(15.5, abs=0.4)
    assert 0.81 < accuracy(["image"]) < accuracy(["image", "age"]) < 0.86


def test_best_possible_refuses_an_unknown_name(people: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="site"):
        best_possible(people, ["site"])


# --- the image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (40, 48, 40)])
def test_rendered_volumes_are_those_drawn(people: pd.DataFrame, shape: tuple[int, int, int]) -> None:
    voxel_ml = spacing(shape) ** 3 / 1000
    for i, row in people.head(12).iterrows():
        tissues = render_tissues(row, np.random.default_rng(int(str(i))), shape)
        ml = {name: float(part.sum()) * voxel_ml for name, part in tissues._asdict().items()}
        icv = ml["csf"] + ml["grey"] + ml["white"]
        assert icv == pytest.approx(row["icv_ml"], rel=0.005)
        assert ml["ventricles"] == pytest.approx(row["ventricles_ml"], rel=0.01)
        assert ml["hippocampus"] == pytest.approx(row["hippocampus_ml"], rel=0.01)
        assert 100 * ml["grey"] / icv == pytest.approx(row["grey_percent"], rel=0.01)
        assert 100 * ml["white"] / icv == pytest.approx(row["white_percent"], rel=0.01)
        assert all(part.min() >= -1e-6 for part in tissues)


def test_extreme_heads_fit_the_field_of_view() -> None:
    largest = {**draw_anatomy(np.random.default_rng(0), 20, "M"), "icv_ml": 2100.0}
    for seed in range(3):
        tissues = render_tissues(largest, np.random.default_rng(seed), SHAPE)
        head = tissues.csf + tissues.grey + tissues.white
        assert head.sum() * spacing(SHAPE) ** 3 / 1000 == pytest.approx(2100, rel=0.005)
        for axis in range(3):
            assert max(np.take(head, end, axis).max() for end in (0, -1)) < 0.5


def test_tissues_of_the_image_can_be_separated() -> None:
    anatomy = {name: float(np.exp(law.constant) if law.log else law.constant) for name, law in LAW.items()}
    rng = np.random.default_rng(1)
    tissues = render_tissues(anatomy, rng, SHAPE)
    image = render_image(tissues, rng).astype(float)
    pure = [image[part > 0.9].mean() for part in (tissues.csf, tissues.grey, tissues.white)]
    assert 0 < 2 * pure[0] < pure[1] < 0.8 * pure[2]
    assert np.all(image[tissues.csf + tissues.grey + tissues.white <= 0] == 0)


def test_individual_shape_knows_neither_age_nor_sex() -> None:
    """Subjects differ by anatomy and nuisance; the nuisance stream is the same whoever owns it."""
    images = []
    for age, sex in ((25.0, "F"), (80.0, "M")):
        anatomy = {**draw_anatomy(np.random.default_rng(0), age, sex), **dict.fromkeys(LAW, 0.0)}
        anatomy |= {"icv_ml": 1500, "ventricles_ml": 20, "grey_percent": 45, "white_percent": 38}
        anatomy["hippocampus_ml"] = 7.5
        rng = np.random.default_rng(5)
        images.append(render_image(render_tissues(anatomy, rng, SHAPE), rng))
    np.testing.assert_array_equal(*images)


# --- the data set --------------------------------------------------------------------------------------------------


def test_subject_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "two", 2, (16, 16, 16), seed=4, workers=1)
    make_phantoms(tmp_path / "five", 5, (16, 16, 16), seed=4, workers=2)
    few, many = read_tables(tmp_path / "two"), read_tables(tmp_path / "five")
    pd.testing.assert_frame_equal(few, many.head(2))
    for name in few["participant_id"]:
        file = Path(name) / "anat" / f"{name}_T1w.nii.gz"
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "five" / file).read_bytes()
    assert len(set(many["icv_ml"])) == 5
    assert draw_subject(4, 0, (16, 16, 16))[0] == many["age"][0] != draw_subject(5, 0, (16, 16, 16))[0]


def test_bids_tree_holds_what_was_drawn(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "bids", 3, SHAPE, seed=1, workers=1)
    assert json.loads((tmp_path / "bids" / "dataset_description.json").read_text())["DatasetType"] == "raw"
    for index, row in read_tables(tmp_path / "bids").iterrows():
        age, sex, anatomy, voxels = draw_subject(1, int(str(index)), SHAPE)
        assert (row["age"], row["sex"]) == (age, sex)
        assert {name: row[name] for name in anatomy} == pytest.approx(anatomy)
        name = row["participant_id"]
        image = nib.load(tmp_path / "bids" / name / "anat" / f"{name}_T1w.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), voxels)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        head_ml = np.count_nonzero(voxels) * np.prod(image.header.get_zooms()) / 1000
        assert head_ml == pytest.approx(row["icv_ml"], rel=0.03)


def test_refuses_a_folder_in_use_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        make_phantoms(tmp_path / "out", 1, workers=1)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "_write_tables", fails)
    with pytest.raises(OSError, match="disk full"):
        make_phantoms(tmp_path / "new", 1, (16, 16, 16), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
import shards.files
from shards.phantom import make
moment, out = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
write = make._write_subject
if moment == "subject": make._write_subject = lambda *args: die() if args[-1] else write(*args)
if moment == "rename": Path.replace = die
if moment == "after the rename": shards.files.sync = die
make.make_phantoms(Path(out), 2, (16, 16, 16), workers=1)
"""


@pytest.mark.parametrize("moment", ["subject", "rename", "after the rename"])
def test_a_killed_process_leaves_all_or_nothing(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(out)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert is_complete(out) == out.exists() == (moment == "after the rename")
    if not out.exists():
        make_phantoms(out, 2, (16, 16, 16), workers=1)
    make_phantoms(tmp_path / "once", 2, (16, 16, 16), workers=1)
    for path in (p for p in (tmp_path / "once").rglob("*") if p.is_file()):
        assert (out / path.relative_to(tmp_path / "once")).read_bytes() == path.read_bytes()


def test_a_killed_worker_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["phantom", str(tmp_path / "out"), "--subjects", "500", "--workers", "2"]) == 2
    killer.join()
    assert "phantom: a worker process was killed" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--rich"], ["--shape", "16", "20", "18"], []])
def test_the_command_that_is_named_for_packing_packs(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["phantom", str(tmp_path / "a b"), "--subjects", "3", "--workers", "1", *options]) == 0
    _, _, command = capsys.readouterr().out.strip().partition("pack them with: shards ")
    words = [str(tmp_path / "out") if word == "OUT" else word for word in shlex.split(command)]
    more = ["--split", "1", "0", "0", "--workers", "1", "--keep-suspect"]
    assert main([*words, *more]) == 0
    index = Index.load(tmp_path / "out")
    assert index.grid["shape"] == ([16, 20, 18] if "--shape" in options else [32, 32, 32])
    assert ("memory" in [v.name for v in index.schema]) == ("--rich" in options)


def test_options_come_from_a_preset(tmp_path: Path) -> None:
    preset = tmp_path / "two.yaml"
    preset.write_text("subjects: 2\nshape: [16, 16, 16]\nrich: true\n")
    assert main(["phantom", str(tmp_path / "out"), "--config", str(preset), "--seed", "3", "--workers", "1"]) == 0
    make_phantoms(tmp_path / "same", 2, (16, 16, 16), seed=3, workers=1, rich=True)
    pd.testing.assert_frame_equal(read_tables(tmp_path / "out"), read_tables(tmp_path / "same"))


@pytest.mark.parametrize(("subjects", "shape"), [(0, SHAPE), (1, (32, 8, 32))])
def test_refuses_what_cannot_be_drawn(tmp_path: Path, subjects: int, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_phantoms(tmp_path / "out", subjects, shape)


# --- rich phantoms --------------------------------------------------------------------------------------------


def test_rich_phantoms_are_the_same_people_and_more(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "plain", 3, (16, 16, 16), workers=1)
    make_phantoms(tmp_path / "rich", 3, (16, 16, 16), workers=1, rich=True)
    plain, rich = (read_tables(tmp_path / name) for name in ("plain", "rich"))
    pd.testing.assert_frame_equal(rich[plain.columns], plain)
    assert set(rich["site"]) <= set(SITES) and rich["memory"].dtype == int
    volumes = sorted(p.name for p in (tmp_path / "rich").rglob("*.nii.gz"))
    assert volumes == [f"sub-000{i}_{c}.nii.gz" for i in (1, 2, 3) for c in ("T1w", "T2w")]


def test_the_second_contrast_is_that_of_the_same_brain() -> None:
    """What is dark in one is bright in the other."""
    _, _, _, rich = draw_rich(0, 0, SHAPE)
    inside = rich.t1w > 0
    assert np.array_equal(inside, rich.t2w > 0)
    assert np.corrcoef(rich.t1w[inside], rich.t2w[inside])[0, 1] < -0.3


def test_memory_and_site_follow_their_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "render_tissues", lambda *_: None)
    monkeypatch.setattr(phantom, "render_image", lambda *_: None)
    people = [draw_rich(0, i, SHAPE) for i in range(4000)]
    residual = [rich.memory - MEMORY.mean(age, sex == "M") for age, sex, _, rich in people]
    assert kstest(residual, "norm", (0, MEMORY.sd)).pvalue > 0.001
    sites = pd.Series([rich.site for *_, rich in people]).value_counts(normalize=True)
    assert all(abs(sites[name] - share) < 4.5 * np.sqrt(share / 4000) for name, (share, _) in SITES.items())
