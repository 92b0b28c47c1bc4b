"""Reading tables of participants: a BIDS folder, or a CSV with a column of paths -> rows ready to pack."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shards.bids_files import check_entities
from shards.bids_source import read_bids
from shards.csv_source import read_csv
from shards.errors import DataError, named
from shards.participant_rows import Columns, Reject, Row, Table
from shards.schema import Schema, Value


def read_table(
    source: str | Path,
    schema: Schema,
    group: str = "",
    split_column: str = "",
    entities: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    files_root: str | Path | None = None,
) -> Table:
    """Read the rows of a BIDS folder or a CSV (or TSV) file.

    Args:
        source: a folder with ``participants.tsv``, or a table with the columns ``participant_id`` and ``path`` (or one
            column for each volume variable; ``session_id`` optional).
        schema: the variables.
        group: column of groups, whose subjects belong to one part of a split; empty for none.
        split_column: column with the part of each row, see :func:`shards.split.parse_part`; empty for none.
        entities: key -> value that the names of the volumes in a BIDS folder must have, as ``desc`` -> ``preproc``;
            masks have a ``desc`` of their own.
        rename: column of the tables -> the name that is read for it, as ``gender`` -> ``sex``.
        files_root: folder that all files of a CSV must lie in, where its relative paths begin. None: relative paths
            begin at the CSV's folder and stay in it, absolute ones may lie anywhere.

    Returns:
        Rows in the order of the table, each either ready to pack or rejected with a reason.

    Raises:
        DataError: the source cannot be read, lacks a column, has an unknown word in the split column, or a path that
            leads out of its folder.
    """
    source = Path(source)
    check_entities(entities or {})
    if source.is_dir():
        columns = Columns(schema, group, split_column, rename or {})
        table = read_bids(source, schema, group, split_column, entities or {}, columns)
    elif source.is_file():
        if entities:
            raise DataError(f"{source}: entities choose the files of a BIDS folder; a CSV names its files")
        columns = Columns(schema, group, split_column, rename or {})
        table = read_csv(source, schema, group, split_column, columns, Path(files_root) if files_root else None)
    else:
        raise DataError(f"{source}: no such folder or file; give a BIDS folder or a CSV")
    columns.check_used(source)
    return replace(table, notes=[*columns.notes, *table.notes, *_contradictions(table.rows, schema)])


def _contradictions(rows: Sequence[Row | Reject], schema: Schema) -> Iterator[str]:
    """A note for each category that changes between the visits of a subject."""
    for variable in (v for v in schema.scalars if v.kind == "categorical"):
        found: dict[str, set[Value]] = {}
        for row in rows:
            if isinstance(row, Row) and row.values[variable.name] is not None:
                found.setdefault(row.subject, set()).add(row.values[variable.name])
        changed = [subject for subject, values in found.items() if len(values) > 1]
        if changed:
            whose = "1 subject" if len(changed) == 1 else f"{len(changed)} subjects"
            text = f"{variable.name} differs between the visits of {whose}: {named(changed)}"
            yield f"{text}; correct the table unless it did change"
