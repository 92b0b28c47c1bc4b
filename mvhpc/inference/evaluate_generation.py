"""Stage ``evaluate-generation``: drawn volumes beside real ones of people whom the model never saw.

One volume is drawn for the scalars of each real person, or drawn people are read from a BIDS tree. Every figure stands
beside that of real people in the place of the drawn ones, at an equal number, and beside its recipe.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvhpc.config import ConfigError, Device, Sampling, Tracking, at_least, to_dict
from mvhpc.evaluation import generation_figures as figures
from mvhpc.evaluation.figures import gallery, slices
from mvhpc.evaluation.frechet import Extrapolation, Sets
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
from mvhpc.inference.drawn_volumes import DrawnTree, draw_for_records
from mvhpc.inference.pictures import draw_over_number, fluid_over_number
from mvhpc.inference.prediction_tables import derivative, write_rows
from mvhpc.inference.sampler import Sampler, versions
from mvhpc.models.feature_networks import FeatureNetwork, VolumeFeatures, feature_network
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_grid, subjects, true_value, volume_shape
from mvhpc.runs.folder import Run, identity
from mvhpc.runtime.devices import resolve_device
from mvhpc.variables import Value
from shards.dataset import Dataset, open_dataset
from shards.files import atomic_folder, write_text
from shards.progress import progress
from shards.schema import Variable

FEWEST = 20  # people; halves of fewer say nothing
SHOWN = 6  # people in a picture
TABLE = "generation"  # .tsv, .json, .md


@dataclass
class EvaluateGenerationConfig:
    """`mvhpc evaluate-generation`: drawn volumes beside real ones."""

    out: str
    data: str
    features: str
    features_sha256: str
    model: str
    drawn: str
    split: str
    split_name: str
    count: int
    at: list[float]
    slices: float
    pixels: int
    resamples: int
    batch: int
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(0, {"count": self.count, "pixels": self.pixels})
        at_least(1, {"batch": self.batch})
        at_least(20, {"resamples": self.resamples})
        if not 0 < self.slices <= 1:
            raise ConfigError(f"slices={self.slices:g}: the share of slices lies above 0 and is at most 1")


@dataclass(frozen=True)
class Comparison:
    """Who is compared with whom.

    Attributes:
        dataset: packed.
        volume: that is drawn; the first of the schema.
        keys: of the real people, in an order of chance.
        training: of the people from whom the model learnt.
        readable: of all people outside of the part, for the reader.
        values: scalars of the drawn people, in their order.
        drawn: their volumes.
        paired: whether drawn person i has the scalars of real person i.
        sampler: that draws; None where drawn people were given.
        warnings: for the user.
    """

    dataset: Dataset
    volume: Variable
    keys: list[str]
    training: list[str]
    readable: list[str]
    values: list[dict[str, Value]]
    drawn: Iterable[NDArray[np.float32]]
    paired: bool
    sampler: Sampler | None
    warnings: list[str]

    @classmethod
    def of(cls, config: EvaluateGenerationConfig) -> "Comparison":
        """Open data and model.

        Raises:
            ConfigError: neither model nor drawn people, too few people, or another grid.
            ModelError: no joint model.
        """
        if not (config.model or config.drawn):
            raise ConfigError("give --model, a joint model that draws, or --drawn, a BIDS tree of drawn people")
        dataset = open_dataset(config.data)
        schema, shape = dataset.index.schema, volume_shape(dataset)
        volume = schema.volumes[0]
        part = subjects(dataset, config.split, config.split_name)
        everybody = [key for key in dataset.keys("all") if dataset.has(key, volume.name)]
        having = set(everybody)
        keys = [key for key in part if key in having]
        order = np.random.default_rng(config.seed).permutation(len(keys))
        keys = [keys[i] for i in order][: config.count or None]
        rest = [key for key in everybody if key not in set(part)]
        if config.drawn:
            tree = DrawnTree.open(Path(config.drawn), schema, volume, shape)
            n = min(len(keys), len(tree.names))
            _enough(n, config)
            few = DrawnTree(tree.names[:n], tree.values[:n], tree.files[:n], shape)
            seen = set(dataset.keys("train", config.split_name))
            training = [key for key in rest if key in seen]
            return cls(dataset, volume, keys[:n], training, rest, few.values, few, False, None, [])
        _enough(len(keys), config)
        sampler = Sampler.of(config)
        check_grid(sampler.model.grid, dataset)
        learnt = TrainingPeople.read(sampler.model.meta).learnt(dataset.index)
        met = [key for key in keys if key in learnt]
        warnings = (
            [f"the model learnt from {len(met)} of the {len(keys)} real people: name another split"] if met else []
        )
        values = [{v.name: true_value(dataset, key, v) for v in schema.scalars} for key in keys]
        drawn = draw_for_records(sampler, dataset, keys, volume.name, config.seed, config.batch)
        training = [key for key in rest if key in learnt]
        return cls(dataset, volume, keys, training, rest, values, drawn, True, sampler, warnings)

    def read(self, keys: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Packed volumes (H, W, D) in [0, 1]."""
        return (self.dataset.read(key, self.volume.name).astype(np.float32) for key in keys)

    def recorded(self, keys: Sequence[str], variable: Variable) -> list[Value]:
        """The recorded values of a scalar."""
        return [true_value(self.dataset, key, variable) for key in keys]


