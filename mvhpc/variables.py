"""Variables as tensors, in the representation that diffusion works on.

A schema (data plane) lists the variables; this module turns their values into tensors and back. A batch of B people is
a ``dict`` from variable name to tensor, with a second ``dict`` of (B,) bool for the presence of each value.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvhpc.runtime.devices import send
from shards.errors import DataError, nearest
from shards.schema import Schema, Value

SD_FLOOR = 1e-9  # of numbers that are no constant, in units of the largest


@dataclass(frozen=True, eq=False)
class Volume:
    """An image, represented by its standardised latent.

    Attributes:
        name: of the variable.
        shape: of one latent, (C, h, w, d).
        mean: subtracted from latents; of that shape, or one number.
        sd: divides the difference, likewise.
    """

    name: str
    shape: tuple[int, int, int, int]
    mean: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    sd: Tensor = field(default_factory=lambda: torch.tensor(1.0))

    def encode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w, d) of the autoencoder -> z_0, the same shape in float32."""
        return (latents.float() - send(self.mean, latents.device)) / send(self.sd, latents.device)

    def decode(self, z: Tensor) -> Tensor:
        """z_0 (B, C, h, w, d) -> latents that the autoencoder's decoder takes."""
        return z * send(self.sd, z.device) + send(self.mean, z.device)


@dataclass(frozen=True)
class Continuous:
    """A number, scaled linearly so that [low, high] becomes [-1, 1] (paper, section 3.1).

    Values outside the interval are neither refused nor clipped when they are encoded and decoded; what is reported goes
    through :meth:`snap`. An ordinal variable has ``whole`` numbers: a scale keeps their order, classes would not.
    """

    name: str
    low: float
    high: float
    unit: str = ""
    whole: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)  # the smallest and the largest value that the schema allows

    def encode(self, values: Sequence[Value]) -> Tensor:
        """B values in units -> z_0 (B, 1) float32; a missing value becomes 0."""
        raw = torch.tensor([[0.0 if _missing(v) else float(v)] for v in values], dtype=torch.float64)  # type: ignore[arg-type]
        z = (2 * raw - self.low - self.high) / (self.high - self.low)
        absent = torch.tensor([[_missing(v)] for v in values])
        return z.masked_fill(absent, 0.0).float()  # (B, 1)

    def decode(self, z: Tensor) -> Tensor:
        """z_0 (B, 1) -> values (B,) in units, float64."""
        return ((self.high - self.low) * z.double().flatten() + self.low + self.high) / 2

    def snap(self, values: Tensor) -> Tensor:
        """Values in units, clipped to the schema's range, and rounded to whole numbers for an ordinal variable."""
        return self.clip(values.round() if self.whole else values)

    def clip(self, values: Tensor) -> Tensor:
        """Values in units, clipped to the schema's range: a law on all numbers may say an age below 0."""
        return values.clamp(*self.range)


@dataclass(frozen=True)
class Categorical:
    """One of K classes, by its index in the schema's order."""

    name: str
    classes: tuple[str, ...]

    @property
    def size(self) -> int:
        """K, the number of classes."""
        return len(self.classes)

    def encode(self, values: Sequence[Value]) -> Tensor:
        """B class names -> x_0 (B,) int64; a missing value becomes class 0.

        Raises:
            ValueError: an unknown class, naming the nearest.
        """
        for value in values:
            if not _missing(value) and value not in self.classes:
                raise ValueError(f"{self.name}: {nearest(str(value), self.classes, 'class')}")
        return torch.tensor([0 if _missing(v) else self.classes.index(str(v)) for v in values])  # (B,)

    def decode(self, x: Tensor) -> list[str]:
        """x_0 (B,) -> B class names."""
        return [self.classes[i] for i in x.tolist()]


Variable = Volume | Continuous | Categorical
Scalar = Continuous | Categorical


