"""Devices and precisions, and settings of PyTorch for repeatable results."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from mvhpc.config import ConfigError, choose
from mvhpc.runtime.cudnn import cudnn_fault

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at first use; cuBLAS then repeats its bits
torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has no repeatable gradients

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products: as named, or for ``auto`` bfloat16 where the device computes it faster.

    A CPU without bfloat16 instructions computes it slower than float32. So do Intel's CPUs with AMX (Sapphire Rapids
    and later, which have float16 instructions) where a virtual machine hides AMX: their other bfloat16 instructions
    reach two thirds of the rate of float32 (oneDNN 3, Emerald Rapids).

    Raises:
        ConfigError: an unknown name, or bfloat16 with a faulty cuDNN (:func:`mvhpc.runtime.cudnn.cudnn_fault`).
    """
    precision = _precision(name, device)
    fault = cudnn_fault(torch.backends.cudnn.version()) if device.type == "cuda" else None
    if fault is not None and precision is torch.bfloat16:
        raise ConfigError(f"{fault}, or set compute.precision=float32")
    return precision


def _precision(name: str, device: torch.device) -> torch.dtype:
    choose(name, ("auto", *PRECISIONS), "compute.precision")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not report them
        fast = has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and not has.get("avx512_fp16", False))
    return torch.bfloat16 if fast else torch.float32


def resolve_device(name: str) -> torch.device:
    """The device ``auto``, ``cpu`` or ``cuda``; ``auto`` is CUDA where it is available.

    Raises:
        ConfigError: an unknown name, or CUDA is requested and not available.
    """
    choose(name, ("auto", "cpu", "cuda"), "compute.device")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("compute.device=cuda, but torch sees no CUDA device; use compute.device=auto or cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def describe_device(device: torch.device) -> str:
    """``CPU (4 threads)``, or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)})"


def processor(device: torch.device) -> str:
    """What decides the bits of a result, of a device: the name of the GPU, or the instructions of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On CPUs the order of floating-point sums depends on the number of threads; inside, it is always the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Gradients inside are bit-identical in every run. On a GPU those of attention are otherwise not."""
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
    """Copy ``x`` to a device; to a GPU from pinned memory, so that the host does not wait for the GPU's queue."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
