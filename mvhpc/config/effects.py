"""What a key of the configuration can change; one table, which fingerprints and checkpoints both ask.

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
        SELECTION: the same steps of training, of which others are exported: another result, the same checkpoints.
        LENGTH: the same, as long as the learning rate does not depend on the number of steps.
        RESULT: another result.
    """

    NONE = "none"
    SELECTION = "selection"
    LENGTH = "length"
    RESULT = "result"


EFFECTS = {
    "out": Effect.NONE,
    "tracking": Effect.NONE,
    "workers": Effect.NONE,  # processes of packing
    "batch": Effect.NONE,  # of inference: volumes or people at a time
    "training.checkpoint_every": Effect.NONE,
    "training.keep": Effect.NONE,
    "training.log_every": Effect.NONE,
    "training.validate_every": Effect.SELECTION,
    "training.epochs": Effect.LENGTH,
    "compute.workers": Effect.NONE,
    "compute.zero_stage": Effect.NONE,
    "compute.offload": Effect.NONE,
    "compute.device": Effect.NONE,
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
