"""The tables of participants and sessions of a derivative."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from shards.files import atomic_file, write_text
from shards.participant_rows import ID, PATH, SESSION, prefixed
from shards.sheets import column_names, missing, read_sheet

MISSING = "n/a"


def carry_tables(source: Path, out: Path, kind: str, keys: Collection[str]) -> None:
    """Carry what a source's tables say of its participants over to the derivative.

    A BIDS folder's ``participants.tsv``, the tables of sessions and the descriptions of both are copied.
    A CSV becomes such tables, without its columns of paths: what differs between a subject's sessions goes into its
    table of sessions.

    Args:
        source: of the preprocessing.
        out: the derivative.
        kind: ``bids`` or ``csv``.
        keys: of the visits that the source has, ``sub-X`` or ``sub-X_ses-Y``.
    """
    if kind == "bids":
        subjects = sorted({key.partition("_")[0] for key in keys})
        files = ["participants.tsv", "participants.json", "sessions.json"]
        files += [f"{s}/{s}_sessions.{kind}" for s in subjects for kind in ("tsv", "json")]
        for name in files:
            if (source / name).is_file() and (out / name).parent.is_dir():
                with atomic_file(out / name) as part:
                    shutil.copyfile(source / name, part)
        return
    sheet = read_sheet(source)
    sheet = sheet.renamed(column_names(sheet.columns, {ID: (), SESSION: ()}, {}, source))
    columns = [c for c in sheet.columns if c and c not in {ID, SESSION, PATH, "mask"}]
    subjects_rows: dict[str, list[Mapping[str, str]]] = {}
    for _, cells in sheet.rows:
        session = cells.get(SESSION, "")
        labels = [prefixed("sub-", cells[ID]), *([] if missing(session) else [prefixed("ses-", session)])]
        if "_".join(labels) in keys:
            subjects_rows.setdefault(labels[0], []).append(cells)
    table = []
    for subject, rows in subjects_rows.items():
        shared = [rows[0][c] if len({row[c] for row in rows}) == 1 else MISSING for c in columns]
        table.append([subject, *shared])
        if not any(missing(row.get(SESSION, "")) for row in rows) and (out / subject).is_dir():
            sessions = [[prefixed("ses-", row[SESSION]), *(row[c] for c in columns)] for row in rows]
            write_text(out / subject / f"{subject}_sessions.tsv", _tsv([SESSION, *columns], sessions))
    write_text(out / "participants.tsv", _tsv([ID, *columns], table))


def _tsv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as BIDS has it: no quoting; tabs and line breaks in cells become spaces."""
    return "".join("\t".join(" ".join(cell.split()) or MISSING for cell in row) + "\n" for row in [header, *rows])