def _enough(people: int, config: EvaluateGenerationConfig) -> None:
    if people < FEWEST:
        raise ConfigError(
            f"{people} people to compare with (split={config.split}, count={config.count}): at least {FEWEST} are "
            "needed; take a larger part, such as split=all for a model that did not learn from these data"
        )


def run(config: EvaluateGenerationConfig, run: Run) -> dict[str, Any]:
    """Stage ``evaluate-generation``: write ``generation.tsv``, ``.json`` and ``.md``, and figures, to ``config.out``.

    Returns:
        Figures of drawn people, by short names.

    Raises:
        ConfigError: as :meth:`Comparison.of`; a baseline that reads something else.
        WeightsError: weights that are missing, or have another hash.
        FileExistsError: ``config.out`` exists.
    """
    who = Comparison.of(config)
    device = resolve_device(config.compute.device)
    network = feature_network(
        config.features, config.features_sha256, config.slices, config.pixels, who.volume.name, device
    )
    if isinstance(network, VolumeFeatures):
        check_grid(network.model.grid, who.dataset)
    grid, shown = who.dataset.index.grid, _Shown()
    drawn = measure(shown(progress(who.drawn, "drawn", len(who.keys), "volume")), network, grid)
    real = measure(progress(who.read(who.keys), "real", len(who.keys), "volume"), network, grid)
    readable = _voxels(who, who.readable)
    found = _rows(config, who, network, drawn, real, readable)
    recipe = _recipe(config, who, network)
    with atomic_folder(Path(config.out)) as folder:
        write_rows(folder / f"{TABLE}.tsv", HEADER, [row.cells for row in found.rows])
        about = derivative("Quality of drawn volumes", **recipe)
        content = {"rows": [row.to_dict() for row in found.rows], "recipe": recipe}
        write_text(folder / "dataset_description.json", json.dumps(about, indent=1))
        write_text(folder / f"{TABLE}.json", json.dumps(content, indent=1))
        write_text(folder / f"{TABLE}.md", _page(found.rows, recipe, who))
        for path in _figures(config, who, network, drawn, real, found, shown.volumes, run):
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


@dataclass(frozen=True)
class _Found:
    """Results: rows of the table, and what the figures show."""

    rows: list[Row]
    lines: dict[str, Extrapolation]
    readings: list[Reading]
    copies: Copies | None
    floor: Copies | None


def _voxels(who: Comparison, keys: Sequence[str]) -> NDArray[np.float32]:
    """The compared voxels of packed people, (N, V)."""
    volumes = progress(who.read(keys), "others", len(keys), "volume")
    rows = [compared_voxels(volume, who.dataset.index.grid) for volume in volumes]
    return np.stack(rows) if rows else np.zeros((0, 1), np.float32)


def _rows(
    config: EvaluateGenerationConfig,
    who: Comparison,
    network: FeatureNetwork,
    drawn: Measures,
    real: Measures,
    readable: NDArray[np.float32],
) -> _Found:
    seed = config.seed
    sets = Sets(drawn.features, real.features, who.paired)
    rows, lines = distance_rows(sets, network.name, network.planes, config.resamples, seed)
    rows += overlap_rows(_of_people(drawn), _of_people(real), seed)
    rows += [diversity_row(drawn, real, seed), *sharpness_rows(drawn, real, seed)]
    copies, floor = _copies(who, drawn, real, readable)
    if copies:
        rows += copy_rows(copies, floor, seed)
    readings = list(_readings(who, network, drawn, real, readable))
    rows += [row for reading in readings for row in reading.rows(seed)]
    return _Found(rows, lines, readings, copies, floor)


def _of_people(measures: Measures) -> NDArray[np.float32]:
    """One vector of features for each person: means over the slices of each plane, (N, P F)."""
    return np.concatenate([plane.mean(1) for plane in measures.features], 1)


