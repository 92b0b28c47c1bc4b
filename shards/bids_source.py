"""Reading a BIDS folder: participants, sessions, and the volumes of each visit."""

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from shards.bids_files import find_files, folder_names, several
from shards.errors import DataError, counted, named
from shards.files import NOT_FETCHED, is_dangling
from shards.participant_rows import ID, LABEL, SESSION, Columns, RowBuilder, Table, check_fetched, prefixed
from shards.schema import Schema, Variable
from shards.sheets import Description, Sheet, check_units, missing, read_description, read_sheet, require_column

MASK = "mask"  # suffix of brain masks


def read_bids(
    folder: Path,
    schema: Schema,
    group: str,
    split_column: str,
    entities: Mapping[str, str],
    names: Columns,
) -> Table:
    """The rows of a BIDS folder; see :func:`shards.participants.read_table`.

    Args:
        folder: with ``participants.tsv``, or at least folders ``sub-*`` where the schema has no scalar.
        schema, group, split_column, entities: as there.
        names: gives columns the schema's names.

    Raises:
        DataError: the table cannot be read, or lacks a column.
    """
    path = folder / "participants.tsv"
    given = path.exists() or is_dangling(path)
    if not given and schema.scalars and folder.is_dir():
        raise DataError(
            f"{path}: No such file; write one, or for a derivative copy that of the data set it was made from"
        )
    sheet, renamed = names.name(path, read_sheet(path) if given else _list_subjects(folder))
    require_column(sheet.columns, ID, path)
    if group:
        require_column(sheet.columns, group, path)
    description = read_description(folder / "participants.json", renamed)
    names.add_notes(check_units(path, description, schema, renamed))
    sessions_known: set[str] = set()
    builder = RowBuilder(path, schema, group, split_column)
    folders = _folders(folder, "sub-")
    bare = {_bare(name): name for name in folders}
    digest = hashlib.sha256(sheet.text.encode())
    empty_sessions: list[str] = []
    without_folder: set[str] = set()  # rows of sessions
    for line, cells in sheet.rows:
        subject = prefixed("sub-", cells[ID])
        if missing(cells[ID]) or not LABEL.fullmatch(subject):  # not a safe path
            builder.add(line, cells, lambda variable: None)
            continue
        try:
            visits = list(_visits(folder / subject, cells, schema, entities))
            full = [(session, files) for session, files in visits if files or _dangling(folder, subject, session)]
        except OSError as error:  # a session that is not seen must not be taken for one that is not there
            where = Path(error.filename or folder / subject).relative_to(folder)
            builder.reject(line, cells, f"{where} cannot be read: {error.strerror}")
            continue
        table = folder / subject / f"{subject}_sessions.tsv"
        by_session: dict[str, dict[str, str]] = {}
        of_sessions: Description = {}
        if table.is_file() or is_dangling(table):
            sessions, renamed = names.name(table, read_sheet(table))
            for sidecar in (folder / "sessions.json", table.with_suffix(".json")):
                of_sessions = {**of_sessions, **read_description(sidecar, renamed)}
            names.add_notes(check_units(table, of_sessions, schema, renamed))
            require_column(sessions.columns, SESSION, table)
            sessions_known.update(sessions.columns)
            digest.update(sessions.text.encode())
            by_session = _by_session(table, sessions, names)
            present = _folders(folder / subject, "ses-")
            without_folder.update(f"{subject}/{name}" for name in by_session if name not in present)
        if full:
            seen = {session for session, _ in full}
            empty_sessions += [f"{subject}/{session}".rstrip("/") for session, _ in visits if session not in seen]
        for session, files in full or visits[:1]:

            def find(
                variable: Variable,
                files: Mapping[str, list[Path]] = files,
                subject: str = subject,
                session: str = session,
                rowless: str = _rowless(table, by_session, session) if missing(cells.get(SESSION, "")) else "",
            ) -> Path | None:
                matches = files.get(variable.name, [])
                if len(matches) > 1:
                    stem = "_".join(filter(None, (subject, session)))
                    raise ValueError(f"{variable.name}: {several(matches, stem, variable.suffix)}")
                if not matches:
                    return None
                check_fetched(variable.name, matches[0])
                if rowless:
                    raise ValueError(rowless)
                return matches[0]

            own = {k: v for k, v in by_session.get(session, {}).items() if not missing(v)}
            why = functools.partial(_why_none, folder, subject, session, schema, bare, entities)
            own_names = {*own, *map(str.casefold, own)}
            described = {**description, **{c: entry for c, entry in of_sessions.items() if c in own_names}}
            builder.add(line, {**cells, **own, SESSION: session}, find, why, described)
    for variable in schema.scalars:
        if variable.column not in sessions_known:
            require_column(
                sheet.columns, variable.column, path, " Name the table's by --rename COLUMN=" + variable.column
            )
    if split_column and split_column not in sessions_known:
        require_column(sheet.columns, split_column, path)
    notes = []
    listed = {prefixed("sub-", cells[ID]) for _, cells in sheet.rows}
    unlisted = [name for name in folders if name not in listed]
    if unlisted:
        which, added = ("folder that has", "one is") if len(unlisted) == 1 else ("folders that have", "rows are")
        text = f"skipped {len(unlisted)} subject {which} no row in participants.tsv, until {added} added"
        notes.append(f"{text}: {named(unlisted)}")
    if empty_sessions:
        text = f"skipped {counted(len(empty_sessions), 'session')} without any of the volumes"
        notes.append(f"{text}: {named(empty_sessions)}")
    if without_folder:
        notes.append(
            f"{len(without_folder)} rows in tables of sessions have no folder and were skipped, as "
            f"{min(without_folder)}"
        )
    return Table("bids", builder.rows, notes, digest.hexdigest())


