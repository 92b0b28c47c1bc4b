"""``index.json``: a JSON object whose first member is the SHA-256 of all bytes after its first line."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shards.errors import RESTORE, DataError, IntegrityError
from shards.files import write_bytes

NAME = "index.json"
VERSION = 2
START, END = b'{"checksum": "', b'",\n'
DIGITS = 64


def write_header(folder: Path, content: dict[str, Any]) -> None:
    """Write ``index.json`` atomically; ``version`` and the checksum are added."""
    body = json.dumps({"version": VERSION, **content}, indent=1, allow_nan=False).removeprefix("{\n").encode() + b"\n"
    write_bytes(folder / NAME, START + hashlib.sha256(body).hexdigest().encode() + END + body)


def read_header(folder: Path) -> dict[str, Any]:
    """The content of ``index.json``, with its ``version`` (1 or 2) and without its checksum.

    Raises:
        DataError: no index in the folder, or one of a later version.
        IntegrityError: an index that differs from what was written.
    """
    path = folder / NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{folder}: no packed data set here ({NAME}: {error.strerror})") from error
    body = raw[len(START) + DIGITS + len(END) :]
    if raw == START + hashlib.sha256(body).hexdigest().encode() + END + body:
        content: dict[str, Any] = json.loads(b"{" + body)
    else:
        content = _version_1(path, raw)
    if content["version"] not in (1, VERSION):
        raise DataError(
            f"{path}: format version {content['version']}, this program reads 1 and {VERSION}; update the program"
        )
    for entry in content.get("tables", {}).values():
        if Path(entry["file"]).name != entry["file"]:
            raise IntegrityError(f"{path}: file {entry['file']!r} leads out of {folder}; {RESTORE}")
    return content


def _version_1(path: Path, raw: bytes) -> dict[str, Any]:
    """The content of an index of version 1, whose checksum is that of the object without it, rendered again."""
    try:
        content: dict[str, Any] = json.loads(raw)
        known = content.pop("checksum")
        text = json.dumps(content, indent=1, allow_nan=False)
        again = json.dumps({**content, "checksum": known}, indent=1, allow_nan=False).encode() + b"\n"
        intact = content["version"] == 1 and hashlib.sha256(text.encode()).hexdigest() == known and again == raw
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise IntegrityError(f"{path}: damaged (its own checksum does not match); {RESTORE}")
    return content
