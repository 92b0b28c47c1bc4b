"""The tables of participants and sessions of a derivative."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.participant_rows import ID, PATH, SESSION, Row, prefixed
from shards.sheets import column_names, missing, read_sheet

MISSING = "n/a"


def carried_tables(source: Path, kind: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """What a source's tables say of its participants, for the derivative.

    A BIDS folder's ``participants.tsv``, the tables of sessions and the descriptions of both stay as they are.
    A CSV becomes such tables, without its columns of paths: what differs between a subject's sessions goes into its
    table of sessions. Its description (JSON) becomes that of both.

    Args:
        source: of the preprocessing.
        kind: ``bids`` or ``csv``.
        rows: of the visits that the source has.

    Returns:
        File relative to the derivative -> content.

    Raises:
        DataError: values of a CSV that tables of BIDS cannot hold; names the line.
    """
    if kind == "bids":
        files = ["participants.tsv", "participants.json", "sessions.json"]
        files += [f"{s}/{s}_sessions.{suffix}" for s in sorted({r.subject for r in rows}) for suffix in ("tsv", "json")]
        return {name: (source / name).read_bytes() for name in files if (source / name).is_file()}
    sheet = read_sheet(source)
    sheet = sheet.renamed(column_names(sheet.columns, {ID: (), SESSION: ()}, {}, source))
    columns = [c for c in sheet.columns if c and c not in {ID, SESSION, PATH, "mask"}]
    cells = dict(sheet.rows)
    lines: dict[str, list[int]] = {}
    for row in rows:
        lines.setdefault(row.subject, []).append(row.line)
    table: list[list[str]] = []
    tables: dict[str, bytes] = {}
    for subject, own in lines.items():
        sessions = {line: cells[line] for line in own if not missing(cells[line].get(SESSION, ""))}
        plain = next((cells[line] for line in own if line not in sessions), None)
        if plain:
            _check_filled(source, subject, columns, plain, sessions)
        shared = {c: MISSING if len({cells[line][c] for line in own}) > 1 else cells[own[0]][c] for c in columns}
        table.append([subject, *((plain or shared)[c] for c in columns)])
        if sessions:
            visits = [[prefixed("ses-", row[SESSION]), *(row[c] for c in columns)] for row in sessions.values()]
            tables[f"{subject}/{subject}_sessions.tsv"] = _tsv([SESSION, *columns], visits)
    sidecar = source.with_suffix(".json")
    if sidecar.is_file():
        tables |= dict.fromkeys(("participants.json", "sessions.json"), sidecar.read_bytes())
    return {"participants.tsv": _tsv([ID, *columns], table), **tables}


def _check_filled(
    source: Path,
    subject: str,
    columns: Sequence[str],
    plain: Mapping[str, str],
    sessions: Mapping[int, Mapping[str, str]],
) -> None:
    """Refuse a session without a value that the visit without a session has: BIDS would take that one for it."""
    for line, row in sessions.items():
        for column in columns:
            if missing(row[column]) and not missing(plain[column]):
                raise DataError(
                    f"{source}: line {line}, column {column!r}: no value, where the visit of {subject} without a "
                    "session has one, which would be taken for it; give all visits a session"
                )


def _tsv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    """A table as BIDS has it: no quoting; tabs and line breaks in cells become spaces."""
    lines = ["\t".join(" ".join(cell.split()) or MISSING for cell in row) + "\n" for row in [header, *rows]]
    return "".join(lines).encode()
