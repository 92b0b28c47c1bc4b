"""Rows of predictions, and the BIDS derivative that they are written to."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvhpc.evaluation.tables import GENERATED_BY, MISSING, sidecar, subject_of
from mvhpc.inference.prediction_columns import IDS, describe_columns, describe_draws
from shards.files import atomic_file, write_text
from shards.schema import Schema

Row = dict[str, Any]
DESCRIPTION = "dataset_description.json"


def class_cells(name: str, p: Mapping[str, float]) -> Row:
    """The cells of a category: its most probable class, and the probability of each class."""
    return {name: max(p, key=p.__getitem__), **{f"{name}_p_{c}": probability for c, probability in p.items()}}


def write_predictions(path: Path, rows: Sequence[Row], schema: Schema, description: Mapping[str, Any]) -> None:
    """Write rows as TSV (missing values as n/a) and beside it their description; each atomically, the TSV last.

    ``participant_id`` and ``session_id`` stand for ``key`` and ``subject`` of a row. The JSON beside the table tells of
    each column what BIDS wants, and how the rows were made under ``GeneratedBy``. Joint draws are written to
    ``NAME.draws.tsv``, a line each. Draws of an earlier query at the same path are removed. The folder becomes a BIDS
    derivative, where it has no ``dataset_description.json`` yet.

    Args:
        path: of the TSV.
        rows: at least one, all with the same columns; ``draws`` of a row holds the values by variable.
        schema: of the model.
        description: of model, data and query; JSON-able. ``given`` and ``want`` are the variables of the query; no
            others are described.
    """
    drawn, want = path.with_suffix(".draws.tsv"), list(description["want"])
    columns = _columns(rows[0])
    used = [*description["given"], *want]
    facts = {key: value for key, value in description.items() if value is not None}
    variables = {name: spec for name, spec in schema.to_dict().items() if name in used}
    made = {"Name": "mvhpc", "Version": version("mvhpc"), **facts, "schema": variables}
    for old in (drawn, sidecar(drawn)):
        old.unlink(missing_ok=True)
    write_text(sidecar(path), json.dumps(describe_columns(schema, want, columns) | {GENERATED_BY: made}, indent=1))
    if "draws" in rows[0]:
        names = list(rows[0]["draws"])
        write_text(sidecar(drawn), json.dumps(describe_draws(schema, names), indent=1))
        draws = ((*ids(row), i, *values) for row in rows for i, values in enumerate(zip(*row["draws"].values())))
        write_rows(drawn, [*IDS, "draw", *names], draws)
    if not (path.parent / DESCRIPTION).exists():
        write_text(path.parent / DESCRIPTION, json.dumps(derivative("Predictions from brain scans"), indent=1))
    with atomic_file(path) as part, part.open("w") as stream:
        stream.writelines(tsv_lines(rows))


def ids(row: Row) -> tuple[str, str | None]:
    """``participant_id`` and ``session_id``; None without sessions."""
    subject = subject_of(row["key"])
    return subject, row["key"][len(subject) + 1 :] or None


def tsv_lines(rows: Sequence[Row], header: bool = True) -> Iterator[str]:
    """The lines of a table of predictions; rows have the same columns, at least one."""
    columns = _columns(rows[0])
    if header:
        yield "\t".join(columns) + "\n"
    for row in rows:
        yield "\t".join(map(_cell, [*ids(row), *(row[name] for name in columns[len(IDS) :])])) + "\n"


def _columns(row: Row) -> list[str]:
    return [*IDS, *(name for name in row if name not in ("key", "subject", "draws"))]


def derivative(name: str, **made: Any) -> dict[str, Any]:
    """The content of the ``dataset_description.json`` of a BIDS derivative.

    Args:
        name: of the data set.
        made: how it was made, for ``GeneratedBy``.
    """
    generator = {"Name": "mvhpc", "Version": version("mvhpc"), **made}
    return {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [generator]}


def files(config: Any) -> list[Path]:
    """The files of the predictions of a configuration: the table and what lies beside it."""
    path = Path(config.out)
    drawn = path.with_suffix(".draws.tsv")
    return [path, sidecar(path), path.with_suffix(".parquet"), drawn, sidecar(drawn)]


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a TSV atomically; None as n/a."""
    with atomic_file(path) as part, part.open("w") as stream:
        for row in [header, *rows]:
            stream.write("\t".join(_cell(value) for value in row) + "\n")


def without_answer(rows: Iterable[Mapping[str, Any]], want: Sequence[str]) -> list[tuple[str, str]]:
    """(key, reason) of the rows without any answer."""
    return [(row["key"], row["flag"]) for row in rows if all(row[name] is None for name in want)]


def _cell(value: float | str | None) -> str:
    return MISSING if value is None else value if isinstance(value, str) else f"{value:.6g}"
