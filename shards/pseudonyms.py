"""Names of people as keyed hashes.

A subject's pseudonym is HMAC-SHA256 of its id under the bytes of a key file, 80 bits in base 32. It is the same in
every packing with that key, so that rows that are added later and follow-up sessions agree; without the key it can
neither be computed from an id nor tested against a list of ids. No list of ids and pseudonyms is stored.
"""

import base64
import hashlib
import hmac
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from shards.errors import DataError
from shards.participant_rows import Reject, Row, Table

SHORTEST = 16  # bytes of a key
LETTERS = 16  # of a pseudonym, 5 bits each
# A reason shows the text of the table from here on: quoted cells, lists in parentheses, names, paths, numbers.
CELLS = re.compile(r"""['"(;/]|\b(?:sub|ses)-|(?<![\w.])[-+]?\d|\S+\.(?:nii|mg[hz]|hdr|img)\b""")
LABELS = re.compile(r"\b(?:sub|ses)-")
LEFT_OUT = "[names are left out]"
HIDDEN = "[pseudonymised: see that line of the table]"
UNNAMED = "[the name of a file is left out]"


def read_key(path: str | Path) -> bytes:
    """The bytes of a key file.

    Raises:
        DataError: the file cannot be read, may be read by others, or is too short.
    """
    try:
        with Path(path).open("rb") as file:
            mode, key = stat.S_IMODE(Path(path).stat().st_mode), file.read()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; make a key: (umask 077; head -c 32 /dev/urandom > {path})"
        ) from error
    if mode & 0o077:
        raise DataError(f"{path}: others may read this key (mode {mode:04o}): chmod 600 {path}")
    if len(key) < SHORTEST:
        raise DataError(f"{path}: {len(key)} bytes; a key has {SHORTEST} at least: head -c 32 /dev/urandom > {path}")
    return key


def fingerprint(key: bytes) -> str:
    """What identifies a key to those who have it, and is of no use to others."""
    return _hash(key, "fingerprint")


def pseudonymised(table: Table, key: bytes) -> Table:
    """The table with pseudonyms in place of the ids of subjects, sessions and groups.

    Values of variables stay, and so do the numbers of lines. Of the reason of a rejected row only that part stays that
    quotes nothing of the table, and of a note what comes before the first label.

    Raises:
        DataError: two ids with one pseudonym.
    """
    rows = [_reject(row, key) if isinstance(row, Reject) else _row(row, key) for row in table.rows]
    for name in (lambda row: row.key, lambda row: row.group):
        _check_unique(table.rows, rows, name)
    notes = [_cut(note, LABELS.search(note), LEFT_OUT) for note in table.notes]
    return replace(
        table, rows=rows, notes=notes, sha256=hmac.new(key, table.sha256.encode(), hashlib.sha256).hexdigest()
    )


def _row(row: Row, key: bytes) -> Row:
    group = _hash(key, "group", row.group) if row.group else ""
    names = _names(row.subject, row.key[len(row.subject) + 1 :], key)
    return replace(row, key="_".join(names), subject=names[0], group=group)


def without_names(reason: str, files: Iterable[Path]) -> str:
    """The reason of a conversion up to the first name of a file or label of BIDS, which may be those of a person.

    Args:
        reason: in words.
        files: of the row.
    """
    names = [re.escape(part) for file in files for part in {str(file), file.name}]
    found = re.search("|".join([r"\b(?:sub|ses)-", *names]), reason)
    return _cut(reason, found, UNNAMED)


def _reject(row: Reject, key: bytes) -> Reject:
    subject, _, session = row.key.partition("_ses-")
    label = "_".join(_names(subject, session and f"ses-{session}", key)) if row.key else ""
    return replace(row, key=label, reason=_without_cells(row.reason))


def _names(subject: str, session: str, key: bytes) -> list[str]:
    """The pseudonyms of a subject and, where it has one, of its session, whose label may be a date."""
    sessions = [f"ses-{_hash(key, 'session', subject, session)}"] if session else []
    return [f"sub-{_hash(key, 'subject', subject)}", *sessions]


def _hash(key: bytes, *parts: str) -> str:
    digest = hmac.new(key, "\0".join(parts).encode(), hashlib.sha256).digest()
    return base64.b32encode(digest).decode().lower()[:LETTERS]


def _without_cells(reason: str) -> str:
    return _cut(reason, CELLS.search(reason), HIDDEN)


def _cut(reason: str, found: re.Match[str] | None, instead: str) -> str:
    return reason if found is None else f"{reason[: found.start()].rstrip(' :,')} {instead}".lstrip()


def _check_unique(before: Iterable[Row | Reject], after: Iterable[Row | Reject], name: Callable[[Row], str]) -> None:
    ids: dict[str, str] = {}
    for old, new in zip(before, after):
        if isinstance(old, Row) and isinstance(new, Row) and ids.setdefault(name(new), name(old)) != name(old):
            raise DataError(f"line {old.line}: its pseudonym is that of another row; take another key")
