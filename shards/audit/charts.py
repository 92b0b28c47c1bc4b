"""Charts and tables of the scalars of a data set, by the parts of its split and by its categories."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from shards.schema import Schema
from shards.web_page import inline

LINE, FILL, FAINT = "#1f5fa8", "#cfe0f3", "#5b6470"
BINS = 24
GROUPS = 12  # shown, the largest ones
PART = "part"  # column of the split


def distributions(scalars: pd.DataFrame, parts: pd.Series, schema: Schema) -> Iterator[dict[str, Any]]:
    """A section for each scalar by each grouping: ``title``, and ``picture`` with ``alt``, or ``header`` and ``rows``.

    Args:
        scalars: a column for each scalar of the schema, a row for each record.
        parts: of each record; nan for none.
        schema: of the data set.
    """
    groupings = {PART: parts} if parts.notna().any() else {}
    groupings |= {v.name: scalars[v.name] for v in schema.scalars if v.kind == "categorical"}
    for scalar in schema.scalars:
        for name, groups in groupings.items():
            known = pd.DataFrame({"value": scalars[scalar.name], "group": groups}).dropna()
            if name == scalar.name or known.empty:
                continue
            title = f"{scalar.name} by {name}"
            if scalar.kind == "categorical":
                yield {"title": title, **_table(known, scalar.classes, name)}
            else:
                label = f"{scalar.name} ({scalar.unit})" if scalar.unit else scalar.name
                yield {"title": title, "picture": _histograms(known, label), "alt": _words(known, title)}


def scatters(measures: pd.DataFrame, scalars: pd.DataFrame, schema: Schema) -> Iterator[dict[str, Any]]:
    """Brightness of each volume variable over each number: ``title``, ``picture``, ``alt``."""
    for volume in schema.volumes:
        for scalar in schema.scalars:
            column = f"{volume.name}.brightness"
            if scalar.kind == "categorical" or column not in measures:
                continue
            both = pd.DataFrame({"x": scalars[scalar.name], "y": measures[column]}).dropna().astype(float)
            if len(both) < 2:
                continue
            figure = Figure(figsize=(7.5, 2.8), layout="constrained")
            ax = figure.subplots()
            ax.spines[["top", "right"]].set_visible(False)
            ax.scatter(both["x"], both["y"], s=12, color=LINE, alpha=0.6, linewidths=0, rasterized=True)
            ax.set_xlabel(f"{scalar.name} ({scalar.unit})" if scalar.unit else scalar.name)
            ax.set_ylabel(f"brightness of {volume.name}")
            title = f"brightness of {volume.name} over {scalar.name}"
            yield {"title": title, "picture": inline(figure, "svg"), "alt": f"Scatter plot: {title}"}


def _largest(known: pd.DataFrame) -> list[Any]:
    """Names of the largest groups, in order of size."""
    return list(known["group"].value_counts().index[:GROUPS])


def _histograms(known: pd.DataFrame, label: str) -> str:
    """One histogram below another, with common bins."""
    groups = _largest(known)
    figure = Figure(figsize=(7.5, 0.5 + 0.75 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    numbers = known["value"].astype(float)
    edges = np.linspace(numbers.min(), numbers.max() + (numbers.max() == numbers.min()), BINS + 1)
    for ax, group in zip(axes, groups):
        values = numbers[known["group"] == group]
        ax.hist(values, edges, color=FILL, edgecolor=LINE, linewidth=0.6)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_yticks([])
        text = f"{group}: {len(values):,}, mean {values.mean():.1f} ± {values.std(ddof=0):.1f}"
        ax.set_title(text, loc="left", fontsize=9, color=FAINT, pad=2)
    axes[-1].set_xlabel(label)
    return inline(figure, "svg")


def _words(known: pd.DataFrame, title: str) -> str:
    """The content of a picture for those who cannot see it."""
    numbers = known["value"].astype(float)
    means = [f"{group} mean {numbers[known['group'] == group].mean():.1f}" for group in _largest(known)]
    return f"Histograms of {title}: {'; '.join(means)}"


def _table(known: pd.DataFrame, classes: tuple[str, ...], grouping: str) -> dict[str, Any]:
    """Counts and shares of the classes in each group."""
    rows = []
    for group in _largest(known):
        counts = known["value"][known["group"] == group].value_counts()
        total = int(counts.sum())
        cells = [f"{int(counts.get(c, 0)):,} ({100 * counts.get(c, 0) / total:.0f} %)" for c in classes]
        rows.append([str(group), f"{total:,}", *cells])
    return {"header": [grouping, "records", *classes], "rows": rows}
