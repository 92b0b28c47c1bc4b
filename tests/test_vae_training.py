"""Training the autoencoder: its losses at known values, and that it learns."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mvhpc.config import CONFIGS, ConfigError, load_config
from mvhpc.evaluation.similarity import psnr, ssim
from mvhpc.models.bundle import load
from mvhpc.models.perceptual import SqueezeLPIPS
from mvhpc.models.weight_files import WeightsError
from mvhpc.training.loop import train
from mvhpc.training.vae import (
    Discriminator,
    VAEConfig,
    VAETask,
    discriminator_loss,
    generator_loss,
    least_squares,
)
from shards.dataset import open_dataset
from tests.ellipsoids import pack_ellipsoids

SMALL = [
    "model.channels=[8,16]",
    "model.latent_channels=4",
    "model.res_blocks=1",
    "model.norm_groups=8",
    "loss.perceptual=0",
    "loss.discriminator_channels=4",
    "loss.discriminator_layers=1",
    "optimizer.lr=3e-3",
    "optimizer.warmup=5",
    "discriminator_lr=1e-3",
    "training.batch=3",
    "training.log_every=1",
    "compute.device=cpu",
    "compute.threads=1",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_ellipsoids(tmp_path_factory.mktemp("ellipsoids") / "data", train=6, validation=3)


def config(data: Path, out: Path, *overrides: str) -> VAEConfig:
    return load_config(VAEConfig, "vae", "default", [f"data={data}", f"out={out}", *SMALL, *overrides])


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, -1, 1, 1)


def test_least_squares_losses_at_known_logits() -> None:
    """Logits above zero count as they are, below zero a twentieth (MONAI's activation of the output)."""
    assert generator_loss(logits(1.0, 1.0)) == 0
    assert generator_loss(logits(0.0, 3.0)) == pytest.approx((1 + 4) / 2)
    assert generator_loss(logits(-2.0)) == pytest.approx(1.1**2)
    assert discriminator_loss(logits(0.0), logits(1.0)) == 0
    assert discriminator_loss(logits(0.5), logits(0.0)) == pytest.approx(0.5 * (0.25 + 1))
    assert least_squares().criterion == "least_squares"


def test_psnr_and_ssim_are_scikit_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((2, 1, 14, 16, 20)).astype(np.float32)
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1).astype(np.float32)
    a, b, inside = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(rng.random(x.shape) < 0.3)
    for i in range(2):
        where = inside[i, 0].numpy()
        expected = peak_signal_noise_ratio(x[i, 0][where], y[i, 0][where], data_range=1)
        assert float(psnr(a, b, inside)[i]) == pytest.approx(expected, rel=1e-5)
        expected = peak_signal_noise_ratio(x[i, 0], y[i, 0], data_range=1)
        assert float(psnr(a, b)[i]) == pytest.approx(expected, rel=1e-5)
        _, similarity = structural_similarity(
            x[i, 0], y[i, 0], data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        inner = (slice(5, -5),) * 3  # where the window of 11 lies inside
        assert float(ssim(a, b)[i]) == pytest.approx(similarity[inner].mean(), abs=1e-5)
        assert float(ssim(a, b, inside)[i]) == pytest.approx(similarity[inner][where[inner]].mean(), abs=1e-5)
    assert torch.equal(ssim(a[..., :8, :8, :8], a[..., :8, :8, :8]), torch.ones(2))  # fits a smaller window
    with torch.autocast("cpu", torch.bfloat16):  # as in the validation of a training
        assert float(ssim(a, b, inside)[1]) == pytest.approx(similarity[inner][where[inner]].mean(), abs=1e-5)


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24)])
def test_a_discriminator_of_too_many_layers_is_refused(layers: int, smallest: int) -> None:
    network = Discriminator(2, layers, (smallest, 32, 32))
    assert network(torch.rand(1, 1, smallest, 32, 32)).shape[2] == 1
    with pytest.raises(ConfigError, match="discriminator_layers"):
        Discriminator(2, layers, (smallest - 1, 32, 32))


def test_samples_are_all_volumes_there_are(data: Path, tmp_path: Path) -> None:
    task, dataset = VAETask(config(data, tmp_path)), open_dataset(data)
    assert task.samples == sum(dataset.has(k, n) for k in dataset.keys("train") for n in ("scan", "other")) == 8
    assert task.validation == 4
    key, name = task.train[5]
    batch = task.load([5, 0])["volume"]
    assert np.array_equal(batch[0, 0].numpy(), dataset.read(key, name))


