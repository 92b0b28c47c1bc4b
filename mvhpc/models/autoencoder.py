"""The KL-regularised autoencoder that maps a volume to a latent of a quarter or an eighth of its size per axis."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc import config
from mvhpc.models.kernels.channels_last import use_channels_last_blocks
from mvhpc.models.kernels.merged_upsampling import merge_upsampling

FIRST_LOG_VARIANCE = -6.0
RIDGE = 1e-4  # of the mean square, in the regression of blocks on latents


class Autoencoder(nn.Module):
    """Single-channel 3D KL-VAE without attention: MONAI's AutoencoderKL (Rombach et al., arXiv:2112.10752).

    With ``shortcut`` a linear map from blocks of voxels to latent channels, and one back, stand beside the networks,
    which learn what these leave over (residual autoencoding, Chen et al., arXiv:2410.10733). They start in closed form,
    see :meth:`fit_shortcut`, and the networks start at zero.

    Args:
        cfg: configuration; every level after the first halves each axis.

    Raises:
        ConfigError: a width that ``norm_groups`` does not divide.
    """

    def __init__(self, cfg: config.AutoencoderConfig) -> None:
        from monai.networks.nets import AutoencoderKL  # MONAI takes seconds to import

        super().__init__()
        odd = [width for width in cfg.channels if width % cfg.norm_groups]
        if odd or not cfg.channels:
            raise config.ConfigError(
                f"model.channels {list(cfg.channels)}: every width must be a multiple of "
                f"model.norm_groups = {cfg.norm_groups}"
            )
        self.factor = 2 ** (len(cfg.channels) - 1)
        self.latent_channels = cfg.latent_channels
        self.shortcut = cfg.shortcut
        self.network = AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=tuple(cfg.channels),
            num_res_blocks=cfg.res_blocks,
            attention_levels=(False,) * len(cfg.channels),
            latent_channels=cfg.latent_channels,
            norm_num_groups=cfg.norm_groups,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            use_checkpoint=cfg.checkpointing,
        )
        # Narrow posteriors from the start: with SD 1 the first hundreds of steps only learn to narrow them
        # (480 steps on phantoms of 32 cubed: 18.9 against 17.0 dB after 120, 19.7 against 19.1 after 240).
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, FIRST_LOG_VARIANCE)
        if cfg.shortcut:
            edge = self.factor
            self.down = nn.Conv3d(1, cfg.latent_channels, edge, edge, bias=False)
            self.up = nn.Conv3d(cfg.latent_channels, edge**3, 3, padding=1, bias=False)
            for layer in (self.network.quant_conv_mu, self.network.decoder.blocks[-1]):
                for weight in layer.parameters():
                    nn.init.zeros_(weight)
        use_channels_last_blocks(self)
        merge_upsampling(self)

    @torch.no_grad()
    def fit_shortcut(self, volumes: Sequence[Tensor]) -> None:
        """Set the shortcut: principal components of blocks of voxels, and the regression of blocks on the latents of
        3 x 3 x 3 neighbours, which leaves no edges between blocks.

        Each channel has a mean square of 1, so that none is lost in the posterior's noise; channels beyond the voxels
        of a block are 0.

        Args:
            volumes: (H, W, D) each, float32. Their mean is not removed, and is most of the first component.
        """
        edge, size = self.factor, self.factor**3
        moments, count = torch.zeros(size, size, dtype=torch.float64), 0
        for volume in volumes:
            blocks = _blocks(volume, edge).flatten(0, 2).double()  # (h w d, f^3)
            moments += blocks.T @ blocks
            count += len(blocks)
        squares, vectors = torch.linalg.eigh(moments / count)  # from the smallest on
        vectors = vectors.flip(1)[:, : self.latent_channels].T  # (R, f^3), R the smaller of C and f^3
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * largest.sign()  # a vector and its opposite are both right
        scale = squares.flip(0)[: self.latent_channels, None].clamp_min(1e-12).sqrt()
        self.down.weight.zero_()
        self.down.weight[: len(vectors)] = (vectors / scale).view(len(vectors), 1, edge, edge, edge).float()

        inputs = self.latent_channels * 27
        squares = torch.zeros(inputs, inputs, dtype=torch.float64)
        products = torch.zeros(inputs, size, dtype=torch.float64)
        for volume in volumes:
            padded = F.pad(self.down(volume[None, None])[0], (1,) * 6)  # (C, h + 2, w + 2, d + 2)
            near = padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # (C, h, w, d, 3, 3, 3)
            rows = near.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2).double()  # (h w d, 27 C)
            squares += rows.T @ rows
            products += rows.T @ _blocks(volume, edge).flatten(0, 2).double()
        ridge = RIDGE * squares.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
        weight = torch.linalg.solve(squares + ridge, products)  # (27 C, f^3)
        self.up.weight.copy_(weight.T.view_as(self.up.weight))

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The latent's shape (C, h, w, d) for a volume of ``shape`` (H, W, D).

        Raises:
            ConfigError: an axis is not a multiple of ``factor``; the message names the next multiples.
        """
        if len(shape) != 3 or any(n % self.factor or n <= 0 for n in shape):
            fits = tuple(max(1, math.ceil(n / self.factor)) * self.factor for n in shape)
            raise config.ConfigError(
                f"a volume of shape {tuple(shape)} does not divide by {self.factor}, the autoencoder's "
                f"factor per axis; pack the volumes to the next multiples, {fits}"
            )
        return (self.latent_channels, *(n // self.factor for n in shape))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The approximate posterior of the latent.

        Args:
            x: volumes (B, 1, H, W, D) in [0, 1].

        Returns:
            Mean and standard deviation, each (B, C, H/f, W/f, D/f).

        Raises:
            ConfigError: H, W or D is not a multiple of ``factor``.
        """
        self.latent_shape(x.shape[2:])
        mean, sigma = self.network.encode(x)
        return (mean + self.down(x) if self.shortcut else mean), sigma

    def decode(self, z: Tensor) -> Tensor:
        """Volumes (B, 1, H, W, D), not clipped, from latents (B, C, H/f, W/f, D/f)."""
        y = self.network.decode(z)
        return y + _assemble(self.up(z), self.factor) if self.shortcut else y

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of training: encode, draw by reparameterisation, decode.

        Args:
            x: volumes (B, 1, H, W, D) in [0, 1].
            noise: standard normal draws (B, C, H/f, W/f, D/f); zeros give the reconstruction from the mean.

        Returns:
            Reconstruction (B, 1, H, W, D), mean and standard deviation of the latent (B, C, H/f, W/f, D/f).
        """
        mean, sigma = self.encode(x)
        return self.decode(mean + sigma * noise.to(mean.dtype)), mean, sigma


def _blocks(volume: Tensor, edge: int) -> Tensor:
    """(H, W, D) as blocks (H/f, W/f, D/f, f^3)."""
    return volume.unfold(0, edge, edge).unfold(1, edge, edge).unfold(2, edge, edge).flatten(3)


def _assemble(blocks: Tensor, edge: int) -> Tensor:
    """Blocks (B, f^3, h, w, d) as volumes (B, 1, h f, w f, d f)."""
    x = blocks.unflatten(1, (edge, edge, edge)).permute(0, 4, 1, 5, 2, 6, 3)  # (B, h, f, w, f, d, f)
    return x.flatten(5).flatten(3, 4).flatten(1, 2)[:, None]


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) of each sample, summed over the latent's elements (as in MAISI).

    Args:
        mean, sigma: (B, C, h, w, d).

    Returns:
        (B,), in nats.
    """
    mean, sigma = mean.float(), sigma.float()
    variance = sigma.square()  # at least exp(-30): the network clamps its logarithm
    return 0.5 * (mean.square() + variance - variance.log() - 1).flatten(1).sum(1)
