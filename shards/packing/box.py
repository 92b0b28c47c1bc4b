"""The smallest box for all brains of a table, found by all parts of a packing together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from shards.box import smallest_shape
from shards.convert import brain_extents
from shards.errors import DataError
from shards.files import write_bytes
from shards.packing.places import digest
from shards.packing.pool import map_tasks
from shards.participant_rows import Row
from shards.progress import Progress
from shards.qc.limits import verdict
from shards.schema import Schema
from shards.volumes import Space

FOLDER = "box"
CHUNK = 32  # rows whose extent is stored together


def find_shape(
    rows: Sequence[Row],
    stamps: Mapping[str, str],
    folder: Path,
    schema: Schema,
    spacing: float,
    space: Space | None,
    keep_suspect: bool,
    workers: int,
    first: float = 0.0,
) -> tuple[int, int, int]:
    """The smallest box that holds the brains of all rows fit to be packed.

    The extents of some rows at a time are stored in ``folder``, and taken from there by every process that comes to
    them later.

    Args:
        rows: of the table.
        stamps: key -> stamp of a row's files.
        folder: of the unfinished packing.
        schema, spacing, space, keep_suspect: of the packing.
        workers: processes.
        first: share of the rows that are left for the end, so that parts begin with different ones.

    Raises:
        DataError: no row is fit to be packed, or a file cannot be read now; the box would be another one without it.
    """
    chunks = []
    for start in range(0, len(rows), CHUNK):
        members = rows[start : start + CHUNK]
        name = digest([start, [[row.key, stamps[row.key]] for row in members], spacing, keep_suspect])
        chunks.append((folder / FOLDER / f"{name[:32]}.json", members))
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    turn = int(first * len(chunks))
    read = partial(_extents, schema=schema, spacing=spacing, space=space, keep_suspect=keep_suspect)
    with Progress("box", len(rows), "volume") as bar:

        def missing() -> Iterator[tuple[Path, Sequence[Row]]]:
            for path, members in chunks[turn:] + chunks[:turn]:
                if path.exists():
                    bar.update(len(members))
                else:
                    yield path, members

        for path, bounds, count in map_tasks(read, missing(), workers):
            write_bytes(path, json.dumps(bounds).encode())
            bar.update(count)
    bounds = [json.loads(path.read_bytes()) for path, _ in chunks]
    found = [np.array(extent, np.int64) for extent in bounds if extent]
    if not found:
        raise DataError("--shape auto: no scan can be packed; pack with a given --shape to see why")
    return smallest_shape(found)


def _extents(
    chunk: tuple[Path, Sequence[Row]], schema: Schema, spacing: float, space: Space | None, keep_suspect: bool
) -> tuple[Path, list[list[int]], int]:
    """The file of a chunk, the first and last layer of its brains along each axis (nothing without any), its rows."""
    path, rows = chunk
    found = [
        bounds
        for row in rows
        for name, (bounds, figures) in brain_extents(row, spacing, space).items()
        if keep_suspect or not verdict(figures, schema[name].suffix)
    ]
    if not found:
        return path, [], len(rows)
    lows, highs = np.min([b[:, 0] for b in found], 0), np.max([b[:, 1] for b in found], 0)
    return path, np.stack([lows, highs], 1).tolist(), len(rows)
