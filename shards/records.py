"""A record of a packed data set, and the Arrow columns in which records are stored."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from shards.errors import DataError
from shards.schema import Schema, Value

BATCH_ROWS = 4096  # rows that are checked together: half a millisecond, and 250 checksums for a million records
AFFINE = pa.list_(pa.float64(), 16)


@dataclass(frozen=True)
class Record:
    """One visit of one subject.

    Attributes:
        key: ``sub-X`` or ``sub-X_ses-Y``, unique.
        subject: ``sub-X``.
        group: the subject's group, which a split does not divide; named by its first subject.
        values: scalar variable -> value, None where missing.
        checksums: volume variable -> SHA-256 of the array's bytes (C order, little endian), without missing volumes.
        shard: the tar file, relative to the folder; empty in a Zarr store.
        offsets: volume variable -> byte offset of the stored bytes in their file; in a Zarr store of version 1, the
            row of the Zarr array.
        figures: ``VARIABLE.FIGURE`` -> value, of quality control; see :mod:`shards.qc.limits`;
            ``VARIABLE.preprocess.FIGURE`` where the scan was preprocessed.
        flags: ``VARIABLE.FIGURE`` of each limit of quality control that the scans violate.
        affines: volume variable -> (4, 4), from the voxels of the common grid to mm in the space of the source, where
            the volume lies; empty in data sets of earlier versions.
        crcs: volume variable -> CRC-32C of the stored bytes: the array in a tar file, its chunks in a Zarr store. Empty
            in data sets of version 1.
        sizes: volume variable -> number of stored bytes. Empty in data sets of version 1.
        slot: number of the record's place, counted over all shards: place ``slot % per_shard`` of the shard with number
            ``slot // per_shard``, and the row of the Zarr arrays.
    """

    key: str
    subject: str
    group: str
    values: dict[str, Value]
    checksums: dict[str, str]
    shard: str
    offsets: dict[str, int]
    figures: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    affines: dict[str, list[list[float]]] = field(default_factory=dict)
    crcs: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    slot: int = 0


def record_schema(schema: Schema, volumes: Iterable[str], records: Iterable[Record]) -> pa.Schema:
    """The columns that hold ``records``; they have a column for each figure that any of them has.

    Args:
        schema: of the data set.
        volumes: names of its arrays.
        records: all of them.
    """
    figures = dict.fromkeys(name for record in records for name in record.figures)
    texts = [(name, pa.string()) for name in ("key", "subject", "group", "shard")]
    kinds = [(f"value.{v.name}", pa.string() if v.kind == "categorical" else pa.float64()) for v in schema.scalars]
    places = [
        (f"{what}.{name}", kind)
        for name in volumes
        for what, kind in (
            ("offset", pa.int64()),  # -1: no such volume
            ("size", pa.int64()),  # 0: not known, version 1
            ("crc32c", pa.uint32()),
            ("sha256", pa.binary(32)),
            ("affine", AFFINE),
        )
    ]
    numbers = [(f"figure.{name}", pa.float64()) for name in figures]
    return pa.schema([*texts, ("slot", pa.int64()), *kinds, *places, *numbers, ("flags", pa.list_(pa.string()))])


def to_columns(records: Sequence[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Some records as one batch.

    Raises:
        DataError: a value that its column cannot hold; the message names the record.
    """
    try:
        columns = [pa.array(map(_cells(field.name), records), field.type, size=len(records)) for field in schema]
    except (pa.ArrowException, ValueError, TypeError) as error:
        for record in records if len(records) > 1 else ():
            to_columns([record], schema)
        raise DataError(f"{records[0].key}: {error}") from error
    return pa.record_batch(columns, schema=schema)


def _cells(column: str) -> Callable[[Record], Any]:
    """What a column holds of a record."""
    what, _, name = column.partition(".")
    match what:
        case "value":
            return lambda r: r.values.get(name)
        case "offset":
            return lambda r: r.offsets[name] if name in r.checksums else -1
        case "size":
            return lambda r: r.sizes.get(name, 0)
        case "crc32c":
            return lambda r: r.crcs.get(name, 0)
        case "sha256":
            return lambda r: bytes.fromhex(r.checksums[name]) if name in r.checksums else None
        case "affine":
            return lambda r: list(itertools.chain(*r.affines[name])) if name in r.affines else None
        case "figure":
            return lambda r: _finite(name, r.figures.get(name))
    return operator.attrgetter(what)


def _finite(figure: str, number: float | None) -> float | None:
    if number is not None and not math.isfinite(number):
        raise ValueError(f"the figure {figure} is {number}")
    return number


def from_columns(batch: pa.RecordBatch) -> Iterator[Record]:
    """The records of a batch, in order."""
    columns = {name: batch.column(i).to_pylist() for i, name in enumerate(batch.schema.names)}
    kinds: dict[str, list[tuple[str, list[Any]]]] = {}  # what -> (name, cells)
    for column, cells in columns.items():
        what, _, name = column.partition(".")
        kinds.setdefault(what, []).append((name, cells))

    def known(what: str, row: int, missing: Any) -> dict[str, Any]:
        return {name: cells[row] for name, cells in kinds.get(what, ()) if cells[row] != missing}

    for row in range(batch.num_rows):
        sizes = known("size", row, 0)
        crcs = {name: cells[row] for name, cells in kinds.get("crc32c", ()) if name in sizes}
        yield Record(
            key=columns["key"][row],
            subject=columns["subject"][row],
            group=columns["group"][row],
            values={name: cells[row] for name, cells in kinds.get("value", ())},
            checksums={name: cell.hex() for name, cell in known("sha256", row, None).items()},
            shard=columns["shard"][row],
            offsets=known("offset", row, -1),
            figures=known("figure", row, None),
            flags=columns["flags"][row],
            affines={n: [a[0:4], a[4:8], a[8:12], a[12:16]] for n, a in known("affine", row, None).items()},
            crcs=crcs,
            sizes=sizes,
            slot=columns["slot"][row],
        )


def digest_entry(record: Record | Mapping[str, Any]) -> list[Any]:
    """What of a record identifies the data: neither its place in a file nor what quality control found."""
    content = record if isinstance(record, Mapping) else vars(record)
    parts = [content[name] for name in ("key", "subject", "values", "checksums")]
    return [*parts, content["affines"]] if content.get("affines") else parts
