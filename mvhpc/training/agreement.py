"""Whether a checkpoint is of the run that wants to go on from it."""

from collections.abc import Iterator
from typing import Any

from mvhpc.config import ConfigError, to_dict
from mvhpc.training.checkpoint import Checkpoint
from mvhpc.training.task import Config

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


def agree(checkpoint: Checkpoint, config: Config, total: int) -> None:
    """Refuse a checkpoint that another configuration wrote.

    Args:
        checkpoint: of whatever number of workers.
        config: of this run.
        total: its steps.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    before, now = checkpoint.state["configuration"], flat(config)
    free = [k for k in FREE if k != "training.epochs" or config.optimizer.schedule == "constant"]
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not any(key == k or key.startswith(k) for k in free):
            raise ConfigError(
                f"{checkpoint.folder} was trained with {key}={before.get(key)}, not {now.get(key)}; "
                f"set it back, or train in another folder (out=...)"
            )
    if checkpoint.step > total:
        raise ConfigError(
            f"{checkpoint.folder} is beyond the {total} steps of training.epochs={config.training.epochs}; "
            f"raise it, or train in another folder (out=...)"
        )


def flat(config: Any) -> dict[str, Any]:
    """A configuration as dotted key -> JSON-able value."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(config), ""))
