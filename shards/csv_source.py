"""Reading a CSV or TSV whose columns name the files of volumes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from shards.errors import DataError
from shards.inside import inside
from shards.participant_rows import ID, PATH, Columns, RowBuilder, Table, check_fetched
from shards.schema import Schema, Variable
from shards.sheets import check_units, missing, read_description, read_sheet, require_column


def read_csv(
    path: Path, schema: Schema, group: str, split_column: str, names: Columns, files_root: Path | None
) -> Table:
    """The rows of a CSV, or of a TSV; see :func:`shards.participants.read_table`.

    Args:
        path: of the table.
        schema, group, split_column, files_root: as there.
        names: gives columns the schema's names.

    Raises:
        DataError: the table cannot be read, lacks a column, or has a path that leads out of its folder.
    """
    sheet, renamed = names.name(path, read_sheet(path))
    description = read_description(path.with_suffix(".json"), renamed)
    names.add_notes(check_units(path, description, schema, renamed))
    volumes = schema.volumes
    columns = {v.name: v.column for v in volumes}
    if len(volumes) == 1 and volumes[0].column not in sheet.columns:
        columns = {volumes[0].name: PATH}
    optional = [column for column in (group, split_column) if column]
    for needed in (ID, *columns.values(), *(v.column for v in schema.scalars), *optional):
        require_column(
            sheet.columns, needed, path, f" Name the table's by --rename COLUMN={needed}" if needed in schema else ""
        )
    builder = RowBuilder(path, schema, group, split_column)
    for line, cells in sheet.rows:
        for column in columns.values():
            try:
                _file_of(path, files_root, cells[column])
            except ValueError as error:  # nothing of such a table is to be read
                raise DataError(
                    f"{path}: line {line}, column {column!r}: the path {error}; give the folder that holds all files "
                    "by --files-root, or absolute paths"
                ) from None

        def find(variable: Variable, cells: Mapping[str, str] = cells) -> Path | None:
            cell = cells[columns[variable.name]]
            if missing(cell):
                return None
            file, where = _file_of(path, files_root, cell), f"where column {columns[variable.name]} points"
            try:
                check_fetched(variable.name, file)
                if not file.is_file():
                    raise ValueError(f"{variable.name}: no file {where}")
            except OSError as error:  # a name that is too long, or a folder that may not be entered
                raise ValueError(f"{variable.name}: no file can be read {where}: {error.strerror}") from error
            return file

        builder.add(line, cells, find, description=description)
    return Table("csv", builder.rows, [], hashlib.sha256(sheet.text.encode()).hexdigest())


def _file_of(table: Path, files_root: Path | None, cell: str) -> Path:
    """The file that a cell names.

    Raises:
        ValueError: it leads out of the folder that it must lie in.
    """
    if files_root is None and Path(cell).is_absolute():
        return Path(cell)
    return inside(files_root or table.parent, cell)
