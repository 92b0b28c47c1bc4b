"""3D convolutions on CPUs: workarounds for wrong or slow kernels of PyTorch and oneDNN."""

from functools import partial

import torch
from torch import Tensor, nn

# Whether oneDNN is available and faster than PyTorch's own kernels; it is not on ARM.
ONEDNN = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()


def patch_conv3d(module: nn.Module) -> None:
    """Replace a network's 3D convolutions where those of PyTorch on CPUs are wrong or slow (torch 2.13, oneDNN 3.12).

    In bfloat16, oneDNN's weight gradient contains uninitialised memory, infinities included, and may write out of
    bounds, if a spatial axis is shorter than the kernel. These sizes are computed in float32.

    In float32, PyTorch does not use oneDNN for a batch of one with few channels x height x width, but a kernel of its
    own that takes up to 20 times as long. For a tensor in oneDNN's layout, it uses oneDNN.
    """

    def forward(convolution: nn.Conv3d, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            rounded = convolution.weight.dtype != torch.float32  # for inference, which takes no gradients
            (h, w, d), (kh, kw, kd) = x.shape[2:], convolution.kernel_size
            if rounded or (h >= kh and w >= kw and d >= kd):
                return type(convolution).forward(convolution, x)
            with torch.autocast("cpu", enabled=False):
                return type(convolution).forward(convolution, x.float())
        if _kept_from_onednn(convolution, x) and not torch.compiler.is_compiling():
            return convolution._conv_forward(x.to_mkldnn(), convolution.weight, convolution.bias).to_dense()
        return type(convolution).forward(convolution, x)

    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.forward = partial(forward, part)  # type: ignore[method-assign]


def _kept_from_onednn(convolution: nn.Conv3d, x: Tensor) -> bool:
    """Whether PyTorch uses its own, slower kernel for a convolution of x (B, C, H, W, D); the condition is that of
    ``use_mkldnn`` in aten/src/ATen/native/Convolution.cpp."""
    plain = type(convolution) is nn.Conv3d and convolution.groups == 1
    few = len(x) == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480
    single = x.dtype == convolution.weight.dtype == torch.float32
    return ONEDNN and plain and few and single and 1 < max(convolution.kernel_size) <= 3
