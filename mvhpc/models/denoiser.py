"""The network of the joint model: a 3D U-Net over the volumes, which scalars enter and leave in one of two ways.

``early`` is the paper's (section 3.1, figure 1): scalars are input channels and cross-attention tokens of the whole
U-Net, and heads on its bottleneck answer for them. ``late`` is this project's: a few small readers look at the volumes
once for any number of questions, a trunk beside each answers for the scalars from what it saw, and the U-Net, which the
scalars meet in its up path, is run for volumes alone.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvhpc import config
from mvhpc.models.heads import PaperHead, Reader, Token, Trunk
from mvhpc.models.kernels.channels_last import adopt, down, middle, up
from mvhpc.models.kernels.merged_upsampling import merge_upsampling
from mvhpc.runtime.devices import send
from mvhpc.variables import Categorical, Scalar, Variables

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What the down path makes of a batch.

    Attributes:
        bottleneck: (B, C, h, w, d).
        skips: of the levels, for the up path.
        size: of the latents before padding.
    """

    bottleneck: Tensor
    skips: list[Tensor]
    size: torch.Size


class JointDenoiser(nn.Module):
    """f(z, t) of the paper: what eps, v or z_0 is (by the diffusion's choice), and logits of categories.

    MONAI's ``DiffusionModelUNet`` gives the blocks. Volumes enter as concatenated channels and leave by the same
    channels. Latents whose size its strides do not divide are padded with zeros inside and cropped again.

    Args:
        variables: at least one volume; all volumes of one spatial size.
        model: widths and design.
        blind: the level from which a value is pure noise and not shown: zero stands in its place. None: all are shown.

    Raises:
        ValueError: no volume, or volumes of different size.
    """

    ANSWERING = ("readers.", "trunks.", "asked.")  # ``late``: names of what answers for scalars begin so, no others
    TELLING = ("trunks.", "asked.")  # of these what :meth:`predict` needs, which a posterior runs in float32
    scale: Tensor
    shift: Tensor

    def __init__(self, variables: Variables, model: config.DenoiserConfig, blind: int | None = None) -> None:
        super().__init__()
        config.choose(model.scalars, ("early", "late"), "way for scalars into the network")
        volumes, scalars = variables.volumes, variables.scalars
        if not volumes:
            raise ValueError("the joint model needs at least one volume variable; the schema has none")
        sizes = {v.name: v.shape[1:] for v in volumes}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"volumes of one model must have latents of one size, not {sizes}")
        self.volumes, self.scalars, self.names = volumes, scalars, variables.names
        self.late, self.components = model.scalars == "late", model.components
        self.blind, self.embedding, self.checkpointing = blind, model.embedding, model.checkpointing
        self.factor = 2 ** (len(model.channels) - 1)
        channels = sum(v.shape[0] for v in volumes)
        parts = zip(*(v.channelwise() for v in volumes))
        for name, part in zip(("scale", "shift"), parts):  # (sum C, h, w, d)
            self.register_buffer(name, torch.cat(part), persistent=False)
        unet = partial(
            DiffusionModelUNet,
            spatial_dims=3,
            out_channels=channels,
            channels=model.channels,
            attention_levels=model.attention,
            num_res_blocks=model.res_blocks,
            num_head_channels=model.head_channels,
            norm_num_groups=model.norm_groups,
            dropout_cattn=model.dropout,
            use_flash_attention=model.dropout == 0,  # MONAI's keeps its dropout on outside of training
        )
        told = {"with_conditioning": bool(scalars), "cross_attention_dim": model.embedding if scalars else None}
        whole = unet(in_channels=channels + (0 if self.late else len(scalars)), **told)
        half = unet(in_channels=channels) if self.late else whole  # without cross-attention
        self.conv_in, self.down, self.middle = half.conv_in, half.down_blocks, half.middle_block
        self.up, self.out = whole.up_blocks, whole.out

        width = 4 * model.channels[0]  # of the time embedding, as MONAI has it
        waves = len(variables) * model.embedding
        self.time = _mlp(len(volumes) * model.embedding if self.late else waves, width)
        self.tokens = nn.ModuleList(Token(v, model.embedding) for v in scalars)
        if self.late:
            self.up_time = _mlp(waves, width)
            if scalars:
                count = range(model.readers)  # networks of their own from latents to answer
                self.readers = nn.ModuleList(Reader(channels, model) for _ in count)
                self.asked = nn.ModuleList(nn.ModuleList(Token(v, model.embedding) for v in scalars) for _ in count)
                self.trunks = nn.ModuleList(Trunk(scalars, len(variables), model) for _ in count)
        else:
            self.heads = nn.ModuleList(PaperHead(v, model) for v in scalars)
        adopt(self)
        merge_upsampling(self)

    def forward(
        self,
        z: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        want: Collection[str] | None = None,
        shown: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {}),
        moving: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            z: noisy values: (B, C, h, w, d), (B, 1), or int64 (B,) for categories. In the ``late`` design scalars may
                have B x Q rows, row by row: Q questions about each, for one look at the volumes; the first of them is
                what the volumes are told.
            t: levels, int64 (B,) by variable, (B x Q,) of such scalars.
            want: variables to answer for, None for all. The up path is run for volumes alone, in the ``late`` design
                the down path too.
            shown: ``late``: volumes, and their levels, that the reader is shown in place of those in z and t.
            moving: ``late``: the rows whose volumes are wanted, (B,) bool on the CPU, where one need not wait for a GPU
                to know them; None: those with a volume that is not at rest.

        Returns:
            By variable: like z; for categories logits (B, K); for numbers (B, 1 + 3 components), see
            :mod:`mvhpc.diffusion.density`; of scalars (B, readers, ...) in the ``late`` design. Zero for the volumes of
            a row that does not move: the U-Net is not run for it.
        """
        want = set(self.names if want is None else want)
        volumes, scalars = {v.name for v in self.volumes}, [v.name for v in self.scalars]
        if not self.late:
            features = self.contract(z, t)
            outputs = {v.name: self.heads[i](features.bottleneck) for i, v in enumerate(self.scalars) if v.name in want}
            return outputs if want.isdisjoint(volumes) else outputs | self.expand(features, z, t)
        n = len(z[scalars[0]]) // len(z[self.volumes[0].name]) if scalars else 1  # Q
        outputs = {}
        if not want.isdisjoint(scalars):
            seen, levels = {**z, **shown[0]}, {**t, **shown[1]}
            read = self.encode(seen, levels).repeat_interleave(n, 0)
            levels = {name: x.repeat_interleave(n) if name in volumes else x for name, x in levels.items()}
            outputs = self.predict(read, z, levels, want)
        if want.isdisjoint(volumes):
            return outputs
        z, t = ({name: x if name in volumes else x[::n] for name, x in values.items()} for values in (z, t))
        return outputs | self._denoise_moving(z, t, moving)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`torch.nn.Module.compile`; which rows move is found outside of the compiled parts."""
        self._moving = torch.compiler.disable(self._moving)  # type: ignore[method-assign]
        super().compile(*args, **kwargs)

    def encode(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Tensor:
        """``late``: what the readers see of the volumes, (B, readers, C), zero where none is shown.

        A row may be repeated for many questions."""
        shown = torch.stack([self._shown(v.name, t, 3) for v in self.volumes]).amax(0)  # (B, 1, 1)
        latents = self._channelwise(z, t)
        return torch.stack([reader(latents) for reader in self.readers], 1) * shown

    def adapt(self, z: Mapping[str, Tensor]) -> None:
        """Start the readers on clean volumes (N, C, h, w, d) of some people; see :meth:`Reader.adapt`."""
        if self.late and self.scalars:
            latents = self._channelwise(z, {name: torch.zeros(len(x)) for name, x in z.items()})
            for reader in self.readers:
                assert isinstance(reader, Reader)
                reader.adapt(latents)

    def predict(
        self, seen: Tensor, z: Mapping[str, Tensor], t: Mapping[str, Tensor], want: Collection[str]
    ) -> dict[str, Tensor]:
        """``late``: the outputs (B, readers, ...) of the scalars among ``want``, from what :meth:`encode` gave."""
        levels = [self._wave(v.name, t) for v in self.volumes]
        said: dict[str, list[Tensor]] = {v.name: [] for v in self.scalars if v.name in want}
        for trunk, tokens, part in zip(self.trunks, self.asked, seen.unbind(1), strict=True):
            assert isinstance(trunk, Trunk) and isinstance(tokens, nn.ModuleList)
            told = trunk.told(torch.cat([*self._tokens(tokens, z, t), *levels], 1))  # from (B, variables x E)
            for i, v in enumerate(self.scalars):
                if v.name in want:
                    said[v.name].append(trunk(i, part, told))
        return {name: torch.stack(answers, 1) for name, answers in said.items()}

    def contract(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Features:
        """The down path. In the ``late`` design it depends on the volumes' values and levels alone."""
        image = self._image(z, t)
        size = image.shape[2:]
        image = F.pad(image, [p for n in reversed(size) for p in (0, -n % self.factor)])  # (B, sum C, h', w', d')
        x, context = image, None
        if not self.late:
            scalars = [_number(v, z[v.name]) * self._shown(v.name, t, 2) for v in self.scalars]
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

    def expand(self, features: Features, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The up path: the outputs of the volumes."""
        h, skips, context = features.bottleneck, features.skips, self._context(z, t)
        time = self._time(t)
        if self.late:
            levels = [self._wave(v.name, t) for v in self.volumes]
            time = self.up_time(torch.cat([*self._tokens(self.tokens, z, t), *levels], 1))
        for block in self.up:
            n = len(block.resnets)
            skips, passed = skips[:-n], skips[-n:]
            h = self._run(up, block, h, passed, time, context)
        image = self.out(h)[:, :, : features.size[0], : features.size[1], : features.size[2]]  # (B, sum C, h, w, d)
        return {v.name: part for v, part in zip(self.volumes, image.split([v.shape[0] for v in self.volumes], 1))}

    def _denoise_moving(self, z: Values, t: Values, moving: Tensor | None) -> dict[str, Tensor]:
        """The U-Net for the rows that move, zero for the others."""
        rows, z_moving, t_moving = self._moving(z, t, moving)
        denoised = self.expand(self.contract(z_moving, t_moving), z_moving, t_moving)
        return {name: x.new_zeros(z[name].shape).index_copy(0, rows, x) for name, x in denoised.items()}

    def _moving(self, z: Values, t: Values, moving: Tensor | None) -> tuple[Tensor, Values, Values]:
        """The numbers of the rows that move, and z and t of those; of the first row where none does, for all workers
        must run the same layers."""
        if moving is None:
            moving = torch.stack([t[v.name] > 0 for v in self.volumes]).any(0)  # (B,)
        rows = torch.nonzero(moving)[:, 0]
        rows = send(rows if len(rows) else rows.new_zeros(1), self.scale.device)
        z, t = ({name: x[rows] for name, x in values.items()} for values in (z, t))
        if self._compiled_call_impl is None:  # the compiler takes a second to load
            return rows, z, t
        if self.training or len(rows) < len(moving):  # their number differs from call to call: compiled once for any
            for x in (rows, *z.values(), *t.values()):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return rows, z, t

    def _channelwise(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Tensor:
        return self._image(z, t) * self.scale + self.shift  # (B, sum C, h, w, d)

    def _image(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Tensor:
        image = torch.cat([z[v.name] * self._shown(v.name, t, 5) for v in self.volumes], 1)  # (B, sum C, h, w, d)
        return image.contiguous(memory_format=torch.channels_last_3d) if image.is_cuda else image

    def _time(self, t: Mapping[str, Tensor]) -> Tensor:
        names = [v.name for v in self.volumes] if self.late else self.names
        return self.time(torch.cat([self._wave(name, t) for name in names], 1))  # (B, 4 channels[0])

    def _tokens(self, tokens: nn.ModuleList, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> list[Tensor]:
        return [
            token(z[v.name], self._wave(v.name, t), self._shown(v.name, t, 2)) for v, token in zip(self.scalars, tokens)
        ]

    def _context(self, z: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Tensor | None:
        return torch.stack(self._tokens(self.tokens, z, t), 1) if self.scalars else None  # (B, scalars, E)

    def _wave(self, name: str, t: Mapping[str, Tensor]) -> Tensor:
        return sinusoid(t[name], self.embedding).to(self.scale.dtype)  # (B, E)

    def _shown(self, name: str, t: Mapping[str, Tensor], dimensions: int) -> Tensor:
        """1 where a value is shown to the network, else 0; (B, 1, ...)."""
        seen = torch.ones_like(t[name]) if self.blind is None else t[name] < self.blind
        return seen.to(self.scale.dtype).reshape(-1, *[1] * (dimensions - 1))

    def _run(self, block: Callable[..., Any], *args: Any) -> Any:
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


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
