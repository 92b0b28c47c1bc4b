"""Figures as PNG files: brains on black, and predicted against true values.

Volumes are arrays (H, W, D) in [0, 1] with axes to the right, to the front and upwards (RAS). Slices are
drawn as neurologists hold them: the person's left on the left, front or top up.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from shards.files import atomic_file

PAPER, INK, FAINT = "#000000", "#e8e6e3", "#8a8f98"
PANEL_INCHES = 1.35  # height of one brain
LARGEST_DIFFERENCE = 0.3  # of intensities in [0, 1], at full colour
DIFFERENCE = f"difference (red: brighter, blue: darker; full at {LARGEST_DIFFERENCE:g})"


def middle(volume: NDArray) -> tuple[int, int, int]:
    """Where a volume is cut for its sagittal, coronal and axial slice.

    The sagittal one lies a twelfth of the width beside the midline, where it shows ventricles, grey and white matter.
    """
    return volume.shape[0] * 5 // 12, volume.shape[1] // 2, volume.shape[2] // 2


def views(volume: NDArray, at: Sequence[int] | None = None) -> list[NDArray]:
    """The axial (W, H), coronal (D, H) and sagittal (D, W) slice of a volume (H, W, D).

    Args:
        volume: (H, W, D).
        at: where its axes are cut; :func:`middle` where not given.
    """
    x, y, z = at or middle(volume)
    return [np.rot90(volume[:, :, z]), np.rot90(volume[:, y, :]), np.rot90(volume[x, :, :])]


def slices(volume: NDArray) -> NDArray:
    """The three slices of a volume side by side in one image, all at the same scale.

    Args:
        volume: (H, W, D) in [0, 1].

    Returns:
        An image (rows, columns), for ``imshow(..., cmap="gray", vmin=0, vmax=1)``.
    """
    return side_by_side(views(np.asarray(volume, np.float32)))


def side_by_side(images: Sequence[NDArray]) -> NDArray:
    """Images (rows, columns) as one, the lower ones padded at top and bottom."""
    height = max(image.shape[0] for image in images)
    padded = []
    for image in images:
        missing = height - image.shape[0]
        padded.append(np.pad(image, ((missing // 2, missing - missing // 2), (0, 0))))
    return np.concatenate(padded, axis=1)


def difference(before: NDArray, after: NDArray) -> NDArray:
    """How much brighter (red) or darker (blue) the second image is than the first; black where they are equal.

    Args:
        before, after: (h, w) in [0, 1].

    Returns:
        (h, w, 3) in [0, 1]; full colour at a difference of :data:`LARGEST_DIFFERENCE`.
    """
    change = np.clip((after - before) / LARGEST_DIFFERENCE, -1, 1)[..., None]
    return np.maximum(change, 0) * [1.0, 0.35, 0.25] + np.maximum(-change, 0) * [0.3, 0.6, 1.0]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=160, facecolor=figure.get_facecolor())


def _figure(width: float, height: float) -> Figure:
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(width, height), facecolor=PAPER, layout=tight)
    FigureCanvasAgg(figure)
    return figure


def gallery(
    rows: Sequence[Sequence[NDArray]],
    path: Path,
    captions: Sequence[Sequence[str]] | None = None,
    columns: Sequence[str] = (),
    title: str = "",
    spacing: float | None = None,
) -> None:
    """A grid of grey images on black.

    Args:
        rows: images (h, w) in [0, 1], or (h, w, 3) in colour, row by row; rows may differ in length.
        path: PNG file.
        captions: a line under each image.
        columns: a heading over each column.
        title: a line at the top.
        spacing: mm of a pixel; the first image then gets a bar of 5 cm, and an L at the person's left.
    """
    across = max(len(row) for row in rows)
    shapes = [image.shape for row in rows for image in row]
    aspect = max(w / h for h, w, *_ in shapes)
    line = 0.22  # inches of one line of text
    width = across * (PANEL_INCHES * aspect + 0.06)
    height = len(rows) * (PANEL_INCHES + (line if captions else 0.05)) + line * (bool(columns) + 1.3 * bool(title))
    figure = _figure(width, height)
    axes = figure.subplots(len(rows), across, squeeze=False)
    for r, row in enumerate(axes):
        for c, ax in enumerate(row):
            ax.set_axis_off()
            if c >= len(rows[r]):
                continue
            ax.imshow(rows[r][c], cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            if captions:
                ax.text(
                    0.5,
                    -0.03,
                    captions[r][c],
                    transform=ax.transAxes,
                    ha="center",
                    va="top",
                    color=INK,
                    size=8,
                )
            if columns and r == 0:
                ax.set_title(columns[c], color=FAINT, size=8, pad=3)
    if spacing:
        _marks(figure.axes[0], spacing, rows[0][0].shape[0])
    if title:
        figure.suptitle(title, color=INK, size=10)
    save(figure, path)


def _marks(ax: Axes, spacing: float, height: int) -> None:
    """A bar of 5 cm at the bottom and an L at the left of an image of ``height`` rows."""
    ax.autoscale(False)
    ax.plot([0, 50 / spacing], [height - 1, height - 1], color=INK, lw=1.2, solid_capstyle="butt")
    ax.text(0, height - 1.8, "5 cm", color=INK, size=6, va="bottom")
    ax.text(0, height * 0.45, "L", color=INK, size=7, va="center")


def people(
    volumes: Sequence[NDArray],
    captions: Sequence[str],
    path: Path,
    across: int = 6,
    title: str = "",
    spacing: float | None = None,
) -> None:
    """A grid of people: an axial, a coronal and a sagittal slice of each, with a caption.

    Args:
        volumes: (H, W, D) in [0, 1], one per person.
        captions: one per person.
        path: PNG file.
        across: people per row, at most.
        title, spacing: see :func:`gallery`.
    """
    across = max(1, min(across, round(len(volumes) ** 0.5)))
    images = [slices(volume) for volume in volumes]
    cut = range(0, len(images), across)
    gallery([images[i : i + across] for i in cut], path, [captions[i : i + across] for i in cut], (), title, spacing)


def shade(image: NDArray, known: NDArray) -> NDArray:
    """An image (h, w) in colour (h, w, 3), coloured over where ``known`` (h, w) is False."""
    colour = np.array([0.10, 0.22, 0.27])  # dark cyan: neither brain nor background
    return np.where(known[..., None], np.clip(image, 0, 1)[..., None], colour)


def most_unknown(known: NDArray, axis: int) -> int:
    """The index along ``axis`` of the slice with the most unknown voxels; of several, the one nearest to the middle."""
    unknown = (~known).sum(tuple(i for i in range(3) if i != axis))
    best = np.flatnonzero(unknown == unknown.max())
    return int(best[np.abs(best - known.shape[axis] // 2).argmin()])


def inpainting(
    original: NDArray,
    known: NDArray,
    completions: Sequence[NDArray],
    path: Path,
    captions: Sequence[str] = (),
    title: str = "",
    spacing: float | None = None,
) -> None:
    """Original, known part and completions, one column each, in the slices with the most unknown voxels.

    Args:
        original: (H, W, D) in [0, 1].
        known: (H, W, D) bool.
        completions: each (H, W, D).
        path: PNG file.
        captions: one for each completion.
        title, spacing: see :func:`gallery`.
    """
    at = [most_unknown(known, axis) for axis in range(3)]
    shown = [shade(image, seen) for image, seen in zip(views(original, at), views(known, at))]
    columns = [views(original, at), shown, *(views(volume, at) for volume in completions)]
    rows = [list(row) for row in zip(*columns)]
    names = list(captions) or [f"completion {i + 1}" for i in range(len(completions))]
    gallery(rows, path, None, ["original", "known", *names], title, spacing)


def least_squares_line(ax: Axes, x: NDArray, y: NDArray, colour: str) -> float | None:
    """Draw the line of least squares through points, each (N,); its slope, or None where there are too few."""
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    slope, shift = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, slope * ends + shift, color=colour, lw=1.2)
    return float(slope)


def predicted_against_true(
    true: NDArray,
    predicted: NDArray,
    interval: tuple[NDArray, NDArray],
    path: Path,
    name: str,
    unit: str = "",
    note: str = "",
) -> None:
    """Scatter of predicted against true values with their 90 % intervals, the diagonal and the line of least squares.

    Args:
        true, predicted: (N,), in the variable's unit; people without both are left out.
        interval: 5 % and 95 % quantile, each (N,); NaN draws no bar.
        path: PNG file.
        name, unit: of the variable.
        note: text above.
    """
    figure = Figure(figsize=(4.2, 4.7), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    known = np.isfinite(true) & np.isfinite(predicted)
    true, predicted, start, end = (values[known] for values in (true, predicted, *interval))
    shown = np.concatenate([true, predicted, start, end])
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    margin = 0.06 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    ax.plot(limits, limits, color=FAINT, lw=1, zorder=0)
    ax.errorbar(
        true,
        predicted,
        yerr=[np.nan_to_num(predicted - start).clip(0), np.nan_to_num(end - predicted).clip(0)],
        fmt="o",
        ms=4,
        color="#14708a",
        ecolor="#a9d3de",
        elinewidth=1,
        markeredgecolor="white",
        markeredgewidth=0.4,
    )
    slope = least_squares_line(ax, true, predicted, "#c4572e")
    if slope is not None:
        note += f"\nline of least squares: slope {round(slope, 2) + 0.0:.2f}"  # no minus zero
    label = f"{name} ({unit})" if unit else name
    ax.set(xlim=limits, ylim=limits, xlabel=f"true {label}", ylabel=f"predicted {label}", aspect="equal")
    ax.set_title(note.strip(), loc="left", size=9)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)
