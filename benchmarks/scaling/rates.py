"""Constants of the machines in the scaling model: each with its source; some can be measured on this machine."""

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.scaling.workload import VOXELS, joint_parts
from mvhpc.runtime.randomness import generator
from shards.cpus import available_cores
from shards.dataset import open_dataset
from shards.files import sha256
from shards.pack import pack
from shards.phantom.make import make_phantoms

MEASURED = "measured in this run, on {cores} CPU cores"
BLOCK = 2**28  # bytes written, hashed and copied by a measurement


def rate(value: float, unit: str, source: str) -> float:
    """A field of :class:`Rates`: its value, and its entry in the table of constants."""
    made: float = field(default=value, metadata={"unit": unit, "source": source})
    return made


@dataclass(frozen=True)
class Rates:
    """Constants of the model; units and sources are the fields' metadata."""

    peak: float = rate(989e12, "FLOP/s of a GPU", "NVIDIA's data sheet of the H200: bfloat16, no sparsity")
    arithmetic: float = rate(0.48, "of it in convolutions and matrix products", "fitted to one H200 training `h200`")
    bandwidth: float = rate(4.8e12, "bytes/s of a GPU's memory", "NVIDIA's data sheet of the H200")
    traffic: float = rate(0.7, "of it in every operator", "assumed")
    memory: float = rate(141e9, "bytes of a GPU", "NVIDIA's data sheet of the H200")
    filled: float = rate(0.9, "share of it that a configuration may use", "assumed")
    launch: float = rate(6.5e-5, "s of the host per operator", "measured, the virtual machine of one H200; eager")
    noising: float = rate(7.6e-4, "s of the host per row of the joint diffusion", "measured on a CPU core")
    nvlink: float = rate(450e9, "bytes/s each way of a GPU inside a node", "NVIDIA's data sheet of the H200")
    infiniband: float = rate(50e9, "bytes/s each way of a GPU between nodes", "400 Gbit/s NDR, one port per GPU")
    reached: float = rate(0.75, "of both in collectives", "assumed")
    latency: float = rate(15e-6, "s per collective and doubling of the GPUs", "assumed; NCCL")
    hidden: float = rate(0.5, "of ZeRO-3's communication that runs beside computing", "assumed")
    loading: float = rate(4.3e8, "bytes/s of volumes that one worker reads and checks", "measured on 2 CPU cores")
    snapshot: float = rate(25e9, "bytes/s from a GPU to the host's memory", "assumed; PCIe 5, half of its 55e9")
    hashing: float = rate(9.2e8, "bytes/s of SHA-256 by one worker", "measured on 2 CPU cores")
    writing: float = rate(2e9, "bytes/s that a node writes to shared storage", "assumed")
    storage: float = rate(20e9, "bytes/s that shared storage takes from all nodes", "assumed")
    start: float = rate(60, "s from a new attempt to its first step", "assumed; see docs/overhead.md")
    requeue: float = rate(121, "s that SLURM holds a requeued job back", "measured, SLURM 22.05: a fixed delay")
    failing: float = rate(7.9 * 1024, "GPU-hours between failures", "Kokolis et al. 2025: MTTF 7.9 h at 1,024 GPUs")
    failing_llama: float = rate(
        54 * 24 * 16384 / 419, "GPU-hours between failures, if it goes well", "Llama 3: 419 in 54 days on 16,384 GPUs"
    )


def measure(folder: Path | None = None) -> tuple[Rates, dict[str, str], dict[str, float]]:
    """The constants, those that this machine can measure replaced by measurements.

    Args:
        folder: on the file system whose writing is measured; a temporary one where None.

    Returns:
        the constants; the sources of those that were measured; and further figures of this machine: collectives over
        loopback, and storage.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        found = {"noising": _noising(), "loading": _loading(place), "hashing": _hashing(place)}
        local = {"bytes/s written to disk, fsync included": _writing(place)}
    if torch.cuda.is_available():
        found["snapshot"] = _copying("cuda")
    local["bytes/s copied within the host's memory"] = _copying("cpu")
    bandwidth, latency = _all_reduce()
    local["bytes/s of an all-reduce over loopback (gloo, 2 workers)"] = bandwidth
    local["s of the smallest all-reduce over loopback (gloo, 2 workers)"] = latency
    source = MEASURED.format(cores=available_cores())
    return replace(Rates(), **found), dict.fromkeys(found, source), local


def _seconds(job: Callable[[], object], repeat: int = 5) -> float:
    """Median seconds of a few calls, after a warm-up call."""
    job()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _noising(rows: int = 16) -> float:
    """Seconds of the host per row that :class:`mvhpc.diffusion.joint.JointDiffusion` noises, latents of 1 mm."""
    variables, diffusion, _ = joint_parts("h200")
    image = torch.randn(rows, *variables.volumes[0].shape)
    batch = {"image": image, "age": torch.zeros(rows, 1), "sex": torch.zeros(rows, dtype=torch.int64)}

    def job() -> None:
        draws = [generator(0, "train", i) for i in range(rows)]
        diffusion.noise(batch, {}, diffusion.draw_times(draws, volumes_move=True), draws)

    return _seconds(job) / rows


def _loading(folder: Path, people: int = 1) -> float:
    """Bytes a second of volumes of 1 mm that one worker reads from shards in the page cache, checksums verified."""
    make_phantoms(folder / "scans", people, VOXELS, workers=1)
    pack(folder / "scans", folder / "packed", storage="zarr", spacing=1.0, shape=VOXELS, workers=1)
    dataset = open_dataset(folder / "packed")
    keys, name = dataset.keys(), dataset.index.schema.volumes[0].name
    size = dataset.read(keys[0], name).nbytes
    return len(keys) * size / _seconds(lambda: [dataset.read(key, name) for key in keys])


def _hashing(folder: Path) -> float:
    """Bytes a second of :func:`shards.files.sha256`."""
    path = folder / "block"
    path.write_bytes(os.urandom(BLOCK))
    return BLOCK / _seconds(partial(sha256, path), 3)


def _writing(folder: Path) -> float:
    """Bytes a second that reach the disk."""
    tensor = torch.rand(BLOCK // 4)

    def job() -> None:
        with (folder / "written").open("wb") as file:
            torch.save(tensor, file)
            file.flush()
            os.fsync(file.fileno())

    return BLOCK / _seconds(job, 3)


def _copying(device: str) -> float:
    """Bytes a second from a device into host memory that is there already, pinned where the device is a GPU."""
    source = torch.rand(BLOCK // 4, device=device)
    target = torch.empty(BLOCK // 4, pin_memory=device == "cuda")
    return BLOCK / _seconds(lambda: target.copy_(source))


def _all_reduce() -> tuple[float, float]:
    """Bytes a second of an all-reduce over the loopback interface by two processes, and seconds of a small one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=_reducer, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    measured: tuple[float, float] = results.get()
    for process in processes:
        process.join()
    return measured


def _reducer(rank: int, port: int, results: "multiprocessing.SimpleQueue[tuple[float, float]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    large, small = torch.rand(2**24), torch.rand(1)
    result = 4 * 2**24 / _seconds(lambda: dist.all_reduce(large)), _seconds(lambda: dist.all_reduce(small), 50)
    if rank == 0:
        results.put(result)
    dist.destroy_process_group()
