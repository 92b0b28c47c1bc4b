"""Worker processes of one machine, as `torch.multiprocessing.spawn` starts them, but without an import for each."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

IMPORTED = ["deepspeed", "mvhpc.training.joint", "mvhpc.training.loop"]  # ten seconds of computing


def start_workers(function: Callable[..., None], arguments: tuple[Any, ...], workers: int) -> None:
    """Run ``function(rank, *arguments)`` in processes that fork from one which has imported the packages."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(function, arguments, workers, start_method="forkserver")
