"""Training steps of the joint model and of the autoencoder: eager, and with their repeated blocks compiled."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.networks.blocks.spatialattention import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, SpatialTransformer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_sections.data import latents, volumes
from benchmarks.gpu_sections.settings import Settings
from benchmarks.gpu_sections.timing import memory_gib, reset_memory, seconds
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.devices import resolve_device, send
from mvhpc.training.engines.make import make_engine
from mvhpc.training.joint import JointTask
from mvhpc.training.metrics import peak_tflops
from mvhpc.training.task import Config, Task, micro_batch
from mvhpc.training.vae import VAETask
from shards.order import Order

Job = Callable[[], dict[str, Any]]
REGIONS = (DiffusionUNetResnetBlock, SpatialTransformer, SpatialAttentionBlock, AEKLResBlock)
SIGNATURES = 64  # shapes that one block's code may be compiled for; beyond PyTorch's default of 8 it would run eager


class Trainer:
    """A task with its engines, stepped by hand: what the training loop does between two checkpoints.

    Args:
        task: what is trained.
        config: of its stage.
        steps: how many different steps there are; their batches are in host memory before the first.
    """

    def __init__(self, task: Task, config: Config, steps: int) -> None:
        self.task, self.device = task, resolve_device(config.compute.device)
        parts = config.training.accumulate
        order = Order(task.samples, config.training.batch, config.training.seed)
        self.indices = [[order.part(step, part, parts) for part in range(parts)] for step in range(steps)]
        self.batches = [[task.load(part) for part in of_step] for of_step in self.indices]
        micro = micro_batch(config.training, 1)
        self.engines = {
            name: make_engine(
                module,
                task.learning_rates[name],
                config.optimizer,
                config.compute,
                getattr(config, "ema", None) if name in task.averaged else None,
                parts,
                micro,
                Collectives(0, 1),
            )
            for name, module in task.networks.items()
        }

    def step(self, step: int) -> None:
        """Step number ``step``, from 0."""
        for indices, batch in zip(self.indices[step], self.batches[step], strict=True):
            there = tree_map_only(Tensor, lambda x: send(x, self.device), batch)
            self.task.step(there, self.engines, step, indices)

    def all_steps(self) -> None:
        """Every step once."""
        for step in range(len(self.batches)):
            self.step(step)


def measure(trainer: Trainer, batch: int, settings: Settings) -> dict[str, Any]:
    """The time of a step, and its rate of operations as a share of the device's bfloat16 peak.

    The operations of one step are counted, backward pass included.
    """
    device, count = trainer.device, len(trainer.batches)
    reset_memory(device)
    for step in range(settings.warm):
        trainer.step(step % count)
    blocks = [seconds(trainer.all_steps, device) / count for _ in range(settings.blocks)]
    memory = memory_gib(device)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        trainer.step(0)
    step_seconds = statistics.median(blocks)
    rate, most = counter.get_total_flops() / step_seconds / 1e12, peak_tflops(device)
    return {
        "batch": batch,
        "step_ms": 1000 * step_seconds,
        "slowest_block_ms": 1000 * max(blocks),
        "samples_per_second": batch / step_seconds,
        "tflops": rate,
        "peak_percent": 100 * rate / most if most else None,
        "memory_gib": memory,
    }


def compile_regions(network: nn.Module, backend: str) -> int:
    """Compile each residual and attention block by itself (PyTorch's "regional compilation"); how many there are.

    Blocks of equal shapes share their code.
    """
    torch._dynamo.config.recompile_limit = SIGNATURES
    torch._dynamo.config.automatic_dynamic_shapes = False  # blocks of several sizes are no one block of any size
    regions = [part for part in network.modules() if isinstance(part, REGIONS)]
    for part in regions:
        part.forward = torch.compile(part.forward, backend=backend)
    return len(regions)


def compiled(trainer: Trainer, batch: int, settings: Settings) -> dict[str, Any]:
    """As :func:`measure`, with the repeated blocks of the networks compiled; what compiling takes is counted apart."""
    counters.clear()
    regions = sum(compile_regions(engine.module, settings.backend) for engine in trainer.engines.values())
    first = seconds(lambda: trainer.step(0), trainer.device)
    facts = measure(trainer, batch, settings)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return facts | {"first_step_s": first, "regions": regions, "graphs": graphs, "graph_breaks": breaks}


def product(settings: Settings) -> dict[str, Any]:
    """The rate that a product of bfloat16 matrices keeps up: what the device can do at best."""
    device = resolve_device("auto")
    a, b = (torch.rand(settings.product, settings.product, device=device).bfloat16() for _ in range(2))
    once = seconds(lambda: a @ b, device, 2)
    calls = max(2, int(settings.product_seconds / once))
    rate, most = 2 * settings.product**3 / seconds(lambda: a @ b, device, calls) / 1e12, peak_tflops(device)
    return {"tflops": rate, "peak_percent": 100 * rate / most if most else None}


def joint(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``training``: the joint stage."""
    yield "matrix product", lambda: product(settings)
    config = settings.joint_config(**latents(folder, settings))
    trainer = Trainer(JointTask(config), config, settings.steps[0])
    batch = config.training.batch
    yield "joint, eager", lambda: measure(trainer, batch, settings)
    yield "joint, blocks compiled", lambda: compiled(trainer, batch, settings)


def autoencoder(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``autoencoder``. The preset's batch is divided into micro-batches until one fits into memory."""
    config = settings.vae_config(data=volumes(folder, settings))
    found: list[Trainer] = []

    def eager() -> dict[str, Any]:
        parts = config.training.accumulate
        while True:
            divided = replace(config, training=replace(config.training, accumulate=parts))
            try:
                trainer = Trainer(VAETask(divided), divided, settings.steps[1])
                facts = measure(trainer, config.training.batch, settings)
                found.append(trainer)
                return facts | {"micro_batches": parts}
            except torch.OutOfMemoryError:
                if parts == config.training.batch:
                    raise
            parts *= 2  # here, where nothing refers to the tensors of the last attempt any more
            reset_memory(resolve_device(config.compute.device))

    yield "autoencoder, eager", eager
    yield "autoencoder, blocks compiled", lambda: compiled(found[0], config.training.batch, settings)
