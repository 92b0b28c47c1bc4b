"""Training the autoencoder with MAISI's loss (arXiv:2409.11169): L1 + KL + perceptual + adversarial."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvhpc.config import AutoencoderConfig, Compute, ConfigError, Optimizer, Tracking, Training, choose
from mvhpc.evaluation.figures import DIFFERENCE, difference, gallery, slices
from mvhpc.evaluation.similarity import psnr, ssim
from mvhpc.models.autoencoder import Autoencoder, kl_divergence
from mvhpc.models.bundle import save_autoencoder
from mvhpc.models.perceptual import SqueezeLPIPS, load_lpips, slice_distance
from mvhpc.records import read_volumes, volume_shape
from mvhpc.runtime.devices import one_thread
from mvhpc.runtime.randomness import generator, rand, randn
from mvhpc.training.engines.base import Engine
from mvhpc.training.task import Task
from shards.dataset import open_dataset

FITTED = 32  # training volumes whose blocks start the autoencoder's shortcut
SHOWN = 4  # validation subjects in the figure of reconstructions
NARROW = "model.channels=[16,16,32,64] model.res_blocks=1 model.norm_groups=8"
COARSE_MM = 4.0


@dataclass
class VAELoss:
    """MAISI's loss: weights of its terms, and the perceptual network's local weight files."""

    l1: float
    kl: float
    perceptual: float
    adversarial: float
    slices: float  # share of the slices per axis that the perceptual term sees
    backbone: str  # SqueezeNet 1.1 weights (torchvision's file)
    heads: str  # LPIPS linear heads for it
    discriminator_channels: int
    discriminator_layers: int


@dataclass
class VAEConfig:
    """`mvhpc train vae`."""

    out: str
    data: str
    split: str
    model: AutoencoderConfig
    loss: VAELoss
    flip: float  # probability of mirroring left and right in training
    optimizer: Optimizer
    discriminator_lr: float
    training: Training
    compute: Compute
    tracking: Tracking


class Discriminator(nn.Module):
    """PatchGAN: one logit for each patch of a volume (MONAI's PatchDiscriminator with instance norm).

    Args:
        channels: of the first layer; every further layer doubles them.
        layers: number of halvings; small volumes need fewer.
        shape: (H, W, D) of the volumes.

    Raises:
        ConfigError: too many layers for volumes of this shape.
    """

    def __init__(self, channels: int, layers: int, shape: tuple[int, ...]) -> None:
        from monai.networks.nets import PatchDiscriminator  # MONAI takes seconds to import

        super().__init__()
        left = min(shape) // 2**layers - 2  # each of two more convolutions of width 4 removes one voxel
        if left < 1:
            raise ConfigError(
                f"loss.discriminator_layers={layers} is too many for volumes of {shape} voxels; set fewer"
            )
        self.network = PatchDiscriminator(
            spatial_dims=3, channels=channels, in_channels=1, num_layers_d=layers, norm="INSTANCE"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, h, w, d) of volumes (B, 1, H, W, D)."""
        return self.network(x)[-1]


@cache
def least_squares() -> nn.Module:
    """Least squares of Mao et al. 2017, with MONAI's leaky output."""
    from monai.losses import PatchAdversarialLoss  # MONAI takes seconds to import

    return PatchAdversarialLoss(criterion="least_squares")


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """0.5 * (fake + real) of MAISI: least squares to 0 for reconstructions and to 1 for originals."""
    return 0.5 * (
        least_squares()(fake, target_is_real=False, for_discriminator=True)
        + least_squares()(real, target_is_real=True, for_discriminator=True)
    )


def generator_loss(fake: Tensor) -> Tensor:
    """Least squares of the reconstructions' logits to 1."""
    return least_squares()(fake, target_is_real=True, for_discriminator=False)


def cheaper(model: AutoencoderConfig, grid: Mapping[str, Any]) -> list[str]:
    """What makes a step cheaper: fewer channels, and coarser volumes than those of ``grid`` (an index's)."""
    ways = []
    if len(model.channels) == 4 and model.channels[0] > 16:
        ways.append(f"{NARROW} (about a tenth of the arithmetic)")
    spacing = grid["spacing"]
    if spacing < COARSE_MM:
        shape = " ".join(str(8 * math.ceil(n * spacing / COARSE_MM / 8)) for n in grid["shape"])
        fewer = (COARSE_MM / spacing) ** 3
        ways.append(f"shards pack --spacing {COARSE_MM:g} --shape {shape} ({fewer:.0f} times fewer voxels)")
    return ways


class VAETask(Task):
    """One step of the autoencoder; see :class:`mvhpc.training.task.Task`. A sample is one volume of one record.

    Args:
        config: of the stage.

    Raises:
        ConfigError: the data are not volumes, lack this split, or have a shape that the networks cannot process; or the
            training part has no volume.
    """

    exported: Mapping[str, Sequence[str]] = {
        "autoencoder": ("reconstruction", "kl", "psnr", "ssim", "psnr_in_brain", "ssim_in_brain")
    }

    def __init__(self, config: VAEConfig) -> None:
        self.config = config
        self.dataset = open_dataset(config.data)
        choose(config.split, list(self.dataset.index.splits), f"split of {config.data}")
        shape = volume_shape(self.dataset)
        self.train, self.others = (
            [
                (key, v.name)
                for key in self.dataset.keys(part, config.split)
                for v in self.dataset.index.schema.volumes
                if self.dataset.has(key, v.name)
            ]
            for part in ("train", "validation")
        )
        if not self.train:
            raise ConfigError(
                f"data={config.data}: no subject in the training part of split {config.split!r} has a volume; set "
                "another split"
            )
        self.samples, self.validation = len(self.train), len(self.others)
        torch.manual_seed(config.training.seed)  # the layers' initial weights
        autoencoder = Autoencoder(config.model)
        self.latent_shape = autoencoder.latent_shape(shape)
        if config.model.shortcut:
            with one_thread():  # the same sums in every worker
                autoencoder.fit_shortcut([*self._read(self.train[:FITTED])[:, 0].float()])
        self.networks: dict[str, nn.Module] = {"autoencoder": autoencoder}
        self.learning_rates = {"autoencoder": config.optimizer.lr}
        if config.loss.adversarial:
            self.networks["discriminator"] = Discriminator(
                config.loss.discriminator_channels, config.loss.discriminator_layers, shape
            )
            self.learning_rates["discriminator"] = config.discriminator_lr
        self.shorter = cheaper(config.model, self.dataset.index.grid)

    @classmethod
    def check(cls, config: VAEConfig) -> None:
        """Check the configuration, the data and the weights of the perceptual term.

        Raises:
            WeightsError: the perceptual term is on and its weights are missing.
            ConfigError: as the constructor.
        """
        if config.loss.perceptual:
            load_lpips(config.loss.backbone, config.loss.heads)
        cls(config)

    @cached_property
    def lpips(self) -> SqueezeLPIPS | None:
        """The perceptual network; None if ``loss.perceptual`` is 0."""
        loss = self.config.loss
        return load_lpips(loss.backbone, loss.heads) if loss.perceptual else None

    def _read(self, samples: list[tuple[str, str]]) -> Tensor:
        """Volumes (B, 1, H, W, D) as stored, float16."""
        return read_volumes(self.dataset, samples)[:, None]

    def load(self, indices: list[int]) -> dict[str, Any]:
        """``volume`` (B, 1, H, W, D), float16."""
        return {"volume": self._read([self.train[i] for i in indices])}

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """Reconstruct a batch, and take one optimiser step of the autoencoder, then of the discriminator."""
        weights = self.config.loss
        draws = [generator(self.config.training.seed, "train", step, i) for i in indices]
        x = batch["volume"].float()
        mirror = rand(draws, (), x.device) < self.config.flip
        x = torch.where(mirror.view(-1, 1, 1, 1, 1), x.flip(2), x)  # axis 2 runs from left to right
        y, mean, sigma = engines["autoencoder"](x, randn(draws, self.latent_shape, x.device))

        losses = {"reconstruction": (y - x).abs().mean(), "kl": kl_divergence(mean, sigma).mean()}
        loss = weights.l1 * losses["reconstruction"] + weights.kl * losses["kl"]
        if self.lpips is not None:
            lpips = self.lpips.to(x.device)
            losses["perceptual"] = slice_distance(lpips, y, x, weights.slices, draws).mean()
            loss = loss + weights.perceptual * losses["perceptual"]
        discriminator = engines.get("discriminator")
        if discriminator is not None:
            losses["adversarial"] = generator_loss(discriminator.frozen(y))
            loss = loss + weights.adversarial * losses["adversarial"]
        engines["autoencoder"].backward(loss)
        engines["autoencoder"].step()

        if discriminator is not None:
            both = discriminator(torch.cat([y.detach(), x]))  # one pass: instance norm does not mix samples
            losses["discriminator"] = discriminator_loss(*both.chunk(2))
            discriminator.backward(losses["discriminator"])
            discriminator.step()
        return {"loss": loss, **losses}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """L1, PSNR and SSIM of the reconstruction from the posterior mean, of the brain alone too, and the KL term."""
        network = networks["autoencoder"]
        x = self._read([self.others[i] for i in indices]).to(next(network.parameters()).device).float()
        y, mean, sigma = network(x, torch.zeros(len(x), *self.latent_shape, device=x.device))
        y, brain = y.float().clamp(0, 1), x > 0
        return {
            "reconstruction": (y - x).abs().flatten(1).mean(1),
            "kl": kl_divergence(mean, sigma),
            "psnr": psnr(y, x),
            "ssim": ssim(y, x),
            "psnr_in_brain": psnr(y, x, brain),
            "ssim_in_brain": ssim(y, x, brain),
        }

    def figures(self, networks: dict[str, nn.Module], step: int) -> dict[str, Callable[[Path], None]]:
        """The first validation volumes and their reconstructions."""
        samples = self.others[:SHOWN]
        if not samples:
            return {}
        network = networks["autoencoder"]
        x = self._read(samples).to(next(network.parameters()).device).float()
        y = network(x, torch.zeros(len(x), *self.latent_shape, device=x.device))[0].float().clamp(0, 1)
        rows = [[slices(v[0].cpu().numpy()) for v in pair] for pair in zip(x, y, strict=True)]
        for row in rows:
            row.append(difference(*row))
        columns = ["original", "reconstruction", DIFFERENCE]
        title = f"step {step}, {len(rows)} of {len(self.others)} validation volumes"
        spacing = self.dataset.index.grid["spacing"]
        return {"reconstruction.png": partial(gallery, rows, columns=columns, title=title, spacing=spacing)}

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the autoencoder with its validation metrics."""
        network = Autoencoder(self.config.model)
        network.load_state_dict(states["autoencoder"])
        extra = {"validation": metrics, "grid": self.dataset.index.grid}
        save_autoencoder(folder, network, self.config.model, extra)
