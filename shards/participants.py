"""Reading tables of participants: a BIDS tree, or a CSV with a column of paths -> rows ready to pack."""

import csv
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import DataError, nearest
from shards.schema import MISSING, Schema, Value, Variable
from shards.split import parse_part

ID, SESSION, PATH = "participant_id", "session_id", "path"  # the first two are names of the BIDS specification
TIME_UNITS = {
    "years": {"year", "years", "yr", "yrs", "y", "a"},
    "months": {"month", "months", "mo", "mos"},
    "weeks": {"week", "weeks", "wk", "wks"},
    "days": {"day", "days", "d"},
}
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


@dataclass(frozen=True)
class _Sheet:
    """A CSV or TSV file: its columns, and (line number, {column: cell}) of each row."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    text: str


def read_table(source: str | Path, schema: Schema, group: str = "", split_column: str = "") -> Table:
    """Read the rows of a BIDS folder or a CSV (or TSV) file.

    Args:
        source: a folder with ``participants.tsv``, or a table with the columns ``participant_id`` and ``path`` (or one
            column for each volume variable; ``session_id`` optional), paths relative to the table.
        schema: the variables.
        group: column of groups, whose subjects belong to one part of a split; empty for none.
        split_column: column with the part of each row, see :func:`shards.split.parse_part`; empty for none.

    Returns:
        Rows in the order of the table, each either ready to pack or rejected with a reason.

    Raises:
        DataError: the source cannot be read, lacks a column, or has an unknown word in the split column.
    """
    source = Path(source)
    if source.is_dir():
        return _read_bids(source, schema, group, split_column)
    if source.is_file():
        return _read_csv(source, schema, group, split_column)
    raise DataError(f"{source}: no such folder or file; give a BIDS folder or a CSV")


def read_sheet(path: Path) -> _Sheet:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    # BIDS tables have no quoting: a quotation mark is a character of its cell. A CSV has, and it must be balanced.
    commas = path.suffix == ".csv"
    quoting: Any = {"delimiter": ",", "strict": True} if commas else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), **quoting)
    rows = []
    try:
        columns = [c.strip() for c in next(reader, [])]
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise DataError(
                    f"{path}: line {reader.line_num}: a cell holds a line break; remove the quotation mark that is "
                    "not closed"
                )
            if any(cells[len(columns) :]):
                raise DataError(f"{path}: line {reader.line_num} has more cells than there are columns")
            if any(cells):
                padded = [*cells, *[""] * len(columns)]
                rows.append((reader.line_num, {c: cell.strip() for c, cell in zip(columns, padded)}))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quotation mark not closed?") from error
    for column, count in Counter(filter(None, columns)).items():
        if count > 1:
            raise DataError(f"{path}: two columns named {column!r}")
    return _Sheet(columns, rows, text)


def _require_column(columns: list[str], wanted: str, path: Path, remedy: str = "") -> None:
    if wanted not in columns:
        raise DataError(f"{path}: {nearest(wanted, columns, 'column')}{remedy}")


def missing(cell: str) -> bool:
    return cell.casefold() in MISSING


def prefixed(prefix: str, label: str) -> str:
    return label if label.startswith(prefix) else prefix + label


def _check_fetched(variable: str, file: Path) -> None:
    """Refuse a link of DataLad or git-annex whose content is elsewhere."""
    if file.is_symlink() and not file.exists():
        raise ValueError(
            f"{variable}: the file is a link whose content is not here; fetch it first (datalad get, git annex get)"
        )


class _Reader:
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
    ) -> None:
        """Append the row of one visit.

        Args:
            line: of the table.
            cells: column -> cell.
            find: gives a volume's file, None where there is none, or raises ValueError.
            why: says why there is no file of any volume.

        Raises:
            DataError: an unknown word in the split column.
        """
        subject, session = cells[ID], cells.get(SESSION, "")
        if missing(subject):
            self.rows.append(Reject(line, "", f"no {ID}"))
            return
        subject = prefixed("sub-", subject)
        part = self._part(line, subject, cells.get(self.split_column, ""))
        labels = [subject] if missing(session) else [subject, prefixed("ses-", session)]
        key = "_".join(labels)
        try:
            if not all(map(LABEL.fullmatch, labels)):
                raise ValueError("an id may hold letters, digits, -, _ and + only, 40 at most")
            if key in self.seen:
                raise ValueError(f"duplicate id: {key} stands in line {self.seen[key]} already")
            self.seen[key] = line
            values = {v.name: v.parse(cells.get(v.column, "")) for v in self.schema.scalars}
            found = {v.name: find(v) for v in self.schema.volumes}
            files = {name: path for name, path in found.items() if path is not None}
            if not files:
                raise ValueError(f"no file: {', '.join(found)}" + why())
        except ValueError as error:
            self.rows.append(Reject(line, key, str(error)))
            return
        group = cells.get(self.group, "")
        self.rows.append(Row(line, key, subject, "" if missing(group) else group, part, values, files))

    def _part(self, line: int, subject: str, cell: str) -> str:
        """The part of a split that a cell names, '' where it is missing."""
        try:
            return "" if missing(cell) else parse_part(cell)
        except ValueError as error:  # not a row to reject: without it the split would be another one
            raise DataError(f"{self.path}: line {line}, {subject}, column {self.split_column!r}: {error}") from error


def _read_csv(path: Path, schema: Schema, group: str, split_column: str) -> Table:
    sheet = read_sheet(path)
    volumes = schema.volumes
    columns = {v.name: v.column for v in volumes}
    if len(volumes) == 1 and volumes[0].column not in sheet.columns:
        columns = {volumes[0].name: PATH}
    optional = [column for column in (group, split_column) if column]
    for needed in (ID, *columns.values(), *(v.column for v in schema.scalars), *optional):
        _require_column(
            sheet.columns, needed, path, " (the schema's `column` can name another)" if needed in schema else ""
        )
    reader = _Reader(path, schema, group, split_column)
    for line, cells in sheet.rows:

        def find(variable: Variable, cells: Mapping[str, str] = cells) -> Path | None:
            cell = cells[columns[variable.name]]
            if missing(cell):
                return None
            file = path.parent / cell
            _check_fetched(variable.name, file)
            if not file.is_file():
                raise ValueError(f"{variable.name}: no file where column {columns[variable.name]} points")
            return file

        reader.add(line, cells, find)
    return Table("csv", reader.rows, [], hashlib.sha256(sheet.text.encode()).hexdigest())


def _read_bids(folder: Path, schema: Schema, group: str, split_column: str) -> Table:
    path = folder / "participants.tsv"
    sheet = read_sheet(path) if path.exists() or schema.scalars else _list_subjects(folder)
    _require_column(sheet.columns, ID, path)
    if group:
        _require_column(sheet.columns, group, path)
    _check_units(folder / "participants.json", schema)
    sessions_known: set[str] = set()
    reader = _Reader(path, schema, group, split_column)
    folders = {p.name[4:].lstrip("0"): p.name for p in folder.glob("sub-*")}  # label without leading zeros -> name
    digest = hashlib.sha256(sheet.text.encode())
    empty_sessions = 0
    for line, cells in sheet.rows:
        subject = prefixed("sub-", cells[ID])
        if missing(cells[ID]) or not LABEL.fullmatch(subject):  # not a safe path
            reader.add(line, cells, lambda variable: None)
            continue
        table = folder / subject / f"{subject}_sessions.tsv"
        by_session: dict[str, dict[str, str]] = {}
        if table.is_file():
            sessions = read_sheet(table)
            _require_column(sessions.columns, SESSION, table)
            sessions_known.update(sessions.columns)
            digest.update(sessions.text.encode())
            by_session = {prefixed("ses-", row[SESSION]): row for _, row in sessions.rows}
        visits = list(_visits(folder / subject, cells, schema))
        full = [visit for visit in visits if visit[1]]
        empty_sessions += len(visits) - len(full) if full else 0
        for session, files in full or visits[:1]:

            def find(variable: Variable, files: Mapping[str, list[Path]] = files) -> Path | None:
                matches = files.get(variable.name, [])
                if len(matches) > 1:
                    raise ValueError(
                        f"{variable.name}: {len(matches)} files *_{variable.suffix}.* in one anat folder; "
                        "keep one there, or name it in a CSV"
                    )
                if not matches:
                    return None
                _check_fetched(variable.name, matches[0])
                return matches[0]

            own = {k: v for k, v in by_session.get(session, {}).items() if k != SESSION and not missing(v)}
            why = functools.partial(_why_none, folder, subject, schema, folders)
            reader.add(line, {**cells, **own, SESSION: session}, find, why)
    for variable in schema.scalars:
        if variable.column not in sessions_known:
            _require_column(sheet.columns, variable.column, path, " The schema's `column` can name another.")
    if split_column and split_column not in sessions_known:
        _require_column(sheet.columns, split_column, path)
    notes = []
    listed = {prefixed("sub-", cells[ID]) for _, cells in sheet.rows}
    unlisted = sum(p.is_dir() and p.name not in listed for p in folder.glob("sub-*"))
    if unlisted:
        notes.append(f"{unlisted} subject folders have no row in participants.tsv and were skipped")
    if empty_sessions:
        notes.append(f"{empty_sessions} sessions hold none of the volumes and were skipped")
    return Table("bids", reader.rows, notes, digest.hexdigest())


def _why_none(folder: Path, subject: str, schema: Schema, folders: Mapping[str, str]) -> str:
    """The most likely reason why a BIDS folder has no volume of a subject, and what to do."""
    if not (folder / subject).is_dir():
        same = folders.get(subject.removeprefix("sub-").lstrip("0"))
        zeros = f", but {same}: write the id with its zeros in participants.tsv" if same else ""
        return f"; there is no folder {subject}{zeros}"
    wanted = " or ".join(f"anat/*_{v.suffix}.nii.gz" for v in schema.volumes)
    suffixes = tuple(f"_{v.suffix}".casefold() for v in schema.volumes)
    files = (p for p in (folder / subject).rglob("*.*") if p.suffix != ".json")
    near = [p for p in files if p.name.partition(".")[0].casefold().endswith(suffixes)]
    if near:
        return f"; looked for {wanted}, found {min(near).relative_to(folder)}: move or rename it"
    return f"; looked for {wanted} in {subject}"


def _check_units(path: Path, schema: Schema) -> None:
    """Refuse a table whose description gives a variable another unit of time than the schema.

    Args:
        path: ``participants.json``, the description of the columns (BIDS); need not exist.
        schema: the variables.

    Raises:
        DataError: naming the column and both units, or a description that cannot be read.
    """
    if not path.is_file():
        return
    try:
        columns = json.loads(path.read_text(encoding="utf-8-sig"))
        units = {name: str(entry["Units"]) for name, entry in columns.items() if "Units" in entry}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a description of columns as BIDS has it ({error})") from error
    for v in schema.scalars:
        theirs, ours = (_time_unit(unit) for unit in (units.get(v.column, ""), v.unit or ""))
        if theirs and ours and theirs != ours:
            raise DataError(
                f"{path}: column {v.column!r} is in {theirs}, the schema has {v.name} in {ours}; convert the column, "
                "or give the schema that unit and a range in it"
            )


def _time_unit(unit: str) -> str:
    """``years`` for ``Year``, ``yrs``, ...; '' for what is no unit of time."""
    word = unit.strip().casefold().rstrip(".")
    return next((name for name, words in TIME_UNITS.items() if word in words), "")


def _list_subjects(folder: Path) -> _Sheet:
    """A table of the subject folders, for a source without ``participants.tsv`` of which no scalar is wanted."""
    names = sorted(path.name for path in folder.glob("sub-*") if path.is_dir())
    if not names:
        raise DataError(f"{folder}: no participants.tsv and no folder sub-*; give a BIDS folder")
    return _Sheet([ID], [(line, {ID: name}) for line, name in enumerate(names, 2)], "\n".join(names))


def _visits(folder: Path, cells: Mapping[str, str], schema: Schema) -> Iterator[tuple[str, dict[str, list[Path]]]]:
    """The sessions of a subject ('' where there are none) and, by variable, the files that match."""
    named = cells.get(SESSION, "")
    if not missing(named):
        sessions = [prefixed("ses-", named)]
    else:
        found = sorted(p.name for p in folder.glob("ses-*") if p.is_dir())
        sessions = [*([""] if (folder / "anat").is_dir() or not found else []), *found]
    for session in sessions:
        stem = "_".join(filter(None, (folder.name, session)))
        files = {}
        for variable in schema.volumes:
            name = re.compile(rf"{re.escape(stem)}(_.+)?_{re.escape(variable.suffix)}\.(nii(\.gz)?|hdr|mgz)")
            anat = folder / session / "anat"
            matches = sorted(p for p in anat.glob("*") if name.fullmatch(p.name) and (p.is_file() or p.is_symlink()))
            plain = [p for p in matches if p.name.startswith(f"{stem}_{variable.suffix}.")]
            if matches:
                files[variable.name] = plain or matches
        yield session, files
