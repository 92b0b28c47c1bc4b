"""MONAI's blocks in the memory format that suits the device: channels last on GPUs.

Weights, their names and, on CPUs, all bits of the results are MONAI's. On GPUs, MONAI's blocks leave this format after
each attention, and read and write a volume three times for a shift, GroupNorm and SiLU, which need only one pass.
"""

from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, SpatialTransformer
from torch import Tensor, nn

from mvhpc.models.kernels.normalization import GroupNorm, LayerNorm


class UNetResidual(DiffusionUNetResnetBlock):
    """Residual block conditioned on a level, with input and output of one size, as in the U-Net."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W, D) and the level's embedding (B, E) to (B, C', H, W, D)."""
        shift = self.time_emb_proj(self.nonlinearity(emb))  # (B, C')
        h = self.conv1(self.norm1(x, silu=True))
        return self.skip_connection(x) + self.conv2(self.norm2(h, shift, silu=True))


class AutoencoderResidual(AEKLResBlock):
    """Residual block of the autoencoder."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, D) to (B, C', H, W, D)."""
        h = self.conv2(self.norm2(self.conv1(self.norm1(x, silu=True)), silu=True))
        return self.nin_shortcut(x) + h


class Transformer(SpatialTransformer):
    """Attention between voxels and to the scalars' tokens."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, H, W, D), context (B, tokens, E) or None, to (B, C, H, W, D)."""
        if not x.is_cuda:
            return super().forward(x, context)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W D, C)
        for block in self.transformer_blocks:
            h = block(h, context=context)
        return self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:])) + x


OURS = {
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    DiffusionUNetResnetBlock: UNetResidual,
    AEKLResBlock: AutoencoderResidual,
    SpatialTransformer: Transformer,
}
