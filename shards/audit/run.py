"""``shards audit``: a packed data set -> one page that shows every volume, and takes verdicts on them."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from shards.audit.charts import distributions, scatters
from shards.audit.confounding import sentences
from shards.audit.duplicates import Pair, Pairs, compare_all
from shards.audit.measure import MEASURES, SKETCH
from shards.audit.outliers import deviations, histogram_distances
from shards.audit.stream import Look, look, mean_brains
from shards.cpus import available_cores
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.files import write_text
from shards.index import PARTS
from shards.qc.limits import explain
from shards.schema import Schema, Value
from shards.web_page import render

PAGES = Path(__file__).parent / "pages"
HEIGHTS = ((1_000, 160), (10_000, 96))  # records -> height of a picture, pixels; smaller ones keep large pages light
SMALLEST = 64
PICTURES = 20_000  # of the largest scores; a page with more would be slow to open
WORST = 3  # measures that a record shows
REASONS = (
    "motion",
    "artefact",
    "incomplete",
    "not a brain",
    "brain extraction failed",
    "mirrored or turned",
    "duplicate",
    "other",
)


class Summary(TypedDict):
    """The result of an audit.

    Attributes:
        records: of the data set.
        alike: pairs of different subjects that are likely one person.
        unlike: pairs of one subject that are likely different people.
        bytes: of the page.
    """

    records: int
    alike: int
    unlike: int
    bytes: int


def audit(folder: str | Path, out: str | Path, workers: int = 0) -> Summary:
    """Write the page of a packed data set.

    The page is one file that loads nothing. It does not depend on ``workers``.

    Args:
        folder: of the data set, with volumes.
        out: HTML file, outside of the data set; one that exists is replaced.
        workers: processes; 0 for one per core.

    Raises:
        DataError: the data set or ``out`` cannot be used.
        IntegrityError: a damaged volume; names it.
    """
    folder, out = Path(folder), Path(out)
    dataset = open_dataset(folder)
    _check(dataset, out)
    index = dataset.index
    keys = list(dataset.keys())
    references = mean_brains(dataset, [v.name for v in index.schema.volumes])
    if not references:
        raise DataError(f"{folder}: no record has a volume: nothing to look at")
    height = next((height for most, height in HEIGHTS if len(keys) <= most), SMALLEST)
    looks = list(look(folder, references, height, workers or available_cores()))
    records = [dataset.record(key) for key in keys]
    measures = _measures(looks, list(references), [r.figures for r in records])
    scalars = pd.DataFrame(
        {v.name: pd.Series([r.values[v.name] for r in records], keys, dtype=object) for v in index.schema.scalars},
        index=keys,
    )
    split = "default" if "default" in index.splits else next(iter(index.splits), None)
    part = {key: part for part in PARTS for key in dataset.keys(part, split)} if split else {}
    parts = pd.Series([part.get(key) for key in keys], keys, dtype=object)
    pairs = _pairs(looks, next(iter(references)), [r.subject for r in records])
    z = deviations(measures)
    score = z.abs().max(axis=1)
    order = np.argsort(-score.to_numpy(), kind="stable")
    place = {int(record): position for position, record in enumerate(order)}
    single = len(index.schema.volumes) == 1
    names = {c: c.split(".", 1)[1] if single else c for c in measures}
    cards = []
    for n in order:
        worst = z.iloc[n].abs().nlargest(WORST)
        cards.append(
            {
                "key": keys[n],
                "subject": records[n].subject,
                "facts": _facts(records[n].values, index.schema),
                "part": part.get(keys[n], ""),
                "flags": [explain(flag, records[n].figures) for flag in records[n].flags],
                "score": round(float(score.iloc[n]), 2),
                "worst": [[names[c], _number(measures[c].iloc[n]), round(float(z[c].iloc[n]), 1)] for c in worst.index],
                "values": [_number(measures[c].iloc[n]) for c in measures],
            }
        )
    page = render(
        PAGES,
        "audit.html",
        name=folder.resolve().name,
        grid=index.grid,
        volumes=list(references),
        data={
            "digest": index.digest,
            "measures": list(names.values()),
            "cards": cards,
            "alike": _places(pairs.alike, place),
            "unlike": _places(pairs.unlike, place),
            "reasons": REASONS,
        },
        pictures=[base64.b64encode(looks[n].picture).decode() for n in order[:PICTURES]],
        alike=pairs.count,
        unlike=len(pairs.unlike),
        limit=pairs.limit,
        compared=next(iter(references)),
        flagged=sum(bool(r.flags) for r in records),
        sentences=list(sentences(measures, scalars, index.schema)),
        scatters=list(scatters(measures, scalars, index.schema)),
        distributions=list(distributions(scalars, parts, index.schema)),
        meanings=MEASURES,
    )
    write_text(out, page)
    return Summary(records=len(keys), alike=pairs.count, unlike=len(pairs.unlike), bytes=out.stat().st_size)


def _check(dataset: Dataset, out: Path) -> None:
    """Refuse what has no page."""
    if dataset.index.kind != "volumes":
        raise DataError(f"{dataset.folder}: holds {dataset.index.kind}; an audit looks at packed volumes")
    if not dataset.keys():
        raise DataError(f"{dataset.folder}: has no records: nothing to look at")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of an HTML file")
    if out.resolve().is_relative_to(dataset.folder.resolve()):
        raise DataError(f"{out}: lies in the data set, which holds its own files alone; choose a file elsewhere")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first")


def _measures(looks: Sequence[Look], variables: Sequence[str], figures: Sequence[dict[str, float]]) -> pd.DataFrame:
    """A column ``VARIABLE.MEASURE`` for each measure and each figure of quality control that varies."""
    rows = [
        {
            f"{name}.{measure}": value
            for name, volume in found.volumes.items()
            for measure, value in volume.values.items()
        }
        for found in looks
    ]
    table = pd.DataFrame(rows, index=[found.key for found in looks])
    for variable in variables:
        there = [n for n, found in enumerate(looks) if variable in found.volumes]
        distances = np.full(len(looks), np.nan)
        distances[there] = histogram_distances(np.stack([looks[n].volumes[variable].histogram for n in there]))
        table[f"{variable}.histogram"] = distances
    of_quality = pd.DataFrame(list(figures), index=table.index, dtype=float)
    return pd.concat([table, of_quality.loc[:, of_quality.nunique() > 1]], axis=1)


def _pairs(looks: Sequence[Look], variable: str, subjects: Sequence[str]) -> Pairs:
    """Pairs by one variable; records without it are like none."""
    sketches = np.zeros((len(looks), SKETCH), np.float16)
    for row, found in zip(sketches, looks):
        if variable in found.volumes:
            row[:] = found.volumes[variable].sketch
    return compare_all(sketches, subjects)


def _places(pairs: Sequence[Pair], place: dict[int, int]) -> list[list[Any]]:
    """[card, card, correlation, deviation, whether of one subject] of each pair."""
    return [[place[p.first], place[p.second], round(p.correlation, 2), round(p.deviation, 1), p.repeat] for p in pairs]


def _facts(values: dict[str, Value], schema: Schema) -> str:
    """The scalars of a record in one line."""
    shown = []
    for variable in schema.scalars:
        value = values[variable.name]
        text = "n/a" if value is None else value if isinstance(value, str) else f"{value:.4g} {variable.unit}".strip()
        shown.append(f"{variable.name} {text}")
    return ", ".join(shown)


def _number(value: float) -> float | None:
    """Four digits; None for a missing value, which JSON has no number for."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
