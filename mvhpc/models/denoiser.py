"""The network of the joint model (paper, section 3.1 and figure 1): a 3D U-Net of latent diffusion in which scalars
enter as input channels and cross-attention tokens and leave by heads on the bottleneck."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvhpc import config
from mvhpc.variables import Categorical, Scalar, Variables


class JointDenoiser(nn.Module):
    """f(z, t) of the paper: what eps, v or z_0 is (by the diffusion's choice), and logits of categories.

    MONAI's ``DiffusionModelUNet`` gives the blocks. Volumes enter as concatenated channels and leave by the same
    channels. Latents whose size its strides do not divide are padded with zeros inside and cropped again.

    Args:
        variables: at least one volume; all volumes of one spatial size.
        model: widths.

    Raises:
        ValueError: no volume, or volumes of different size.
    """

    def __init__(self, variables: Variables, model: config.Denoiser) -> None:
        super().__init__()
        volumes, scalars = variables.volumes, variables.scalars
        if not volumes:
            raise ValueError("the joint model needs at least one volume variable; the schema has none")
        sizes = {v.name: v.shape[1:] for v in volumes}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"volumes of one model must have latents of one size, not {sizes}")
        self.volumes, self.scalars, self.names = volumes, scalars, variables.names
        self.embedding, self.checkpointing = model.embedding, model.checkpointing
        self.factor = 2 ** (len(model.channels) - 1)
        channels = sum(v.shape[0] for v in volumes)
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=channels + len(scalars),
            out_channels=channels,
            channels=model.channels,
            attention_levels=model.attention,
            num_res_blocks=model.res_blocks,
            num_head_channels=model.head_channels,
            norm_num_groups=model.norm_groups,
            with_conditioning=bool(scalars),
            cross_attention_dim=model.embedding if scalars else None,
            dropout_cattn=model.dropout,
            use_flash_attention=model.dropout == 0,  # MONAI's keeps its dropout on outside of training
        )
        width = 4 * model.channels[0]  # of the time embedding, as MONAI has it
        self.unet.time_embed = nn.Sequential(  # the first layer is a sum of one embedding per variable
            nn.Linear(len(variables) * model.embedding, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.tokens = nn.ModuleList(Token(v, model.embedding) for v in scalars)
        padded = [n + -n % self.factor for n in next(iter(sizes.values()))]
        self.read = nn.Linear(channels * math.prod(padded), model.channels[-1]) if scalars else None
        self.heads = nn.ModuleList(Head(v, model, width) for v in scalars)

    def forward(
        self, z: Mapping[str, Tensor], t: Mapping[str, Tensor], want: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """
        Args:
            z: noisy values: (B, C, h, w, d), (B, 1), or int64 (B,) for categories.
            t: levels, int64 (B,) by variable.
            want: variables to answer for, None for all; without a volume among them the up path is not run.

        Returns:
            By variable: like z; logits (B, K) for categories.
        """
        want = set(self.names if want is None else want)
        image = torch.cat([z[v.name] for v in self.volumes], 1)  # (B, sum C, h, w, d)
        size = image.shape[2:]
        image = F.pad(image, [p for n in reversed(size) for p in (0, -n % self.factor)])  # (B, sum C, h', w', d')
        scalars = [_number(v, z[v.name]) for v in self.scalars]
        planes = [x[:, :, None, None, None].expand(-1, -1, *image.shape[2:]) for x in scalars]
        x = torch.cat([image, *planes], 1)  # (B, sum C + scalars, h', w', d')

        waves = {name: sinusoid(t[name], self.embedding).to(x.dtype) for name in self.names}  # each (B, E)
        time = self.unet.time_embed(torch.cat([waves[name] for name in self.names], 1))  # (B, 4 channels[0])
        tokens = [token(z[v.name], waves[v.name]) for v, token in zip(self.scalars, self.tokens)]
        context = torch.stack(tokens, 1) if tokens else None  # (B, scalars, E)

        h = self.unet.conv_in(x)
        skips = [h]
        for down in self.unet.down_blocks:
            h, passed = self._run(down, h, time, context)
            skips += passed
        h = self._run(self.unet.middle_block, h, time, context)  # (B, channels[-1], h'/factor, ...)

        read = self.read(image.flatten(1)) if self.read else None  # (B, channels[-1])
        outputs = {
            v.name: head(h, read, token, time)
            for v, head, token in zip(self.scalars, self.heads, tokens)
            if v.name in want
        }
        if want.isdisjoint(v.name for v in self.volumes):
            return outputs
        for up in self.unet.up_blocks:
            n = len(up.resnets)
            skips, passed = skips[:-n], skips[-n:]
            h = self._run(up, h, passed, time, context)
        image = self.unet.out(h)[:, :, : size[0], : size[1], : size[2]]  # (B, sum C, h, w, d)
        parts = image.split([v.shape[0] for v in self.volumes], 1)
        return outputs | {v.name: part for v, part in zip(self.volumes, parts)}

    def _run(self, block: Callable[..., Tensor], *args: Tensor | Sequence[Tensor] | None) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class Token(nn.Module):
    """A scalar as one cross-attention token: its value, its level and its name, each embedded."""

    def __init__(self, variable: Scalar, width: int) -> None:
        super().__init__()
        self.classes = variable.size if isinstance(variable, Categorical) else 0
        self.value = nn.Embedding(self.classes, width) if self.classes else nn.Linear(1, width)
        self.level = nn.Linear(width, width)  # its bias is the embedding of the name

    def forward(self, z: Tensor, wave: Tensor) -> Tensor:
        """Value (B, 1) or class (B,), and sinusoid of its level (B, E), to the token (B, E)."""
        return self.value(z) + self.level(wave)


class Head(nn.Module):
    """What the network says of one scalar.

    The paper's head, two GroupNorm-SiLU-Conv blocks with a skip and global average pooling, sees what the U-Net makes
    of the image, but neither where a feature was nor, after normalisation, how much of it there was. Beside it a linear
    map reads the latents cell by cell, and stays linear up to the output: a second layer overfits a hundred subjects.
    The scalar's own token and all levels scale and shift it, as what is left to say depends on them (v is a multiple of
    z_t less a multiple of z_0).
    """

    def __init__(self, variable: Scalar, model: config.Denoiser, time_width: int) -> None:
        super().__init__()
        width = model.channels[-1]
        self.blocks = nn.Sequential(*(_block(width, model.norm_groups) for _ in range(2)))
        self.modulate = nn.Linear(model.embedding + time_width, 2 * width)
        self.own = nn.Sequential(nn.Linear(model.embedding, width), nn.SiLU())
        self.out = nn.Linear(width, variable.size if isinstance(variable, Categorical) else 1)
        nn.init.zeros_(self.out.weight)  # starts as "nothing known": zero, or even odds
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, read: Tensor, token: Tensor, time: Tensor) -> Tensor:
        """
        Args:
            features: of the bottleneck, (B, C, h, w, d).
            read: the linear map of the latents, (B, C).
            token: of the scalar, (B, E).
            time: embedding of all levels, (B, T).

        Returns:
            (B, 1), or logits (B, K).
        """
        pooled = (features + self.blocks(features)).mean((2, 3, 4))  # (B, C)
        scale, shift = self.modulate(F.silu(torch.cat([token, time], 1))).chunk(2, 1)  # each (B, C)
        return self.out((pooled + read) * (1 + scale) + shift + self.own(token))


def _block(width: int, groups: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv3d(width, width, 3, padding=1))


def _number(variable: Scalar, z: Tensor) -> Tensor:
    """A scalar as one number (B, 1); classes evenly over [-1, 1] (paper, section 3.1)."""
    if isinstance(variable, Categorical):
        return (2 * z[:, None].float() / max(variable.size - 1, 1)) - 1
    return z


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Embedding (B, width) of levels t (B,) by sines and cosines of periods up to 10,000 (Ho et al. 2020)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * rates
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))
