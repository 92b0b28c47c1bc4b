"""Stage ``generate``: synthetic people, all variables drawn together or some given, as a BIDS tree.

The noise of a person is a function of (seed, number), so person 7 is the same in any batch and any count.
"""

import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from mvhpc.config import Device, Sampling, Tracking, at_least, to_dict
from mvhpc.evaluation.figures import people
from mvhpc.inference.geometry import Place, nifti, place_of_training
from mvhpc.inference.prediction_tables import derivative
from mvhpc.inference.sampler import Sampler, parse_given, versions
from mvhpc.inference.scalar_draws import draw_scalars
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run, identity
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Continuous, Volume
from shards.files import atomic_folder, write_text
from shards.progress import progress
from shards.schema import Schema

Person = dict[str, Any]  # volumes (H, W, D) float32 in [0, 1], numbers in their unit, class names
SHOWN = 9  # people in the figure

README = """Synthetic people
================

Nobody in this folder exists. Images and table were drawn from a generative model (dataset_description.json says
which). They may look like people of its training data; they are not fit for any decision about a person.
"""


@dataclass
class GenerateConfig:
    """`mvhpc generate`: synthetic people as a BIDS tree."""

    out: str
    model: str
    count: int
    given: dict[str, str]
    batch: int
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"count": self.count, "batch": self.batch})


def check_query(schema: Schema, config: GenerateConfig) -> None:
    """Refuse given values that a model with these variables does not take, as :func:`parse_given`."""
    parse_given(schema, config.given)


def draw_people(
    sampler: Sampler, count: int, given: Mapping[str, float | str], seed: int, batch: int
) -> Iterator[Person]:
    """Draw people.

    Args:
        sampler: of a joint model.
        count: number of people.
        given: scalars with fixed values, in their units.
        seed: of the noise; person i of a seed is always the same.
        batch: people drawn at a time.

    Yields:
        Values by variable: float32 volumes (H, W, D) in [0, 1], floats in the variable's range, class names.
    """
    model = sampler.model
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        rows: list[dict[str, Any]] = [dict(given) for _ in numbers]
        if model.scalars is not None:
            rows = draw_scalars(model.scalars, given, [generator(seed, "scalars", number) for number in numbers])
        encoded, _ = model.variables.encode_scalars(rows)
        known = {name: encoded[name] for name in rows[0]}
        drawn = sampler(known, [generator(seed, "generate", number) for number in numbers])
        for i, row in enumerate(rows):
            others = [v.name for v in model.variables if v.name not in row]
            person = row | {name: decode(sampler, name, drawn[name][i : i + 1]) for name in others}
            yield {name: person[name] for name in model.variables.names}


@torch.inference_mode()
def decode(sampler: Sampler, name: str, drawn: torch.Tensor) -> Any:
    """One person's value of a variable from its clean encoded form (1, ...)."""
    variable = sampler.model.variables[name]
    if isinstance(variable, Volume):
        return sampler.model.decode(name, drawn)[0, 0].float().cpu().numpy()  # (H, W, D)
    if isinstance(variable, Continuous):
        return variable.snap(variable.decode(drawn)).item()
    return variable.decode(drawn)[0]


def caption(schema: Schema, person: Person) -> str:
    """A person's scalars in one line: ``age 70 years, sex F``; those that are known."""
    words = []
    for variable in (v for v in schema.scalars if v.name in person):
        value = person[variable.name]
        text = value if isinstance(value, str) else f"{value:.3g} {variable.unit or ''}".rstrip()
        words.append(f"{variable.name} {text}")
    return ", ".join(words)


