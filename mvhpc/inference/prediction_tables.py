"""Rows of predictions, and the tables that they are written to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvhpc.evaluation.tables import MISSING, sidecar
from shards.files import atomic_file, write_text

Row = dict[str, Any]


def class_cells(name: str, p: Mapping[str, float]) -> Row:
    """The cells of a category: its most probable class, and the probability of each class."""
    return {name: max(p, key=p.__getitem__), **{f"{name}_p_{c}": probability for c, probability in p.items()}}


def write_predictions(path: Path, rows: Sequence[Row], description: dict[str, Any]) -> None:
    """Write rows as TSV (missing values as n/a) and beside it ``description`` as JSON; each atomically, the TSV last.

    Joint draws are written to ``NAME.draws.tsv``, a line each, with the subject's key and the number of the draw. Draws
    of an earlier query at the same path are removed.

    Args:
        path: of the TSV.
        rows: at least one, all with the same columns; ``draws`` of a row holds the values by variable.
        description: of model, data and query; JSON-able.
    """
    path.with_suffix(".draws.tsv").unlink(missing_ok=True)
    write_text(sidecar(path), json.dumps(description, indent=1))
    if "draws" in rows[0]:
        names = list(rows[0]["draws"])
        draws = ((row["key"], i, *values) for row in rows for i, values in enumerate(zip(*row["draws"].values())))
        write_rows(path.with_suffix(".draws.tsv"), ["key", "draw", *names], draws)
    columns = [name for name in rows[0] if name != "draws"]
    write_rows(path, columns, ([row[name] for name in columns] for row in rows))


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a TSV atomically; None as n/a."""
    with atomic_file(path) as part, part.open("w") as stream:
        for row in [header, *rows]:
            stream.write("\t".join(_cell(value) for value in row) + "\n")


def _cell(value: float | str | None) -> str:
    return MISSING if value is None else value if isinstance(value, str) else f"{value:.6g}"
