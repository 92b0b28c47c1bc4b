"""Preprocessing: each step against a known truth, and the derivative as a whole."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mvhpc.config import load_config
from mvhpc.data_stages import PreprocessConfig
from mvhpc.execute import execute, plan
from mvhpc.pipeline.plan import Pipeline, PipelineConfig
from mvhpc.pipeline.run import do
from mvhpc.runtime.ray_subjects import map_subjects_by_ray
from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError, TooManyRejects
from shards.nifti import read
from shards.pack import pack
from shards.participant_rows import Row
from shards.phantom.anatomy import draw_anatomy
from shards.phantom.brain import Tissues, render_tissues, spacing
from shards.phantom.make import render_image
from shards.preprocess import pool, requirements
from shards.preprocess.bias import correct_bias
from shards.preprocess.extraction import extracted_mask
from shards.preprocess.images import Volume, ants_library, resample
from shards.preprocess.recipe import Recipe, read_derivative
from shards.preprocess.registration import FLIP, load_template, register, transform_bytes
from shards.preprocess.run import preprocess
from shards.preprocess.scan import preprocess_scan
from shards.preprocess.subject import Job, Outcome, Worker
from shards.preprocess.tissue import tissue_maps

pytest.importorskip("ants")
pytest.importorskip("nilearn")

SHAPE = (48, 48, 48)
SPACE = "MNI152NLin2009aSym"
REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
QUICK = Recipe(steps=("brain", "registration", "tissue"), spacing=4.0)


def phantom(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[Volume, Tissues]:
    """A brain of 4 mm voxels, or of another shape, centred at 0 mm, and the truth about its tissues."""
    rng = np.random.default_rng(seed)
    tissues = render_tissues(draw_anatomy(rng, 50.0, "F"), rng, shape)
    affine = np.diag([spacing(shape)] * 3 + [1.0])
    affine[:3, 3] = -spacing(shape) * (np.array(shape) - 1) / 2
    return Volume(render_image(tissues, rng).astype(np.float32), affine), tissues


@pytest.fixture(scope="module")
def brain() -> tuple[Volume, Tissues]:
    return phantom(0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def save(path: Path, volume: Volume) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.voxels.astype(np.int16), volume.affine), path)
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# --- steps -----------------------------------------------------------------------------------------------------------


def test_n4_recovers_a_known_field(brain: tuple[Volume, Tissues]) -> None:
    volume, _ = brain
    inside = volume.voxels > 0
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    field = np.exp(0.4 * x - 0.3 * y * y)
    mask = volume.like(inside)
    plain, biased = correct_bias(volume, mask), correct_bias(volume.like(volume.voxels * field), mask)
    left = np.log(biased.voxels[inside] / plain.voxels[inside])
    assert left.std() < 0.25 * np.log(field[inside]).std()
    assert (biased.voxels[~inside] == 0).all()


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_registration_recovers_a_known_map(kind: str) -> None:
    template = load_template(None, Recipe(spacing=4.0))
    known = np.eye(4)
    known[:3, :3] = Rotation.from_euler("xyz", [12, -7, 9], degrees=True).as_matrix()
    if kind == "affine":
        known[:3, :3] @= np.diag([0.9, 0.95, 0.85])
    known[:3, 3] = [8, -12, 15]  # template's mm -> scan's mm
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -130
    moved, mask = (resample(v, affine, (90, 90, 90), np.linalg.inv(known)) for v in (template.brain, template.mask))
    found = register(moved, mask.like(mask.voxels > 0.5), template, kind)
    points = np.array([[-60, -20, 0, 1], [60, -20, 10, 1], [0, 60, 20, 1], [0, -90, 10, 1], [0, 0, 70, 1.0]]).T
    assert np.abs((found - known) @ points).max() < 2.0  # mm; half a voxel of the working grid


def test_the_transform_file_maps_points_as_the_matrix_does(tmp_path: Path) -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() * 1.1
    matrix[:3, 3] = [1, -2, 3]
    (tmp_path / "x.mat").write_bytes(transform_bytes(matrix))
    transform = ants_library().read_transform(str(tmp_path / "x.mat"))
    point = np.array([10.0, 20.0, 30.0, 1.0])  # LPS
    assert np.allclose(transform.apply_to_point(point[:3]), (FLIP @ matrix @ FLIP @ point)[:3], atol=1e-5)


def test_tissue_maps_sum_to_one_and_match_the_truth() -> None:
    volume, truth = phantom(0, (96, 96, 96))  # 2 mm
    inside = volume.voxels > 0
    mask = volume.like(inside)
    maps = tissue_maps(correct_bias(volume, mask), mask)
    assert np.allclose(sum(m.voxels for m in maps.values())[inside], 1, atol=1e-5)
    assert all((m.voxels[~inside] == 0).all() for m in maps.values())
    guess = np.stack([maps[t].voxels for t in ("CSF", "GM", "WM")]).argmax(0)
    real = np.stack([truth.csf, truth.grey, truth.white]).argmax(0)
    for number, least in enumerate((0.55, 0.75, 0.85)):
        assert dice(inside & (guess == number), inside & (real == number)) > least


def test_an_extracted_brain_is_recognised_and_a_head_is_not(brain: tuple[Volume, Tissues]) -> None:
    volume, _ = brain
    found = extracted_mask(volume)
    assert found is not None
    assert dice(found.voxels > 0, volume.voxels > 0) > 0.99
    shifted = volume.like(np.where(volume.voxels > 0, volume.voxels, -1024))
    assert extracted_mask(shifted) is not None
    neck = volume.voxels.copy()
    neck[18:30, 16:28, :16] = 500  # reaches the lower face
    neck[4:44, 2:46, 6:40] += 300
    assert extracted_mask(volume.like(neck)) is None


def test_two_brains_in_one_file_are_refused(brain: tuple[Volume, Tissues]) -> None:
    """Above or beside each other; a scalp around a brain, and a small island, are one scan."""
    volume, _ = brain
    for axis in range(3):
        with pytest.raises(ValueError, match="two objects side by side, one 100% as large as the other"):
            extracted_mask(volume.like(np.concatenate([volume.voxels, volume.voxels], axis)))
    inside = np.pad(volume.voxels, 8)
    near, far = (ndimage.binary_dilation(inside > 0, iterations=n) for n in (2, 5))
    assert extracted_mask(volume.like(np.where(far & ~near, 500, inside))) is None
    inside[1:5, 1:30, 1:30] = 500
    assert extracted_mask(volume.like(inside)) is None


def test_what_is_no_brain_after_extraction_is_not_sent_back_to_it(
    brain: tuple[Volume, Tissues], tmp_path: Path
) -> None:
    """A wrong voxel size: the network finds a brain of 3,000 ml."""
    large = Volume(brain[0].voxels, np.diag([1.3, 1.3, 1.3, 1.0]) @ brain[0].affine)
    path = save(tmp_path / "scan.nii.gz", large)
    with pytest.raises(ValueError, match=r"are too many for a brain.*so it is after brain extraction") as error:
        preprocess_scan(path, QUICK, None, lambda scan: scan.like(scan.voxels > 0))
    assert "shards preprocess" not in str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_formats_of_one_volume_read_alike(tmp_path: Path, brain: tuple[Volume, Tissues]) -> None:
    volume, _ = brain
    voxels = volume.voxels.astype(np.int16)
    expected = read(save(tmp_path / "a.nii.gz", volume))
    nib.save(nib.MGHImage(voxels.astype(np.int32), volume.affine), tmp_path / "b.mgz")
    nib.save(nib.Nifti1Pair(voxels, volume.affine), tmp_path / "c.hdr")
    for name in ("b.mgz", "c.hdr", "c.img"):
        found = read(tmp_path / name)
        assert np.array_equal(found.voxels, expected.voxels)
        assert np.allclose(found.affine, expected.affine, atol=1e-5)
    (tmp_path / "c.img").unlink()
    with pytest.raises(ValueError, match=r"no \.img file beside it"):
        read(tmp_path / "c.hdr")
    nib.save(nib.AnalyzeImage(voxels, volume.affine), tmp_path / "d.hdr")
    with pytest.raises(ValueError, match="Analyze format"):
        read(tmp_path / "d.img")


# --- the derivative --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people, one of them with a follow-up that is turned and brighter, and two faulty rows."""
    folder = tmp_path_factory.mktemp("source")
    first, second = phantom(0)[0], phantom(1)[0]
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", 15, degrees=True).as_matrix()
    save(folder / "sub-a" / "ses-1" / "anat" / "sub-a_ses-1_T1w.nii.gz", first)
    later = Volume(1.5 * first.voxels, turn @ first.affine)
    save(folder / "sub-a" / "ses-2" / "anat" / "sub-a_ses-2_T1w.nii.gz", later)
    save(folder / "sub-b" / "anat" / "sub-b_T1w.nii.gz", second)
    (folder / "sub-c" / "anat").mkdir(parents=True)
    (folder / "sub-c" / "anat" / "sub-c_T1w.nii.gz").write_bytes(b"no scan")
    (folder / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-a\t40\tF\nsub-b\t50\tM\nsub-c\t60\tM\nsub-d\t70\tM\n"
    )
    (folder / "sub-a" / "sub-a_sessions.tsv").write_text("session_id\tage\nses-1\t40\nses-2\t42\n")
    return folder


