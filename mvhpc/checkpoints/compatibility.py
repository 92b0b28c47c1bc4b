"""Whether a checkpoint is of the run that wants to go on from it."""

import math
from pathlib import Path
from typing import Any

from mvhpc.checkpoints.manifest import Checkpoint, CheckpointError, complete, read_checkpoint
from mvhpc.config import ConfigError, Effect, effect, flatten

PLACES = ("data", "latents", "vae")  # may be spelt another way


def check_newest(folder: Path, config: Any) -> None:
    """Refuse the newest checkpoint of a run folder where another configuration wrote it; a damaged one is not judged.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    for checkpoint in complete(folder / "checkpoints")[-1:]:
        try:
            check(read_checkpoint(checkpoint), config)
        except CheckpointError:
            return


def check(checkpoint: Checkpoint, config: Any, total: float = math.inf) -> None:
    """Refuse a checkpoint that another configuration wrote.

    Args:
        checkpoint: of whatever number of workers.
        config: of this run, of a stage that trains.
        total: its steps, where they are known.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    before, now = checkpoint.state["configuration"], flatten(config)
    free = {Effect.NONE, Effect.SELECTION, *([Effect.LENGTH] if config.optimizer.schedule == "constant" else [])}
    for key in sorted({*before, *now}):
        same = before.get(key) == now.get(key) or (key in PLACES and _one_place(before.get(key), now.get(key)))
        if not same and effect(key) not in free:
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
