"""The rows of a table of participants, ready to pack or rejected with a reason."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.files import NOT_FETCHED, is_dangling
from shards.schema import Schema, Value, Variable
from shards.sheets import Description, Sheet, column_names, missing, parse_cell
from shards.split import parse_part

ID, SESSION, PATH = "participant_id", "session_id", "path"  # the first two are names of the BIDS specification
NO_FILE = "no file: "  # begins the reason of a row without any volume
LABEL = re.compile(r"[A-Za-z0-9_+-]{1,40}")  # safe in file names, tar members and webdataset keys (which end at a dot)


@dataclass(frozen=True)
class Row:
    """One visit of one subject.

    Attributes:
        line: of the table.
        key: ``sub-X`` or ``sub-X_ses-Y``.
        subject: ``sub-X``.
        group: value of the group column; empty for none.
        part: ``train``, ``validation`` or ``test``, from the split column; empty for none.
        values: scalar variable -> value, None where missing.
        files: volume variable -> file; missing ones are left out.
    """

    line: int
    key: str
    subject: str
    group: str
    part: str
    values: dict[str, Value]
    files: dict[str, Path]


@dataclass(frozen=True)
class Reject:
    """A row that cannot be packed, and why."""

    line: int
    key: str
    reason: str


@dataclass(frozen=True)
class Table:
    """The content of a source.

    Attributes:
        kind: ``bids`` or ``csv``.
        rows: in the order of the table.
        notes: messages for the user.
        sha256: of the source's tables.
    """

    kind: str
    rows: list[Row | Reject]
    notes: list[str]
    sha256: str


class Columns:
    """Gives the columns of the tables the names that the schema has for them, and notes each that had another one."""

    def __init__(self, schema: Schema, group: str, split_column: str, rename: Mapping[str, str]) -> None:
        self.rename = rename
        scalars = {v.column: v.synonyms for v in schema.scalars}
        self.wanted: dict[str, tuple[str, ...]] = {ID: (), SESSION: (), **scalars}
        self.wanted |= {name: () for name in (group, split_column) if name and name not in scalars}
        self.unused = dict(rename)
        self._notes: dict[str, None] = {}  # ordered

    @property
    def notes(self) -> list[str]:
        """Messages for the user."""
        return list(self._notes)

    def name(self, path: Path, sheet: Sheet) -> tuple[Sheet, dict[str, str]]:
        """A table with the names of the schema, and which of its columns had others."""
        names = column_names(sheet.columns, self.wanted, self.rename, path)
        for old, new in names.items():
            self.unused.pop(old, None)
            self._notes[f"column {old!r} is read as {new!r}"] = None
        return sheet.renamed(names), names

    def add_notes(self, notes: Iterable[str]) -> None:
        """Add messages for the user, each once."""
        self._notes |= dict.fromkeys(notes)

    def check_used(self, source: Path) -> None:
        """Refuse a column to rename that no table has.

        Raises:
            DataError: naming the column.
        """
        if self.unused:
            raise DataError(f"{source}: rename: no table has a column {', '.join(map(repr, self.unused))}")


def prefixed(prefix: str, label: str) -> str:
    """A BIDS label with its prefix, ``sub-`` or ``ses-``, which tables may leave out."""
    return label if label.startswith(prefix) else prefix + label


def check_fetched(variable: str, file: Path) -> None:
    """Refuse a link of DataLad or git-annex whose content is elsewhere.

    Raises:
        ValueError: naming the variable.
    """
    if is_dangling(file):
        raise ValueError(f"{variable}: the file is {NOT_FETCHED}")


class RowBuilder:
    """Turns cells and files into rows; finds duplicate keys."""

    def __init__(self, path: Path, schema: Schema, group: str, split_column: str) -> None:
        self.path, self.schema, self.group, self.split_column = path, schema, group, split_column
        self.rows: list[Row | Reject] = []
        self.seen: dict[str, int] = {}

    def add(
        self,
        line: int,
        cells: Mapping[str, str],
        find: Callable[[Variable], Path | None],
        why: Callable[[], str] = lambda: "",
        description: Description | None = None,
    ) -> None:
        """Append the row of one visit.

        Args:
            line: of the table.
            cells: column -> cell.
            find: gives a volume's file, None where there is none, or raises ValueError.
            why: says why there is no file of any volume.
            description: of the columns.

        Raises:
            DataError: an unknown word in the split column.
        """
        subject, session = cells[ID], cells.get(SESSION, "")
        if missing(subject):
            self.rows.append(Reject(line, "", f"no {ID}"))
            return
        subject = prefixed("sub-", subject)
        part = self._part(line, cells.get(self.split_column, ""))
        labels = [subject] if missing(session) else [subject, prefixed("ses-", session)]
        key = "_".join(labels)
        try:
            if not all(map(LABEL.fullmatch, labels)):
                remedy = "; remove the .0" if any(label.endswith(".0") for label in labels) else ""
                raise ValueError(f"an id may hold letters, digits, -, _ and + only, 40 at most{remedy}")
            if key in self.seen:
                raise ValueError(f"duplicate id: {key} stands in line {self.seen[key]} already")
            self.seen[key] = line
            described = description or {}
            values = {v.name: parse_cell(v, cells.get(v.column, ""), described) for v in self.schema.scalars}
            found = {v.name: find(v) for v in self.schema.volumes}
            files = {name: path for name, path in found.items() if path is not None}
            if not files:
                raise ValueError(f"{NO_FILE}{', '.join(found)}{why()}")
        except ValueError as error:
            self.rows.append(Reject(line, key, str(error)))
            return
        group = cells.get(self.group, "")
        self.rows.append(Row(line, key, subject, "" if missing(group) else group, part, values, files))

    def reject(self, line: int, cells: Mapping[str, str], reason: str) -> None:
        """Append a row whose files cannot be looked for."""
        self.rows.append(Reject(line, prefixed("sub-", cells[ID]), reason))

    def _part(self, line: int, cell: str) -> str:
        """The part of a split that a cell names, '' where it is missing."""
        try:
            return "" if missing(cell) else parse_part(cell)
        except ValueError as error:  # not a row to reject: without it the split would be another one
            raise DataError(f"{self.path}: line {line}, column {self.split_column!r}: {error}") from error
