"""Batch normalisation over all workers, and group and layer normalisation in bfloat16."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Total(torch.autograd.Function):
    """Sum of a tensor over the workers; its gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Total.forward(ctx, *gradients)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over the workers. Forward and backward are collective."""
    summed: Tensor = _Total.apply(x)
    return summed


class SyncedBatchNorm(nn.BatchNorm3d):
    """BatchNorm3d over the batches of all workers, which must be equally large.

    All workers have the same running statistics, and the number of workers changes results only by rounding. torch's
    SyncBatchNorm does the same, but only on GPUs.
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
        """Update the running statistics by those of one batch."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum  # None: a plain mean
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with an optional shift before it and an optional SiLU after it.

    Under CUDA's autocast it reads and writes bfloat16 in channels-last format and sums in float32. PyTorch's own runs
    in float32 there and moves three times the bytes, for the next convolution to round again. Compiled networks use
    PyTorch's, since the compiler fuses these steps.
    """

    def forward(self, x: Tensor, offset: Tensor | None = None, silu: bool = False) -> Tensor:
        """Normalise x (B, C, H, W, D), plus ``offset`` (B, C)."""
        if x.is_cuda and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            from mvhpc.models.kernels.triton_group_norm import group_norm  # Triton is part of PyTorch for GPUs only

            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, offset, silu)
        y = super().forward(x if offset is None else x + offset[:, :, None, None, None])
        return F.silu(y) if silu else y


class LayerNorm(nn.LayerNorm):
    """LayerNorm that also reads and writes bfloat16 under CUDA's autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, N, C) over C."""
        if not input.is_cuda or input.dtype != torch.bfloat16:
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
