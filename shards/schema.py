"""The schema: ordered, named variables, and how each is read from a table."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import DataError, nearest
from shards.numbers import parse_number
from shards.presets import preset_file, read_yaml

MISSING = {"", "n/a", "na", "nan", "none", "null"}  # BIDS writes n/a; the others are common in other tables
KINDS = {  # kind -> allowed keys
    "volume": {"kind", "column", "suffix"},
    "continuous": {"kind", "column", "synonyms", "range", "unit", "values"},
    "ordinal": {"kind", "column", "synonyms", "range", "unit", "values"},
    "categorical": {"kind", "column", "synonyms", "classes", "aliases"},
}
Value = float | str | None


@dataclass(frozen=True)
class Variable:
    """One variable: a volume, a number or a category.

    Attributes:
        name: letters, digits and underscores, beginning with a letter.
        kind: ``volume``, ``continuous``, ``ordinal`` (whole numbers: scores, stages, ratings) or ``categorical``.
        column: the table's column; for a volume, the column of paths in a CSV.
        suffix: of a volume's file name in a BIDS tree, as in ``T1w``.
        range: smallest and largest allowed value of a continuous or ordinal variable.
        unit: of such a variable.
        classes: of a categorical variable, in the order of their numbers.
        aliases: other spellings of the classes.
        values: word -> number: for a category read as a continuous variable, or the words of a scale.
        synonyms: other names that the column of a scalar may have; capitals do not matter.
    """

    name: str
    kind: str
    column: str
    suffix: str = ""
    range: tuple[float, float] = (-math.inf, math.inf)
    unit: str = ""
    classes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    synonyms: tuple[str, ...] = field(default=(), compare=False)  # they name tables, not the variable

    @classmethod
    def from_dict(cls, name: str, spec: Mapping[str, Any]) -> "Variable":
        """Build a variable from its entry in a schema file.

        Raises:
            DataError: a bad name, an unknown kind or key, or a value that does not fit the kind.
        """
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,31}", name):
            raise DataError(f"schema: {name!r} is not a variable name (a letter, then letters, digits or _, up to 32)")
        if not isinstance(spec, Mapping):
            raise DataError(f"schema: {name} needs keys such as kind, found {spec!r}")
        kind = str(spec.get("kind", ""))
        if kind not in KINDS:
            raise DataError(f"schema: {name}: {nearest(kind, KINDS, 'kind')}")
        for key in spec:
            if key not in KINDS[kind]:
                raise DataError(
                    f"schema: {name}: {nearest(str(key), sorted(KINDS[kind]), f'key of a {kind} variable')}"
                )
        given = {k: v for k, v in spec.items() if k != "kind"}
        try:
            if "range" in given:
                low, high = map(float, given["range"])
                if not low < high:
                    raise ValueError("range is [smallest, largest]")
                given["range"] = (low, high)
            if "classes" in given:
                given["classes"] = tuple(_word(c) for c in given["classes"])
            if "synonyms" in given:
                given["synonyms"] = tuple(_word(s) for s in given["synonyms"])
            if "aliases" in given:
                given["aliases"] = {_word(k): _word(v) for k, v in given["aliases"].items()}
            if "values" in given:
                given["values"] = {_word(k): float(v) for k, v in given["values"].items()}
            variable = cls(name=name, kind=kind, **{"column": name, **given})
            variable._check()
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"schema: {name}: {error}") from error
        return variable

    def _check(self) -> None:
        if self.kind in {"continuous", "ordinal"} and not all(map(math.isfinite, self.range)):
            raise ValueError(f"a variable of kind {self.kind} needs a finite range: [smallest, largest]")
        if self.kind == "ordinal" and any(x != round(x) for x in (*self.range, *self.values.values())):
            raise ValueError("an ordinal variable has whole numbers, in its range and values too")
        if self.kind == "volume" and not self.suffix:
            raise ValueError("a volume variable needs the suffix of its files, as in T1w")
        if self.kind == "categorical":
            if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
                raise ValueError("a categorical variable needs two or more different classes")
            for alias, target in self.aliases.items():
                if target not in self.classes:
                    raise ValueError(f"alias {alias}: {nearest(target, self.classes, 'class')}")
            if len({c.casefold() for c in self.classes}) < len(self.classes):
                raise ValueError("classes that differ only in upper and lower case")
        for word, number in self.values.items():
            if not self.range[0] <= number <= self.range[1]:
                raise ValueError(f"values: {word} is {number:g}, outside the range")

    def to_dict(self) -> dict[str, Any]:
        """The entry of a schema file that :meth:`from_dict` reads back to an equal variable."""
        spec: dict[str, Any] = {"kind": self.kind, "column": self.column}
        if self.kind == "volume":
            spec["suffix"] = self.suffix
        elif self.kind in {"continuous", "ordinal"}:
            spec.update(range=list(self.range), unit=self.unit, values=dict(self.values))
        else:
            spec.update(classes=list(self.classes), aliases=dict(self.aliases))
        spec["synonyms"] = list(self.synonyms)
        return {key: value for key, value in spec.items() if value or value == 0}

    def words(self) -> dict[str, Any]:
        """Word in lower case -> the class or number that it stands for."""
        return self._words

    @functools.cached_property
    def _words(self) -> dict[str, Any]:
        known: dict[str, Any] = {w.casefold(): v for w, v in (self.aliases or self.values).items()}
        return known | {c.casefold(): c for c in self.classes}

    def parse(self, text: str) -> Value:
        """The value that a table's cell holds.

        Args:
            text: the cell; spaces around it and upper or lower case of words do not matter.

        Returns:
            A number for a continuous or ordinal variable, a class for a category, None for a missing value.

        Raises:
            ValueError: not a (whole) number, outside the range, or an unknown category.
        """
        word, known = text.strip().casefold(), self.words()
        if word in known:
            return known[word]
        if word in MISSING:
            return None
        if self.kind == "categorical":
            raise ValueError(
                f"{self.name}: unknown category {text.strip()[:40]!r} (known: {', '.join(self.classes)}); say what it "
                "stands for in the Levels of participants.json, or in the schema's aliases"
            )
        try:
            number = parse_number(float, word)
        except ValueError:
            raise ValueError(f"{self.name}: {text.strip()[:40]!r} is not a number") from None
        low, high = self.range
        if not low <= number <= high:
            raise ValueError(f"{self.name}: {number:g} is outside the range {low:g} to {high:g}")
        if self.kind == "ordinal" and number != round(number):
            raise ValueError(f"{self.name}: {number:g} is not a whole number; values of an ordinal variable are")
        return number


def _word(item: Any) -> str:
    if isinstance(item, bool):  # an unquoted yes or no
        raise ValueError("YAML reads a class as true or false: put it in quotes")
    return str(item)


@dataclass(frozen=True)
class Schema:
    """Ordered variables."""

    variables: tuple[Variable, ...]

    @classmethod
    def from_dict(cls, specs: Mapping[str, Any]) -> "Schema":
        """Build a schema from ``{name: {kind: ..., ...}}``.

        Raises:
            DataError: an invalid variable; the message names it.
        """
        if not isinstance(specs, Mapping) or not specs:
            raise DataError("schema: expected variables by name, as in 'image: {kind: volume, suffix: T1w}'")
        variables = tuple(Variable.from_dict(str(name), spec) for name, spec in specs.items())
        if len({v.name.lower() for v in variables}) < len(variables):  # webdataset converts names to lower case
            raise DataError("schema: names that differ only in upper and lower case")
        return cls(variables)

    @classmethod
    def load(cls, name_or_file: str | Path = "default") -> "Schema":
        """Read a schema from a name under ``configs/schema`` or a YAML file.

        Raises:
            DataError: an unknown name, a file that cannot be read or is not YAML, or an invalid variable.
        """
        path = preset_file("schema", name_or_file)
        content = read_yaml(path)
        try:
            return cls.from_dict(content)
        except DataError as error:
            raise DataError(f"{path.name}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """``{name: spec}`` that :meth:`from_dict` reads back to an equal schema."""
        return {v.name: v.to_dict() for v in self.variables}

    @property
    def volumes(self) -> tuple[Variable, ...]:
        """The volume variables, in order."""
        return tuple(v for v in self.variables if v.kind == "volume")

    @property
    def scalars(self) -> tuple[Variable, ...]:
        """The other variables, in order."""
        return tuple(v for v in self.variables if v.kind != "volume")

    def __iter__(self) -> Iterator[Variable]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)

    def __contains__(self, name: object) -> bool:
        return any(v.name == name for v in self.variables)

    def __getitem__(self, name: str) -> Variable:
        """The variable of that name.

        Raises:
            DataError: an unknown name; the message names the nearest known one.
        """
        for variable in self.variables:
            if variable.name == name:
                return variable
        raise DataError(nearest(name, [v.name for v in self.variables], "variable"))
