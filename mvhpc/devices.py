"""Which device and which precision a network computes with, and what must be known of them."""

from functools import partial

import torch
from torch import Tensor, nn

from mvhpc.config import choose

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are done in: as named, or for ``auto`` bfloat16 where the device is made for it.

    On a CPU without bfloat16 instructions it would be slower than float32, not faster.

    Raises:
        ConfigError: an unknown name.
    """
    choose(name, ("auto", *PRECISIONS), "compute.precision")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def resolve_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda``; ``auto`` is CUDA where there is some.

    Raises:
        ConfigError: an unknown name.
        RuntimeError: CUDA asked for where there is none.
    """
    choose(name, ("auto", "cpu", "cuda"), "compute.device")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeError("compute.device=cuda, but torch sees no CUDA device; use compute.device=auto or cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on a device. A GPU takes it when it comes to it, from memory that does not move: the host need not wait for
    what the GPU still has to do, and prepares the next step meanwhile."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def keep_thin_convolutions_exact(module: nn.Module) -> None:
    """Compute 3D convolutions over a first spatial axis of 2, or a second of 1, in float32 under autocast.

    On CPUs oneDNN's bfloat16 weight gradient of those is memory never written, up to infinity, and may write where it
    must not: of kernel 3 and padding 1 the first, of kernel 4 and stride 2, transposed, the second (torch 2.13, oneDNN
    3.12; other sizes are right).
    """

    def forward(convolution: nn.Conv3d, x: Tensor) -> Tensor:
        if x.shape[2] != 2 and x.shape[3] != 1:
            return type(convolution).forward(convolution, x)
        with torch.autocast("cpu", enabled=False):
            return type(convolution).forward(convolution, x.float())

    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.forward = partial(forward, part)  # type: ignore[method-assign]
