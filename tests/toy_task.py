"""A small task that trains in seconds: a generator and a discriminator on points of a plane.

Like the real tasks it draws noise from (seed, step, sample), so every law of the training loop holds for it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mvhpc.config import Compute, Optimizer, Training
from mvhpc.runs.journal import read, unseen
from mvhpc.runtime import watchdog
from mvhpc.runtime.randomness import generator, randn
from mvhpc.training.engines import deepspeed
from mvhpc.training.engines.base import Engine
from mvhpc.training.loop import train
from mvhpc.training.task import Task
from shards.files import write_bytes, write_text
from shards.order import Order


@dataclass
class Faults:
    """Faults that are injected into a run."""

    fail_at: int = -1  # step at which it is interrupted
    kill_at: int = -1  # step at which one process is killed, once: the one that creates the file `mark`
    mark: str = ""
    poison: list[int] = field(default_factory=list)  # steps with a sample that is not finite
    transient: bool = False  # poisoned only the first time
    stop_at: int = -1  # step at which the stop file appears
    full: list[int] = field(default_factory=list)  # first and last step at which no file can grow
    hang_at: int = -1  # step at which one of the processes hangs, once: as with `kill_at`


@dataclass
class ToyConfig:
    """A stage's configuration, as small as the loop allows."""

    out: str
    ema: float
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Faults  # where a resumed run may differ
    adversarial: bool = True
    dropout: float = 0.0
    width: int = 16


def toy_config(**changes: Any) -> ToyConfig:
    """The default, with dotted-key changes (dots written as double underscores)."""
    config = ToyConfig(
        out="toy",
        ema=0.9,
        optimizer=Optimizer(lr=1e-2, betas=[0.9, 0.95], weight_decay=0.01, warmup=3, schedule="constant", clip=1.0),
        training=Training(
            epochs=3,
            batch=8,
            accumulate=1,
            validate_every=1,
            checkpoint_every=4,
            keep=2,
            log_every=2,
            seed=0,
        ),
        compute=Compute(
            device="cpu",
            precision="float32",
            threads=1,
            compile=False,
            workers=1,
            zero_stage=1,
            offload="none",
            retries=0,
            hang_minutes=30.0,
        ),
        tracking=Faults(),
    )
    for key, value in changes.items():
        *parents, name = key.split("__")
        node: Any = config
        for parent in parents:
            node = getattr(node, parent)
        assert name in {f.name for f in dataclasses.fields(node)}
        setattr(node, name, value)
    return config


class Interrupted(Exception):
    """Stops a run at a step."""


