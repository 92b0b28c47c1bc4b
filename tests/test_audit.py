"""The audit of packed data: what it finds, and the page that shows it."""

import html.parser
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from shards.__main__ import main
from shards.audit.alignment import Affine, Aligner, Array, centred, pyramid
from shards.audit.charts import distributions
from shards.audit.confounding import sentences
from shards.audit.duplicates import compare_all
from shards.audit.measure import SKETCH, Measured, Reference, details, encode, measure, picture, sketch
from shards.audit.outliers import deviations, histogram_distances
from shards.audit.run import audit, split_sketches
from shards.audit.stream import Look, look, mean_brains
from shards.dataset import open_dataset
from shards.errors import DataError, IntegrityError
from shards.schema import Schema
from tests.packing import PEOPLE, bids, content, packed

SHAPE = (48, 56, 48)
SPACING = 4.0


def smooth_noise(seed: int, sigma: float) -> Array:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), sigma)
    return np.asarray(noise / noise.std(), np.float32)


ANATOMY = smooth_noise(1000, 4) * 0.15  # what all brains have in common; it is not symmetric


def brain(seed: int) -> Array:
    """An ellipsoid with common structures and folds of its own, in [0, 1], (48, 56, 48)."""
    x, y, z = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SHAPE], indexing="ij")
    ellipsoid = np.clip(4 - 4 * np.sqrt((x / 19) ** 2 + (y / 24) ** 2 + (z / 17) ** 2), 0, 1)
    return np.asarray(np.clip(ellipsoid * (0.55 + ANATOMY + 0.1 * smooth_noise(seed, 1.5)), 0, 1), np.float32)


BRAINS = [brain(seed) for seed in range(24)]


def reference(brains: list[Array]) -> Reference:
    mean = centred(pyramid(np.mean(brains, axis=0), SPACING), SPACING)
    return Reference(Aligner(mean, SPACING), {}, SPACING)


REFERENCE = reference(BRAINS[:12])


def looks(volume: Array) -> Measured:
    return measure(np.ascontiguousarray(volume), "sub-01", REFERENCE, 64)


def moved(volume: Array, degrees: float) -> Array:
    matrix = Rotation.from_euler("xyz", [degrees, -degrees / 2, degrees / 2], degrees=True).as_matrix() * 1.04
    middle = (np.array(volume.shape) - 1) / 2
    return np.asarray(ndimage.affine_transform(volume, matrix, middle - matrix @ middle + 0.8, order=1), np.float32)


def test_alignment_undoes_a_known_movement() -> None:
    levels = pyramid(np.mean(BRAINS, axis=0), SPACING)
    aligner = Aligner(levels, SPACING)
    turn = Affine(Rotation.from_euler("xyz", [5, -4, 6], degrees=True).as_matrix() * 1.05, np.array([5.0, -4.0, 3.0]))
    fit = aligner.fit(pyramid(aligner.warp(levels[0], 0, turn), SPACING))
    assert np.abs(fit.matrix @ turn.matrix - np.eye(3)).max() < 0.02
    assert np.abs(fit.matrix @ turn.shift + fit.shift).max() < 0.5  # mm
    assert turn.degrees == pytest.approx(8.7, abs=0.3)


def test_an_empty_volume_is_measured() -> None:
    found = looks(np.zeros(SHAPE, np.float32))
    assert all(np.isfinite(value) for value in found.values.values())
    assert found.values["mean_likeness"] == 0 and not found.sketch.any() and not found.histogram.any()


@pytest.mark.parametrize("seed", range(12, 15))
def test_mirrored_and_upside_down_brains_have_negative_measures(seed: int) -> None:
    stored = looks(BRAINS[seed]).values
    assert stored["left_right"] > 0 and stored["up_down"] > 0
    assert looks(BRAINS[seed][::-1]).values["left_right"] < 0
    assert looks(BRAINS[seed][:, :, ::-1]).values["up_down"] < 0


def test_a_member_of_the_mean_brain_is_not_compared_with_itself() -> None:
    """Otherwise brains of the sample would look more typical than others."""
    members = {f"sub-{n:02d}": REFERENCE.aligner.fit(pyramid(b, SPACING)) for n, b in enumerate(BRAINS[:3])}
    aligner = REFERENCE.aligner
    warped = [
        [aligner.warp(volume, level, fit) for level, volume in enumerate(pyramid(b, SPACING))]
        for b, fit in zip(BRAINS, members.values())
    ]
    mean, others = ([np.mean(levels, axis=0) for levels in zip(*chosen)] for chosen in (warped, warped[1:]))
    with_itself = Reference(Aligner(mean, SPACING), members, SPACING)
    without = Reference(Aligner(others, SPACING), {"sub-00": members["sub-00"]}, SPACING)
    one, two = (measure(BRAINS[0], "sub-00", r, 64).values["mean_likeness"] for r in (with_itself, without))
    assert one == pytest.approx(two, abs=1e-5)


