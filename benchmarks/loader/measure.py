"""Epochs of all ways, each in its own process, interleaved."""

import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.loader.peers import PEERS
from benchmarks.loader.ways import LIMITS, OURS, Nibabel, NibabelPrepared, Volume, Way

WAYS: list[type[Way]] = [*LIMITS, *OURS, *PEERS, Nibabel, NibabelPrepared]
PAGE = 4096
SLOW = {Nibabel.name, NibabelPrepared.name}  # read in every second round


def serve(number: int, folder: Path, pipe: Connection) -> None:
    """Open a way, then read one epoch for each seed that comes; answer with CPU seconds per volume."""
    try:
        epoch = WAYS[number]().open(folder)
        pipe.send(0.0)
        while (seed := pipe.recv()) is not None:
            count, touched, began = 0, 0, time.process_time()
            for volume in epoch(seed):
                touched += int(volume.reshape(-1).view(np.uint8)[::PAGE].max())
                count += 1
            pipe.send((time.process_time() - began) / count)
    except Exception as error:
        traceback.print_exc()
        pipe.send(error)


def missing(way: type[Way]) -> bool:
    """Whether the package of a way is not installed."""
    return bool(way.module) and importlib.util.find_spec(way.module) is None


def measure(
    volumes: Volume, scans: Sequence[Path], scratch: Path, repeats: int, only: Sequence[str]
) -> dict[str, list[float]]:
    """Way -> CPU ms per volume of each epoch."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the workers of a DataLoader
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for number, way in enumerate(WAYS):
        if missing(way) or (only and not any(word in way.name for word in only)):
            continue
        folder = scratch / f"way-{number}"
        folder.mkdir()
        print(f"writing {way.name}", file=sys.stderr, flush=True)
        way().write(folder, volumes, scans)
        pipes[way.name], there = context.Pipe()
        processes.append(context.Process(target=serve, args=(number, folder, there), daemon=True))
        processes[-1].start()
        there.close()  # so that the end of the process is seen here
        answer(pipes, way.name)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(repeats + 1):  # the first one fills caches and is not counted
        for name in np.random.default_rng(turn).permutation(list(pipes)):
            if name in SLOW and turn % 2:
                continue
            pipes[name].send(turn)
            seconds = answer(pipes, name)
            if seconds is not None and (turn or name in SLOW):
                times[name].append(1e3 * seconds)
        print(f"epoch {turn} of {repeats}", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return times


def answer(pipes: dict[str, Connection], name: str) -> float | None:
    """What the process of a way sends; one that failed is left out from now on."""
    try:
        found = pipes[name].recv()
    except EOFError as error:
        found = error
    if isinstance(found, Exception):
        print(f"{name}: {type(found).__name__}: {found}", file=sys.stderr, flush=True)
        del pipes[name]
        return None
    return float(found)