class Network(nn.Sequential):
    """Consecutive layers; torch.compile needs a ``forward`` of the class itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ToyTask(Task):
    """Denoise points of a curve, with an adversary that distinguishes denoised points from real ones."""

    exported: Mapping[str, Sequence[str]] = {"denoiser": ("error", "index", "odd")}
    averaged: Collection[str] = ("denoiser",)
    samples = 36
    validation = 7

    def __init__(self, config: ToyConfig) -> None:
        torch.manual_seed(config.training.seed)
        self.config = config
        self.networks: dict[str, nn.Module] = {
            "denoiser": Network(
                nn.Linear(2, config.width), nn.SiLU(), nn.Dropout(config.dropout), nn.Linear(config.width, 2)
            )
        }
        self.poisoned: set[int] = set()
        self.learning_rates = {"denoiser": config.optimizer.lr}
        if config.adversarial:
            self.networks["discriminator"] = Network(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
            self.learning_rates["discriminator"] = config.optimizer.lr / 2

    @staticmethod
    def points(indices: list[int]) -> Tensor:
        angle = torch.tensor(indices, dtype=torch.float32) / 5
        return torch.stack([angle.cos(), angle.sin()], 1)  # (B, 2)

    def load(self, indices: list[int]) -> dict[str, Any]:
        return {"x": self.points(indices)}

    def _inject_faults(self, step: int, x: Tensor, indices: list[int]) -> Tensor:
        """Apply the faults of this step."""
        faults = self.config.tracking
        if step == faults.fail_at:
            raise Interrupted
        if step == faults.kill_at:
            with contextlib.suppress(FileExistsError):
                Path(faults.mark).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        if step == faults.stop_at:
            Path(os.environ["MVHPC_STOP_FILE"]).touch()
        if step == faults.hang_at:
            with contextlib.suppress(FileExistsError):
                Path(faults.mark).touch(exist_ok=False)
                while True:
                    time.sleep(1)
        rank, world = (int(os.environ.get(name, 1)) for name in ("RANK", "WORLD_SIZE"))
        if faults.full and rank >= world - 1:  # for every file of this process, the last of the workers
            soft = 100 if faults.full[0] <= step <= faults.full[1] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        if step in faults.poison and not (faults.transient and step in self.poisoned):
            first = Order(self.samples, self.config.training.batch, self.config.training.seed).indices(step)[0]
            x = torch.where(torch.tensor(indices, device=x.device)[:, None] == first, torch.nan, x)
        self.poisoned.add(step)
        return x

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        x = self._inject_faults(step, batch["x"], indices)
        noise = randn([generator(self.config.training.seed, "train", step, i) for i in indices], (2,))
        denoised = engines["denoiser"](x + 0.3 * noise.to(x.device))
        loss = (denoised - x).square().mean()
        scalars = {}
        if self.config.adversarial:
            scalars["adversarial"] = (engines["discriminator"].frozen(denoised) - 1).square().mean()
            loss = loss + 0.1 * scalars["adversarial"]
        engines["denoiser"].backward(loss)
        engines["denoiser"].step()
        if self.config.adversarial:
            adversary = engines["discriminator"]
            adversary_loss = (adversary(x) - 1).square().mean() + adversary(denoised.detach()).square().mean()
            adversary.backward(adversary_loss)
            adversary.step()
            scalars["discriminator"] = adversary_loss
        return {"loss": loss, **scalars}

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        network = networks["denoiser"]
        x = self.points([i + 1000 for i in indices]).to(next(network.parameters()).device)
        error = (network(0.9 * x) - x).square().mean(1)
        odd = torch.tensor([float(i) if i % 2 else float("nan") for i in indices])
        return {"error": error, "index": torch.tensor(indices).float(), "odd": odd}

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        folder.mkdir(exist_ok=True)
        for name, state in states.items():
            write_bytes(folder / f"{name}.safetensors", save(state))
        write_text(folder / "model.json", json.dumps(metrics))

    def figures(self, networks: dict[str, nn.Module], step: int) -> dict[str, Any]:
        networks["denoiser"](self.points([0]))
        return {"step.txt": lambda path: path.write_text(str(step))}


def exported(folder: Path, network: str = "denoiser") -> dict[str, Tensor]:
    """The weights a run exported."""
    return load_file(folder / "model" / f"{network}.safetensors")


def run_toy(config: ToyConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train the toy task; importable by workers."""
    deepspeed.PERSISTENT = 100  # under ZeRO-3 some of its few weights are fetched then
    return train(ToyTask(config), config, folder, rank, world)


def join(rank: int, world: int, rendezvous: Path) -> None:
    """Become one of the workers, without Ray."""
    torch.set_num_threads(1)
    stop = rendezvous.with_name("stop")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MVHPC_STOP_FILE=str(stop))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    watchdog.PERIOD_S = 0.0  # a poll after every step


def digest(value: object) -> str:
    """SHA-256 over the bits of every tensor in a nested structure."""
    sha = hashlib.sha256()

    def walk(node: object) -> None:
        if isinstance(node, Tensor):
            sha.update(str((node.dtype, tuple(node.shape))).encode() + node.detach().contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                sha.update(str(key).encode())
                walk(node[key])
        elif isinstance(node, list | tuple):
            for item in node:
                walk(item)
        elif isinstance(node, int | float | str):
            sha.update(repr(node).encode())

    walk(value)
    return sha.hexdigest()


def curves(folder: Path) -> dict[tuple[int, str], float]:
    """All metrics in the journal of a run by step and name, except those of the machine."""
    return {
        (e["step"], name): value
        for e in unseen(read(folder))
        if e["event"] == "metrics"
        for name, value in e["metrics"].items()
        if not name.startswith("system/")
    }