def write_bids(
    folder: Path,
    drawn: Iterator[Person],
    count: int,
    schema: Schema,
    places: Mapping[str, Place],
    source: dict[str, Any],
) -> list[Person]:
    """Write people as a BIDS derivative, which ``shards pack`` takes as it is.

    Args:
        folder: to write, atomically; must not exist.
        drawn: the people.
        count: number of people, for the width of their numbers.
        schema: names, columns and suffixes of the variables.
        places: volume -> where it lies; said in a sidecar at the root, which holds for all files of that name.
        source: model and query, for ``dataset_description.json``.

    Returns:
        The first :data:`SHOWN` people.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    shown: list[Person] = []
    width = max(4, len(str(count)))
    with atomic_folder(folder) as tree:
        lines = [["participant_id", *(variable.column for variable in schema.scalars)]]
        for number, person in enumerate(drawn, 1):
            name = f"sub-{number:0{width}d}"
            (tree / name / "anat").mkdir(parents=True)
            for variable in schema.volumes:
                place = places[variable.name]
                file = tree / name / "anat" / f"{place.name(name, variable.suffix)}.nii.gz"
                nib.save(nifti(person[variable.name], place.affine), file)
            values = [person[variable.name] for variable in schema.scalars]
            lines.append([name, *(v if isinstance(v, str) else f"{v:.6g}" for v in values)])
            if len(shown) < SHOWN:
                shown.append(person)
        write_text(tree / "participants.tsv", "".join("\t".join(line) + "\n" for line in lines))
        write_text(tree / "participants.json", json.dumps(_columns(schema, source.get("Given", ())), indent=1))
        for variable in schema.volumes:
            place = places[variable.name]
            about = {"Description": "Drawn, not measured.", "SpatialReference": place.reference}
            write_text(tree / f"{place.name('', variable.suffix)}.json", json.dumps(about, indent=1))
        description = derivative("Synthetic people drawn from a generative model", **source)
        write_text(tree / "dataset_description.json", json.dumps(description, indent=1))
        write_text(tree / "README", README)
    return shown


def _columns(schema: Schema, given: Container[str]) -> dict[str, dict[str, Any]]:
    """Descriptions of the columns of participants.tsv."""
    columns: dict[str, dict[str, Any]] = {}
    for variable in schema.scalars:
        how = "given to the model" if variable.name in given else "drawn from the model"
        columns[variable.column] = {"Description": f"{variable.name}, {how}"}
        if variable.kind == "categorical":
            columns[variable.column]["Levels"] = {c: c for c in variable.classes}
        elif variable.unit:
            columns[variable.column]["Units"] = variable.unit
    return columns


def run(config: GenerateConfig, run: Run) -> dict[str, Any]:
    """Stage ``generate``: write people to ``config.out`` as a BIDS tree, and a figure of the first few.

    Returns:
        The number of people, mean and SD of each number, and the frequency of each class.

    Raises:
        ConfigError: given values that the model does not take.
        FileExistsError: ``config.out`` exists.
    """
    sampler = Sampler.of(config)
    schema, grid = sampler.model.schema, sampler.model.grid
    given, training = parse_given(schema, config.given), TrainingPeople.read(sampler.model.meta)
    warnings = training.beyond(given, schema)
    places = {v.name: place_of_training(grid, training, v.name) for v in schema.volumes}
    if not training.recorded:
        warnings.append("the model does not say from whom it learnt, nor where their scans lie (an earlier version)")
    for warning in warnings:
        print(f"people: warning: {warning}", file=sys.stderr)
    source = {
        "Description": "Nobody in this data set exists.",
        "Warnings": warnings,
        "Model": identity(config.model),
        "Given": given,
        "Sampling": to_dict(sampler.sampling),
        "Seed": config.seed,
        "Packages": versions(),
    }
    table: dict[str, list[Any]] = {variable.name: [] for variable in schema.scalars}

    def drawn() -> Iterator[Person]:
        stream = draw_people(sampler, config.count, given, config.seed, config.batch)
        for person in progress(stream, "people", config.count, "person"):
            for name, values in table.items():
                values.append(person[name])
            yield person

    shown = write_bids(Path(config.out), drawn(), config.count, schema, places, source)
    with run.figure("people.png") as path:
        volumes = [person[schema.volumes[0].name] for person in shown]
        title = f"{len(shown)} of {config.count} synthetic people"
        captions = [caption(schema, person) for person in shown]
        people(volumes, captions, path, title=title, spacing=grid["spacing"])
    return {"people": config.count, **_summary(schema, table)}


def _summary(schema: Schema, table: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for variable in schema.scalars:
        values = table[variable.name]
        if variable.kind == "categorical":
            summary |= {f"{variable.name}_p_{c}": values.count(c) / len(values) for c in variable.classes}
        else:
            summary |= {f"{variable.name}_mean": float(np.mean(values)), f"{variable.name}_sd": float(np.std(values))}
    return summary
