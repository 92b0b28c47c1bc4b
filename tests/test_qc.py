"""Quality control: what is no whole, upright, brain-extracted T1w brain is found, for the right reason."""

import dataclasses
import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from shards.__main__ import main
from shards.index import Index, Record
from shards.nifti import read
from shards.pack import pack
from shards.phantom.anatomy import draw_anatomy
from shards.phantom.brain import Tissues, render_tissues, spacing
from shards.phantom.make import T1W, T2W, draw_subject, render_image
from shards.qc.figures import measure
from shards.qc.limits import LIMITS, explain, verdict, violated
from shards.qc.registered import compare
from shards.qc.wording import FIGURES, flag_words
from shards.volumes import canonical

SHAPE, MM = (40, 48, 40), 4.0
AFFINE = np.diag([MM, MM, MM, 1.0])


@pytest.fixture(scope="module")
def tissues() -> Tissues:
    rng = np.random.default_rng(3)
    return render_tissues(draw_anatomy(rng, 45.0, "F"), rng, SHAPE)


@pytest.fixture(scope="module")
def brain(tissues: Tissues) -> np.ndarray:
    return render_image(tissues, np.random.default_rng(1), T1W).astype(np.float32)


def failed(voxels: np.ndarray, affine: np.ndarray = AFFINE, contrast: str = "T1w", head: bool = False) -> set[str]:
    """Figures whose limits a volume violates."""
    figures = measure(np.ascontiguousarray(voxels, np.float32), affine)
    return {limit.figure for limit in violated(figures, contrast, head)}


