"""Which device and which precision a network computes with, and what must be known of them."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from mvhpc.config import choose

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when first used: what cuBLAS's equal bits ask for
torch.backends.cuda.enable_cudnn_sdp(False)  # has no attention whose gradients are the same every time

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are done in: as named, or for ``auto`` bfloat16 where the device is made for it.

    On a CPU without bfloat16 instructions it would be slower than float32, not faster. So it is on those that Intel
    made for AMX (Sapphire Rapids and later, told by their float16 instructions) where a virtual machine hides AMX: what
    is left does two thirds of float32's operations a second (oneDNN 3, Emerald Rapids).

    Raises:
        ConfigError: an unknown name.
    """
    choose(name, ("auto", *PRECISIONS), "compute.precision")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch cannot say
        fast = has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and not has.get("avx512_fp16", False))
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


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """In which gradients are the same, to the bit, every time: on a GPU those of attention would not be, whose parts
    are added up in the order in which they are ready."""
    if device.type != "cuda":
        yield
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on a device. A GPU takes it when it comes to it, from memory that does not move: the host need not wait for
    what the GPU still has to do, and prepares the next step meanwhile."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
