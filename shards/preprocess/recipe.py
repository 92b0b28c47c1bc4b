"""The recipe of a preprocessing: all choices that decide its results."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import DataError, nearest

STEPS = ("brain", "bias", "registration", "tissue")  # in the order in which they run
BRAIN = ("auto", "deepbet", "hd-bet", "mask", "none")
REGISTRATION = ("rigid", "affine")
MNI = "mni"


@dataclass(frozen=True)
class Recipe:
    """What is done to each scan.

    Attributes:
        steps: of :data:`STEPS`.
        brain: how the brain is extracted. ``auto``: deepbet, except where the scan is extracted already; ``mask``: by
            mask files beside the scans.
        registration: ``rigid`` or ``affine``.
        template: ``mni`` for the MNI152 template of nilearn, otherwise the SHA-256 of a template file.
        space: label of the template's space in BIDS names.
        spacing: of the results, mm.
        weights: SHA-256 of the weights of HD-BET; empty for the others.
    """

    steps: tuple[str, ...] = STEPS
    brain: str = "auto"
    registration: str = "affine"
    template: str = MNI
    space: str = "MNI152NLin2009aSym"
    spacing: float = 1.0
    weights: str = ""

    def __post_init__(self) -> None:
        for step in self.steps:
            if step not in STEPS:
                raise DataError(nearest(step, STEPS, "step"))
        object.__setattr__(self, "steps", tuple(step for step in STEPS if step in self.steps))
        if not self.steps:
            raise DataError(f"no steps; known: {', '.join(STEPS)}")
        if self.brain not in BRAIN:
            raise DataError(nearest(self.brain, BRAIN, "brain extraction"))
        if self.registration not in REGISTRATION:
            raise DataError(nearest(self.registration, REGISTRATION, "registration"))
        if not 0.5 <= self.spacing <= 8:
            raise DataError(f"spacing {self.spacing:g}: expected millimetres, 0.5 to 8")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it back."""
        return {**dataclasses.asdict(self), "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """The recipe of a derivative.

        Raises:
            DataError: an unknown key or value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in content:
            if key not in known:
                raise DataError(nearest(key, known, "key of a recipe"))
        return cls(**{**content, "steps": tuple(content.get("steps", STEPS))})