@pytest.mark.parametrize("adversarial", [0, 0.1])
def test_it_learns_a_few_ellipsoids(data: Path, tmp_path: Path, adversarial: float) -> None:
    """From the untrained network's PSNR, far up; the best epoch is what is written."""
    settings = config(
        data, tmp_path, f"loss.adversarial={adversarial}", "training.epochs=24", "training.validate_every=12"
    )
    task = VAETask(settings)
    with torch.no_grad():
        before = float(task.validate([0, 1, 2, 3], task.networks)["psnr"].mean())
    summary = train(task, settings, tmp_path)
    assert summary["validation/psnr"] > before + 5
    best, _ = load(tmp_path)
    metrics = task.validate([0, 1, 2, 3], {"autoencoder": best})
    assert float(metrics["psnr"].mean()) == pytest.approx(summary["validation/psnr"], rel=1e-5)
    assert float(metrics["reconstruction"].mean()) == pytest.approx(summary["validation/reconstruction"], rel=1e-5)
    assert (tmp_path / "figures" / "reconstruction.png").read_bytes()[:4] == b"\x89PNG"


def test_a_samples_noise_and_mirroring_depend_on_step_and_sample_alone(data: Path, tmp_path: Path) -> None:
    """The loss of a batch is the mean of the losses of its samples, whoever computes them."""
    settings = config(data, tmp_path, "loss.adversarial=0")

    def loss(indices: list[int], step: int) -> float:
        task = VAETask(settings)
        engine = Recorder(task.networks["autoencoder"])
        with torch.no_grad():
            losses = task.step(task.load(indices), {"autoencoder": engine}, step, indices)  # type: ignore[dict-item]
        return float(losses["loss"])

    alone = [loss([i], 7) for i in (4, 0, 2)]
    assert loss([4, 0, 2], 7) == pytest.approx(math.fsum(alone) / 3, rel=1e-5)
    assert loss([4], 8) != pytest.approx(alone[0], rel=1e-5)


class Recorder:
    """An engine that only runs the network forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Nothing to learn."""

    def step(self) -> None:
        """Nothing to update."""


def test_mirroring_is_left_to_right(data: Path, tmp_path: Path) -> None:
    """With flip=1 the network sees what it sees with flip=0, turned around along the first axis of RAS."""
    seen = []

    class Spy(Recorder):
        def __call__(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append(args[0])
            return super().__call__(*args)

    for flip in (0, 1):
        task = VAETask(config(data, tmp_path, "loss.adversarial=0", f"flip={flip}"))
        task.step(task.load([0, 1]), {"autoencoder": Spy(task.networks["autoencoder"])}, 0, [0, 1])  # type: ignore[dict-item]
    assert torch.equal(seen[1], seen[0].flip(2))
    assert not torch.equal(seen[1], seen[0])


def test_the_perceptual_term_reaches_the_loss(tmp_path: Path) -> None:
    data = pack_ellipsoids(tmp_path / "data", train=2, validation=1, shape=(24, 24, 24))
    settings = config(data, tmp_path, "loss.adversarial=0", "loss.perceptual=0.3")
    torch.manual_seed(0)
    lpips = SqueezeLPIPS().requires_grad_(False)
    for head in lpips.heads:
        head.fill_(0.1)
    task = VAETask(settings)
    task.lpips = lpips
    losses = task.step(task.load([0]), {"autoencoder": Recorder(task.networks["autoencoder"])}, 0, [0])  # type: ignore[dict-item]
    assert losses["perceptual"] > 0
    parts = losses["reconstruction"] + 1e-7 * losses["kl"] + 0.3 * losses["perceptual"]
    torch.testing.assert_close(losses["loss"], parts)


def test_without_weights_it_stops_before_it_starts(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"loss\.perceptual=0"):
        VAETask.check(config(data, tmp_path / "vae", "loss.perceptual=0.3"))
    assert not (tmp_path / "vae" / "checkpoints").exists()


def test_volumes_that_do_not_divide_are_refused_before_it_starts(tmp_path: Path) -> None:
    data = pack_ellipsoids(tmp_path / "data", shape=(16, 18, 16))
    settings = config(data, tmp_path / "vae", "model.channels=[8,8,8]")
    with pytest.raises(ConfigError, match=r"\(16, 20, 16\)"):
        VAETask.check(settings)


@pytest.mark.parametrize("shortcut", ["true", "false"])
def test_a_training_part_without_volumes_is_refused_before_it_starts(tmp_path: Path, shortcut: str) -> None:
    data = pack_ellipsoids(tmp_path / "data", train=0)
    with pytest.raises(ConfigError, match=r"data=.*training part of split 'default' has a volume"):
        VAETask.check(config(data, tmp_path / "vae", f"model.shortcut={shortcut}"))


@pytest.mark.parametrize("preset", [p.stem for p in (CONFIGS / "vae").glob("*.yaml")])
def test_presets_build_networks_eight_times_down(preset: str) -> None:
    """But for small volumes, which would leave too few cells."""
    settings = load_config(VAEConfig, "vae", preset, ["data=d", "out=o"])
    assert len(settings.model.channels) == (3 if preset in {"demo", "small"} else 4)
    assert all(width % settings.model.norm_groups == 0 for width in settings.model.channels)