def sphere(radius: float, centre: tuple[float, float, float] = (0, 0, 0), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Whether voxels lie within ``radius`` mm of ``centre`` (mm from the middle)."""
    x = [(np.arange(n) - (n - 1) / 2) * MM - c for n, c in zip(shape, centre)]
    return sum(u**2 for u in np.ix_(*x)) < radius**2


def head(brain: np.ndarray, noise: float) -> np.ndarray:
    """A brain in skull and scalp, with a neck that leaves the image, 32 mm more on each side."""
    inside = np.pad(ndimage.binary_fill_holes(brain > 0), 8)
    distance = ndimage.distance_transform_edt(~inside, sampling=MM)
    voxels = np.pad(brain, 8)
    bright = float(np.percentile(brain[brain > 0], 90))
    voxels[(distance > 8) & (distance < 18)] = 1.2 * bright  # fat
    x, y, z = np.ogrid[tuple(slice(n) for n in voxels.shape)]
    neck = ((x - voxels.shape[0] / 2) ** 2 + (y - voxels.shape[1] / 2) ** 2 < 13**2) & (z < 14) & (distance > 8)
    voxels[neck & (voxels == 0)] = 0.6 * bright
    air = np.abs(np.random.default_rng(0).normal(0, noise * bright, voxels.shape))
    return np.where(voxels > 0, voxels, air).astype(np.float32)


# --- brains pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 16), (24, 24, 24), (32, 32, 32), (40, 48, 40)])
def test_phantoms_of_every_size_pass(shape: tuple[int, int, int]) -> None:
    step = spacing(shape)
    for i in range(3):
        figures = measure(draw_subject(0, i, shape)[3].astype(np.float32), np.diag([step, step, step, 1]))
        assert verdict(figures) == [] and violated(figures, rejects=False) == []


def test_volume_is_that_of_the_head(tissues: Tissues, brain: np.ndarray) -> None:
    truth = float(sum(part.sum() for part in (tissues.csf, tissues.grey, tissues.white))) * MM**3 / 1000
    assert measure(brain, AFFINE)["volume_ml"] == pytest.approx(truth, rel=0.05)


def test_scale_offset_and_empty_space_change_nothing(brain: np.ndarray) -> None:
    expected = measure(brain, AFFINE)
    for other in (brain * np.float32(0.01), brain + np.float32(64), np.pad(brain, 5)):
        assert measure(other, AFFINE) == pytest.approx(expected, rel=0.01, abs=0.005)


def test_order_of_axes_in_the_file_changes_nothing(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain, AFFINE)
    found = []
    for axes in ([[0, 1], [1, 1], [2, 1]], [[2, -1], [0, -1], [1, 1]], [[1, 1], [2, -1], [0, 1]]):
        nib.save(image.as_reoriented(np.array(axes)), tmp_path / "a.nii")
        found.append(canonical(tmp_path / "a.nii", 4.0, SHAPE).figures)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("degrees", [-20, -10, 10, 20])
@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_a_head_may_be_turned_in_the_scanner(brain: np.ndarray, axes: tuple[int, int], degrees: int) -> None:
    turned = ndimage.rotate(np.pad(brain, 6), degrees, axes=axes, reshape=False, order=1)
    assert failed(turned) == set()


def test_few_voxels_below_the_background_are_no_reason(brain: np.ndarray) -> None:
    """Ringing of an interpolation, and one dead voxel."""
    edge = ndimage.binary_dilation(brain > 0) & (brain == 0)
    ringing = np.where(edge & (np.random.default_rng(0).random(SHAPE) < 0.2), -0.1 * brain.max(), brain)
    ringing[20, 24, 20] = -32768
    assert failed(ringing) == set()


# --- other images do not ------------------------------------------------------------------------------------------


def _ct(brain: np.ndarray) -> np.ndarray:
    bone = ndimage.binary_dilation(brain > 0, iterations=2) & (brain == 0)
    return np.where(bone, 1000, np.where(brain > 0, 30 + brain / brain.max() * 10, -1000))


def _statistic(brain: np.ndarray) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1.5)
    return np.where(brain > 0, noise, 0)


def _labels(brain: np.ndarray) -> np.ndarray:
    """Tissues as numbers, each in voxels of 2 mm."""
    fine = brain.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return np.digitize(fine, np.percentile(brain[brain > 0], (0, 30, 70)))


def _slab(brain: np.ndarray) -> np.ndarray:
    return brain[:, :, 18:23]


def _vessels(brain: np.ndarray) -> np.ndarray:
    walks = np.random.default_rng(2).normal(size=(12, 3, 400)).cumsum(2) * 0.7 + np.array(SHAPE)[:, None] / 2
    points = np.clip(np.rint(walks), 1, np.array(SHAPE)[:, None] - 2).astype(int)
    tree = np.zeros(SHAPE)
    tree[tuple(np.concatenate(points, 1))] = 1
    return ndimage.gaussian_filter(tree, 0.4) * (ndimage.gaussian_filter(tree, 0.4) > 0.05)


OTHERS: list[tuple[str, Callable[[np.ndarray], np.ndarray], np.ndarray, str, str]] = [
    ("a CT", _ct, AFFINE, "hounsfield", "a CT, not MR"),
    ("a map of t values", _statistic, AFFINE, "negative", "a statistical map"),
    ("labels", _labels, np.diag([2.0, 2, 2, 1]), "flat", "a label map"),
    ("a slab", _slab, AFFINE, "height_mm", "a slab"),
    ("PET", lambda b: ndimage.gaussian_filter(np.pad(b, 8), 2.5), AFFINE, "blur", "PET"),
    ("vessels", _vessels, AFFINE, "compact", "vessels"),
    ("half as small", lambda b: b, np.diag([2.6, 2.6, 2.6, 1]), "volume_ml", "too few for a human brain"),
    ("too large", lambda b: b, np.diag([6.0, 6, 6, 1]), "volume_ml", "wrong voxel size"),
    ("upside down", lambda b: b[:, :, ::-1], AFFINE, "upright", "upside down"),
    ("back to front", lambda b: b[:, ::-1], AFFINE, "upright", "back to front"),
    ("axes exchanged", lambda b: b.transpose(0, 2, 1), AFFINE, "upright", "axes exchanged"),
    ("cut", lambda b: b[:, :, : np.flatnonzero(b.any((0, 1)))[-1] - 8], AFFINE, "cut", "cut by the border"),
    ("head with noise", lambda b: head(b, 0.03), AFFINE, "signal_outside", "run `shards preprocess`"),
    ("head in empty air", lambda b: head(b, 0.0), AFFINE, "gap", "a head with skull and scalp"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "affine", "figure", "words"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS]
)
def test_other_images_are_found(
    brain: np.ndarray, make: Callable[[np.ndarray], np.ndarray], affine: np.ndarray, figure: str, words: str
) -> None:
    figures = measure(np.ascontiguousarray(make(brain), np.float32), affine)
    assert figure in {limit.figure for limit in violated(figures)}
    assert words in "; ".join(verdict(figures))


def test_heads_are_taken_where_the_brain_is_extracted_later(brain: np.ndarray) -> None:
    for noise in (0.0, 0.03):
        assert failed(head(brain, noise)) and failed(head(brain, noise), head=True) == set()
    assert failed(_ct(brain), head=True) == {"hounsfield"}  # but not everything


def test_a_second_contrast_is_no_fault_where_the_schema_names_it(tissues: Tissues) -> None:
    t2w = render_image(tissues, np.random.default_rng(1), T2W)
    assert failed(t2w) == {"fluid"} and failed(t2w, contrast="T2w") == set()


def test_a_volume_without_cortex_is_kept_and_flagged() -> None:
    ball = np.where(sphere(60), 500 + np.arange(48)[None, :, None], 0).astype(np.float32)
    figures = measure(ball, AFFINE)
    assert verdict(figures) == [] and [limit.figure for limit in violated(figures, rejects=False)] == ["blur_inside"]


def test_every_limit_has_a_reason_that_formats_and_a_basis() -> None:
    for limit in LIMITS:
        assert limit.low < limit.high and limit.basis and limit.reason.format(0.5)
        assert "--" not in limit.reason  # it is a flag of answers too, whose readers do not pack


# --- after registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registration", ["affine", "rigid"])
def test_a_scan_that_fits_the_template(brain: np.ndarray, registration: Literal["affine", "rigid"]) -> None:
    mask, r = brain > 0, registration
    same = compare(brain * 3, mask, brain, mask, r)
    assert same == {f"{r}_covered": 1, f"{r}_overlap": 1, f"{r}_similarity": 1} and verdict(same) == []
    moved = np.roll(mask, 10, 0)
    shifted = compare(np.roll(brain, 10, 0), moved, brain, mask, r)
    common = (mask & moved).sum() / mask.sum()
    assert shifted[f"{r}_covered"] == shifted[f"{r}_overlap"] == pytest.approx(common, rel=1e-3)
    inverted = compare(-brain, mask, brain, mask, r)
    assert inverted[f"{r}_similarity"] == -1 and "not T1-weighted" in verdict(inverted)[0]
    assert verdict(inverted, "T2w") == []
    assert compare(brain, ~mask, brain, mask, r)[f"{r}_covered"] == 0
    with pytest.raises(ValueError, match="different shapes"):
        compare(brain, mask, brain[1:], mask, r)
    with pytest.raises(ValueError, match="empty"):
        compare(brain, mask, brain, mask & ~mask, r)


# --- packing ------------------------------------------------------------------------------------------------------


def table(folder: Path, volumes: dict[str, np.ndarray]) -> Path:
    """A CSV of scans."""
    folder.mkdir()
    for name, voxels in volumes.items():
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), AFFINE), folder / f"{name}.nii.gz")
    rows = "".join(f"{name},{name}.nii.gz,40,F\n" for name in volumes)
    (folder / "t.csv").write_text(f"participant_id,path,age,sex\n{rows}")
    return folder / "t.csv"


def test_suspects_are_rejected_or_kept_with_a_flag(
    tmp_path: Path, brain: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in", {"good": brain, "turned": brain[:, :, ::-1], "ct": _ct(brain)})
    command = ["pack", str(source), "--spacing", "4", "--shape", *map(str, SHAPE), "--workers", "1"]
    assert main([*command[:2], str(tmp_path / "a"), *command[2:], "--max-rejects", "2"]) == 0
    index = Index.load(tmp_path / "a")
    assert [r.key for r in index.records] == ["sub-good"] and index.records[0].flags == []
    assert index.records[0].figures["image.volume_ml"] == measure(brain, AFFINE)["volume_ml"]
    lines = (tmp_path / "a" / "rejected.tsv").read_text().splitlines()
    assert "sub-turned\timage: stored upside down" in lines[1] and "sub-ct\timage: a CT, not MR" in lines[2]
    assert main([*command[:2], str(tmp_path / "b"), *command[2:], "--keep-suspect"]) == 0
    flags = {r.key: r.flags for r in Index.load(tmp_path / "b").records}
    assert flags == {"sub-good": [], "sub-turned": ["image.upright"], "sub-ct": ["image.hounsfield"]}
    assert "quality control flags 2 of the packed rows" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "2 records by quality control: image.upright 1, image.hounsfield 1" in capsys.readouterr().out


def test_an_index_from_before_quality_control_loads(tmp_path: Path, brain: np.ndarray) -> None:
    pack(table(tmp_path / "in", {"a": brain}), tmp_path / "out", spacing=8.0, shape=(24, 28, 24))
    stored = dataclasses.asdict(Index.load(tmp_path / "out").records[0])
    old = {k: v for k, v in stored.items() if k not in {"figures", "flags"}}
    record = Record(**old)
    assert (record.figures, record.flags) == ({}, [])
    assert dataclasses.asdict(record) | {"figures": stored["figures"]} == stored


@pytest.mark.parametrize("value", [-32768, 32767, 1e9])
@pytest.mark.parametrize("outliers", [1, 100, 250])
def test_dead_voxels_change_themselves_alone(tmp_path: Path, brain: np.ndarray, value: float, outliers: int) -> None:
    nib.save(nib.Nifti1Image(brain, AFFINE), tmp_path / "good.nii")
    dead = brain.copy()
    inside = np.argwhere(brain > 0)
    chosen = np.random.default_rng(0).choice(len(inside), outliers, replace=False)
    dead[tuple(inside[chosen].T)] = value
    nib.save(nib.Nifti1Image(dead, AFFINE), tmp_path / "dead.nii")
    good, other = (canonical(tmp_path / f"{n}.nii", 4.0, SHAPE) for n in ("good", "dead"))
    assert verdict(other.figures) == []
    flags = [limit.figure for limit in violated(other.figures, rejects=False)]
    assert flags == ["outliers"] * (other.figures["outliers"] > 0.001) and other.figures["outliers"] < 0.02
    assert (np.abs(good.voxels.astype(float) - other.voxels.astype(float)) > 5e-3).sum() <= outliers


def spiked(brain: np.ndarray, value: float, share: float) -> np.ndarray:
    """A copy of which this share of the voxels have that value."""
    inside = np.argwhere(brain > 0)
    chosen = np.random.default_rng(0).choice(len(inside), int(share * len(inside)), replace=False)
    voxels = brain.copy()
    voxels[tuple(inside[chosen].T)] = value
    return voxels


def test_outliers_that_spoil_the_contrast_are_named(tmp_path: Path, brain: np.ndarray) -> None:
    many = measure(spiked(brain, 1e6, 0.04), AFFINE)
    assert verdict(many)[0].startswith("4.0% of the voxels are far brighter or darker than tissue")
    near = measure(spiked(brain, 3 * brain.max(), 0.015), AFFINE)  # near enough to tissue to be of the range
    assert verdict(near) == [] and [limit.figure for limit in violated(near, rejects=False)] == ["peak"]
    nib.save(nib.Nifti1Image(spiked(brain / 2, 1e6, 0.07), AFFINE), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"^\d+ voxels are 1e\+06, and the other \d+ differ a thousand times less"):
        canonical(tmp_path / "a.nii", 4.0, SHAPE)


@pytest.mark.parametrize(("degrees", "rejects"), [(0, False), (5, False), (27, True)])
@pytest.mark.parametrize("name", ["a.nii", "a.mgz"])
def test_sheared_axes_are_flagged_or_rejected(
    tmp_path: Path, brain: np.ndarray, name: str, degrees: float, rejects: bool
) -> None:
    angle, sheared = np.radians(degrees), AFFINE.copy()
    sheared[:2, 1] = MM * np.sin(angle), MM * np.cos(angle)
    image = nib.Nifti1Image(brain, turned(30) @ sheared)
    image.set_qform(None, 0)  # it cannot hold such axes
    nib.save(image if name == "a.nii" else nib.MGHImage(brain, image.affine), tmp_path / name)
    figures = read(tmp_path / name).header
    assert figures["shear_degrees"] == pytest.approx(degrees, abs=1e-3)
    assert [limit.figure for limit in violated(figures, rejects=False)] == ["shear_degrees"] * (degrees > 0)
    assert [reason[:8] for reason in verdict(figures)] == ["sheared:"] * rejects


@pytest.mark.parametrize("pixdim", [np.inf, np.nan])
def test_a_pixdim_that_is_no_number_rejects_its_scan_alone(tmp_path: Path, brain: np.ndarray, pixdim: float) -> None:
    source = table(tmp_path / "in", {"good": brain, "bad": brain})
    raw = bytearray(gzip.decompress((tmp_path / "in" / "bad.nii.gz").read_bytes()))
    header = np.frombuffer(raw, nib.nifti1.header_dtype, 1)
    header["pixdim"][0, 1:4], header["qform_code"] = pixdim, 0
    (tmp_path / "in" / "bad.nii.gz").write_bytes(gzip.compress(raw))
    summary = pack(source, tmp_path / "out", spacing=8.0, shape=(20, 24, 20), max_rejects=1)
    assert summary["packed"] == 1
    assert "sub-bad\timage: the header's pixdim is infinite or NaN" in (tmp_path / "out/rejected.tsv").read_text()


def test_voxel_sizes_that_contradict_each_other_are_refused(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.Nifti1Image(brain, AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(np.eye(4), 2)
    image.header.set_zooms((MM, MM, MM))
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match="1 x 1 x 1 mm by its sform, 4 x 4 x 4 mm by its pixdim"):
        read(tmp_path / "a.nii")
    image.set_sform(AFFINE * [[1.06], [1.06], [1.06], [1]], 2)  # too little to reject
    image.header.set_zooms((MM, MM, MM))
    nib.save(image, tmp_path / "a.nii")
    assert [limit.figure for limit in violated(read(tmp_path / "a.nii").header, rejects=False)] == ["header_sizes"]
    image.set_sform(AFFINE * [[1.03], [1.03], [1.03], [1]], 2)
    image.header.set_zooms((MM, MM, MM))
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read(tmp_path / "a.nii").affine.diagonal()[:3], 1.03 * MM)
    image.set_sform(np.eye(4), 2)
    image.header.set_zooms((MM, MM, MM))
    image.set_qform(None, 0)  # then pixdim alone disagrees
    nib.save(image, tmp_path / "a.nii")
    assert [limit.figure for limit in violated(read(tmp_path / "a.nii").header, rejects=False)] == ["header_sizes"]


def turned(degrees: float, mirrored: bool = False) -> np.ndarray:
    """AFFINE turned about the vertical axis, or with left and right exchanged."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    return turn @ np.diag([-1.0 if mirrored else 1.0, 1, 1, 1]) @ AFFINE


@pytest.mark.parametrize(
    ("sform", "qform", "codes", "expected"),
    [
        (turned(0), turned(0), (1, 1), []),
        (turned(12), turned(0), (1, 1), []),
        (turned(30), turned(0), (2, 1), ["header_degrees"]),
        (turned(180), turned(0), (4, 1), ["header_degrees"]),
        (turned(180), turned(0), (1, 1), "axes point to LPS by the sform and to RAS by the qform"),
        (turned(0), turned(0, mirrored=True), (4, 1), "left and right are exchanged"),
        (turned(0), turned(40), (0, 1), []),  # one form alone: it counts
        (turned(40), turned(0), (1, 0), []),
        (turned(0), turned(0), (0, 0), ["unoriented"]),
    ],
)
@pytest.mark.parametrize("nifti", [nib.Nifti1Image, nib.Nifti2Image])
def test_sform_and_qform_are_compared(
    tmp_path: Path,
    brain: np.ndarray,
    nifti: Any,
    sform: np.ndarray,
    qform: np.ndarray,
    codes: tuple[int, int],
    expected: list[str] | str,
) -> None:
    image = nifti(brain, None)
    image.header.set_zooms((MM, MM, MM))
    image.header.set_qform(qform, codes[1])
    image.header.set_sform(sform, codes[0])
    nib.save(nifti(brain, None, image.header), tmp_path / "a.nii")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(tmp_path / "a.nii")
        return
    scan = read(tmp_path / "a.nii")
    assert [limit.figure for limit in violated(scan.header, rejects=False)] == expected
    wanted = sform if codes[0] else qform
    if any(codes):  # the form that counts decides where the voxels lie
        original = nib.as_closest_canonical(nib.Nifti1Image(brain, wanted))
        np.testing.assert_allclose(scan.affine, original.affine, atol=1e-3)


def test_a_file_of_freesurfer_without_directions_is_flagged(tmp_path: Path, brain: np.ndarray) -> None:
    image = nib.MGHImage(brain, AFFINE)
    nib.save(image, tmp_path / "a.mgz")
    assert violated(read(tmp_path / "a.mgz").header, rejects=False) == []
    image.to_filename(tmp_path / "b.mgh")
    raw = bytearray((tmp_path / "b.mgh").read_bytes())
    raw[28:30] = bytes(2)  # goodRASFlag, which nibabel always writes as 1
    (tmp_path / "b.mgh").write_bytes(raw)
    flags = violated(read(tmp_path / "b.mgh").header, rejects=False)
    assert [limit.figure for limit in flags] == ["unoriented"]


def test_files_that_were_not_fetched_are_rejected_rows(tmp_path: Path, brain: np.ndarray) -> None:
    """Links of DataLad without content, and pointers in place of content."""
    lines = ["participant_id\tage\tsex"]
    annex = "../../../.git/annex/objects/k7/Q2/MD5E-s91--0123.nii.gz/MD5E-s91--0123.nii.gz"
    for i in range(6):
        anat = tmp_path / "bids" / f"sub-{i}" / "anat"
        anat.mkdir(parents=True)
        path = anat / f"sub-{i}_T1w.nii.gz"
        lines.append(f"sub-{i}\t40\tF")
        if i == 1:
            path.symlink_to("../../.git/annex/objects/k7/Q2/MD5E-s91--0123.nii.gz")
        elif i == 2:
            path.write_text("/annex/objects/MD5E-s91--0123.nii.gz\n")
        elif i == 3:
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        elif i > 3:  # links that were checked out as text
            path.write_text(annex if i == 4 else annex.replace("/", "\\"))
        else:
            nib.save(nib.Nifti1Image(brain, AFFINE), path)
    (tmp_path / "bids" / "participants.tsv").write_text("\n".join(lines) + "\n")
    summary = pack(tmp_path / "bids", tmp_path / "out", spacing=8.0, shape=(20, 24, 20), max_rejects=5)
    rejected = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert summary["packed"] == 1 and "a link whose content is not here" in rejected[1]
    assert all("a pointer whose content was not fetched" in line for line in rejected[2:])


# --- real scans ---------------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("MVHPC_IXI", "")).parent
real = pytest.mark.skipif("MVHPC_IXI" not in os.environ, reason="needs real scans: set MVHPC_IXI to their BIDS folder")


def scans(data: str) -> list[Path]:
    """Every scan of a data set beside the one that MVHPC_IXI names."""
    found = sorted((REAL / data).glob("sub-*/**/anat/*_T1w.nii.gz"))
    if not found:
        pytest.skip(f"needs real scans: no data set {data} beside the folder that MVHPC_IXI names")
    return found


@real
@pytest.mark.parametrize(("data", "every"), [("ixi", 6), ("oasis", 3), ("ds002748", 4)])
def test_no_real_brain_is_rejected(data: str, every: int) -> None:
    for path in scans(data)[::every]:
        scan = read(path)
        assert verdict(measure(scan.voxels, scan.affine)) == [], path.name


@real
def test_real_heads_are_refused_unless_the_brain_is_extracted_later() -> None:
    for path in scans("heads"):
        figures = measure((scan := read(path)).voxels, scan.affine)
        assert "skull" in verdict(figures)[0] and "shards preprocess" in verdict(figures)[-1], path.name
        assert verdict(figures, head=True) == [], path.name


ODD = {
    "4d.nii.gz": "4D volume", "axes-RAS.nii.gz": "not brain-extracted", "axes-PIR.nii.gz": "not brain-extracted",
    "bigendian.nii": "too few for a human brain", "ct.nii.gz": "a CT or an angiogram", "labels.nii.gz": "a label map",
    "headeronly.hdr": "truncated|half of a pair", "macaque-labels.nii.gz": "a label map",
    "oneslice.nii": "not a volume", "pet.nii": "a PET",
    "rgb.nii.gz": "expected real numbers", "shear.nii.gz": "a CT", "slab.nii.gz": "a slab",
    "statistic.nii.gz": "a statistical map", "t2-template.nii": "not brain-extracted",
}  # fmt: skip


@real
@pytest.mark.parametrize(("name", "words"), ODD.items(), ids=ODD)
def test_odd_files_are_refused_for_the_right_reason(name: str, words: str) -> None:
    path = REAL / "odd" / name
    if not path.exists():
        pytest.skip("needs odd files beside the folder that MVHPC_IXI names")
    try:
        reasons = verdict(measure((scan := read(path)).voxels, scan.affine))
    except ValueError as error:
        reasons = [str(error)]
    assert re.search(words, "; ".join(reasons))


def test_a_flag_is_explained_by_the_limit_that_it_violates() -> None:
    assert explain("image.volume_ml", {"image.volume_ml": 250.0}).startswith("image: 250 ml are too few")
    assert "too many for a brain" in explain("image.volume_ml", {"image.volume_ml": 4000.0})


def test_every_figure_with_a_limit_has_words_and_flags_of_several_scans_one_line() -> None:
    assert {limit.figure for limit in LIMITS} == FIGURES.keys()
    assert flag_words("image.box", [1.0, 3.0]).startswith(
        "image: reaches 1 to 3 of the six sides of the packed box: what lies"
    )
    assert flag_words("image.preprocess.blur_inside", [5.5]) == explain(
        "image.x.blur_inside", {"image.x.blur_inside": 5.5}
    )
    assert flag_words("image.outliers", [0.0012, 0.0188]).startswith("image: 0.1 to 1.9% of the voxels")
