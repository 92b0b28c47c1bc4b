"""GroupNorm of channels-last volumes on GPUs, in Triton.

GPUs convolve fastest in the channels-last format, which PyTorch's GroupNorm does not support. A shift of each channel
before it and SiLU after it are fused. Nothing is autotuned and every sum has a fixed order, so that equal inputs give
equal bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128  # voxels and channels per block of a program
CHUNK, PARTS = 512, 256  # fewest voxels that a program sums; most parts of a volume


@triton.jit
def _slope(y):  # type: ignore[no-untyped-def]
    """Derivative of SiLU."""
    s = tl.sigmoid(y)
    return s * (1 + y * (1 - s))


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    x, dy, mean, rstd, weight, bias, first, second, S, C, chunk: tl.constexpr,
    backward: tl.constexpr, silu: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Sums over a part of one sample's voxels, per channel. Forward: of x - p and its square, p being the first voxel.
    Backward: of dy (before SiLU) and of dy (x - mean)."""
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    live = c < C
    if backward:
        middle = tl.load(mean + n * C + c, live, 0)
        factor, shift = tl.load(rstd + n * C + c, live, 0) * tl.load(weight + c, live, 0), tl.load(bias + c, live, 0)
    else:
        middle = tl.load(x + n * S * C + c, live, 0).to(tl.float32)
    a = tl.zeros((rows, columns), tl.float32)
    b = tl.zeros((rows, columns), tl.float32)
    for start in range(0, chunk, rows):
        s = part * chunk + start + tl.arange(0, rows)
        inside = (s < S)[:, None] & live[None]
        at = (n * S + s)[:, None] * C + c[None]
        v = tl.where(inside, tl.load(x + at, inside, 0).to(tl.float32) - middle[None], 0)
        g = v
        if backward:
            g = tl.load(dy + at, inside, 0).to(tl.float32)
            if silu:
                g *= _slope(v * factor[None] + shift[None])
        a += g
        b += g * v
    to = (n * parts + part) * C + c
    tl.store(first + to, tl.sum(a, 0), live)
    tl.store(second + to, tl.sum(b, 0), live)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    x, first, second, offset, mean, rstd, apart, S, C, parts, eps,
    shifted: tl.constexpr, size: tl.constexpr, width: tl.constexpr, most: tl.constexpr,
):  # fmt: skip
    """Statistics of one group of ``size`` channels: what is subtracted from x, the factor, and the difference of each
    channel's mean from the group's."""
    n, i, p = tl.program_id(0).to(tl.int64), tl.arange(0, width), tl.arange(0, most)
    c = tl.program_id(1) * size + i
    live = i < size
    at, inside = (n * parts + p)[:, None] * C + c[None], (p < parts)[:, None] & live[None]
    a, b = tl.sum(tl.load(first + at, inside, 0), 0) / S, tl.sum(tl.load(second + at, inside, 0), 0) / S
    above = tl.load(offset + n * C + c, live, 0).to(tl.float32) if shifted else tl.zeros((width,), tl.float32)
    middle = tl.load(x + n * S * C + c, live, 0).to(tl.float32) + a + above
    of_group = tl.sum(middle, 0) / size
    beyond = tl.where(live, middle - of_group, 0)
    variance = tl.sum(b - a * a + beyond * beyond, 0) / size
    tl.store(mean + n * C + c, of_group - above, live)
    tl.store(rstd + n * C + c, tl.zeros((width,), tl.float32) + 1 / tl.sqrt(variance + eps), live)
    tl.store(apart + n * C + c, beyond, live)


@triton.jit
def _slopes(  # type: ignore[no-untyped-def]
    first, second, rstd, apart, weight, level, slope, of_weight, of_bias, of_offset, S, C, parts,
    size: tl.constexpr, width: tl.constexpr, most: tl.constexpr,
):  # fmt: skip
    """Coefficients of one group in dx = dy rstd weight + level + (x - mean) slope; one sample's part of the gradients
    of weight and bias, and the gradient of the offset, which is the sum of dx."""
    n, i, p = tl.program_id(0).to(tl.int64), tl.arange(0, width), tl.arange(0, most)
    c = tl.program_id(1) * size + i
    live = i < size
    at, inside = (n * parts + p)[:, None] * C + c[None], (p < parts)[:, None] & live[None]
    a, b = tl.sum(tl.load(first + at, inside, 0), 0), tl.sum(tl.load(second + at, inside, 0), 0)
    table = n * C + c
    r, w = tl.load(rstd + table, live, 0), tl.load(weight + c, live, 0)
    flat, steep = -r * tl.sum(w * a, 0) / (size * S), -r * r * r * tl.sum(w * b, 0) / (size * S)
    tl.store(level + table, flat, live)
    tl.store(slope + table, steep, live)
    tl.store(of_weight + table, r * b, live)
    tl.store(of_bias + table, a, live)
    tl.store(of_offset + table, r * w * a + S * (flat + steep * tl.load(apart + table, live, 0)), live)


