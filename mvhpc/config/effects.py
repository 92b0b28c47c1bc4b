"""Table of the effects of configuration keys, for fingerprints and the compatibility of checkpoints.

A key that is not listed decides the result.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mvhpc.config.loader import flatten


class Effect(Enum):
    """What a change of a key changes.

    Attributes:
        NONE: nothing, or the result by rounding only.
        SELECTION: the result, but not the steps of training and their checkpoints.
        LENGTH: as SELECTION if the learning rate does not depend on the number of steps, else as RESULT.
        RESULT: the result.
    """

    NONE = "none"
    SELECTION = "selection"
    LENGTH = "length"
    RESULT = "result"


EFFECTS = {
    "out": Effect.NONE,
    "tracking": Effect.NONE,
    "batch": Effect.NONE,  # of inference; the noise of a sample does not depend on its batch
    "workers": Effect.NONE,  # of packing
    "max_rejects": Effect.NONE,  # a packing is refused or not; its shards stay
    "model.checkpointing": Effect.NONE,  # activations are recomputed instead of stored
    "training.checkpoint_every": Effect.NONE,
    "training.damaged": Effect.NONE,  # a run that met damage may go on without it
    "training.keep": Effect.NONE,
    "training.log_every": Effect.NONE,
    "training.validate_every": Effect.SELECTION,
    "training.epochs": Effect.LENGTH,
    "compute.workers": Effect.NONE,
    "compute.zero_stage": Effect.NONE,
    "compute.offload": Effect.NONE,
    "compute.device": Effect.NONE,  # also selects the precision if that is `auto`: a model can be used without a GPU
    "compute.compile": Effect.NONE,
    "compute.threads": Effect.NONE,
    "compute.retries": Effect.NONE,
    "compute.hang_minutes": Effect.NONE,
}


def effect(key: str) -> Effect:
    """The effect of the dotted ``key`` of a stage's configuration."""
    for known, found in EFFECTS.items():
        if key == known or key.startswith(f"{known}."):
            return found
    return Effect.RESULT


def decisive(config: Any) -> Mapping[str, Any]:
    """The dotted keys that decide the result of a configuration's stage, with their values."""
    return {key: value for key, value in flatten(config).items() if effect(key) is not Effect.NONE}
