"""Whether a run may resume from a checkpoint."""

import math
from pathlib import Path
from typing import Any

from mvhpc.checkpoints.manifest import Checkpoint, CheckpointError, complete, read_checkpoint
from mvhpc.config import ConfigError, Effect, effect, flatten


def check_newest(folder: Path, config: Any) -> None:
    """Refuse the newest checkpoint of a run folder where another configuration wrote it. Skips a damaged one.

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
        checkpoint: of any number of workers.
        config: of this run.
        total: number of steps of this run, where known.

    Raises:
        ConfigError: naming the key that differs and what to do.
    """
    before, now = checkpoint.state["configuration"], flatten(config)
    free = {Effect.NONE, Effect.SELECTION, *([Effect.LENGTH] if config.optimizer.schedule == "constant" else [])}
    for key in sorted({*before, *now}):
        same = before.get(key) == now.get(key) or _same_path(before.get(key), now.get(key))
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


def _same_path(value: Any, other: Any) -> bool:
    """Whether two values are spellings of one path; different words are different paths too."""
    both = isinstance(value, str) and isinstance(other, str) and bool(value and other)
    return both and Path(value).resolve() == Path(other).resolve()