def _copies(
    who: Comparison, drawn: Measures, real: Measures, readable: NDArray[np.float32]
) -> tuple[Copies | None, Copies | None]:
    """Drawn people beside those of the training, and held-out ones in their place; None where that says nothing."""
    chosen = set(who.training)
    rows = [i for i, key in enumerate(who.readable) if key in chosen]
    if len(rows) < len(who.keys):
        who.warnings.append(
            f"{len(rows)} people of the training are in these data, fewer than the {len(who.keys)} held-out ones: "
            "whether any were copied is not measured"
        )
        return None, None
    owners = np.array([who.dataset.record(who.readable[i]).subject for i in rows])
    training, half = readable[rows], len(real.voxels) // 2
    copies = find_copies(drawn.voxels, training, real.voxels, owners, who.paired)
    return copies, find_copies(real.voxels[:half], training, real.voxels[half:], owners)


def _readings(
    who: Comparison, network: FeatureNetwork, drawn: Measures, real: Measures, readable: NDArray[np.float32]
) -> Iterator[Reading]:
    """Each scalar as ridge regression reads it, and that of an in-domain network as the network does."""
    for variable in who.dataset.index.schema.scalars:
        wanted = [row[variable.name] for row in who.values]
        known = (readable, who.recorded(who.readable, variable))
        true = who.recorded(who.keys, variable)
        reading = ridge_reading(variable, known, (drawn.voxels, wanted), (real.voxels, true))
        if reading:
            yield reading
        if isinstance(network, VolumeFeatures) and network.model.want == variable.name:
            parts: list[list[Any]] = []
            for measures, values in ((drawn, wanted), (real, true)):
                there = [i for i, value in enumerate(values) if value is not None]
                parts += [[values[i] for i in there], network.read(measures.features[0][there, 0])]
            yield Reading(variable, network.reader, *parts)


def _recipe(config: EvaluateGenerationConfig, who: Comparison, network: FeatureNetwork) -> dict[str, Any]:
    """How the figures were made; JSON-able."""
    grid, shape = who.dataset.index.grid, volume_shape(who.dataset)
    return {
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
        "PeopleOfTheReader": len(who.readable),
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


def _page(rows: Sequence[Row], recipe: dict[str, Any], who: Comparison) -> str:
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


def _figures(
    config: EvaluateGenerationConfig,
    who: Comparison,
    network: FeatureNetwork,
    drawn: Measures,
    real: Measures,
    found: _Found,
    shown: Sequence[NDArray[np.float32]],
    run: Run,
) -> Iterator[Path]:
    """Draw the figures; yields their paths in the run folder."""
    spacing, schema = who.dataset.index.grid["spacing"], who.dataset.index.schema
    captions = [[_caption(row, schema.scalars) for row in rows[:SHOWN]] for rows in (_real_values(who), who.values)]
    with run.figure("real-over-drawn.png") as path:
        rows = [[slices(v) for v in volumes] for volumes in (who.read(who.keys[:SHOWN]), shown)]
        gallery(rows, path, captions, title="real people over drawn ones", spacing=spacing)
    yield path
    with run.figure("fid-over-people.png") as path:
        figures.extrapolation(found.lines, network.name, path)
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
    if number and who.sampler:
        with run.figure(f"drawn-over-{number.name}.png") as path:
            draw_over_number(who.sampler, who.dataset, config.split_name, path, config.seed, config.at)
        yield path


def _real_values(who: Comparison) -> list[dict[str, Value]]:
    names = who.dataset.index.schema.scalars
    return [{v.name: true_value(who.dataset, key, v) for v in names} for key in who.keys[:SHOWN]]


def _caption(row: dict[str, Value], scalars: Sequence[Variable]) -> str:
    values = [row[v.name] for v in scalars]
    return " ".join(v if isinstance(v, str) else f"{v:.0f}" for v in values if v is not None)


def _nearest(who: Comparison, copies: Copies, path: Path, config: EvaluateGenerationConfig) -> None:
    """The drawn people that are relatively nearest to somebody of the training, over that person."""
    ratio = copies.training / np.maximum(copies.held_out, 1e-12)
    chosen = np.argsort(ratio)[:SHOWN].tolist()
    training = [key for key in who.readable if key in set(who.training)]
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


def _summary(rows: Sequence[Row], people: int) -> dict[str, Any]:
    """Drawn people's figures, of the mean over planes where there are several."""
    chosen = (row for row in rows if row.plane in ("", "mean") and np.isfinite(row.drawn.value))
    return {"people": people} | {row.measure: row.drawn.value for row in chosen}
