"""Stage ``evaluate-generation``: drawn volumes beside real ones of people whom the model never saw.

One volume is drawn for the scalars of each real person, or drawn people are read from a BIDS tree. Every figure stands
beside that of real people in the place of the drawn ones, at an equal number, and beside its recipe.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvhpc.config import to_dict
from mvhpc.evaluation.frechet import Sets
from mvhpc.evaluation.generation import (
    HEADER,
    Reading,
    Row,
    copy_rows,
    distance_rows,
    diversity_row,
    overlap_rows,
    ridge_reading,
    sharpness_rows,
    table,
)
from mvhpc.evaluation.neighbours import Copies, find_copies
from mvhpc.evaluation.similarity import SCALES, scales
from mvhpc.evaluation.volume_measures import PAIRS, SMOOTHING, SPACING, Measures, compared_voxels, measure
from mvhpc.inference.generation_comparison import Cohorts, EvaluateGenerationConfig
from mvhpc.inference.generation_pictures import SHOWN, Found, draw_figures
from mvhpc.inference.prediction_tables import derivative, write_rows
from mvhpc.inference.sampler import versions
from mvhpc.models.feature_networks import FeatureNetwork, VolumeFeatures, feature_network
from mvhpc.records import check_grid, volume_shape
from mvhpc.runs.folder import Run, identity
from mvhpc.runtime.devices import resolve_device
from shards.files import atomic_folder, write_text
from shards.progress import progress

TABLE = "generation"  # .tsv, .json, .md


def run(config: EvaluateGenerationConfig, run: Run) -> dict[str, Any]:
    """Stage ``evaluate-generation``: write ``generation.tsv``, ``.json`` and ``.md``, and figures, to ``config.out``.

    Returns:
        Figures of drawn people, by short names.

    Raises:
        ConfigError: as :meth:`Cohorts.of`; a baseline that reads something else.
        WeightsError: weights that are missing, or have another hash.
        FileExistsError: ``config.out`` exists.
    """
    who = Cohorts.of(config)
    device = resolve_device(config.compute.device)
    network = feature_network(
        config.features, config.features_sha256, config.slices, config.pixels, who.volume.name, device
    )
    if isinstance(network, VolumeFeatures):
        check_grid(network.model.grid, who.dataset)
    grid, shown = who.dataset.index.grid, _Shown()
    drawn = measure(shown(progress(who.drawn, "drawn", len(who.keys), "volume")), network, grid)
    real = measure(progress(who.read(who.keys), "real", len(who.keys), "volume"), network, grid)
    others = _voxels(who, who.others)
    found = _rows(config, who, network, drawn, real, others)
    recipe = _recipe(config, who, network)
    with atomic_folder(Path(config.out)) as folder:
        write_rows(folder / f"{TABLE}.tsv", HEADER, [row.cells for row in found.rows])
        about = derivative("Quality of drawn volumes", **recipe)
        content = {"rows": [row.to_dict() for row in found.rows], "recipe": recipe}
        write_text(folder / "dataset_description.json", json.dumps(about, indent=1))
        write_text(folder / f"{TABLE}.json", json.dumps(content, indent=1))
        write_text(folder / f"{TABLE}.md", _page(found.rows, recipe, who))
        for path in draw_figures(config, who, network.name, drawn, real, found, shown.volumes, run):
            shutil.copy(path, folder)
    for warning in who.warnings:
        print(f"evaluate-generation: warning: {warning}", file=sys.stderr)
    return _summary(found.rows, len(who.keys))


class _Shown:
    """Passes volumes on and keeps the first ones for a picture."""

    def __init__(self) -> None:
        self.volumes: list[NDArray[np.float32]] = []

    def __call__(self, volumes: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        for volume in volumes:
            if len(self.volumes) < SHOWN:
                self.volumes.append(volume)
            yield volume


def _voxels(who: Cohorts, keys: Sequence[str]) -> NDArray[np.float32]:
    """The compared voxels of packed people, (N, V)."""
    volumes = progress(who.read(keys), "others", len(keys), "volume")
    rows = [compared_voxels(volume, who.dataset.index.grid) for volume in volumes]
    return np.stack(rows) if rows else np.zeros((0, 1), np.float32)


def _rows(
    config: EvaluateGenerationConfig,
    who: Cohorts,
    network: FeatureNetwork,
    drawn: Measures,
    real: Measures,
    others: NDArray[np.float32],
) -> Found:
    seed = config.seed
    sets = Sets(drawn.features, real.features, who.paired)
    rows, lines = distance_rows(sets, network.name, network.planes, config.resamples, seed)
    rows += overlap_rows(_of_people(drawn), _of_people(real), seed)
    rows += [diversity_row(drawn, real, seed), *sharpness_rows(drawn, real, seed)]
    copies, floor = _copies(who, drawn, real, others)
    if copies:
        rows += copy_rows(copies, floor, seed)
    readings = list(_readings(who, network, drawn, real, others))
    rows += [row for reading in readings for row in reading.rows(seed)]
    return Found(rows, lines, readings, copies, floor)


def _of_people(measures: Measures) -> NDArray[np.float32]:
    """One vector of features for each person: means over the slices of each plane, (N, P F)."""
    return np.concatenate([plane.mean(1) for plane in measures.features], 1)


def _copies(
    who: Cohorts, drawn: Measures, real: Measures, others: NDArray[np.float32]
) -> tuple[Copies | None, Copies | None]:
    """Drawn people beside those of the training, and held-out ones in their place; None where that says nothing."""
    chosen = set(who.training)
    rows = [i for i, key in enumerate(who.others) if key in chosen]
    if len(rows) < len(who.keys):
        who.warnings.append(
            f"{len(rows)} people of the training are in these data, fewer than the {len(who.keys)} held-out ones: "
            "whether any were copied is not measured"
        )
        return None, None
    owners = np.array([who.dataset.record(who.others[i]).subject for i in rows])
    training, half = others[rows], len(real.voxels) // 2
    copies = find_copies(drawn.voxels, training, real.voxels, owners, who.paired)
    return copies, find_copies(real.voxels[:half], training, real.voxels[half:], owners)


def _readings(
    who: Cohorts, network: FeatureNetwork, drawn: Measures, real: Measures, others: NDArray[np.float32]
) -> Iterator[Reading]:
    """Each scalar as ridge regression reads it, and that of an in-domain network as the network does."""
    for variable in who.dataset.index.schema.scalars:
        wanted = [row[variable.name] for row in who.values]
        known = (others, who.recorded(who.others, variable))
        true = who.recorded(who.keys, variable)
        reading = ridge_reading(variable, known, (drawn.voxels, wanted), (real.voxels, true))
        if reading is None:
            continue
        yield reading
        if isinstance(network, VolumeFeatures) and network.model.want == variable.name:
            parts: list[list[Any]] = []
            for measures, values in ((drawn, wanted), (real, true)):
                there = [i for i, value in enumerate(values) if value is not None]
                parts += [[values[i] for i in there], network.read(measures.features[0][there, 0])]
            yield Reading(variable, network.reader, *parts)


def _recipe(config: EvaluateGenerationConfig, who: Cohorts, network: FeatureNetwork) -> dict[str, Any]:
    """How the figures were made; JSON-able."""
    grid, shape = who.dataset.index.grid, volume_shape(who.dataset)
    return {
        "Volume": who.volume.name,
        "Distance": network.name,
        "Network": network.recipe,
        "Features": identity(config.features),
        "ResolutionMm": grid["spacing"],
        "Shape": list(shape),
        "People": len(who.keys),
        "PeopleOfTheFloor": len(who.keys) // 2,
        "Paired": who.paired,
        "Part": config.split,
        "Split": config.split_name,
        "TrainingPeople": len(who.training),
        "PeopleOfTheRegression": len(who.others),
        "Voxels": f"about {SPACING:g} mm, smoothed by {SMOOTHING:g} voxel, left and right averaged",
        "SimilarityScales": f"{scales(shape)} of {len(SCALES)}, {min(PAIRS, len(who.keys) - 1)} pairs",
        "Resamples": config.resamples,
        "Seed": config.seed,
        "Model": identity(config.model) if who.sampler else None,
        "Sampling": to_dict(who.sampler.sampling) if who.sampler else None,
        "Drawn": None if who.sampler else identity(config.drawn),
        "Data": who.dataset.index.digest,
        "Warnings": who.warnings,
        "Packages": versions(),
    }


def _page(rows: Sequence[Row], recipe: dict[str, Any], who: Cohorts) -> str:
    """The table and the recipe as Markdown."""
    facts = {**recipe["Network"], **{key: recipe[key] for key in ("ResolutionMm", "Shape", "SimilarityScales")}}
    lines = "\n".join(f"- {name}: {_words(value)}" for name, value in facts.items())
    warnings = "".join(f"\n**Warning:** {text}\n" for text in who.warnings)
    how = "drawn for the age, sex and other scalars of each real person" if who.paired else "read from a BIDS tree"
    return f"""# Quality of drawn volumes

{len(who.keys)} volumes, {how}, beside {len(who.keys)} real ones (part {recipe["Part"]} of split {recipe["Split"]}).
{warnings}
{table(rows).markdown()}

95 % intervals in brackets, by bootstrap over people; at half of n, the range of 95 % of random halves. The column
"real" has real people in the place of the drawn ones: at half of n, one half of them against the other. The FID of few
people is too large: read it beside that of an equal number of real people. Extrapolated, it is 0 for real people where
the extrapolation holds.

Recipe of the FID:

{lines}
"""


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _summary(rows: Sequence[Row], people: int) -> dict[str, Any]:
    """Drawn people's figures, of the mean over planes where there are several."""
    chosen = (row for row in rows if row.plane in ("", "mean") and np.isfinite(row.drawn.value))
    return {"people": people} | {row.measure: row.drawn.value for row in chosen}
