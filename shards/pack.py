"""Packing: a table of people -> a dataset of canonical volumes, in parallel, going on after an interruption."""

import contextlib
import hashlib
import json
import multiprocessing
import platform
import re
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from shards.cpus import available_cores
from shards.errors import DataError, TooManyRejects
from shards.files import write_bytes
from shards.index import Index
from shards.participants import Reject, Row, Table, read_table
from shards.progress import Progress
from shards.schema import Schema
from shards.split import draw_folds, draw_fractions, merge_groups
from shards.volumes import Canonical, canonical, grid
from shards.writer import DatasetWriter

FRACTIONS = (0.89, 0.01, 0.10)  # the MetaVoxel paper: 9,078 / 108 / 968 subjects
REJECTED = "rejected.tsv"
CROPPED = 0.02  # share of a brain outside the box that is worth a warning
PACKAGES = ("numpy", "scipy", "nibabel", "zarr", "mvhpc")


class Summary(TypedDict):
    """What a packing did.

    Attributes:
        rows: of the source.
        packed: of them.
        rejected: of them, listed in ``rejected.tsv``.
        subjects: that the packed rows come from.
        missing: variable -> packed rows without it.
        cropped: packed rows that lose more than 2 % of the brain to the box.
        bytes: of the dataset's files.
        notes: for the user.
    """

    rows: int
    packed: int
    rejected: int
    subjects: int
    missing: dict[str, int]
    cropped: int
    bytes: int
    notes: list[str]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    storage: str = "zarr",
    schema: Schema | str | Path = "default",
    spacing: float,
    shape: Sequence[int],
    max_rejects: str | int = "5%",
    fractions: Sequence[float] = FRACTIONS,
    group: str | None = None,
    folds: int = 0,
    seed: int = 0,
    workers: int = 1,
) -> Summary:
    """Pack a BIDS folder or a CSV into ``out``.

    The result does not depend on ``workers``, bit for bit, nor on interruptions: called again with the same arguments
    after one, it goes on behind the last complete shard.

    Args:
        source: see :func:`shards.participants.read_table`.
        out: folder, without a dataset in it.
        storage: ``zarr`` or ``webdataset``.
        schema: a schema, or the name or file of one.
        spacing: mm.
        shape: voxels.
        max_rejects: largest number of faulty rows, or share of all rows as in ``5%``.
        fractions: of subjects in train, validation and test.
        group: column whose equal values stay on one side of a split; None for no such column.
        folds: also record this many cross-validation folds; 0 for none.
        seed: of the splits.
        workers: processes; 0 for one per core.

    Returns:
        A summary; ``out/rejected.tsv`` lists the rows that were left out, and why.

    Raises:
        DataError: source or arguments that cannot be used.
        TooManyRejects: ``out`` then holds ``rejected.tsv`` and no dataset.
    """
    schema = schema if isinstance(schema, Schema) else Schema.load(schema)
    group = group or ""
    size = _check(schema, spacing, shape)
    table = read_table(source, schema, group)
    if not table.rows:
        raise DataError(f"{source}: the table has no rows")
    allowed = _allowed(max_rejects, len(table.rows))
    draw_fractions([], fractions, seed)  # refuses bad fractions before hours of work
    arrays = {v.name: {"shape": size, "dtype": "<f2"} for v in schema.volumes}
    target = grid(spacing, size)
    token = _token(table, schema, target, storage, group)
    arguments = {
        "source": table.kind,
        "spacing": spacing,
        "shape": list(size),
        "format": storage,
        "max_rejects": str(max_rejects),
        "fractions": [float(f) for f in fractions],
        "group": group,
        "folds": folds,
        "seed": seed,
    }
    writer = DatasetWriter(out, storage, "volumes", schema, arrays, target, group=group, token=token)
    with contextlib.closing(writer):
        _fill(writer, table, spacing, size, workers or available_cores())
        packed = [n for n in writer.notes if "sources" in n]
        rejects = [n for n in writer.notes if "reason" in n]
        listing = _listing(rejects)
        if len(rejects) > allowed or not packed:
            listed = writer.folder / REJECTED
            write_bytes(listed, listing)
            raise TooManyRejects(
                f"{len(rejects)} of {len(table.rows)} rows are faulty ({max_rejects} allowed), first "
                f"{_plain(rejects[0]['key'])}: {_plain(rejects[0]['reason'])}; all are listed in {listed}. "
                "Mend them, or raise the limit: complete shards are then reused"
            )
        splits = {"default": draw_fractions(writer.records, fractions, seed, group)}
        if folds:
            splits |= draw_folds(writer.records, folds, seed, group)
        provenance = {
            "software": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "arguments": arguments,
            "source_sha256": _digest([table.sha256, [[n["key"], n["sources"]] for n in packed]]),
            "rows": len(table.rows),
            "rejected": len(rejects),
        }
        index = writer.finish(splits, provenance, files={REJECTED: listing})
    return _summary(index, table, packed, len(rejects))