def _missing(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def standard_intervals(schema: Schema, rows: Sequence[Mapping[str, Value]]) -> dict[str, list[float]]:
    """The interval that becomes [-1, 1] of each number: its mean plus and minus one SD.

    Args:
        schema: of the variables.
        rows: values of people by name; None, or no entry, where missing.

    Returns:
        [low, high] by variable; no entry for a variable that is constant up to rounding, which takes its schema's
        range.
    """
    intervals: dict[str, list[float]] = {}
    for v in schema.scalars:
        if v.kind != "categorical":
            known = np.array([x for x in (row.get(v.name) for row in rows) if x is not None], float)
            if len(known) > 1 and known.std() > SD_FLOOR * np.abs(known).max():
                intervals[v.name] = [float(known.mean() - known.std()), float(known.mean() + known.std())]
    return intervals


def check_known(schema: Schema, rows: Sequence[Mapping[str, Value]]) -> None:
    """Refuse to train a model of a number or category that none of its people has: it would invent all answers.

    Of one that has a single value a note says that it is not predicted.

    Args:
        schema: of the variables.
        rows: values of the training's people by name; None, or no entry, where missing.

    Raises:
        DataError: naming the variables.
    """
    never = [v.name for v in schema.scalars if all(row.get(v.name) is None for row in rows)]
    if rows and never:
        raise DataError(
            f"none of the {len(rows)} training subjects has {' or '.join(never)}: fill the column, or pack with a "
            "schema without it (--schema)"
        )
    for v in schema.scalars:
        values = {row.get(v.name) for row in rows} - {None}
        if len(values) == 1:
            print(
                f"note: all training subjects that have {v.name} have {values.pop()}: it is not predicted",
                file=sys.stderr,
            )


class Variables:
    """The variables of a model, in the order of its schema.

    Args:
        items: variables with distinct names.
    """

    def __init__(self, items: Sequence[Variable]) -> None:
        self._items = {v.name: v for v in items}
        if len(self._items) != len(items):
            raise ValueError(f"two variables share a name: {', '.join(v.name for v in items)}")

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        latent: Mapping[str, Mapping[str, Any]],
        intervals: Mapping[str, Sequence[float]] | None = None,
    ) -> "Variables":
        """The variables of a schema.

        Args:
            schema: names, kinds, ranges and classes.
            latent: for each volume its latent's ``shape`` [C, h, w, d], ``mean`` and ``sd``.
            intervals: of a continuous variable, what becomes [-1, 1]; the schema's range where not named.

        Raises:
            ValueError: a volume without latent, or a continuous variable with neither interval nor finite range.
        """
        items: list[Variable] = []
        for v in schema:
            if v.kind == "volume":
                if v.name not in latent:
                    raise ValueError(f"no latents of volume {v.name!r}; there are: {', '.join(latent) or 'none'}")
                facts = latent[v.name]
                c, h, w, d = facts["shape"]
                items.append(Volume(v.name, (c, h, w, d), facts["mean"], facts["sd"]))
            elif v.kind != "categorical":
                low, high = (intervals or {}).get(v.name, v.range)
                if not math.isfinite(high - low):
                    raise ValueError(f"schema: {v.name} needs a finite range to be scaled by")
                whole = v.kind == "ordinal"
                items.append(Continuous(v.name, float(low), float(high), v.unit or "", whole, v.range))
            else:
                items.append(Categorical(v.name, tuple(v.classes)))
        return cls(items)

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __getitem__(self, name: str) -> Variable:
        """The variable of that name.

        Raises:
            KeyError: naming the nearest.
        """
        if name not in self._items:
            raise KeyError(nearest(name, self._items, "variable"))
        return self._items[name]

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return list(self._items)

    @property
    def volumes(self) -> list[Volume]:
        """The volumes, in order."""
        return [v for v in self if isinstance(v, Volume)]

    @property
    def scalars(self) -> list[Scalar]:
        """All variables but the volumes, in order."""
        return [v for v in self if not isinstance(v, Volume)]

    def encode_scalars(self, rows: Sequence[Mapping[str, Value]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scalars of B people.

        Args:
            rows: for each person, values by name: a number, a class name, or None (or no entry) where missing.

        Returns:
            By variable, values, (B, 1) float32 for a continuous variable and (B,) int64 for a category; and presence,
            (B,) bool.
        """
        batch, present = {}, {}
        for v in self.scalars:
            values = [row.get(v.name) for row in rows]
            batch[v.name] = v.encode(values)
            present[v.name] = torch.tensor([not _missing(value) for value in values])
        return batch, present
