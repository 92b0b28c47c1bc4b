"""3D convolutions on CPUs: a workaround for what PyTorch and oneDNN get wrong or slow."""

from functools import partial

import torch
from torch import Tensor, nn

# Whether oneDNN is there, and faster than PyTorch's own kernels: not on ARM.
ONEDNN = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()


def patch_conv3d(module: nn.Module) -> None:
    """Make a network's 3D convolutions right and fast where those of PyTorch on CPUs are not (torch 2.13, oneDNN 3.12).

    In bfloat16, oneDNN's weight gradient over a first spatial axis of 2, or a second of 1, is memory never written, up
    to infinity, and may write where it must not: of kernel 3 and padding 1 the first, of kernel 4 and stride 2,
    transposed, the second. Those are computed in float32.

    In float32, PyTorch keeps a batch of one from oneDNN where channels x height x width are few, and takes up to 20
    times as long by a kernel of its own. A tensor that is in oneDNN's layout already is not kept from it.
    """

    def forward(convolution: nn.Conv3d, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            rounded = convolution.weight.dtype != torch.float32  # for inference, which takes no gradients
            if rounded or (x.shape[2] != 2 and x.shape[3] != 1):
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
    """Whether PyTorch (aten/src/ATen/native/Convolution.cpp, use_mkldnn) computes a convolution of x (B, C, H, W, D) by
    itself, and takes longer."""
    plain = type(convolution) is nn.Conv3d and convolution.groups == 1
    few = len(x) == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480
    single = x.dtype == convolution.weight.dtype == torch.float32
    return ONEDNN and plain and few and single and 1 < max(convolution.kernel_size) <= 3
