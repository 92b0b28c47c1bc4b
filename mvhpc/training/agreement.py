"""Whether a checkpoint is of the run that wants to go on from it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, to_dict
from mvhpc.training.manifest import Checkpoint, CheckpointError, complete, read_checkpoint

# What a configuration may change between a checkpoint and its resumption, because it does not decide the weights.
# (With a cosine schedule `training.epochs` decides them too: the rate of every step depends on it.)
FREE = (
    "out",
    "tracking.",
    "training.epochs",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep",
    "training.log_every",
    "compute.workers",
    "compute.zero_stage",
    "compute.device",
    "compute.threads",
    "compute.retries",
    "compute.offload",
    "compute.compile",
    "compute.hang_minutes",
)
PLACES = ("data", "latents", "vae")  # may be spelt another way


def agree_with_newest(folder: Path, config: Any) -> None:
    """Refuse the newest checkpoint of a run folder where another configuration wrote it; a damaged one is not judged.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    for checkpoint in complete(folder / "checkpoints")[-1:]:
        try:
            agree(read_checkpoint(checkpoint), config)
        except CheckpointError:
            return


def agree(checkpoint: Checkpoint, config: Any, total: float = math.inf) -> None:
    """Refuse a checkpoint that another configuration wrote.

    Args:
        checkpoint: of whatever number of workers.
        config: of this run, of a stage that trains.
        total: its steps, where they are known.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    before, now = checkpoint.state["configuration"], flat(config)
    free = [k for k in FREE if k != "training.epochs" or config.optimizer.schedule == "constant"]
    for key in sorted({*before, *now}):
        same = before.get(key) == now.get(key) or (key in PLACES and _one_place(before.get(key), now.get(key)))
        if not same and not any(key == k or key.startswith(k) for k in free):
            raise ConfigError(
                f"{checkpoint.folder} was trained with {key}={before.get(key)}, not {now.get(key)}; "
                f"set it back, or train in another folder (out=...)"
            )
    if checkpoint.step > total:
        raise ConfigError(
            f"{checkpoint.folder} is beyond the {total} steps of training.epochs={config.training.epochs}; "
            f"raise it, or train in another folder (out=...)"
        )


def _one_place(path: Any, other: Any) -> bool:
    return isinstance(path, str) and isinstance(other, str) and Path(path).resolve() == Path(other).resolve()


def flat(config: Any) -> dict[str, Any]:
    """A configuration as dotted key -> JSON-able value."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(config), ""))
