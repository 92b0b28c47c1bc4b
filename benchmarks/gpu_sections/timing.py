"""Wall-clock times on a device that works while the host goes on."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call, over several calls: the host prepares one call while the GPU computes another."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        job()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def median_seconds(job: Callable[[], object], device: torch.device, calls: int = 1, repeat: int = 5) -> float:
    """The median over ``repeat`` measurements of :func:`seconds`, after two calls that do not count."""
    seconds(job, device, 2)
    return statistics.median(seconds(job, device, calls) for _ in range(repeat))


def reset_memory(device: torch.device) -> None:
    """Begin a new measurement of the memory peak, with nothing cached from before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> float | None:
    """The largest memory in tensors since :func:`reset_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
