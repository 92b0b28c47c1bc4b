"""The recipe of a preprocessing: all choices that decide its results."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import DataError, nearest
from shards.volumes import Space

STEPS = ("brain", "bias", "registration", "tissue")  # in the order in which they run
BRAIN = ("auto", "deepbet", "hd-bet", "mask", "none")
REGISTRATION = ("rigid", "affine")
MNI = "mni"
TISSUES = ("GM", "WM", "CSF")
GENERATOR = "shards preprocess"
DESCRIPTION = "dataset_description.json"
LOCK = ".preprocess.lock"  # stays in the derivative


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


def differences(before: Recipe, now: Recipe) -> str:
    """How two recipes differ, in words, as ``spacing 2 mm there, 1 mm now``; empty where they do not."""
    pairs = [
        (field.name, getattr(before, field.name), getattr(now, field.name)) for field in dataclasses.fields(Recipe)
    ]
    return "; ".join(f"{name} {_words(a)} there, {_words(b)} now" for name, a, b in pairs if a != b)


def _words(value: Any) -> str:
    if isinstance(value, float | int):
        return f"{value:g} mm"
    return " ".join(value) if isinstance(value, tuple) else value or "none"


def describe(recipe: Recipe, version: str, centre: tuple[float, float, float] | None, suffix: str) -> dict[str, Any]:
    """The content of a derivative's ``dataset_description.json``.

    Args:
        recipe: of the derivative.
        version: of this package.
        centre: of the template's brain, mm; None without registration.
        suffix: of the scans, as ``T1w``.
    """
    generator = {
        "Name": GENERATOR,
        "Version": version,
        "Recipe": recipe.to_dict(),
        "TemplateCentre": centre,
        "Suffix": suffix,
    }
    return {
        "Name": "Preprocessed scans",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [generator],
    }


def read_derivative(folder: Path) -> tuple[Recipe, Space | None] | None:
    """The recipe of a derivative of this package, and the space of its volumes; None for any other folder.

    Raises:
        DataError: a derivative that is not complete, or a recipe that this version does not know.
    """
    path = folder / DESCRIPTION
    generator = _generator(folder)
    if generator is None:
        if (folder / LOCK).exists():
            raise DataError(f"{folder}: an unfinished derivative; run the same `shards preprocess` again")
        return None
    try:
        recipe = Recipe.from_dict(generator["Recipe"])
        centre = generator["TemplateCentre"]
        if centre is None:
            return recipe, None
        x, y, z = map(float, centre)
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}; preprocess again with this version") from error
    return recipe, Space(recipe.space, (x, y, z), TISSUES if "tissue" in recipe.steps else ())


def derived_suffix(folder: Path) -> str:
    """The suffix of the scans that a complete derivative was made of; empty where it does not say so."""
    return str((_generator(folder) or {}).get("Suffix", ""))


def _generator(folder: Path) -> dict[str, Any] | None:
    """What a derivative says of its making; None of any other folder."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return next(dict(g) for g in content["GeneratedBy"] if g["Name"] == GENERATOR)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