def test_products_of_sketches_are_those_of_the_details() -> None:
    aligner = REFERENCE.aligner
    all_details = [details(b, Affine(np.eye(3), np.zeros(3)), aligner) for b in BRAINS]
    exact = np.stack([d / np.linalg.norm(d) for d in all_details])
    estimated = np.stack([sketch(d) for d in all_details]).astype(np.float64)
    error = (estimated @ estimated.T - exact @ exact.T)[np.triu_indices(len(BRAINS), 1)]
    assert np.abs(error).max() < 4 / np.sqrt(SKETCH)


def test_a_person_scanned_twice_in_another_pose_is_found_and_nobody_else() -> None:
    """Repeat scans of one subject are named as such, and so are scans of one subject that do not look alike."""
    volumes = [*(moved(b, 0.5 * n - 6) for n, b in enumerate(BRAINS)), moved(BRAINS[3], 8) * 0.8, moved(BRAINS[5], 3)]
    sketches = np.stack([looks(v).sketch for v in volumes])
    subjects = [f"sub-{n:02d}" for n in range(len(BRAINS))] + ["sub-99", "sub-05"]
    subjects[7] = subjects[8]
    found = compare_all(sketches, subjects)
    assert [(p.first, p.second, p.repeat) for p in found.alike] == [(3, 24, False), (5, 25, True)]
    assert found.count == 1
    assert [(p.first, p.second, p.repeat) for p in found.unlike] == [(7, 8, True)]


def test_pairs_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sketches = rng.normal(size=(40, 256)).astype(np.float16)
    sketches[31] = sketches[2]
    subjects = [f"sub-{n % 39}" for n in range(40)]
    whole = compare_all(sketches, subjects)
    monkeypatch.setattr("shards.audit.duplicates.BLOCK", 7)
    parts = compare_all(sketches, subjects)
    assert [(p.first, p.second) for p in whole.alike] == [(p.first, p.second) for p in parts.alike] == [(2, 31)]
    assert [(p.first, p.second) for p in parts.unlike] == [(0, 39)]


@pytest.mark.parametrize("records", [0, 1, 10])
def test_few_records_have_no_pairs(records: int) -> None:
    found = compare_all(np.ones((records, 8), np.float16), [f"sub-{n}" for n in range(records)])
    assert found.limit == np.inf and not found.alike and not found.unlike


def test_deviations_follow_the_fault_and_not_the_skew() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "image.mean_likeness": [*rng.normal(0.9, 0.01, 99), 0.8],
            "image.contrast": [*np.exp(rng.normal(0, 1, 99)), np.nan],
            "image.gap": [0.0] * 98 + [0.004, 0.26],  # at most 0.25 is usual
        }
    )
    z = deviations(table)
    assert z["image.mean_likeness"].idxmin() == 99 and z["image.mean_likeness"].min() < -8
    assert (z["image.mean_likeness"] <= 0).all(), "a brain that is very much like the mean is no outlier"
    assert z["image.contrast"][99] == 0 and z["image.contrast"].max() < 15
    assert z["image.gap"][98] < 0.5 and z["image.gap"][99] > 9


def test_the_distance_of_histograms_is_the_shift_of_the_intensities() -> None:
    histograms = np.zeros((5, 64))
    histograms[:4, 20] = 1
    histograms[4, 36] = 1
    assert histogram_distances(histograms) == pytest.approx([0, 0, 0, 0, 16 / 64])


SCHEMA = Schema.from_dict(
    {
        "image": {"kind": "volume", "suffix": "T1w"},
        "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
        "site": {"kind": "categorical", "classes": ["north", "south"]},
    }
)


def test_confounding_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 200)
    scalars = pd.DataFrame({"age": age, "site": np.where(np.arange(200) % 2, "north", "south")}, dtype=object)
    scalars.loc[:9, "age"] = None
    measures = pd.DataFrame({"image.brightness": 0.6 - 0.002 * age + rng.normal(0, 0.04, 200)})
    measures["image.contrast"] = rng.normal(0.3, 0.01, 200) + 0.02 * (np.arange(200) % 2)
    brightness_age, brightness_site, contrast_age, contrast_site = sentences(measures, scalars, SCHEMA)
    assert brightness_age.startswith("Brightness of image falls with age (correlation −0.6")
    assert "95 % interval −0." in brightness_age and "190 records" in brightness_age
    assert "no difference by site" in brightness_site and "no correlation with age" in contrast_age
    assert contrast_site.startswith("Contrast of image differs by site (4") and "p < 0.001" in contrast_site
    few = sentences(measures[:5], scalars[:5], SCHEMA)
    assert all("too few different values" in sentence for sentence in few)


