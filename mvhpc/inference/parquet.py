"""Rows of predictions as Parquet, with every bit of their numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.prediction_tables import Row, ids
from shards.files import atomic_file
from shards.schema import Schema

if TYPE_CHECKING:
    import pyarrow

DRAWS = "draws."  # before the names of variables: lists of joint draws
TEXTS = ("participant_id", "session_id", "not_given", "flag")


def write_parquet(path: Path, rows: Sequence[Row], schema: Schema, want: Sequence[str]) -> None:
    """Write rows, with the columns of the TSV and, for each variable with joint draws, a list ``draws.NAME``.

    Args:
        path: of the file, which appears complete.
        rows: at least one, all with the same columns.
        schema: of the model.
        want: the predicted variables.
    """
    import pyarrow
    from pyarrow import parquet

    flat = [_flat(row) for row in rows]
    types = pyarrow.schema([(name, _type(name, schema, want)) for name in flat[0]])
    with atomic_file(path) as part, part.open("wb") as sink:  # Arrow opens no name that is not UTF-8
        parquet.write_table(pyarrow.Table.from_pylist(flat, types), sink)


def read_rows(path: Path) -> list[Row]:
    """The rows that :func:`write_parquet` wrote."""
    from pyarrow import parquet

    with path.open("rb") as source:
        return [_row(cells) for cells in parquet.read_table(source).to_pylist()]


def _flat(row: Row) -> Row:
    subject, session = ids(row)
    cells = {name: value for name, value in row.items() if name not in ("key", "subject", "draws")}
    drawn = {f"{DRAWS}{name}": values for name, values in row.get("draws", {}).items()}
    return {"participant_id": subject, "session_id": session, **cells, **drawn}


def _row(cells: Row) -> Row:
    subject, session = cells.pop("participant_id"), cells.pop("session_id")
    key = f"{subject}_{session}" if session else subject
    drawn = {name.removeprefix(DRAWS): cells.pop(name) for name in [*cells] if name.startswith(DRAWS)}
    row = {"key": key, "subject": subject_of(key), **cells}
    return row | {"draws": drawn} if drawn else row


def _type(column: str, schema: Schema, want: Sequence[str]) -> "pyarrow.DataType":
    import pyarrow

    if column.startswith(DRAWS):
        return pyarrow.list_(_type(column.removeprefix(DRAWS), schema, want))
    words = {cell for name in want if schema[name].kind == "categorical" for cell in (name, f"{name}_true")}
    return pyarrow.string() if column in TEXTS or column in words else pyarrow.float64()
