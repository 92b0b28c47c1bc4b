"""Figures of the stage ``evaluate-generation``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvhpc.evaluation import generation_figures as figures
from mvhpc.evaluation.figures import gallery, slices
from mvhpc.evaluation.frechet import Extrapolation
from mvhpc.evaluation.generation import Reading, Row
from mvhpc.evaluation.neighbours import Copies
from mvhpc.evaluation.volume_measures import Measures
from mvhpc.inference.drawn_volumes import draw_for_records
from mvhpc.inference.generation_comparison import Cohorts, EvaluateGenerationConfig
from mvhpc.inference.pictures import draw_over_number, fluid_over_number
from mvhpc.records import true_value
from mvhpc.runs.folder import Run
from mvhpc.variables import Value
from shards.schema import Variable

SHOWN = 4  # people in a picture


@dataclass(frozen=True)
class Found:
    """Results: rows of the table, and what the figures show."""

    rows: list[Row]
    lines: dict[str, Extrapolation]
    readings: list[Reading]
    copies: Copies | None
    floor: Copies | None


def draw_figures(
    config: EvaluateGenerationConfig,
    who: Cohorts,
    distance: str,
    drawn: Measures,
    real: Measures,
    found: Found,
    shown: Sequence[NDArray[np.float32]],
    run: Run,
) -> Iterator[Path]:
    """Draw the figures.

    Args:
        config: of the stage.
        who: is compared.
        distance: name of the distance of features.
        drawn, real: measures of the two sets.
        found: the results.
        shown: the first :data:`SHOWN` drawn volumes.
        run: whose folder gets the figures.

    Yields:
        Their paths in the run folder.
    """
    spacing, schema = who.dataset.index.grid["spacing"], who.dataset.index.schema
    captions = [[_caption(row, schema.scalars) for row in rows[:SHOWN]] for rows in (_real_values(who), who.values)]
    with run.figure("real-over-drawn.png") as path:
        rows = [[slices(v) for v in volumes] for volumes in (who.read(who.keys[:SHOWN]), shown)]
        gallery(rows, path, captions, title="real people over drawn ones", spacing=spacing)
    yield path
    with run.figure("fid-over-people.png") as path:
        figures.extrapolation(found.lines, distance, path)
    yield path
    if found.copies and found.floor:
        with run.figure("nearest-people.png") as path:
            figures.neighbours(found.copies, found.floor, path)
        yield path
        with run.figure("drawn-over-nearest.png") as path:
            _nearest(who, found.copies, path, config)
        yield path
    for reading in found.readings:
        if reading.variable.kind != "categorical":
            name = f"{reading.variable.name}-by-{reading.reader.split()[0].lower()}.png"
            with run.figure(name) as path:
                figures.readings(reading, path)
            yield path
    number = next((v for v in schema.scalars if v.kind != "categorical"), None)
    if number and who.volume.suffix == "T1w":
        points = [
            [(float(v), ml) for v, ml in zip(values, measures.fluid.tolist(), strict=True) if v is not None]
            for values, measures in (
                (who.recorded(who.keys, number), real),
                ([row[number.name] for row in who.values], drawn),
            )
        ]
        with run.figure(f"ventricles-over-{number.name}.png") as path:
            label = f"{number.name} ({number.unit})" if number.unit else number.name
            fluid_over_number(points[0], points[1], path, label)
        yield path
    drawable = who.sampler.model.schema.scalars if who.sampler else []
    varied = next((v for v in drawable if v.kind != "categorical"), None)
    if who.sampler and varied:
        with run.figure(f"drawn-over-{varied.name}.png") as path:
            draw_over_number(who.sampler, who.dataset, config.split_name, path, config.seed, config.at)
        yield path


def _real_values(who: Cohorts) -> list[dict[str, Value]]:
    names = who.dataset.index.schema.scalars
    return [{v.name: true_value(who.dataset, key, v) for v in names} for key in who.keys[:SHOWN]]


def _caption(row: dict[str, Value], scalars: Sequence[Variable]) -> str:
    values = [row[v.name] for v in scalars]
    return " ".join(v if isinstance(v, str) else f"{v:.0f}" for v in values if v is not None)


def _nearest(who: Cohorts, copies: Copies, path: Path, config: EvaluateGenerationConfig) -> None:
    """The drawn people that are relatively nearest to somebody of the training, over that person."""
    ratio = copies.training / np.maximum(copies.held_out, 1e-12)
    chosen = np.argsort(ratio)[:SHOWN].tolist()
    learnt = set(who.training)
    training = [key for key in who.others if key in learnt]
    if who.sampler:
        keys = [who.keys[i] for i in chosen]
        volumes = draw_for_records(who.sampler, who.dataset, keys, who.volume.name, config.seed, config.batch)
    else:
        wanted = set(chosen)
        kept = {i: volume for i, volume in enumerate(who.drawn) if i in wanted}
        volumes = iter([kept[i] for i in chosen])
    beside = who.read([training[copies.nearest[i]] for i in chosen])
    rows = [[slices(v) for v in part] for part in (volumes, beside)]
    ratios = [f"distance {ratio[i]:.2f}" for i in chosen]
    title = "drawn people over the nearest of the training (distance by that to the nearest held-out person)"
    gallery(rows, path, [ratios, [""] * len(chosen)], title=title, spacing=who.dataset.index.grid["spacing"])
