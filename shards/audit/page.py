"""The page of an audit: cards of the records, pictures, pairs and statistics in one HTML file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shards.audit.charts import distributions, scatters
from shards.audit.confounding import sentences
from shards.audit.duplicates import Pair, Pairs
from shards.audit.measure import MEASURES
from shards.audit.outliers import deviations
from shards.dataset import Dataset
from shards.files import write_text
from shards.index import PARTS
from shards.qc.limits import explain
from shards.records import Record
from shards.schema import Schema, Value
from shards.web_page import render

PAGES = Path(__file__).parent / "pages"
PICTURES = 20_000  # of the largest scores; a page with more would be slow to open
WORST = 3  # measures that a card shows
REASONS = (  # keys 1 to 8
    "motion",
    "artefact",
    "incomplete",
    "not a brain",
    "brain extraction failed",
    "mirrored or turned",
    "duplicate",
    "other",
)


def write_page(
    dataset: Dataset, compared: str, measures: pd.DataFrame, pictures: Sequence[bytes], pairs: Pairs, out: Path
) -> None:
    """Write the page.

    Args:
        dataset: the data set.
        compared: variable whose volumes are compared in ``pairs``.
        measures: columns ``VARIABLE.MEASURE``, a row for each record in order.
        pictures: of each record, WebP.
        pairs: of numbers of records.
        out: HTML file.
    """
    index = dataset.index
    schema = index.schema
    records = [dataset.record(key) for key in measures.index]
    scalars = pd.DataFrame(
        {v.name: pd.Series([r.values[v.name] for r in records], measures.index, dtype=object) for v in schema.scalars},
        index=measures.index,
    )
    parts = _parts(dataset)
    z = deviations(measures)
    score = z.abs().max(axis=1).to_numpy()
    order = [int(n) for n in np.argsort(-score, kind="stable")]
    place = {record: position for position, record in enumerate(order)}
    names = [str(c).split(".", 1)[1] if len(schema.volumes) == 1 else str(c) for c in measures]
    page = render(
        PAGES,
        "audit.html",
        name=dataset.folder.resolve().name,
        grid=index.grid,
        volumes=[v.name for v in schema.volumes],
        data={
            "digest": index.digest,
            "measures": names,
            "cards": _cards(records, parts, measures.to_numpy(float), z.to_numpy(), names, order, schema),
            "alike": _places(pairs.alike, place),
            "unlike": _places(pairs.unlike, place),
            "reasons": REASONS,
        },
        pictures=[base64.b64encode(pictures[n]).decode() for n in order[:PICTURES]],
        alike=pairs.count,
        unlike=len(pairs.unlike),
        limit=pairs.limit,
        compared=compared,
        flagged=sum(bool(r.flags) for r in records),
        sentences=list(sentences(measures, scalars, schema)),
        scatters=list(scatters(measures, scalars, schema)),
        distributions=list(
            distributions(scalars, pd.Series([parts.get(r.key) for r in records], measures.index, dtype=object), schema)
        ),
        meanings=MEASURES,
    )
    write_text(out, page)


def _parts(dataset: Dataset) -> dict[str, str]:
    """Key -> part of the split ``default``, or of the first one."""
    splits = list(dataset.index.splits)
    if not splits:
        return {}
    split = "default" if "default" in splits else splits[0]
    return {key: part for part in PARTS for key in dataset.keys(part, split)}


def _cards(
    records: Sequence[Record],
    parts: Mapping[str, str],
    values: np.ndarray[Any, np.dtype[np.float64]],
    deviation: np.ndarray[Any, np.dtype[np.float64]],
    names: Sequence[str],
    order: Sequence[int],
    schema: Schema,
) -> list[dict[str, Any]]:
    """What the page says of each record, in the order of their scores."""
    cards = []
    for n in order:
        worst = np.argsort(-np.abs(deviation[n]), kind="stable")[:WORST]
        record = records[n]
        cards.append(
            {
                "key": record.key,
                "facts": _facts(record.values, schema),
                "part": parts.get(record.key, ""),
                "flags": [explain(flag, record.figures) for flag in record.flags],
                "score": round(float(np.abs(deviation[n]).max()), 2),
                "worst": [[names[c], _number(values[n, c]), round(float(deviation[n, c]), 1)] for c in worst],
                "values": [_number(value) for value in values[n]],
            }
        )
    return cards


def _places(pairs: Sequence[Pair], place: Mapping[int, int]) -> list[list[Any]]:
    """[card, card, correlation, deviation, whether of one subject] of each pair."""
    return [[place[p.first], place[p.second], round(p.correlation, 2), round(p.deviation, 1), p.repeat] for p in pairs]


def _facts(values: Mapping[str, Value], schema: Schema) -> str:
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
