"""The one table of what configuration keys can change; fingerprints and the compatibility of checkpoints follow it.

A key that is not named here decides the result.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mvhpc.config.loader import flatten


class Effect(Enum):
    """What another value of a key does.

    Attributes:
        NONE: nothing, or the result changes by rounding at most.
        SELECTION: the result is another one, the steps of training and their checkpoints are the same.
        LENGTH: as SELECTION where the learning rate does not depend on the number of steps, else as RESULT.
        RESULT: the result is another one.
    """

    NONE = "none"
    SELECTION = "selection"
    LENGTH = "length"
    RESULT = "result"


EFFECTS = {
    "out": Effect.NONE,
    "tracking": Effect.NONE,
    "batch": Effect.NONE,  # of inference: volumes or people at a time; noise belongs to the person, not to the batch
    "workers": Effect.NONE,  # of packing
    "model.checkpointing": Effect.NONE,  # activations are computed again instead of kept
    "training.checkpoint_every": Effect.NONE,
    "training.keep": Effect.NONE,
    "training.log_every": Effect.NONE,
    "training.validate_every": Effect.SELECTION,
    "training.epochs": Effect.LENGTH,
    "compute.workers": Effect.NONE,
    "compute.zero_stage": Effect.NONE,
    "compute.offload": Effect.NONE,
    "compute.device": Effect.NONE,  # with precision `auto` it also chooses that: a model may be used where no GPU is
    "compute.compile": Effect.NONE,
    "compute.threads": Effect.NONE,
    "compute.retries": Effect.NONE,
    "compute.hang_minutes": Effect.NONE,
}


def effect(key: str) -> Effect:
    """What the dotted ``key`` of a stage's configuration can change."""
    for known, found in EFFECTS.items():
        if key == known or key.startswith(f"{known}."):
            return found
    return Effect.RESULT


def decisive(config: Any) -> Mapping[str, Any]:
    """The keys of a configuration that decide its stage's result, dotted, with their values."""
    return {key: value for key, value in flatten(config).items() if effect(key) is not Effect.NONE}