@triton.jit
def _map(  # type: ignore[no-untyped-def]
    x, dy, mean, rstd, weight, bias, level, slope, out, S, C,
    backward: tl.constexpr, silu: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Forward: y from x. Backward: dx from x and dy."""
    n = tl.program_id(1).to(tl.int64)
    s, c = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(2) * columns + tl.arange(0, columns)
    live = c < C
    inside, at, table = (s < S)[:, None] & live[None], (n * S + s)[:, None] * C + c[None], n * C + c
    factor, shift = tl.load(rstd + table, live, 0) * tl.load(weight + c, live, 0), tl.load(bias + c, live, 0)
    v = tl.load(x + at, inside, 0).to(tl.float32) - tl.load(mean + table, live, 0)[None]
    y = v * factor[None] + shift[None]
    if backward:
        g = tl.load(dy + at, inside, 0).to(tl.float32)
        if silu:
            g *= _slope(y)
        y = g * factor[None] + tl.load(level + table, live, 0)[None] + v * tl.load(slope + table, live, 0)[None]
    elif silu:
        y *= tl.sigmoid(y)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)


class _GroupNorm(torch.autograd.Function):
    """x (B, C, H, W, D) in channels-last format; weight, bias (C,) and offset (B, C), or None, in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        (n, c), voxels = x.shape[:2], x[0, 0].numel()
        chunk = max(CHUNK, triton.cdiv(triton.cdiv(voxels, PARTS), ROWS) * ROWS)
        parts = triton.cdiv(voxels, chunk)
        mean, rstd, apart = x.new_empty(3, n, c, dtype=torch.float32)
        first, second = x.new_empty(2, n, parts, c, dtype=torch.float32)
        ctx.by_part = (n, parts, triton.cdiv(c, COLUMNS))
        ctx.by_row = (triton.cdiv(voxels, ROWS), n, triton.cdiv(c, COLUMNS))
        ctx.by_group, ctx.sizes = (n, groups), (voxels, c, chunk, parts)
        ctx.silu, ctx.shifted = silu, offset is not None
        size = c // groups
        ctx.blocks = (size, triton.next_power_of_2(size), triton.next_power_of_2(parts))
        _add[ctx.by_part](x, x, mean, rstd, weight, bias, first, second, voxels, c, chunk, False, silu, ROWS, COLUMNS)
        _moments[ctx.by_group](
            x, first, second, mean if offset is None else offset, mean, rstd, apart, voxels, c, parts, eps, ctx.shifted,
            *ctx.blocks,
        )  # fmt: skip
        y = torch.empty_like(x)
        _map[ctx.by_row](x, x, mean, rstd, weight, bias, mean, mean, y, voxels, c, False, silu, ROWS, COLUMNS)
        ctx.save_for_backward(x, weight, bias, mean, rstd, apart)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, apart = ctx.saved_tensors
        voxels, c, chunk, parts = ctx.sizes
        dy = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        first, second = x.new_empty(2, len(x), parts, c, dtype=torch.float32)
        level, slope, of_weight, of_bias, of_offset = x.new_empty(5, len(x), c, dtype=torch.float32)
        _add[ctx.by_part](
            x, dy, mean, rstd, weight, bias, first, second, voxels, c, chunk, True, ctx.silu, ROWS, COLUMNS
        )
        _slopes[ctx.by_group](
            first, second, rstd, apart, weight, level, slope, of_weight, of_bias, of_offset, voxels, c, parts,
            *ctx.blocks,
        )  # fmt: skip
        dx = torch.empty_like(x)
        _map[ctx.by_row](x, dy, mean, rstd, weight, bias, level, slope, dx, voxels, c, True, ctx.silu, ROWS, COLUMNS)
        return dx, of_weight.sum(0), of_bias.sum(0), of_offset if ctx.shifted else None, None, None, None


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None = None, silu: bool = False
) -> Tensor:
    """GroupNorm of x + offset, then SiLU if ``silu``; sums are float32.

    Args:
        x: (B, C, H, W, D), in any memory format; converted to channels last.
        groups: that C is divided into.
        weight, bias: (C,) float32.
        eps: added to the variance.
        offset: (B, C).
        silu: whether SiLU follows.

    Returns:
        (B, C, H, W, D) of x's type, in channels-last format.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    offset = None if offset is None else offset.float().contiguous()
    y: Tensor = _GroupNorm.apply(x, weight, bias, offset, groups, eps, silu)
    return y