def test_distributions_are_of_each_scalar_by_part_and_category() -> None:
    scalars = pd.DataFrame({"age": [30.0, 40, 50, None], "site": ["north", "south", "south", None]}, dtype=object)
    parts = pd.Series(["train", "train", "test", None], dtype=object)
    found = {section["title"]: section for section in distributions(scalars, parts, SCHEMA)}
    assert list(found) == ["age by part", "age by site", "site by part"]
    assert (
        found["age by part"]["picture"].startswith("data:image/svg+xml")
        and "test mean 50.0" in found["age by part"]["alt"]
    )
    assert found["site by part"]["rows"] == [
        ["train", "2", "1 (50 %)", "1 (50 %)"],
        ["test", "1", "0 (0 %)", "1 (100 %)"],
    ]


def test_a_picture_keeps_left_and_top(tmp_path: Path) -> None:
    volume = np.zeros((40, 48, 44), np.float32)
    volume[5, 40, 22] = volume[5, 24, 40] = 1  # left and front in the axial slice; left and top in the coronal one
    image = picture(volume, 200)
    assert image.shape == (48, 40 + 40 + 48)
    assert image[48 - 1 - 40, 5] == 255 and image[2 + 44 - 1 - 40, 40 + 5] == 255
    (tmp_path / "a.webp").write_bytes(encode([picture(volume, 24), picture(volume, 24)]))
    assert Image.open(tmp_path / "a.webp").size == (64, 48)


# --- the page -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The embedded data of a page, its ids, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if named.get("id"):
            self.ids.append(str(named["id"]))
        self._script = str(named.get("id") or "") if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    packed(bids(folder / "bids", PEOPLE), folder / "packed", folds=0)
    return folder / "packed"


def test_the_page_is_whole_loads_nothing_and_does_not_depend_on_workers(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(small)
    assert main(["audit", str(small), "--out", str(tmp_path / "a.html"), "--workers", "1"]) == 0
    assert "7 records in" in capsys.readouterr().out
    audit(small, tmp_path / "b.html", workers=2)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert content(small) == before, "an audit changes the data set"
    page = Page((tmp_path / "a.html").read_text())
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    data = json.loads(page.scripts["data"])
    assert sorted(card["key"] for card in data["cards"]) == [key for key, *_ in PEOPLE]
    scores = [card["score"] for card in data["cards"]]
    assert scores == sorted(scores, reverse=True)
    assert all(len(card["values"]) == len(data["measures"]) for card in data["cards"])
    assert all(page.scripts[f"i{n}"].startswith("UklGR") for n in range(len(PEOPLE))), "not WebP"


def test_looks_keep_no_sketch_beside_the_array(small: Path) -> None:
    seen = look(small, mean_brains(open_dataset(small), ["image"]), 32, 1)
    first = next(seen)
    found, sketches = split_sketches([first, Look("sub-99", {}, b""), *seen], 1 + len(PEOPLE), "image")
    assert (sketches[0] == first.volumes["image"].sketch).all() and sketches[0].any() and not sketches[1].any()
    assert [f.key for f in found] == ["sub-00", "sub-99", *(key for key, *_ in PEOPLE[1:])]
    assert not any(measured.sketch.size for f in found for measured in f.volumes.values())


def test_what_cannot_be_audited_is_refused(small: Path, tmp_path: Path) -> None:
    for out, reason in [(small / "audit.html", "elsewhere"), (tmp_path, "folder"), (tmp_path / "no/a.html", "first")]:
        with pytest.raises(DataError, match=reason):
            audit(small, out)
    with pytest.raises(DataError, match="no packed data set"):
        audit(tmp_path, tmp_path / "a.html")


def test_a_damaged_volume_ends_the_audit_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    packed(bids(tmp_path / "bids", PEOPLE), folder, storage="webdataset")
    shard = next(folder.rglob("*.tar"))
    raw = bytearray(shard.read_bytes())
    raw[4000] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError, match="sub-00"):
        audit(folder, tmp_path / "a.html", workers=1)
    assert not (tmp_path / "a.html").exists()
