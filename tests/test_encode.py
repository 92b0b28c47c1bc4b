"""Encoding: everybody's latents as they are, and a scale from the training part alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mvhpc.config import AutoencoderConfig as AutoencoderConfig
from mvhpc.config import ConfigError, load_config
from mvhpc.inference.encode import EncodeConfig, Moments, run, to_float16
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, load, save_autoencoder
from mvhpc.runs.folder import Run
from shards.dataset import Dataset, open_dataset
from tests.ellipsoids import SCHEMA, pack_ellipsoids

MODEL = AutoencoderConfig(channels=[4, 4, 4], latent_channels=2, res_blocks=1, norm_groups=2, checkpointing=False)
MOVED = [[4, 0, 0, 1], [0, 4, 0, 1], [0, 0, 4, 1], [0, 0, 0, 1]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed volumes in ``data`` and an untrained autoencoder in ``vae``."""
    folder = tmp_path_factory.mktemp("encode")
    pack_ellipsoids(folder / "data")
    torch.manual_seed(0)
    save_autoencoder(folder / "vae" / "model", Autoencoder(MODEL), MODEL)
    return folder


def encode(source: Path, out: Path, *overrides: str) -> tuple[Dataset, dict[str, float]]:
    places = [f"data={source / 'data'}", f"vae={source / 'vae'}", f"out={out}"]
    config = load_config(EncodeConfig, "encode", "default", [*places, "compute.threads=1", *overrides])
    summary = run(config, Run(out.with_name("run")))
    return open_dataset(out), summary


@pytest.fixture(scope="module")
def latents(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, dict[str, float]]:
    return encode(source, tmp_path_factory.mktemp("latents") / "latents")


def test_latents_are_the_posterior_means_and_all_else_is_kept(
    source: Path, latents: tuple[Dataset, dict[str, float]]
) -> None:
    volumes, (encoded, _) = open_dataset(source / "data"), latents
    network, meta = load(source / "vae", kind=AutoencoderModel)
    assert encoded.index.kind == "latents"
    assert encoded.keys(None) == volumes.keys(None)
    assert encoded.index.schema == SCHEMA
    assert encoded.index.splits == volumes.index.splits
    assert encoded.index.grid == volumes.index.grid
    assert encoded.index.extra["vae"] == meta["sha256"]
    for key in volumes.keys(None):
        assert encoded.values(key) == volumes.values(key)
        for name in ("scan", "other"):
            assert encoded.has(key, name) == volumes.has(key, name)
            if volumes.has(key, name):
                x = torch.from_numpy(volumes.read(key, name).astype(np.float32))[None, None]
                expected = network.encode(x)[0][0].numpy()
                np.testing.assert_allclose(encoded.read(key, name), expected, rtol=2e-3, atol=1e-4)


def test_mirrored_latents_are_of_the_mirrored_volume_and_of_the_training_side_alone(
    source: Path, latents: tuple[Dataset, dict[str, float]], tmp_path: Path
) -> None:
    volumes, (encoded, _) = open_dataset(source / "data"), latents
    network, _ = load(source / "vae", kind=AutoencoderModel)
    learnt = {*volumes.keys("train"), *volumes.keys("validation")}
    for key in volumes.keys(None):
        assert encoded.has(key, "scan_mirrored") == (key in learnt and volumes.has(key, "scan"))
    key = volumes.keys("train")[0]
    x = torch.from_numpy(volumes.read(key, "scan")[::-1].astype(np.float32))[None, None]
    np.testing.assert_allclose(
        encoded.read(key, "scan_mirrored"), network.encode(x)[0][0].numpy(), rtol=2e-3, atol=1e-4
    )
    plain, _ = encode(source, tmp_path / "latents", "flip=false")
    assert set(plain.index.arrays) == {"scan", "other"}


def test_scale_is_one_over_the_standard_deviation_of_the_training_part(
    latents: tuple[Dataset, dict[str, float]],
) -> None:
    encoded, summary = latents
    for name in ("scan", "other"):
        present = [encoded.read(k, name) for k in encoded.keys("train") if encoded.has(k, name)]
        expected = 1 / np.stack(present).astype(np.float64).std()
        assert encoded.index.extra["scale"][name] == pytest.approx(expected, rel=1e-12)
        assert summary[f"scale_{name}"] == encoded.index.extra["scale"][name]
    everybody = np.stack([encoded.read(k, "scan") for k in encoded.keys(None) if encoded.has(k, "scan")])
    assert encoded.index.extra["scale"]["scan"] != pytest.approx(1 / everybody.astype(np.float64).std(), rel=1e-6)


def test_batch_size_does_not_matter(source: Path, latents: tuple[Dataset, dict[str, float]], tmp_path: Path) -> None:
    one, _ = encode(source, tmp_path / "latents", "batch=1")
    for key in one.keys(None):
        for name in one.index.arrays:
            if one.has(key, name):
                a, b = one.read(key, name), latents[0].read(key, name)
                np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2e-3, atol=1e-5)


def test_moments_of_a_stream_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.normal(1e3, 1e-2, size=n).astype(np.float64) for n in (1, 7, 1000)]  # hard for naive sums
    moments = Moments()
    for block in blocks:
        moments.add(block)
    whole = np.concatenate(blocks)
    assert moments.mean == pytest.approx(whole.mean(), rel=1e-14)
    assert moments.std == pytest.approx(whole.std(), rel=1e-9)


@pytest.mark.parametrize("bad", [7e4, float("nan"), float("inf")])
def test_what_float16_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(OverflowError, match="float16"):
        to_float16(torch.tensor([0.0, bad]))


def test_latents_are_not_encoded_again(source: Path, latents: tuple[Dataset, dict[str, float]], tmp_path: Path) -> None:
    config = load_config(
        EncodeConfig,
        "encode",
        "default",
        [f"data={latents[0].folder}", f"vae={source / 'vae'}", f"out={tmp_path / 'x'}"],
    )
    with pytest.raises(ConfigError, match="holds latents"):
        run(config, Run(tmp_path / "run"))


def test_an_autoencoder_of_another_grid_is_refused(source: Path, tmp_path: Path) -> None:
    """Its latents would have another size, or another meaning."""
    grid = open_dataset(source / "data").index.grid
    network = load(source / "vae", kind=AutoencoderModel).network
    for name, change in {"same": {}, "coarse": {"spacing": 2 * grid["spacing"]}, "moved": {"affine": MOVED}}.items():
        save_autoencoder(tmp_path / name / "model", network, MODEL, {"grid": grid | change})
        values = {"data": str(source / "data"), "vae": str(tmp_path / name), "out": str(tmp_path / f"{name}-latents")}
        config = load_config(EncodeConfig, "encode", "default", (), values)
        if change:
            with pytest.raises(ConfigError, match=f"has {next(iter(change))} .* the model was trained on"):
                run(config, Run(tmp_path / "run"))
            assert not Path(config.out).exists()
        else:
            summary, index = run(config, Run(tmp_path / "run")), open_dataset(source / "data").index
            assert summary["volumes"] == sum(len(record.checksums) for record in index.records)
            assert 0 < summary["mirrored_volumes"] < summary["volumes"]


@pytest.mark.slow
def test_a_compiled_encoder_makes_the_same_latents(
    source: Path, latents: tuple[Dataset, dict[str, float]], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    compiled, _ = encode(source, tmp_path / "latents", "compute.compile=true", "flip=false")
    for key in compiled.keys(None):
        for name in compiled.index.arrays:
            if compiled.has(key, name):
                a, b = compiled.read(key, name), latents[0].read(key, name)
                np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=5e-3, atol=1e-4)
