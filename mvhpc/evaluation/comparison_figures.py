"""Figures of a comparison: scores with intervals, calibration, reliability, error by group."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mvhpc.evaluation.answers import Answers
from mvhpc.evaluation.calibration import BINS, SHARES, inside, reliability
from mvhpc.evaluation.figures import FAINT, save
from mvhpc.evaluation.metrics import share_of_subjects
from mvhpc.evaluation.paper_tables import measure, score_of
from mvhpc.evaluation.tables import label
from shards.schema import Variable

ACROSS = 4  # panels in a row
PANEL = 2.3  # inches
GRID = "#e3e5e8"
Colours = Mapping[str, str]  # method -> colour


def colours(methods: Sequence[str]) -> Colours:
    """A colour for each method, the same in all figures; of more than 20 methods some share one."""
    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return {name: palette[i % len(palette)] for i, name in enumerate(methods)}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def scores(variable: Variable, answers: Sequence[Answers], colour: Colours, path: Path) -> None:
    """Errors or accuracies with 95 % intervals: methods in rows, one panel for each choice of given variables.

    Args:
        variable: the wanted one.
        answers: of this variable.
        colour: of each method; rows in this order.
        path: PNG file.
    """
    givens = list(dict.fromkeys(a.given for a in answers))
    rows = [name for name in colour if any(a.method == name for a in answers)]
    figure = _figure(2.2 + 2.1 * len(givens), 1.0 + 0.3 * len(rows))
    axes = figure.subplots(1, len(givens), sharex=True, sharey=True, squeeze=False)[0]
    for ax, given in zip(axes, givens):
        _plain(ax)
        ax.set_title(f"given {label(given)}", size=9)
        ax.grid(axis="x", color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        for a in answers:
            if a.given != given:
                continue
            found, y = score_of(a), rows.index(a.method)
            ax.plot([found.low, found.high], [y, y], color=colour[a.method], lw=2, solid_capstyle="round")
            ax.plot(found.value, y, "o", color=colour[a.method], ms=6, mec="white", mew=0.8)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"{measure(variable)}, with 95 % intervals over people", size=9)
    save(figure, path)


def calibration_of_number(variable: Variable, answers: Sequence[Answers], colour: Colours, path: Path) -> None:
    """Histogram of the PIT values of each method, flat if its distributions hold, and the coverage of intervals.

    Args:
        variable: a number.
        answers: of methods with predicted distributions, at least one, to one query.
        colour: of each method.
        path: PNG file.
    """
    figure, axes = _panels(len(answers) + 1)
    for ax, a in zip(axes, answers):
        pit = a.column("pit")
        pit = pit[np.isfinite(pit)]
        n = len(pit)
        ax.hist(pit, bins=BINS, range=(0, 1), weights=np.full(n, BINS / n), color="#a9d3de", edgecolor="white")
        spread = 1.96 * np.sqrt(BINS * (1 - 1 / BINS) / n)  # of a bar of a calibrated method, normal approximation
        ax.axhspan(max(0, 1 - spread), 1 + spread, color=FAINT, alpha=0.18, lw=0)
        ax.axhline(1, color=FAINT, lw=1)
        ax.set(xlim=(0, 1), yticks=[0, 1, 2], ylim=(0, max(2.2, ax.get_ylim()[1])))
        ax.set_title(a.method, size=8)
        ax.set_xlabel("PIT", size=8)
    ax = axes[len(answers)]
    for place, share in enumerate(SHARES):
        ax.plot([place - 0.45, place + 0.45], [share, share], color=FAINT, lw=1)
    for k, a in enumerate(answers):
        found = [share_of_subjects(inside(a.column("pit"), share), a.subjects) for share in SHARES]
        y = 100 * np.array([f.value for f in found])
        ends = 100 * np.array([[f.value - f.low, f.high - f.value] for f in found]).T
        x = np.arange(len(SHARES)) + 0.7 * ((k + 0.5) / len(answers) - 0.5)
        ax.errorbar(x, y, np.nan_to_num(ends), fmt="o", ms=4, lw=1.2, color=colour[a.method], label=a.method)
    ax.set_xticks(range(len(SHARES)), [str(share) for share in SHARES])
    ax.set_ylim(min(40, ax.get_ylim()[0]), 102)
    ax.set_xlabel("interval, %", size=8)
    ax.set_ylabel("holds the truth, %", size=8)
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=7, frameon=False)
    figure.suptitle(
        f"{variable.name} given {label(answers[0].given)}; bands: where 95 % of calibrated bars lie", size=9
    )
    save(figure, path)


def reliability_of_category(variable: Variable, answers: Sequence[Answers], path: Path) -> None:
    """How often the most probable class is right against its predicted probability, for each method.

    Args:
        variable: a category.
        answers: of methods with predicted probabilities, at least one, to one query.
        path: PNG file.
    """
    figure, axes = _panels(len(answers))
    for ax, a in zip(axes, answers):
        confidence, right = a.column("confidence"), a.scores
        known = np.isfinite(confidence) & np.isfinite(right)
        ax.plot([0, 1], [0, 1], color=FAINT, lw=1)
        ax.set(xlim=(1 / len(variable.classes) - 0.05, 1.02), ylim=(0, 1.05))
        ax.set_title(a.method, size=8)
        ax.set_xlabel("predicted probability", size=8)
        if not known.any():
            continue
        found = reliability(confidence[known], right[known])
        size = 12 + 160 * found.people / found.people.sum()
        ax.plot(found.confidence, found.accuracy, color="#14708a", lw=1)
        ax.scatter(found.confidence, found.accuracy, size, color="#14708a", edgecolors="white", zorder=3)
        ax.text(0.97, 0.04, f"calibration error {found.error:.3f}", transform=ax.transAxes, ha="right", size=7)
    axes[0].set_ylabel("right", size=8)
    figure.suptitle(f"{variable.name} given {label(answers[0].given)}; areas: people", size=9)
    save(figure, path)


def groups(
    numbers: pd.DataFrame, variable: Variable, orders: Mapping[str, Sequence[str]], colour: Colours, path: Path
) -> None:
    """Error or accuracy of each method in groups of people, one panel for each scalar that makes groups.

    Args:
        numbers: of the table ``groups``, of this variable.
        variable: the wanted one.
        orders: scalar -> its groups in order.
        colour: of each method.
        path: PNG file.
    """
    methods = list(dict.fromkeys(numbers["method"]))
    widths = [max(2, len(groups)) for groups in orders.values()]
    figure = _figure(1.8 + 0.62 * sum(widths), 3.2)
    axes = figure.subplots(1, len(orders), sharey=True, squeeze=False, width_ratios=widths)[0]
    for ax, (name, order) in zip(axes, orders.items()):
        _plain(ax)
        ax.grid(axis="y", color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        people: dict[str, int] = {}
        for k, method in enumerate(methods):
            rows = numbers[(numbers["method"] == method) & (numbers["by"] == name)].set_index("group")
            places = [i for i, group in enumerate(order) if group in rows.index]
            own = rows.loc[[order[i] for i in places]]
            x = np.array(places) + 0.5 * ((k + 0.5) / len(methods) - 0.5)
            ends = np.nan_to_num(np.array([own["score"] - own["low"], own["high"] - own["score"]]))
            ax.errorbar(x, own["score"], ends.clip(0), fmt="o", ms=4, lw=1.1, color=colour[method], label=method)
            people |= {str(group): max(people.get(str(group), 0), int(n)) for group, n in own["people"].items()}
        names = [f"{group.replace(' to ', '–')}\nn = {people.get(group, 0)}" for group in order]
        ax.set_xticks(range(len(order)), names, fontsize=7)
        ax.set_xlim(-0.6, len(order) - 0.4)
        ax.set_title(f"by {name}", size=9)
    axes[0].set_ylabel(measure(variable), size=9)
    if variable.kind != "categorical":
        axes[0].set_ylim(0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=7, frameon=False)
    save(figure, path)


def against_truth(variable: Variable, answers: Sequence[Answers], path: Path) -> None:
    """Predicted against true numbers, a panel for each method.

    Args:
        variable: a number.
        answers: to one query, at least one; somebody is answered.
        path: PNG file.
    """
    figure, axes = _panels(len(answers), equal=True)
    both = np.concatenate([a.column(name) for a in answers for name in ("true", "value")])
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    margin = 0.08 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    for ax, a in zip(axes, answers):
        x, y = a.column("true"), a.column("value")
        ax.plot(limits, limits, color=FAINT, lw=1)
        ax.plot(x, y, "o", ms=3, color="#14708a", mec="white", mew=0.3)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set_title(a.method, size=8)
    unit = f" ({variable.unit})" if variable.unit else ""
    figure.supxlabel(f"true {variable.name}{unit}", size=9)
    figure.supylabel(f"predicted {variable.name}{unit}", size=9)
    figure.suptitle(f"given {label(answers[0].given)}", size=9)
    save(figure, path)


def _panels(count: int, equal: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, and these."""
    across = min(count, ACROSS)
    down = -(-count // across)
    figure = _figure(PANEL * across + 0.4, (PANEL if equal else 0.9 * PANEL) * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for ax in axes:
        _plain(ax)
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]
