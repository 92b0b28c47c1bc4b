"""Normalisation: of batches over the samples of all workers, of groups and layers without leaving bfloat16."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Total(torch.autograd.Function):
    """The sum of a tensor over the workers; the gradient of it is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Total.forward(ctx, *gradients)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over the workers. Collective, and again when its gradient is taken."""
    summed: Tensor = _Total.apply(x)
    return summed


class SyncedBatchNorm(nn.BatchNorm3d):
    """BatchNorm3d whose batch is that of all workers together, each with an equal share of it.

    Every worker then holds the same running statistics, and their number changes no result but by rounding. (torch's
    SyncBatchNorm does the same, on GPUs alone.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W, D). Collective in training."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        shape, rest = (1, -1, 1, 1, 1), (0, 2, 3, 4)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            mean = total(y.mean(rest)) / world  # (C,)
            y = y - mean.view(shape)
            variance = total(y.square().mean(rest)) / world
            count = world * y.numel() // y.shape[1]
            self._follow(mean.detach(), variance.detach() * count / max(1, count - 1))
            y = y * (torch.rsqrt(variance + self.eps) * self.weight).view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics take in those of one batch."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum  # None: a plain mean
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, with a shift before and SiLU after it where they are asked for.

    Under CUDA's autocast it reads and writes bfloat16, in channels-last order, its sums being float32 all the same.
    Autocast has it in float32 there, which moves three times the bytes for the convolution behind it to round again; a
    compiled network keeps those in registers by itself.
    """

    def forward(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        """Normalise x (B, C, H, W, D), plus ``offset`` (B, C)."""
        if x.is_cuda and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            from mvhpc.models.kernels.triton_group_norm import group_norm  # Triton comes with PyTorch for GPUs alone

            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, offset, silu)
        y = super().forward(x if offset is None else x + offset[:, :, None, None, None])
        return F.silu(y) if silu else y


class LayerNorm(nn.LayerNorm):
    """LayerNorm that under CUDA's autocast reads and writes bfloat16 too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, N, C) over C."""
        if not input.is_cuda or input.dtype != torch.bfloat16:
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
