"""Pictures of what a joint model knows: one person at several ages, and ventricles over age, real beside drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvhpc.evaluation.figures import DIFFERENCE, difference, gallery, least_squares_line, save, side_by_side, views
from mvhpc.evaluation.ventricles import deep_fluid_ml
from mvhpc.inference.generate import decode
from mvhpc.inference.sampler import Sampler
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Continuous
from shards.dataset import Dataset
from shards.nifti import read
from shards.schema import Variable
from shards.sheets import read_sheet

QUANTILES = (0.02, 1 / 3, 2 / 3, 0.98)  # of the training people's values
Points = list[tuple[float, float]]  # value of the variable, ml


def draw_over_number(
    sampler: Sampler, dataset: Dataset, split: str, path: Path, seed: int = 0, at: Sequence[float] = ()
) -> None:
    """Draw one person at some values of the first number, with the same noise, in each class of the first category.

    Below each person stand the differences from the one of the first value.

    Args:
        sampler: of a joint model.
        dataset: packed, for the values of its training part.
        split: of the data set.
        path: PNG file.
        seed: of the noise.
        at: values of the number; those within the training part's range are taken. Fewer than two of them: the
            quantiles :data:`QUANTILES` of the training part instead.
    """
    schema = sampler.model.schema
    number = next(v for v in schema.scalars if v.kind != "categorical")
    category = next((v for v in schema.scalars if v.kind == "categorical"), None)
    recorded = [dataset.values(key)[number.name] for key in dataset.keys("train", split)]
    known = [float(v) for v in recorded if v is not None]
    within = [v for v in at if min(known) <= v <= max(known)]
    chosen = within if len(within) > 1 else np.quantile(known, QUANTILES).tolist()
    variable = sampler.model.variables[number.name]
    assert isinstance(variable, Continuous)
    values = variable.snap(torch.tensor([float(f"{v:.2g}") for v in chosen])).tolist()
    classes = category.classes if category else ("",)
    given: list[dict[str, float | str]] = [
        {number.name: value} | ({category.name: name} if category else {}) for name in classes for value in values
    ]
    scalars, _ = sampler.model.variables.encode_scalars(given)
    fixed = {name: scalars[name] for name in given[0]}
    volume = schema.volumes[0].name
    drawn = sampler(fixed, [generator(seed, "generate", 0) for _ in given])[volume]  # (B, C, h, w, d)
    images = [side_by_side(views(decode(sampler, volume, drawn[i : i + 1]))[:2]) for i in range(len(given))]
    rows, captions = [], []
    for i, name in enumerate(classes):
        row = images[i * len(values) : (i + 1) * len(values)]
        rows += [row, [np.zeros_like(row[0]), *(difference(row[0], image) for image in row[1:])]]
        captions.append([" ".join(f"{name} {number.name} {v:g} {number.unit}".split()) for v in values])
        captions.append(["", *(f"change since {values[0]:g}" for _ in values[1:])])
    title = f"one person (the same noise) at {len(values)} values of {number.name}\n{DIFFERENCE}"
    gallery(rows, path, captions, title=title, spacing=sampler.model.grid["spacing"])


def fluid_of_dataset(dataset: Dataset, keys: Sequence[str], volume: str, number: str) -> Points:
    """Number and deep fluid of the packed people who have both."""
    spacing, found = dataset.index.grid["spacing"], []
    for key in keys:
        value = dataset.values(key)[number]
        if value is not None and dataset.has(key, volume):
            found.append((float(value), deep_fluid_ml(dataset.read(key, volume).astype(np.float32), spacing)))
    return found


def fluid_of_tree(tree: Path, number: Variable, volume: Variable, spacing: float) -> Points:
    """Number and deep fluid of the people of a BIDS tree that `mvhpc generate` wrote."""
    rows = read_sheet(tree / "participants.tsv").rows
    people = {cells["participant_id"]: float(cells[number.column]) for _, cells in rows}
    scans = {name: next((tree / name / "anat").glob(f"*_{volume.suffix}.nii.gz")) for name in people}
    return [(value, deep_fluid_ml(read(scans[name]).voxels, spacing)) for name, value in people.items()]


def fluid_over_number(real: Points, drawn: Points, path: Path, label: str) -> None:
    """Scatter of deep fluid (ml) against a number, real beside drawn people, each with its line of least squares.

    Args:
        real, drawn: number and ml.
        path: PNG file.
        label: of the axis: the number's name and unit.
    """
    figure = Figure(figsize=(5.2, 3.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    for points, name, colour, marker in ((real, "real", "#14708a", "o"), (drawn, "drawn", "#c4572e", "^")):
        x, y = np.array(points, float).reshape(-1, 2).T
        ax.scatter(x, y, s=18, color=colour, marker=marker, edgecolor="white", linewidth=0.4, label=_legend(x, y, name))
        least_squares_line(ax, x, y, colour)
    ax.set(xlabel=label, ylabel="fluid deep inside the brain (ml)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _legend(x: NDArray[np.float64], y: NDArray[np.float64], name: str) -> str:
    if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
        return f"{name}, n = {len(x)}, correlation {np.corrcoef(x, y)[0, 1]:.2f}"
    return f"{name}, n = {len(x)}"
