"""What became of each row: its place in a shard, and by what a change of its source is seen."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shards.convert import row_files
from shards.files import file_state, sha256
from shards.nifti import PAIR, file_sha256
from shards.packing.pool import map_tasks
from shards.participant_rows import Row
from shards.schema import Schema, Value
from shards.volumes import Space
from shards.writer import as_value

COLUMNS = ("shard", "place", "key", "stamp", "content", "cropped", "touches", "reason")
CHUNK = 64  # rows whose files one task reads


@dataclass(frozen=True)
class Place:
    """The place of a row in a shard.

    Attributes:
        shard: number of the shard.
        place: in the shard, from 0; empty where the row was rejected.
        key: of the row.
        stamp: hash of the inodes, sizes and times of the source's files; changes where a file may be another one.
        content: hash of the source's bytes and of everything else that decides the volumes; empty where the row was
            rejected for a reason that may pass, such as a file that could not be read.
        cropped, touches: see :class:`shards.volumes.Canonical`; the largest and all of the row's volumes.
        reason: of the rejection; empty for a packed row.
    """

    shard: int
    place: int
    key: str
    stamp: str
    content: str
    cropped: float = 0.0
    touches: tuple[str, ...] = ()
    reason: str = ""


def digest(content: Any) -> str:
    """SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored_values(row: Row, schema: Schema) -> dict[str, Value]:
    """The scalars that a record has of its row."""
    return {v.name: as_value(row.values.get(v.name), v.kind) for v in schema.scalars}


def stamp(row: Row, parameters: str, space: Space | None) -> str:
    """See :attr:`Place.stamp`; empty where a file is missing.

    Names of files are no part of it, since they hold ids: inodes tell files of equal size and time apart.
    """
    states = []
    for path in row_files(row, space):
        try:
            states.append(file_state(path))
        except OSError:
            return ""
    return digest([parameters, states])[:32]


def content(row: Row, parameters: str, space: Space | None, known: Mapping[Path, str] | None = None) -> str:
    """See :attr:`Place.content`.

    Args:
        row, space: the row and the space of its volumes.
        parameters: hash of all that decides the conversion.
        known: hashes of files that were read already.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    known = known or {}
    hashes = [
        known[path] if path in known else file_sha256(path) if path.suffix in PAIR else sha256(path)
        for path in row_files(row, space)
    ]
    return digest([parameters, sorted(row.files), hashes, []])[:32]  # [] as in the data sets of earlier versions


def find_unchanged(
    rows: Sequence[Row],
    stamps: Mapping[str, str],
    places: Iterable[Place],
    parameters: str,
    space: Space | None,
    workers: int,
) -> set[str]:
    """The keys of the rows whose files are as they were when they were packed or rejected.

    Only files whose inode, size or time differs are read.

    Args:
        rows: of the table.
        stamps: key -> stamp of each row now.
        places: of the rows before, converted with the same parameters.
        parameters, space: see :func:`content`.
        workers: processes.
    """
    before = {place.key: place for place in places if place.content}
    unchanged = {key for key, place in before.items() if stamps.get(key) == place.stamp}
    unsure = [row for row in rows if row.key in before and row.key not in unchanged and stamps[row.key]]
    chunks = [unsure[start : start + CHUNK] for start in range(0, len(unsure), CHUNK)]
    read = partial(_contents, parameters=parameters, space=space)
    for found in map_tasks(read, chunks, workers):
        unchanged |= {key for key, value in found.items() if value == before[key].content}
    return unchanged


def _contents(rows: Sequence[Row], parameters: str, space: Space | None) -> dict[str, str]:
    found = {}
    for row in rows:
        try:
            found[row.key] = content(row, parameters, space)
        except (OSError, ValueError):
            found[row.key] = ""  # the conversion gives the reason
    return found


def write_places(places: Iterable[Place]) -> bytes:
    """The places as a table."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(COLUMNS)
    for p in places:
        cropped = f"{p.cropped:.6g}"
        table.writerow([p.shard, p.place, p.key, p.stamp, p.content, cropped, " ".join(p.touches), p.reason])
    return text.getvalue().encode()


def read_places(raw: bytes) -> list[Place]:
    """The places of :func:`write_places`."""
    rows = csv.reader(io.StringIO(raw.decode()), delimiter="\t")
    next(rows)
    return [
        Place(int(shard), int(place), key, mark, found, float(cropped), tuple(touches.split()), reason)
        for shard, place, key, mark, found, cropped, touches, reason in rows
    ]
