"""Cells of a table of predictions, from the predictive laws of scalars."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvhpc.diffusion.density import crps, quantile
from mvhpc.diffusion.laws import Law
from mvhpc.inference.prediction_columns import QUANTILES
from mvhpc.inference.prediction_tables import Row, class_cells
from mvhpc.variables import Categorical, Continuous, Scalar, Value, Variable


def law_cells(variable: Scalar, law: Law, truth: Sequence[Value]) -> list[Row]:
    """For each of B people, of a category its probabilities; of a number mean, SD, quantiles, CRPS and PIT.

    Mean and quantiles are clipped to the schema's range; SD, CRPS and PIT are those of the law as it is.

    Args:
        variable: what was predicted.
        law: of B people.
        truth: the recorded values in the variable's unit, None where missing.
    """
    name = variable.name
    if isinstance(variable, Categorical):
        assert isinstance(law, Tensor)
        return [class_cells(name, dict(zip(variable.classes, p))) for p in law.tolist()]
    assert isinstance(variable, Continuous) and not isinstance(law, Tensor)
    device, scale = law.mean.device, (variable.high - variable.low) / 2
    shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
    points = quantile(law, shares.to(device))  # (B, 5)
    columns = {name: variable.clip(variable.decode(law.mean)), f"{name}_sd": law.stddev * scale}
    columns |= {f"{name}_q{q:02d}": variable.snap(variable.decode(points[:, i])) for i, q in enumerate(QUANTILES)}
    encoded = variable.encode(truth).to(device)[:, 0].double()  # 0 where missing
    columns[f"{name}_crps"] = crps(law, encoded) * scale
    columns[f"{name}_pit"] = law.cdf(encoded)
    rows: list[Row] = [dict(zip(columns, cells)) for cells in zip(*(c.tolist() for c in columns.values()))]
    return [row if x is not None else row | {f"{name}_crps": None, f"{name}_pit": None} for row, x in zip(rows, truth)]


def decode_draws(variable: Variable, drawn: Tensor, subjects: int) -> list[list[Any]]:
    """Draws (subjects x n, ...) as values in the variable's unit, or classes: subjects x n."""
    if isinstance(variable, Continuous):
        flat: list[Any] = variable.snap(variable.decode(drawn)).tolist()
    else:
        assert isinstance(variable, Categorical)
        flat = list(variable.decode(drawn))
    n = len(flat) // subjects
    return [flat[i * n : (i + 1) * n] for i in range(subjects)]
