"""Predictions of a DenseNet121 beside the bare loop of its network: overhead on one worker, and gain of a second one.

    python -m benchmarks.speed.predictions [--people 64] [--rounds 5] [--size 40]

The weights are untrained, for speed does not depend on them. The bare loop has all voxels in memory and calls the
network on groups of the same size; the other ways read, check and decompress each volume and make rows. Everything is
done by one thread per worker. Ways take turns; Ray actors are timed from the first rows on. Ratios are medians over
rounds. `CPU` is the time of all threads of the process, which other programs disturb less than the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mvhpc.config import load_config
from mvhpc.inference.answers import Answered, answers
from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.ray_pool import pool_answers
from mvhpc.models.baseline import Baseline, scalars_of
from mvhpc.models.bundle import save_baseline
from shards.dataset import open_dataset
from shards.pack import pack
from shards.schema import Schema
from tests.conftest import SCHEMA, write_bids


def prepare(root: Path, people: int, size: int) -> PredictConfig:
    """Ellipsoids of ``size`` voxels an axis, and an untrained DenseNet121 for their age."""
    write_bids(root / "bids", people, size)
    options: dict[str, Any] = {"schema": Schema.from_dict(SCHEMA), "keep_suspect": True}  # ellipsoids are no brains
    pack(root / "bids", root / "packed", spacing=8.0, shape=(size,) * 3, **options)
    index = open_dataset(root / "packed").index
    torch.manual_seed(0)
    network = Baseline(scalars_of(index.schema, ["age"], {}), ["image"], "age")
    query: dict[str, Any] = {
        "given": ["image"],
        "want": "age",
        "schema": index.schema,
        "intervals": {},
        "grid": index.grid,
    }
    save_baseline(root / "model", network.state_dict(), name="densenet", settings=None, **query)
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "data": str(root / "packed"),
        "out": str(root / "a.tsv"),
        "split": "all",
    }
    values |= {"given": ["image"], "want": ["age"], "compute.device": "cpu", "compute.threads": 1, "batch": people}
    return load_config(PredictConfig, "predict", values=values)


def bare(predictor: BaselinePredictor, keys: Sequence[str]) -> Callable[[], None]:
    """The network on all groups, from memory."""
    group = predictor.group
    parts = [predictor.inputs(keys[i : i + group]) for i in range(0, len(keys), group)]

    def loop() -> None:
        with torch.inference_mode():
            for voxels, values, present in parts:
                predictor.model.network(voxels.float(), values, present).double().tolist()

    return loop


def from_first(found: Iterator[Answered], keys: Sequence[str], group: int) -> tuple[float, float]:
    """Seconds of the clock, and of the CPUs, from the first rows to the last ones, scaled to all people."""
    next(found)
    wall, cpu = time.perf_counter(), of_cpus()
    spent = (0.0, 0.0)
    for _ in found:  # workers end after the last rows
        spent = time.perf_counter() - wall, of_cpus() - cpu
    return spent[0] * len(keys) / (len(keys) - group), spent[1] * len(keys) / (len(keys) - group)


def of_cpus() -> float:
    """Seconds of the CPUs that this process and the workers have had."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        if "".join(child.cmdline()).startswith("ray::Worker"):
            total += sum(child.cpu_times()[:2])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), options.people, options.size)
        predictor = open_predictor(config)
        assert isinstance(predictor, BaselinePredictor)
        keys = predictor.dataset.keys()[: options.people // predictor.group * predictor.group]
        loop = bare(predictor, keys)
        loop()
        taken: dict[str, list[float]] = {}

        def ours() -> None:
            for _ in answers(predictor, keys, 1):
                pass

        for _ in range(options.rounds):
            for name, act in (("bare", loop), ("one process", ours)):
                wall, cpu = time.perf_counter(), time.process_time()
                act()
                taken.setdefault(name, []).append(time.perf_counter() - wall)
                taken.setdefault(f"{name}, CPU", []).append(time.process_time() - cpu)
        for workers in (1, 2):
            for _ in range(min(2, options.rounds)):
                config.compute.workers = workers
                config.batch = -(-len(keys) // (4 * workers))
                found = pool_answers(config, keys, predictor.group, Path(folder) / "logs")
                name = f"{workers} Ray actor{'s' * (workers > 1)}"
                wall, cpu = from_first(found, keys, predictor.group * workers)
                taken.setdefault(name, []).append(wall)
                taken.setdefault(f"{name}, CPU", []).append(cpu)
    print(f"{len(keys)} people, volumes of {options.size} voxels an axis, groups of {predictor.group}")
    print("| | ms a person | over the bare loop, % |\n|---|---:|---:|")
    for name, seconds in taken.items():
        base = taken["bare, CPU" if "CPU" in name else "bare"]
        paired = len(base) == len(seconds)
        ratio = statistics.median(
            [a / b for a, b in zip(seconds, base)] if paired else [s / statistics.median(base) for s in seconds]
        )
        print(f"| {name} | {1000 * statistics.median(seconds) / len(keys):.1f} | {100 * (ratio - 1):+.1f} |")


if __name__ == "__main__":
    main()