def _fill(writer: DatasetWriter, table: Table, spacing: float, shape: tuple[int, int, int], workers: int) -> None:
    """Convert and write the rows that the writer has no note of yet; each row leaves one note."""
    done = len(writer.notes)
    together = merge_groups([(r.subject, r.group) for r in table.rows if isinstance(r, Row)])
    with Progress("packing", len(table.rows), "volume", initial=done) as bar:
        for row, outcome in _convert_all(table.rows[done:], spacing, shape, workers):
            if isinstance(outcome, str) or isinstance(row, Reject):
                writer.note({"line": row.line, "key": row.key, "reason": outcome})
            else:
                hashes = {name: volume.sha256 for name, volume in outcome.items()}
                writer.note({"key": row.key, "sources": hashes, "cropped": max(v.cropped for v in outcome.values())})
                voxels = {name: volume.voxels for name, volume in outcome.items()}
                writer.add(row.key, row.subject, row.values, voxels, together[row.subject])
            bar.update()


def _listing(rejects: Sequence[dict[str, Any]]) -> bytes:
    """The content of ``rejected.tsv``."""
    lines = [f"{n['line']}\t{_plain(n['key'])}\t{_plain(n['reason'])}\n" for n in rejects]
    return "".join(["line\tkey\treason\n", *lines]).encode()


def _summary(index: Index, table: Table, packed: Sequence[dict[str, Any]], rejected: int) -> Summary:
    notes = list(table.notes)
    cropped = [n for n in packed if n["cropped"] > CROPPED]
    if cropped:
        worst = max(cropped, key=lambda n: n["cropped"])
        notes.append(
            f"{len(cropped)} volumes lose more than {CROPPED:.0%} of their signal to the box "
            f"({worst['key']} {worst['cropped']:.0%}): take a larger --shape"
        )
    records, schema = index.records, index.schema
    return Summary(
        rows=len(table.rows),
        packed=len(packed),
        rejected=rejected,
        subjects=len({r.subject for r in records}),
        missing={
            **{v.name: sum(v.name not in r.checksums for r in records) for v in schema.volumes},
            **{v.name: sum(r.values[v.name] is None for r in records) for v in schema.scalars},
        },
        cropped=len(cropped),
        bytes=sum(f["bytes"] for f in index.files.values()),
        notes=notes,
    )


def _check(schema: Schema, spacing: float, shape: Sequence[int]) -> tuple[int, int, int]:
    if not schema.volumes:
        raise DataError("the schema has no volume variable: nothing to pack")
    if not 0.1 <= spacing <= 50:
        raise DataError(f"spacing {spacing:g}: expected millimetres, 0.1 to 50")
    if len(shape) != 3 or not all(2 <= n <= 1024 for n in shape):
        raise DataError(f"shape {list(shape)}: expected three numbers of voxels, 2 to 1024")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _allowed(limit: str | int, rows: int) -> int:
    """The largest number of faulty rows."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(limit).strip())
    if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise DataError(f"max-rejects {limit!r}: expected a count, or a share of the rows as in 5%")
    return int(float(match[1]) / 100 * rows + 1e-9) if match[2] else int(match[1])


def _plain(text: str) -> str:
    """One line without tabs."""
    return " ".join(str(text).split())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _token(table: Table, schema: Schema, target: dict[str, Any], storage: str, group: str) -> str:
    """Identifies what is being packed: an interrupted packing goes on only where all of this is the same."""
    files = [
        [row.key, name, path.stat().st_size, path.stat().st_mtime_ns]
        for row in table.rows
        if isinstance(row, Row)
        for name, path in row.files.items()
    ]
    versions = [version(name) for name in PACKAGES]
    return _digest([table.sha256, files, schema.to_dict(), target, storage, group, versions])


Outcome = str | dict[str, Canonical]


def _convert(row: Row, spacing: float, shape: tuple[int, int, int]) -> Outcome:
    """A row's canonical volumes, or the reason why there are none."""
    volumes = {}
    for name, path in row.files.items():
        try:
            volumes[name] = canonical(path, spacing, shape)
        except ValueError as error:
            return f"{name}: {error}"
        except OSError as error:
            return f"{name}: {error.strerror or 'file cannot be read'}"
        except MemoryError:
            return f"{name}: too large for this machine's memory"
    return volumes


def _convert_all(
    rows: Sequence[Row | Reject], spacing: float, shape: tuple[int, int, int], workers: int
) -> Iterator[tuple[Row | Reject, Outcome]]:
    """Rows with their outcomes, in order, converted in ``workers`` processes (in this one where that is 1)."""
    if workers == 1:
        for row in rows:
            yield row, row.reason if isinstance(row, Reject) else _convert(row, spacing, shape)
        return
    context = multiprocessing.get_context("spawn")  # the caller may have threads, which fork does not survive
    pool = ProcessPoolExecutor(workers, context, initializer=_quiet)
    pending: deque[tuple[Row | Reject, Future[Outcome] | str]] = deque()
    try:
        for row in rows:
            pending.append((row, row.reason if isinstance(row, Reject) else pool.submit(_convert, row, spacing, shape)))
            if len(pending) > 4 * workers:  # bounds the results that wait in memory
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, for want of memory most likely: try fewer workers; complete shards are reused"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(row: Row | Reject, outcome: Future[Outcome] | str) -> tuple[Row | Reject, Outcome]:
    return row, outcome if isinstance(outcome, str) else outcome.result()


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
