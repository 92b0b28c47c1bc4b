"""Reading tables of participants: a BIDS tree, or a CSV with a column of paths -> rows ready to pack."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shards.bids_files import check_entities, find_files, folder_names, several
from shards.errors import DataError
from shards.inside import inside
from shards.schema import Schema, Value, Variable
from shards.sheets import (
    Description,
    Sheet,
    check_units,
    column_names,
    missing,
    parse_cell,
    read_description,
    read_sheet,
    require_column,
)
from shards.split import parse_part

ID, SESSION, PATH = "participant_id", "session_id", "path"  # the first two are names of the BIDS specification
MASK = "mask"  # suffix of brain masks
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
        columns = _Columns(schema, group, split_column, rename or {})
        table = _read_bids(source, schema, group, split_column, entities or {}, columns)
    elif source.is_file():
        if entities:
            raise DataError(f"{source}: entities choose the files of a BIDS folder; a CSV names its files")
        columns = _Columns(schema, group, split_column, rename or {})
        table = _read_csv(source, schema, group, split_column, columns, Path(files_root) if files_root else None)
    else:
        raise DataError(f"{source}: no such folder or file; give a BIDS folder or a CSV")
    columns.check_used(source)
    return replace(table, notes=[*columns.notes, *table.notes])


class _Columns:
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
        """Refuse a column to rename that no table has."""
        if self.unused:
            raise DataError(f"{source}: rename: no table has a column {', '.join(map(repr, self.unused))}")


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
                raise ValueError("an id may hold letters, digits, -, _ and + only, 40 at most")
            if key in self.seen:
                raise ValueError(f"duplicate id: {key} stands in line {self.seen[key]} already")
            self.seen[key] = line
            described = description or {}
            values = {v.name: parse_cell(v, cells.get(v.column, ""), described) for v in self.schema.scalars}
            found = {v.name: find(v) for v in self.schema.volumes}
            files = {name: path for name, path in found.items() if path is not None}
            if not files:
                raise ValueError(f"no file: {', '.join(found)}" + why())
        except ValueError as error:
            self.rows.append(Reject(line, key, str(error)))
            return
        group = cells.get(self.group, "")
        self.rows.append(Row(line, key, subject, "" if missing(group) else group, part, values, files))

    def _part(self, line: int, cell: str) -> str:
        """The part of a split that a cell names, '' where it is missing."""
        try:
            return "" if missing(cell) else parse_part(cell)
        except ValueError as error:  # not a row to reject: without it the split would be another one
            raise DataError(f"{self.path}: line {line}, column {self.split_column!r}: {error}") from error


def _read_csv(
    path: Path, schema: Schema, group: str, split_column: str, names: _Columns, files_root: Path | None
) -> Table:
    sheet, renamed = names.name(path, read_sheet(path))
    sidecar = path.with_suffix(".json")  # of a TSV, as BIDS has it
    description = read_description(sidecar, renamed) if path.suffix == ".tsv" else {}
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
    reader = _Reader(path, schema, group, split_column)
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
            file = _file_of(path, files_root, cell)
            _check_fetched(variable.name, file)
            if not file.is_file():
                raise ValueError(f"{variable.name}: no file where column {columns[variable.name]} points")
            return file

        reader.add(line, cells, find, description=description)
    return Table("csv", reader.rows, [], hashlib.sha256(sheet.text.encode()).hexdigest())


def _file_of(table: Path, files_root: Path | None, cell: str) -> Path:
    """The file that a cell names.

    Raises:
        ValueError: it leads out of the folder that it must lie in.
    """
    if files_root is None and Path(cell).is_absolute():
        return Path(cell)
    return inside(files_root or table.parent, cell)


def _read_bids(
    folder: Path,
    schema: Schema,
    group: str,
    split_column: str,
    entities: Mapping[str, str],
    names: _Columns,
) -> Table:
    path = folder / "participants.tsv"
    if not path.exists() and schema.scalars and folder.is_dir():
        raise DataError(
            f"{path}: No such file; write one, or for a derivative copy that of the data set it was made from"
        )
    sheet, renamed = names.name(path, read_sheet(path) if path.exists() else _list_subjects(folder))
    require_column(sheet.columns, ID, path)
    if group:
        require_column(sheet.columns, group, path)
    description = read_description(folder / "participants.json", renamed)
    names.add_notes(check_units(path, description, schema, renamed))
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
        of_sessions: Description = {}
        if table.is_file():
            sessions, renamed = names.name(table, read_sheet(table))
            for sidecar in (folder / "sessions.json", table.with_suffix(".json")):
                of_sessions = {**of_sessions, **read_description(sidecar, renamed)}
            names.add_notes(check_units(table, of_sessions, schema, renamed))
            require_column(sessions.columns, SESSION, table)
            sessions_known.update(sessions.columns)
            digest.update(sessions.text.encode())
            by_session = {prefixed("ses-", row[SESSION]): row for _, row in sessions.rows}
        visits = list(_visits(folder / subject, cells, schema, entities))
        full = [visit for visit in visits if visit[1]]
        empty_sessions += len(visits) - len(full) if full else 0
        for session, files in full or visits[:1]:

            def find(
                variable: Variable,
                files: Mapping[str, list[Path]] = files,
                subject: str = subject,
                session: str = session,
            ) -> Path | None:
                matches = files.get(variable.name, [])
                if len(matches) > 1:
                    stem = "_".join(filter(None, (subject, session)))
                    raise ValueError(f"{variable.name}: {several(matches, stem, variable.suffix)}")
                if not matches:
                    return None
                _check_fetched(variable.name, matches[0])
                return matches[0]

            own = {k: v for k, v in by_session.get(session, {}).items() if k != SESSION and not missing(v)}
            why = functools.partial(_why_none, folder, subject, session, schema, folders, entities)
            own_names = {*own, *map(str.casefold, own)}
            described = {**description, **{c: entry for c, entry in of_sessions.items() if c in own_names}}
            reader.add(line, {**cells, **own, SESSION: session}, find, why, described)
    for variable in schema.scalars:
        if variable.column not in sessions_known:
            require_column(
                sheet.columns, variable.column, path, " Name the table's by --rename COLUMN=" + variable.column
            )
    if split_column and split_column not in sessions_known:
        require_column(sheet.columns, split_column, path)
    notes = []
    listed = {prefixed("sub-", cells[ID]) for _, cells in sheet.rows}
    unlisted = sum(p.is_dir() and p.name not in listed for p in folder.glob("sub-*"))
    if unlisted:
        notes.append(f"{unlisted} subject folders have no row in participants.tsv and were skipped")
    if empty_sessions:
        notes.append(f"{empty_sessions} sessions hold none of the volumes and were skipped")
    return Table("bids", reader.rows, notes, digest.hexdigest())


def _why_none(
    folder: Path,
    subject: str,
    session: str,
    schema: Schema,
    folders: Mapping[str, str],
    entities: Mapping[str, str],
) -> str:
    """The most likely reason why a BIDS folder has no volume of a subject, and what to do."""
    if not (folder / subject).is_dir():
        same = folders.get(subject.removeprefix("sub-").lstrip("0"))
        zeros = f", but {same}: write the id with its zeros in participants.tsv" if same else ""
        return f"; there is no folder {subject}{zeros}"
    chosen = "".join(f"_{key}-{value}*" for key, value in entities.items())
    place = f"{session}/anat" if session else "anat"
    wanted = " or ".join(f"{place}/*{chosen}_{v.suffix}.nii.gz" for v in schema.volumes)
    suffixes = tuple(f"_{v.suffix}".casefold() for v in schema.volumes)
    files = (p for p in (folder / subject).rglob("*.*") if p.suffix != ".json")
    near = [p for p in files if p.name.partition(".")[0].casefold().endswith(suffixes)]
    if near:
        remedy = "check --entities, or move or rename it" if entities else "move or rename it"
        return f"; looked for {wanted}, found {min(near).relative_to(folder)}: {remedy}"
    return f"; looked for {wanted} in {subject}"


def _list_subjects(folder: Path) -> Sheet:
    """A table of the subject folders, for a source without ``participants.tsv`` of which no scalar is wanted."""
    names = sorted(path.name for path in folder.glob("sub-*") if path.is_dir())
    if not names:
        raise DataError(f"{folder}: no participants.tsv and no folder sub-*; give a BIDS folder")
    return Sheet([ID], [(line, {ID: name}) for line, name in enumerate(names, 2)], "\n".join(names))


def _visits(
    folder: Path, cells: Mapping[str, str], schema: Schema, entities: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, list[Path]]]]:
    """The sessions of a subject ('' where there are none) and, by variable, the files that match."""
    named = cells.get(SESSION, "")
    if not missing(named):
        sessions = [prefixed("ses-", named)]
    else:
        found = [name for name in folder_names(folder) if name.startswith("ses-") and (folder / name).is_dir()]
        sessions = [*([""] if (folder / "anat").is_dir() or not found else []), *found]
    for session in sessions:
        stem = "_".join(filter(None, (folder.name, session)))
        files = {}
        for variable in schema.volumes:
            wanted: Mapping[str, str] = entities
            free: tuple[str, ...] = ()
            if variable.suffix == MASK:  # the brain mask of an image has a description of its own
                wanted, free = {key: value for key, value in entities.items() if key != "desc"}, ("desc",)
            if matches := find_files(folder / session / "anat", stem, variable.suffix, wanted, free):
                files[variable.name] = matches
        yield session, files
