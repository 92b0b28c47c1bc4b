"""Equal bits: each training stage runs twice from the same seed, and every tensor of its checkpoints must agree."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_sections.settings import Settings
from benchmarks.speed.ways import prepare
from mvhpc.checkpoints.consolidate import read_weights
from mvhpc.config import load_config
from mvhpc.training.baseline import BaselineConfig, BaselineTask
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.loop import train
from mvhpc.training.scalars import ScalarsConfig, ScalarsTask
from mvhpc.training.task import Task
from mvhpc.training.vae import VAEConfig, VAETask

STEPS = "training.epochs"
Job = Callable[[], dict[str, Any]]


def repeatability(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``repeatability``, by the demo's networks on phantoms of 32 x 32 x 32 voxels."""
    root = folder / "phantoms"
    if not root.is_dir():
        prepare(root, settings.people)
    data = {"data": str(root / "packed")}
    short = {"training.batch": 4, "training.epochs": 2, "compute.workers": 1, "out": "none"}
    critic = {"loss.adversarial": 0.1, "loss.discriminator_channels": 8}
    query = {"want": "age", "given": ["image", "sex"]}
    inputs = {key: str(root / key) for key in ("latents", "vae", "scalars")}
    stages: dict[str, tuple[Callable[[Any], Task], Any]] = {
        "vae": (VAETask, load_config(VAEConfig, "vae", "demo", values=short | data | critic)),
        "baseline": (BaselineTask, load_config(BaselineConfig, "baseline", "demo", values=short | data | query)),
        "scalars": (ScalarsTask, load_config(ScalarsConfig, "scalars", "demo", values=short | data)),
        "joint": (JointTask, load_config(JointConfig, "joint", "demo", values=short | inputs)),
    }
    for name, (task, config) in stages.items():
        yield name, partial(compare, task, config, folder / "repeated" / name)


def compare(task: Callable[[Any], Task], config: Any, folder: Path) -> dict[str, Any]:
    """Train twice; how many tensors there are, and how many differ.

    Raises:
        AssertionError: some differ.
    """
    first, second = (run(task(config), config, folder / str(i)) for i in range(2))
    different = [name for name in first if first[name] != second[name]]
    if first.keys() != second.keys() or different:
        raise AssertionError(f"{len(different)} of {len(first)} tensors differ, such as {', '.join(different[:3])}")
    return {"tensors": len(first), "different": len(different), "sha256": digest(first)}


def run(task: Task, config: Any, folder: Path) -> dict[str, str]:
    """Train to the end; SHA-256 of every tensor of the last checkpoint (weights, moments, averages)."""
    train(task, config, folder)
    newest = max((folder / "checkpoints").glob("step-*"))
    found = {}
    for path in sorted(newest.rglob("*.pt")):
        for i, value in enumerate(tree_leaves(read_weights(path))):
            if isinstance(value, Tensor):
                bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                found[f"{path.relative_to(newest)}:{i}"] = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    return found


def digest(hashes: dict[str, str]) -> str:
    """One hash of all."""
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
