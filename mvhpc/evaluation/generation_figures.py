"""Figures of the quality of drawn volumes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvhpc.evaluation.figures import FAINT, least_squares_line, save
from mvhpc.evaluation.frechet import Extrapolation
from mvhpc.evaluation.generation import Reading
from mvhpc.evaluation.neighbours import Copies

REAL, DRAWN = "#14708a", "#c4572e"


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def extrapolation(lines: Mapping[str, Extrapolation], name: str, path: Path) -> None:
    """The mean FID against the number of people, and its line to infinitely many.

    Args:
        lines: ``drawn`` against real people, and ``real`` ones against one another.
        name: of the distance.
        path: PNG file.
    """
    figure, (ax,) = _axes(5.2, 3.8)
    for key, colour, marker in (("drawn", DRAWN, "^"), ("real", REAL, "o")):
        line = lines[key]
        x, y, limit = 1 / line.sizes, line.values[:, -1], float(line.limit[-1])
        slope = np.polyfit(x, y, 1)[0]
        ends = np.array([0, x.max()])
        ax.plot(ends, limit + slope * ends, color=colour, lw=1.2)
        ax.scatter(x, y, s=18, color=colour, marker=marker, label=f"{key} against real")
        ax.scatter([0], [limit], s=30, facecolor="white", edgecolor=colour, marker=marker, zorder=3, clip_on=False)
    sizes = sorted({int(line.sizes[i]) for line in lines.values() for i in (0, -1)}, reverse=True)
    ax.set_xticks([0, *(1 / size for size in sizes)], ["∞", *map(str, sizes)])
    ax.axhline(0, color=FAINT, lw=0.8, zorder=0)
    ax.set_ylim(top=1.3 * max(line.values[:, -1].max() for line in lines.values()))  # room for the legend
    ax.set(xlabel="people (at distances of 1 / n)", ylabel=name, xlim=(0, None))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


def readings(reading: Reading, path: Path) -> None:
    """A number as an independent reader finds it, against the true one (real brains) and the one asked for (drawn).

    Args:
        reading: of a number.
        path: PNG file.
    """
    figure, axes = _axes(7.2, 3.8, 2)
    unit = f" ({reading.variable.unit})" if reading.variable.unit else ""
    name = reading.variable.name
    sides = ((reading.true, reading.real, REAL, "o"), (reading.wanted, reading.drawn, DRAWN, "^"))
    values = np.concatenate([np.array(x, float) for side in sides for x in side[:2]])
    margin = 0.04 * np.ptp(values)
    limits = (values.min() - margin, values.max() + margin)
    for ax, (wanted, read, colour, marker), title, label in zip(
        axes, sides, ("real brains", "drawn brains"), (f"{name}{unit}", f"{name} asked for{unit}"), strict=True
    ):
        x, y = np.array(wanted, float), np.array(read, float)
        ax.plot(limits, limits, color=FAINT, lw=1, zorder=0)
        ax.scatter(x, y, s=18, color=colour, marker=marker, edgecolor="white", linewidth=0.4)
        least_squares_line(ax, x, y, colour)
        note = f"mean difference {np.abs(x - y).mean():.1f}, correlation {np.corrcoef(x, y)[0, 1]:.2f}"
        ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel=label)
        ax.set_title(f"{title}: {note}", fontsize=8)
    axes[0].set_ylabel(f"{name} read by {reading.reader}{unit}")
    save(figure, path)


def neighbours(copies: Copies, floor: Copies, path: Path) -> None:
    """Distance to the nearest person of the training against that to the nearest held-out person.

    Args:
        copies: of drawn people.
        floor: of held-out people in the place of the drawn ones.
        path: PNG file.
    """
    figure, (ax,) = _axes(4.4, 4.2)
    values: list[NDArray] = []
    for found, name, colour, marker in ((floor, "held-out people", REAL, "o"), (copies, "drawn people", DRAWN, "^")):
        ax.scatter(
            found.held_out,
            found.training,
            s=18,
            color=colour,
            marker=marker,
            edgecolor="white",
            linewidth=0.4,
            label=f"{name}, n = {len(found.training)}",
        )
        values += [found.held_out, found.training]
    top = 1.05 * float(np.concatenate(values).max())
    ax.plot([0, top], [0, top], color=FAINT, lw=1, zorder=0)
    ax.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    ax.set(xlabel="distance to the nearest held-out person", ylabel="distance to the nearest person of the training")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)
