"""The 3D U-Net of the joint model, in one of two designs.

``early`` is the paper's (section 3.1, figure 1): scalars are input channels and cross-attention tokens of the whole
U-Net, and heads on its bottleneck predict them. ``late`` is this project's: the U-Net predicts volumes alone and is
conditioned on scalars in its up path; :mod:`mvhpc.models.scalar_stack` predicts the scalars.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvhpc import config
from mvhpc.models.kernels.channels_last import down, middle, up, use_channels_last_blocks
from mvhpc.models.kernels.merged_upsampling import merge_upsampling
from mvhpc.models.layers import Token, Values, VariableNetwork, zero_linear
from mvhpc.variables import Categorical, Scalar, Variables


@dataclass(frozen=True)
class Features:
    """Output of the down path.

    Attributes:
        bottleneck: (B, C, h, w, d).
        skips: of the levels, for the up path.
        size: of the latents before padding.
    """

    bottleneck: Tensor
    skips: list[Tensor]
    size: torch.Size


class JointDenoiser(VariableNetwork):
    """f(z, t) of the paper: eps, v or z_0 of volumes (by the diffusion's choice); in the early design, of scalars too.

    MONAI's ``DiffusionModelUNet`` gives the blocks. Volumes enter as concatenated channels and leave by the same
    channels. Latents whose size its strides do not divide are padded with zeros inside and cropped again.

    Args:
        variables: at least one volume; all volumes of one spatial size.
        model: widths and design.
        masked_level: the level from which a value is pure noise and masked by zero. None: no value is masked.

    Attributes:
        outputs: names of the variables that it predicts.

    Raises:
        ConfigError: an unknown design.
        ValueError: no volume, or volumes of different size.
    """

    def __init__(self, variables: Variables, model: config.DenoiserConfig, masked_level: int | None = None) -> None:
        from monai.networks.nets import DiffusionModelUNet  # MONAI takes seconds to import

        super().__init__(variables, model.embedding, masked_level)
        config.choose(model.scalars, ("early", "late"), "way for scalars into the network")
        self.late, self.checkpointing = model.scalars == "late", model.checkpointing
        self.outputs = [v.name for v in self.volumes] if self.late else self.names
        self.factor = 2 ** (len(model.channels) - 1)
        unet = partial(
            DiffusionModelUNet,
            spatial_dims=3,
            out_channels=self.channels,
            channels=model.channels,
            attention_levels=model.attention,
            num_res_blocks=model.res_blocks,
            num_head_channels=model.head_channels,
            norm_num_groups=model.norm_groups,
            dropout_cattn=model.dropout,
            use_flash_attention=model.dropout == 0,  # MONAI's keeps its dropout on outside of training
        )
        whole = unet(
            in_channels=self.channels + (0 if self.late else len(self.scalars)),
            with_conditioning=bool(self.scalars),
            cross_attention_dim=model.embedding if self.scalars else None,
        )
        half = unet(in_channels=self.channels) if self.late else whole  # without cross-attention
        self.conv_in, self.down, self.middle = half.conv_in, half.down_blocks, half.middle_block
        self.up, self.out = whole.up_blocks, whole.out

        width = 4 * model.channels[0]  # of the time embedding, as in MONAI
        levels = len(variables) * model.embedding
        self.time = _mlp(len(self.volumes) * model.embedding if self.late else levels, width)
        self.tokens = nn.ModuleList(Token(v, model.embedding) for v in self.scalars)
        if self.late:
            self.up_time = _mlp(levels, width)
        else:
            self.heads = nn.ModuleList(PaperHead(v, model) for v in self.scalars)
        use_channels_last_blocks(self)
        with torch.random.fork_rng(devices=[]):  # replaced layers draw initial weights that are not used
            merge_upsampling(self)

    def forward(self, z: Values, t: Values, want: Collection[str] | None = None) -> dict[str, Tensor]:
        """
        Args:
            z: noisy values: volumes (B, C, h, w, d), numbers (B, 1), categories int64 (B,).
            t: levels, int64 (B,) by variable.
            want: variables to predict, None for all. ``early``: the up path is run for volumes alone.

        Returns:
            By variable of :attr:`outputs`, shaped like z; for categories logits (B, K).
        """
        features = self.contract(z, t)
        if self.late:
            return self.expand(features, z, t)
        want = set(self.names if want is None else want)
        outputs = {v.name: self.heads[i](features.bottleneck) for i, v in enumerate(self.scalars) if v.name in want}
        return outputs if want.isdisjoint(v.name for v in self.volumes) else outputs | self.expand(features, z, t)

    def contract(self, z: Values, t: Values) -> Features:
        """The down path. In the late design it depends on the volumes' values and levels alone."""
        image = self.image(z, t)
        size = image.shape[2:]
        image = F.pad(image, [p for n in reversed(size) for p in (0, -n % self.factor)])  # (B, sum C, h', w', d')
        x, context = image, None
        if not self.late:
            scalars = [_number(v, z[v.name]) * self.visible(v.name, t, 2) for v in self.scalars]
            planes = [value[:, :, None, None, None].expand(-1, -1, *image.shape[2:]) for value in scalars]
            x, context = torch.cat([image, *planes], 1), self._context(z, t)  # (B, sum C + scalars, h', w', d')
        time = self._time(t)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            h, passed = self._run(down, block, h, time, context)
            skips += passed
        h = self._run(middle, self.middle, h, time, context)  # (B, channels[-1], h'/factor, ...)
        return Features(h, skips, size)

    def expand(self, features: Features, z: Values, t: Values) -> dict[str, Tensor]:
        """The up path: the outputs of the volumes."""
        h, skips, context = features.bottleneck, features.skips, self._context(z, t)
        time = self._time(t)
        if self.late:
            levels = self.levels((v.name for v in self.volumes), t)
            time = self.up_time(torch.cat([*self.embed_scalars(self.tokens, z, t), *levels], 1))
        for block in self.up:
            n = len(block.resnets)
            skips, passed = skips[:-n], skips[-n:]
            h = self._run(up, block, h, passed, time, context)
        image = self.out(h)[:, :, : features.size[0], : features.size[1], : features.size[2]]  # (B, sum C, h, w, d)
        return {v.name: part for v, part in zip(self.volumes, image.split([v.shape[0] for v in self.volumes], 1))}

    def _time(self, t: Values) -> Tensor:
        names = [v.name for v in self.volumes] if self.late else self.names
        return self.time(torch.cat(self.levels(names, t), 1))  # (B, 4 channels[0])

    def _context(self, z: Values, t: Values) -> Tensor | None:
        return torch.stack(self.embed_scalars(self.tokens, z, t), 1) if self.scalars else None  # (B, scalars, E)

    def _run(self, block: Callable[..., Any], *args: Any) -> Any:
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class PaperHead(nn.Module):
    """Section 3.1 of the paper: two GroupNorm-SiLU-Conv blocks with a skip, global average pooling, a linear layer."""

    def __init__(self, variable: Scalar, model: config.DenoiserConfig) -> None:
        super().__init__()
        width = model.channels[-1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.GroupNorm(model.norm_groups, width), nn.SiLU(), nn.Conv3d(width, width, 3, padding=1))
                for _ in range(2)
            )
        )
        self.out = zero_linear(width, variable.size if isinstance(variable, Categorical) else 1)

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Features (B, C, h, w, d) to (B, 1), or logits (B, K)."""
        pooled = (bottleneck + self.blocks(bottleneck)).mean((2, 3, 4))  # (B, C)
        return self.out(pooled)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _number(variable: Scalar, z: Tensor) -> Tensor:
    """A scalar as one number (B, 1); classes evenly over [-1, 1] (paper, section 3.1)."""
    if isinstance(variable, Categorical):
        return (2 * z[:, None].float() / max(variable.size - 1, 1)) - 1
    return z