def test_what_begins_is_printed_before_anything_is_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loads(*arguments: object) -> None:
        raise DataError("loading")

    monkeypatch.setattr("shards.preprocess.run.load_template", loads)
    with pytest.raises(DataError, match="loading"):
        preprocess(source, tmp_path / "out", QUICK, workers=8)
    line = "preprocessing 4 scans of 3 subjects: brain, registration, tissue; to 4 mm; in 3 processes\n"
    assert capsys.readouterr().err == line


@pytest.fixture(scope="module")
def derivative(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derivative") / "out"
    summary = preprocess(source, out, QUICK, workers=1)
    assert (summary["processed"], summary["unchanged"], summary["rejected"]) == (3, 0, 2)
    return out


def test_bad_scans_are_listed_and_stop_nothing(derivative: Path) -> None:
    lines = (derivative / "rejected.tsv").read_text().splitlines()
    assert lines[0] == "line\tkey\treason"
    assert lines[1].startswith("4\tsub-c\tnot a NIfTI file")
    assert lines[2].startswith("5\tsub-d\tno file: image; there is no folder sub-d")


def test_all_results_are_on_the_grid_of_the_template(derivative: Path) -> None:
    template = load_template(None, QUICK)
    anat = derivative / "sub-b" / "anat"
    for name in ("desc-preproc_T1w", "desc-brain_mask", "label-GM_probseg", "label-WM_probseg", "label-CSF_probseg"):
        image = nib.load(anat / f"sub-b_space-{SPACE}_{name}.nii.gz")
        assert image.shape == template.brain.voxels.shape
        assert np.allclose(image.affine, template.brain.affine)
    sidecar = json.loads((anat / f"sub-b_space-{SPACE}_desc-preproc_T1w.json").read_text())
    assert Recipe.from_dict(sidecar["Recipe"]) == QUICK
    assert sidecar["BrainExtraction"] == "none"
    assert sidecar["Figures"]["affine_overlap"] > 0.9


def test_a_follow_up_lies_on_its_first_session(derivative: Path) -> None:
    """The same brain, turned by 15 degrees, comes to lie where it lay."""
    first, later = (
        read(derivative / "sub-a" / s / "anat" / f"sub-a_{s}_space-{SPACE}_desc-preproc_T1w.nii.gz").voxels
        for s in ("ses-1", "ses-2")
    )
    both = (first > 0) & (later > 0)
    assert dice(first > 0, later > 0) > 0.97
    assert np.corrcoef(first[both], later[both])[0, 1] > 0.95


def test_workers_do_not_change_a_bit(source: Path, derivative: Path, tmp_path: Path) -> None:
    preprocess(source, tmp_path / "out", QUICK, workers=2)
    assert hashes(tmp_path / "out") == hashes(derivative)


def test_only_what_changed_is_done_again(source: Path, derivative: Path, tmp_path: Path) -> None:
    scans, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, scans)
    shutil.copytree(derivative, out)
    new: list[int] = []
    summary = preprocess(scans, out, QUICK, workers=1, on_scans=new.append)
    assert (summary["processed"], summary["unchanged"], new) == (0, 3, [])
    assert hashes(out) == hashes(derivative)
    save(scans / "sub-b" / "anat" / "sub-b_T1w.nii.gz", phantom(2)[0])
    next((out / "sub-a" / "ses-2" / "anat").glob("*GM*")).unlink()  # as after an interruption
    summary = preprocess(scans, out, QUICK, workers=1, on_scans=new.append)
    assert (summary["processed"], summary["unchanged"], new) == (2, 1, [1, 1])
    before, after = hashes(derivative), hashes(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.startswith("sub-b/") for name in changed)


