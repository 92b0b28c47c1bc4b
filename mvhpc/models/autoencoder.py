"""The KL-regularised autoencoder that maps a volume to a latent of an eighth of its size per axis."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mvhpc import config
from mvhpc.models.kernels.channels_last import use_channels_last_blocks
from mvhpc.models.kernels.merged_upsampling import merge_upsampling

FIRST_LOG_VARIANCE = -6.0


class Autoencoder(nn.Module):
    """Single-channel 3D KL-VAE without attention: MONAI's AutoencoderKL (Rombach et al., arXiv:2112.10752).

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
        use_channels_last_blocks(self)
        merge_upsampling(self)

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
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Volumes (B, 1, H, W, D), not clipped, from latents (B, C, H/f, W/f, D/f)."""
        return self.network.decode(z)

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