def _by_session(path: Path, sheet: Sheet, names: Columns) -> dict[str, dict[str, str]]:
    """Session -> its cells of the columns that are read; empty where none is.

    Raises:
        DataError: two rows of one session have different cells.
    """
    columns = [column for column in sheet.columns if column in names.wanted and column not in {ID, SESSION}]
    if not columns:
        return {}
    found: dict[str, dict[str, str]] = {}
    for line, row in sheet.rows:
        session, cells = prefixed("ses-", row[SESSION]), {column: row[column] for column in columns}
        for column, cell in found.setdefault(session, cells).items():
            if cell != row[column]:
                raise DataError(
                    f"{path}: line {line}: {column!r} of {session} is {row[column]!r} here and {cell!r} in a line "
                    "before; remove one of the two lines"
                )
    return found


def _rowless(table: Path, by_session: Mapping[str, Mapping[str, str]], session: str) -> str:
    """Why a session without a row in its subject's table cannot be used; '' where it has one or needs none."""
    if not session or not by_session or session in by_session:
        return ""
    near = _near(session, by_session)
    return f"{table.name} has no row {session}" + (f", but {near}: write {session} there" if near else ": add it")


def _why_none(
    folder: Path,
    subject: str,
    session: str,
    schema: Schema,
    bare: Mapping[str, str],
    entities: Mapping[str, str],
) -> str:
    """The most likely reason why a BIDS folder has no volume of a subject, and what to do."""
    if link := _dangling(folder, subject, session):
        return f"; {link.relative_to(folder)} is {NOT_FETCHED}"
    if not (folder / subject).is_dir():
        near = bare.get(_bare(subject), "")
        return f"; there is no folder {subject}" + (f", but {near}: write {near} in participants.tsv" if near else "")
    if not (folder / subject / session).is_dir() and (near := _near(session, _folders(folder / subject, "ses-"))):
        return f"; there is no folder {subject}/{session}, but {near}: write {near} in participants.tsv"
    chosen = "".join(f"_{key}-{value}*" for key, value in entities.items())
    place = f"{session}/anat" if session else "anat"
    wanted = " or ".join(f"{place}/*{chosen}_{v.suffix}.nii.gz" for v in schema.volumes)
    suffixes = tuple(f"_{v.suffix}".casefold() for v in schema.volumes)
    files = (p for p in (folder / subject).rglob("*.*") if p.suffix != ".json")
    misplaced = [p for p in files if p.name.partition(".")[0].casefold().endswith(suffixes)]
    if misplaced:
        remedy = "check --entities, or move or rename it" if entities else "move or rename it"
        return f"; looked for {wanted}, found {min(misplaced).relative_to(folder)}: {remedy}"
    return f"; looked for {wanted} in {subject}"


def _list_subjects(folder: Path) -> Sheet:
    """A table of the subject folders, for a source without ``participants.tsv`` of which no scalar is wanted."""
    names = _folders(folder, "sub-")
    if not names:
        raise DataError(f"{folder}: no participants.tsv and no folder sub-*; give a BIDS folder")
    return Sheet([ID], [(line, {ID: name}) for line, name in enumerate(names, 2)], "\n".join(names))


def _bare(label: str) -> str:
    """A label without what tables change in it: prefix, leading zeros and capitals."""
    return re.sub("^(sub-|ses-)*0*", "", label.casefold())


def _near(label: str, names: Iterable[str]) -> str:
    """The name that is the same bare label; '' for none."""
    return {_bare(name): name for name in names}.get(_bare(label), "")


def _folders(folder: Path, prefix: str) -> list[str]:
    """The subfolders with this prefix, sorted, ses-2 before ses-10; links whose content is not here are folders too."""
    names = sorted((name for name in folder_names(folder) if name.startswith(prefix)), key=_by_number)
    return [name for name in names if (folder / name).is_dir() or is_dangling(folder / name)]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _dangling(folder: Path, subject: str, session: str) -> Path | None:
    """The folder on the way to a visit's volumes that is a link whose content is not here."""
    visit = folder / subject / session
    return next(filter(is_dangling, (folder / subject, visit, visit / "anat")), None)


def _visits(
    folder: Path, cells: Mapping[str, str], schema: Schema, entities: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, list[Path]]]]:
    """The sessions of a subject ('' where there are none) and, by variable, the files that match."""
    named = cells.get(SESSION, "")
    if not missing(named):
        sessions = [prefixed("ses-", named)]
    else:
        found = _folders(folder, "ses-")
        plain = (folder / "anat").is_dir() or is_dangling(folder / "anat")
        sessions = [*([""] if plain or not found else []), *found]
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