PLAIN = Recipe(steps=("brain",))


def test_a_complete_derivative_of_other_settings_is_left_alone(
    source: Path, derivative: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(derivative, out)
    steps = ["--steps", "brain", "--spacing", "2", "--workers", "1"]
    assert main(["preprocess", str(source), str(out), *steps]) == 2
    found = "steps brain registration tissue there, brain now; spacing 4 mm there, 2 mm now"
    assert f"{out} is complete, with other settings: {found}; choose another folder" in capsys.readouterr().err
    assert hashes(out) == hashes(derivative)
    (out / "dataset_description.json").unlink()  # as after an interruption
    assert preprocess(source, out, PLAIN, workers=1)["processed"] == 3
    assert not list(out.rglob("*space-*"))  # of the recipe before


def test_a_derivative_of_another_contrast_is_left_alone(source: Path, derivative: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(derivative, out)
    with pytest.raises(DataError, match="out is complete, with other settings: suffix T1w there, T2w now"):
        preprocess(source, out, QUICK, suffix="T2w", workers=1)
    assert hashes(out) == hashes(derivative)


def test_a_follow_up_is_registered_again_where_the_mask_of_its_first_session_changed(
    source: Path, tmp_path: Path
) -> None:
    recipe = Recipe(steps=("brain", "registration"), brain="mask", spacing=4.0)
    scans, out, new = tmp_path / "scans", tmp_path / "out", tmp_path / "new"
    shutil.copytree(source / "sub-a", scans / "sub-a")
    (scans / "participants.tsv").write_text("participant_id\nsub-a\n")
    for session in ("ses-1", "ses-2"):
        anat = scans / "sub-a" / session / "anat"
        image = read(anat / f"sub-a_{session}_T1w.nii.gz")
        inside = Volume((image.voxels > 0).astype(np.float32), image.affine)
        save(anat / f"sub-a_{session}_desc-brain_mask.nii.gz", inside)
    preprocess(scans, out, recipe, workers=1, keep_suspect=True)
    first = next(scans.rglob("*ses-1*mask.nii.gz"))
    mask = read(first)
    save(first, Volume(ndimage.binary_erosion(mask.voxels > 0, iterations=2).astype(np.float32), mask.affine))
    preprocess(scans, out, recipe, workers=1, keep_suspect=True)
    preprocess(scans, new, recipe, workers=1, keep_suspect=True)
    assert hashes(out) == hashes(new)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_that_cannot_be_written_are_no_fault_of_a_scan(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """As on a full disk. The run ends, and the same command goes on later."""
    out = tmp_path / "out"
    obstacle = out / "sub-b" / "anat"
    obstacle.parent.mkdir(parents=True)
    (out / ".preprocess.lock").touch()
    obstacle.touch()
    command = ["preprocess", str(source), str(out), "--steps", "brain", "--workers", str(workers)]
    assert main(command) == 2
    assert "sub-b/anat" in capsys.readouterr().err
    assert not (out / "rejected.tsv").exists() and not (out / "dataset_description.json").exists()
    obstacle.unlink()
    assert main(command) == 0
    rejected = (out / "rejected.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in rejected] == ["sub-c", "sub-d"]


@pytest.mark.parametrize("kind", ["bids", "csv"])
def test_an_update_is_what_a_new_derivative_would_be(source: Path, tmp_path: Path, kind: str) -> None:
    """Of scans, sessions, values and descriptions that were withdrawn nothing stays, and nothing is packed."""
    scans, table, out, new = tmp_path / "scans", tmp_path / "scans.csv", tmp_path / "out", tmp_path / "new"
    shutil.copytree(source, scans)
    images = {path.name.removesuffix("_T1w.nii.gz"): path for path in scans.rglob("sub-[ab]*_T1w.nii.gz")}
    later, other = images["sub-a_ses-2"], images["sub-b"]
    lines = ["participant_id,session_id,path,age,sex", f"a,1,{images['sub-a_ses-1']},40,F", f"b,,{other},50,M"]
    table.write_text("\n".join([*lines, f"a,2,{later},42,F"]) + "\n")
    (scans / "participants.json").write_text("{}")
    chosen = scans if kind == "bids" else table
    options = {"workers": 1, "files_root": tmp_path if kind == "csv" else None}
    preprocess(chosen, out, PLAIN, **options)
    table.write_text("\n".join(lines) + "\n")
    (scans / "participants.json").unlink()
    (scans / "sub-a" / "sub-a_sessions.tsv").unlink()
    for path in (later, other):
        path.unlink()
    (out / "sub-a" / "ses-1" / "anat" / ".sub-a_ses-1_desc-preproc_T1w.json.7.part").write_bytes(b"half")
    notes = preprocess(chosen, out, PLAIN, **options)["notes"]
    assert "old results of 2 scans, which the source no longer gives, were removed" in notes
    preprocess(chosen, new, PLAIN, **options)
    assert hashes(out) == hashes(new) and len(list(out.rglob("*"))) == len(list(new.rglob("*")))
    pack(out, tmp_path / "packed", spacing=8.0, shape=(24, 24, 24), max_rejects="80%", fractions=(0, 0, 1), workers=1)
    (record,) = open_dataset(tmp_path / "packed").index.records
    assert (record.key, record.values["age"]) == ("sub-a_ses-1", 40.0)


def test_an_unfinished_derivative_is_not_packed(source: Path, tmp_path: Path) -> None:
    """Two recipes are interrupted: the folder mixes scans of both, and only another run of it makes it usable."""
    out, options = tmp_path / "out", {"workers": 1, "keep_suspect": True}
    preprocess(source, out, Recipe(steps=("brain",), brain="none"), **options)
    (out / "dataset_description.json").unlink()

    def interrupted(job: Job, subjects: Sequence[list[Row]]) -> Iterator[list[Outcome]]:
        yield from map(Worker(job), subjects[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(source, out, PLAIN, map_subjects=interrupted, **options)
    with pytest.raises(DataError, match="out: an unfinished derivative; run the same `shards preprocess` again"):
        pack(out, tmp_path / "packed", spacing=8.0, shape=(24, 24, 24), workers=1)
    assert preprocess(source, out, PLAIN, **options)["unchanged"] == 2
    assert read_derivative(out) == (PLAIN, None)


class Call:
    """A value that calls a function in the process which gets it."""

    def __init__(self, function: Callable[..., object], argument: float) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def test_a_killed_process_rejects_its_own_subject_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on in parallel, in few new processes."""
    calls = [Call(os._exit, 9) if i == 3 else Call(time.sleep, 0.2) for i in range(12)]
    subjects = [[Row(i, f"sub-{i}", f"sub-{i}", "", "", {"age": call}, {})] for i, call in enumerate(calls)]
    job, start, pools = Job(tmp_path, PLAIN, "T1w", None, None, "cpu"), pool.process_pool, []

    def counted(workers: int, *arguments: object) -> object:
        pools.append(workers)
        return start(workers, *arguments)

    monkeypatch.setattr(pool, "process_pool", counted)
    outcomes = {outcome.key: outcome.reason for found in pool.map_processes(job, subjects, 2) for outcome in found}
    assert outcomes == {f"sub-{i}": pool.KILLED if i == 3 else "no file *_T1w" for i in range(12)}
    assert len(pools) <= 4 and pools.count(1) <= 2


def test_another_folder_is_not_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than a derivative"):
        preprocess(source, tmp_path, QUICK)
    with pytest.raises(DataError, match="is the source"):
        preprocess(source, source, QUICK)


def test_a_csv_becomes_tables_that_pack_reads(source: Path, tmp_path: Path) -> None:
    table = tmp_path / "scans.csv"
    scans = sorted(source.rglob("sub-[ab]*_T1w.nii.gz"))
    rows = [f"a,1,{scans[0]},40,F", f"a,2,{scans[1]},,F", f"b,,{scans[2]},50,M"]
    table.write_text("\n".join(["participant_id,session_id,path,age,sex", *rows]) + "\n")
    out, packed = tmp_path / "out", tmp_path / "packed"
    preprocess(table, out, dataclasses.replace(QUICK, steps=("brain",)), workers=1, files_root=source)
    pack(out, packed, spacing=8.0, shape=(24, 24, 24), fractions=(0, 0, 1), workers=1)
    values = {r.key: r.values for r in open_dataset(packed).index.records}
    assert values == {
        "sub-a_ses-1": {"age": 40.0, "sex": "F"},
        "sub-a_ses-2": {"age": None, "sex": "F"},
        "sub-b": {"age": 50.0, "sex": "M"},
    }


def test_given_masks_are_used(brain: tuple[Volume, Tissues], tmp_path: Path) -> None:
    volume, _ = brain
    half = volume.like(volume.voxels > 0)
    half.voxels[:24] = 0
    anat = tmp_path / "source" / "sub-a" / "anat"
    save(anat / "sub-a_T1w.nii.gz", volume)
    save(anat / "sub-a_desc-brain_mask.nii.gz", half)
    (tmp_path / "source" / "participants.tsv").write_text("participant_id\nsub-a\n")
    preprocess(
        tmp_path / "source", tmp_path / "out", Recipe(steps=("brain",), brain="mask"), workers=1, keep_suspect=True
    )
    image = read(tmp_path / "out" / "sub-a" / "anat" / "sub-a_desc-preproc_T1w.nii.gz").voxels
    assert np.array_equal(image, np.where(half.voxels > 0, volume.voxels, 0))


def test_ray_gives_the_same_bits(source: Path, derivative: Path, tmp_path: Path) -> None:
    """The stage with several workers, whose subjects Ray distributes."""
    values = {"source": str(source), "out": str(tmp_path / "out"), "steps": list(QUICK.steps), "spacing": QUICK.spacing}
    config = load_config(PreprocessConfig, "preprocess", "default", ["compute.workers=2"], values)
    summary = execute(plan("preprocess", config))
    assert (summary["processed"], summary["rejected"]) == (3, 2)
    assert hashes(tmp_path / "out") == hashes(derivative)


def test_ray_gives_the_error_of_a_disk_as_it_is(source: Path, tmp_path: Path) -> None:
    """Not with all frames of Ray and of the actor."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".preprocess.lock").touch()
    (out / "sub-b").touch()  # where a folder should be
    with pytest.raises(OSError, match=r"^\[Errno 20\] Not a directory: '.*sub-b/anat'$"):
        preprocess(source, out, PLAIN, map_subjects=partial(map_subjects_by_ray, logs=tmp_path / "logs"))


def test_a_suspect_scan_is_rejected_or_kept_with_its_flags(brain: tuple[Volume, Tissues], tmp_path: Path) -> None:
    """A brain of half the size in each direction."""
    volume, _ = brain
    small = Volume(volume.voxels, np.diag([0.5, 0.5, 0.5, 1.0]) @ volume.affine)
    save(tmp_path / "source" / "sub-a" / "anat" / "sub-a_T1w.nii.gz", small)
    with pytest.raises(DataError, match="a slab, or a part of a brain"):
        preprocess(tmp_path / "source", tmp_path / "out", QUICK, workers=1)
    preprocess(tmp_path / "source", tmp_path / "out", QUICK, workers=1, keep_suspect=True)
    pack(tmp_path / "out", tmp_path / "packed", schema="image-only", spacing=4.0, shape=(24, 28, 24), workers=1)
    record = open_dataset(tmp_path / "packed").index.records[0]
    assert record.figures["image.preprocess.brain.volume_ml"] == pytest.approx(
        record.figures["image.preprocess.volume_ml"], rel=0.1
    )
    assert "image.preprocess.brain.width_mm" in record.flags
    with pytest.raises(TooManyRejects, match="no scan could be processed"):  # what was kept is judged again
        preprocess(tmp_path / "source", tmp_path / "out", QUICK, workers=1)


@pytest.mark.parametrize("value", [-32768, 32767])
def test_a_dead_voxel_changes_itself_alone(brain: tuple[Volume, Tissues], tmp_path: Path, value: int) -> None:
    recipe = Recipe(steps=("brain", "bias", "tissue"))
    dead = brain[0].voxels.copy()
    dead[24, 24, 24] = value
    results = [
        preprocess_scan(save(tmp_path / f"{i}.nii", brain[0].like(voxels)), recipe, None, None)
        for i, voxels in enumerate((brain[0].voxels, dead))
    ]
    inside = results[0].mask.voxels > 0
    assert results[1].flags == results[0].flags and (results[0].mask.voxels == results[1].mask.voxels).all()
    for name in ("GM", "WM", "CSF"):
        a, b = (result.tissue[name].voxels[inside] for result in results)
        assert np.abs(a - b).mean() < 0.01
    a, b = (result.image.voxels[inside] for result in results)
    assert np.corrcoef(a, b)[0, 1] > 0.99 and abs(np.median(a) / np.median(b) - 1) < 0.02


def test_a_recipe_with_a_template_of_its_own_needs_its_file(source: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, template="0" * 64)
    with pytest.raises(DataError, match=r"template file with SHA-256 0000.*--template"):
        preprocess(source, tmp_path / "out", recipe, workers=1)
    (tmp_path / "other.nii").write_bytes(b"x")
    with pytest.raises(DataError, match=r"other.nii: SHA-256 is .*, that of the recipe's template 0000"):
        preprocess(source, tmp_path / "out", recipe, workers=1, template=tmp_path / "other.nii")
    with pytest.raises(DataError, match=r"--template .*none.nii: No such file or directory; give a brain-extracted"):
        preprocess(source, tmp_path / "out", QUICK, workers=1, template=tmp_path / "none.nii")


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_pack_takes_a_derivative_as_it_lies(derivative: Path, tmp_path: Path, storage: str) -> None:
    """At the derivative's spacing nothing is interpolated: voxels and maps are those of its files, to the bit."""
    out = tmp_path / "packed"
    shape = (24, 28, 24)
    pack(derivative, out, storage=storage, spacing=4.0, shape=shape, max_rejects="50%", fractions=(0, 0, 1), workers=1)
    data = open_dataset(out)
    assert data.index.provenance["recipe"] == QUICK.to_dict()
    assert data.index.grid["space"] == SPACE
    anat = derivative / "sub-b" / "anat"
    stem = f"sub-b_space-{SPACE}"
    image = nib.load(anat / f"{stem}_desc-preproc_T1w.nii.gz")
    start = np.linalg.solve(image.affine, np.array(data.index.grid["affine"]))[:3, 3]
    assert np.allclose(start, np.rint(start), atol=1e-4)
    box = tuple(slice(round(s), round(s) + n) for s, n in zip(start, shape))
    voxels = image.get_fdata()
    stored = data.read("sub-b", "image").astype(np.float64)
    linear = (stored > 0.01) & (stored < 1)  # the rescaling clips the rest
    assert linear.sum() > 5000
    assert np.corrcoef(voxels[box][linear], stored[linear])[0, 1] > 0.99999
    for tissue in ("GM", "WM", "CSF"):
        probability = nib.load(anat / f"{stem}_label-{tissue}_probseg.nii.gz").get_fdata()[box]
        assert np.array_equal(data.read("sub-b", f"image_{tissue}"), np.rint(255 * probability).astype(np.uint8))


def test_a_missing_map_rejects_the_row(derivative: Path, tmp_path: Path) -> None:
    copy = tmp_path / "derivative"
    shutil.copytree(derivative, copy)
    next((copy / "sub-b").rglob("*label-GM*")).unlink()
    pack(copy, tmp_path / "packed", spacing=8.0, shape=(20, 24, 20), max_rejects="75%", fractions=(0, 0, 1), workers=1)
    assert "sub-b\timage: no map *_label-GM_probseg.nii.gz" in (tmp_path / "packed" / "rejected.tsv").read_text()


def test_the_reasons_of_the_preprocessing_are_kept(source: Path, derivative: Path, tmp_path: Path) -> None:
    """Also of a person all of whose sessions were rejected; a name in a reason gets no further than it did."""
    scans, out, key = tmp_path / "scans", tmp_path / "derivative", tmp_path / "key"
    shutil.copytree(source, scans)
    shutil.copytree(derivative, out)
    for path in scans.glob("sub-a/ses-*/anat/*.nii.gz"):
        path.write_bytes(b"no scan")
    preprocess(scans, out, QUICK, workers=1)
    options = {"spacing": 8.0, "shape": (20, 24, 20), "max_rejects": "75%", "fractions": (0, 0, 1)}
    pack(out, tmp_path / "packed", **options)
    listed = (tmp_path / "packed" / "rejected.tsv").read_text().splitlines()[1:]
    assert listed[0] == "2\tsub-a\tpreprocessing: not a NIfTI file, nor one of FreeSurfer (.mgz)"
    assert listed[1] == listed[0].replace("2\tsub-a", "4\tsub-c")
    assert listed[2].startswith("5\tsub-d\tpreprocessing: no file: image; there is no folder sub-d")
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    table = out / "rejected.tsv"
    table.write_text(table.read_text().replace("not a NIfTI file", "Doe_Jane.nii.gz is no scan, Doe"))
    pack(out, tmp_path / "hidden", **options, pseudonymise=key)
    hidden = (tmp_path / "hidden" / "rejected.tsv").read_text()
    assert hidden.count("\tpreprocessing [pseudonymised: ") == 2 and "Doe" not in hidden and "sub-c" not in hidden


def test_a_missing_sidecar_is_listed_without_its_name(derivative: Path, tmp_path: Path) -> None:
    copy, out, key = tmp_path / "derivative", tmp_path / "packed", tmp_path / "key"
    shutil.copytree(derivative, copy)
    next((copy / "sub-b").rglob("*_T1w.json")).unlink()
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    options = {"spacing": 8.0, "shape": (20, 24, 20), "max_rejects": "75%", "fractions": (0, 0, 1)}
    pack(copy, out, **options, pseudonymise=key)
    assert "image: no usable sidecar beside it" in (out / "rejected.tsv").read_text()
    assert not [path for path in out.rglob("*") if path.is_file() and b"sub-b_" in path.read_bytes()]


def test_a_figure_that_is_no_number_rejects_its_scan_alone(derivative: Path, tmp_path: Path) -> None:
    copy = tmp_path / "derivative"
    shutil.copytree(derivative, copy)
    sidecar = copy / "sub-b" / "anat" / f"sub-b_space-{SPACE}_desc-preproc_T1w.json"
    content = json.loads(sidecar.read_text())
    content["Figures"]["affine_overlap"] = float("inf")
    sidecar.write_text(json.dumps(content))
    pack(copy, tmp_path / "packed", spacing=8.0, shape=(20, 24, 20), max_rejects="75%", fractions=(0, 0, 1), workers=1)
    reason = "sub-b\timage: the figure preprocess.affine_overlap of quality control is inf"
    assert reason in (tmp_path / "packed" / "rejected.tsv").read_text()


def test_a_pipeline_preprocesses_before_it_packs(
    source: Path, derivative: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "study"
    changes = {
        "root": str(root),
        "source": str(source),
        "preprocess_source": True,
        "preprocess": {"steps": list(QUICK.steps), "spacing": QUICK.spacing, "workers": 1},
        "pack": {"spacing": 8.0, "shape": [20, 24, 20], "max_rejects": "50%", "split": [0.5, 0.0, 0.5], "workers": 1},
    }
    pipeline = Pipeline(load_config(PipelineConfig, "pipeline", "default", (), changes))
    steps = list(pipeline.steps())
    assert [stage for stage, _ in steps][:3] == ["preprocess", "pack", "scalars"]
    for stage, config in steps[:2]:
        do(plan(stage, config))
    assert f"\nrejected 2: see {root / 'derivative' / 'rejected.tsv'}\n" in capsys.readouterr().err
    assert hashes(root / "derivative") == hashes(derivative)
    index = open_dataset(root / "packed").index
    assert index.provenance["recipe"] == QUICK.to_dict()
    assert set(index.arrays) == {"image", "image_GM", "image_WM", "image_CSF"}
    assert plan(*steps[0]).state() == "finished"
    shutil.rmtree(root / "derivative")
    preprocess(source, root / "derivative", PLAIN, workers=1)  # by another command
    assert plan(*steps[0]).state() == "changed"


# --- what is missing is found before work starts ---------------------------------------------------------------------


def test_a_missing_package_is_named_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "ants" else object())
    assert main(["preprocess", str(source), str(tmp_path / "out")]) == 2
    assert "package antspyx is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_are_checked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    weights = tmp_path / "weights.zip"
    weights.write_bytes(b"weights")
    recipe = Recipe(brain="hd-bet", weights="0" * 64)
    for given, file, message in (
        (recipe, None, "no file of weights"),
        (recipe, weights, "do not use this file"),
        (dataclasses.replace(recipe, weights=""), weights, "give the SHA-256"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess(source, tmp_path / "out", given, weights=file)
    assert not (tmp_path / "out").exists()


def test_recipes_read_back_and_refuse_unknown_words() -> None:
    assert Recipe.from_dict(json.loads(json.dumps(QUICK.to_dict()))) == QUICK
    for wrong in ({"steps": ("brian",)}, {"brain": "bet"}, {"registration": "syn"}):
        with pytest.raises(DataError, match=r"Did you mean|Known"):
            Recipe(**wrong)


# --- real scans ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (REAL / "heads").is_dir(), reason="needs real heads (shared/data/heads)")
def test_deepbet_finds_the_brain_of_a_real_head(tmp_path: Path) -> None:
    pytest.importorskip("deepbet")
    name = Path("sub-IXI012/anat/sub-IXI012_T1w.nii.gz")
    table = tmp_path / "scans.csv"
    table.write_text(f"participant_id,path\nsub-IXI012,{REAL / 'heads' / name}\n")
    preprocess(table, tmp_path / "out", Recipe(steps=("brain",)), device="cpu", workers=1, files_root=REAL)
    mask = read(tmp_path / "out" / "sub-IXI012" / "anat" / "sub-IXI012_desc-brain_mask.nii.gz").voxels > 0
    assert dice(mask, read(REAL / "ixi" / name).voxels > 0) > 0.93
