"""Whether predictions are better than those that ignore the subject: the mean, or the most frequent class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mvhpc.evaluation.metrics import FEWEST, Estimate, absolute_errors, hits, mean_over_subjects, share_of_subjects
from shards.schema import Variable

ROUNDING = 1e-3  # of the constant prediction's score


@dataclass(frozen=True)
class AgainstMean:
    """A model beside a constant prediction, over the people whose value is known and who were answered.

    Attributes:
        variable: what was predicted.
        own, constant: mean absolute error of a number, accuracy of a category.
        gain: how much smaller the error, or greater the accuracy, of the model is; its interval is of a bootstrap of
            the paired differences over subjects.
    """

    variable: Variable
    own: Estimate
    constant: Estimate
    gain: Estimate

    @property
    def better(self) -> bool:
        """Whether the interval of the gain lies above zero, by more than rounding."""
        return self.gain.n >= FEWEST and self.gain.low > ROUNDING * abs(self.constant.value)

    @property
    def yardstick(self) -> str:
        """What the constant prediction is."""
        return "the most frequent class" if self.variable.kind == "categorical" else "the mean"

    def verdict(self) -> str:
        """``better than predicting the mean``, not shown to be (a gain that may be chance), or not, with the gain."""
        unit = f" {self.variable.unit}" if self.variable.unit and self.variable.kind != "categorical" else ""
        gain = f"gain {self.gain.format(2)}{unit}"
        if self.gain.n < FEWEST:
            return f"too few people with a known {self.variable.name} to compare with predicting {self.yardstick}"
        chance = self.gain.value > ROUNDING * abs(self.constant.value)
        words = "better" if self.better else "not shown to be better" if chance else "NOT better"
        return f"{words} than predicting {self.yardstick} ({gain})"

    def text(self) -> str:
        """Both scores and the verdict, in one line."""
        kind, unit = ("accuracy", "") if self.variable.kind == "categorical" else ("error", self.variable.unit or "")
        own, constant = (f"{e.format(2)} {unit}".rstrip() for e in (self.own, self.constant))
        return f"{self.variable.name} {kind} {own}; predicting {self.yardstick} {constant}: {self.verdict()}"


def compare(
    frame: pd.DataFrame, constant: Sequence[float | str | None], variable: Variable, seed: int = 0
) -> AgainstMean | None:
    """Compare predictions with a constant; None where the variable was not predicted or nobody's value is known.

    Args:
        frame: predictions, with the columns ``NAME``, ``NAME_true`` and ``subject``.
        constant: of each row.
        variable: what was predicted.
        seed: of the bootstrap over subjects.
    """
    name = variable.name
    if name not in frame or f"{name}_true" not in frame:
        return None
    category = variable.kind == "categorical"
    mean = share_of_subjects if category else mean_over_subjects
    score: Callable[[Any, Any], NDArray[np.float64]] = hits if category else absolute_errors
    truth = frame[f"{name}_true"].tolist()
    own, other = (score(values, truth) for values in (frame[name].tolist(), list(constant)))
    both = own + other  # NaN where either is missing: the same people on both sides
    gain = own - other if category else other - own
    people = frame["subject"].astype(str).tolist()
    of_own, of_other = (mean(x + 0 * both, people, seed=seed) for x in (own, other))
    comparison = AgainstMean(variable, of_own, of_other, mean_over_subjects(gain, people, seed=seed))
    return comparison if comparison.own.n else None
