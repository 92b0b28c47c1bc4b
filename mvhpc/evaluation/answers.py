"""Answers of one method to one query, read in the variables of the data, whatever the method's own schema."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mvhpc.evaluation.metrics import Floats, absolute_errors, hits
from shards.schema import Variable


@dataclass(frozen=True)
class Answers:
    """What one method answers to one query.

    Attributes:
        method: its name in tables.
        variable: the wanted one, of the data.
        given: names of the given variables, in the schema's order.
        frame: a row for each record whose value is known: ``key``, ``subject``, ``value`` (missing without an answer)
            and ``true``; of a number with a predicted distribution also ``sd``, ``crps`` and ``pit``; of a category
            with predicted probabilities ``confidence``, that of the most probable class.
    """

    method: str
    variable: Variable
    given: tuple[str, ...]
    frame: pd.DataFrame

    @property
    def category(self) -> bool:
        """Whether the variable is a category."""
        return self.variable.kind == "categorical"

    @property
    def subjects(self) -> list[str]:
        """The subject of each row."""
        return self.frame["subject"].astype(str).tolist()

    @property
    def scores(self) -> Floats:
        """Absolute error of a number, 1.0 or 0.0 of a category, NaN without an answer: (N,)."""
        compare = hits if self.category else absolute_errors
        return compare(self.frame["value"].tolist(), self.frame["true"].tolist())

    @property
    def errors(self) -> Floats:
        """Predicted less true number, NaN without an answer: (N,)."""
        return self.column("value") - self.column("true")

    def has(self, name: str) -> bool:
        """Whether there is a value in a column."""
        return name in self.frame and bool(self.frame[name].notna().any())

    def column(self, name: str) -> Floats:
        """A column of numbers (N,), NaN where missing."""
        return self.frame[name].to_numpy(float)


def read_answers(
    method: str, variable: Variable, given: Sequence[str], predicted: pd.DataFrame, of_model: Variable
) -> Answers:
    """The answers in a table of predictions.

    A category that the method predicts as a number is the class whose number is nearest.

    Args:
        method: its name.
        variable: the wanted one, of the data.
        given: names of the given variables.
        predicted: ``key``, ``subject``, the columns of ``mvhpc predict`` and ``recorded``, the value in the data.
        of_model: the wanted variable in the method's schema.
    """
    name = variable.name
    kept = predicted[predicted["recorded"].notna()].reset_index(drop=True)
    frame = kept[["key", "subject"]].copy()
    frame["value"], frame["true"] = kept[name], kept["recorded"]
    if variable.kind == "categorical" and of_model.kind != "categorical":
        frame["value"] = nearest_class(kept[name].to_numpy(float), variable, of_model)
    elif variable.kind == "categorical":
        columns = [f"{name}_p_{c}" for c in variable.classes if f"{name}_p_{c}" in kept]
        if columns:
            frame["confidence"] = kept[columns].astype(float).max(axis=1)
    else:
        for column in ("sd", "crps", "pit"):
            if f"{name}_{column}" in kept:
                frame[column] = kept[f"{name}_{column}"].astype(float)
    return Answers(method, variable, tuple(given), frame)


def nearest_class(numbers: Floats, variable: Variable, of_model: Variable) -> list[str | None]:
    """The class whose number, as ``of_model`` reads its word, is nearest to each number; None for NaN.

    Args:
        numbers: (N,).
        variable: a category.
        of_model: the same as a number, with ``values``.
    """
    of_class = np.array([of_model.parse(c) for c in variable.classes], float)  # (K,)
    places = np.abs(numbers[:, None] - of_class).argmin(1)
    return [variable.classes[k] if np.isfinite(x) else None for k, x in zip(places, numbers)]
