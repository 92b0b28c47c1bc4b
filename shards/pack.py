"""Packing: a table of participants -> a data set of canonical volumes, in parallel; resumes after an interruption."""

import contextlib
import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from shards.box import smallest_shape
from shards.convert import brain_extents, convert, map_rows
from shards.cpus import available_cores
from shards.errors import DataError, TooManyRejects
from shards.exclusions import exclude, read_exclusions, unknown_note
from shards.files import write_bytes
from shards.index import PARTS, Index, Split
from shards.participants import Reject, Row, Table, read_table
from shards.preprocess.recipe import read_derivative
from shards.progress import Progress
from shards.pseudonyms import fingerprint, pseudonymised, read_key
from shards.qc.limits import LIMITS, verdict, violated
from shards.quantization import stored_as
from shards.schema import Schema
from shards.split import FRACTIONS, check_groups, default_fractions, draw_folds, draw_fractions, merge_groups
from shards.volumes import Canonical, Space, grid, place
from shards.writer import DatasetWriter

REJECTED = "rejected.tsv"
CROPPED = 0.02  # share of a brain outside the box from which on a row is reported
NAMED = 10  # keys in one note
PACKAGES = ("numpy", "scipy", "nibabel", "zarr", "mvhpc")


class Summary(TypedDict):
    """Counts and messages of a packing.

    Attributes:
        rows: of the source.
        packed: rows packed.
        rejected: rows rejected, which ``rejected.tsv`` lists.
        subjects: of the packed rows.
        split: part of the split ``default`` -> its subjects.
        missing: variable -> packed rows without it.
        shape: of the box, voxels.
        cropped: packed rows that lose more than 2 % of the brain to the box.
        touching: packed rows whose brain reaches an edge of the box.
        bytes: of the data set's files.
        notes: messages for the user.
    """

    rows: int
    packed: int
    rejected: int
    subjects: int
    split: dict[str, int]
    missing: dict[str, int]
    shape: list[int]
    cropped: int
    touching: int
    bytes: int
    notes: list[str]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    storage: str = "zarr",
    dtype: str = "float16",
    schema: Schema | str | Path = "default",
    spacing: float,
    shape: Sequence[int] | str,
    max_rejects: str | int = "5%",
    fractions: Sequence[float] | None = None,
    split_column: str = "",
    group: str | None = None,
    folds: int = 0,
    seed: int = 0,
    workers: int = 1,
    keep_suspect: bool = False,
    entities: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    files_root: str | Path | None = None,
    pseudonymise: str | Path | None = None,
    exclusions: str | Path | None = None,
) -> Summary:
    """Pack a BIDS folder or a CSV into ``out``.

    The result does not depend on ``workers`` or on interruptions, bit for bit: called again with the same arguments,
    an interrupted packing resumes after the last complete shard.

    Args:
        source: see :func:`shards.participants.read_table`. Of a derivative of ``shards preprocess``, volumes stay where
            the template has them, and their tissue maps are stored beside them as ``VOLUME_TISSUE``.
        out: folder without a packed data set.
        storage: ``zarr`` or ``webdataset``.
        dtype: of the stored volumes, see :data:`shards.quantization.LARGEST`.
        schema: a schema, or the name or file of one.
        spacing: mm.
        shape: voxels, or ``auto``: the smallest box (:mod:`shards.box`) that holds every brain fit to be packed.
        max_rejects: largest number of rejected rows, or share of all rows as in ``5%``.
        fractions: of subjects in the train, validation and test parts of the split ``default``; by default those of
            :func:`shards.split.default_fractions`.
        split_column: column that gives the part of each row instead; see :func:`shards.split.parse_part`. Rows without
            a value are packed and belong to no part.
        group: column of groups, whose subjects belong to one part of a split; None for none.
        folds: number of cross-validation folds to record as well; 0 for none.
        seed: of the draws of splits.
        workers: processes; 0 for one per core.
        keep_suspect: pack scans that fail quality control (:mod:`shards.qc`) too, and flag their records.
        entities, rename, files_root: see :func:`shards.participants.read_table`.
        pseudonymise: key file, for pseudonyms in place of the ids of subjects, sessions and groups; see
            :mod:`shards.pseudonyms`.
        exclusions: table of verdicts, see :func:`shards.exclusions.read_exclusions`; rows that it rejects are not
            packed, and do not count as rejected for ``max_rejects``.

    Returns:
        A summary; ``out/rejected.tsv`` lists the rejected rows with their reasons.

    Raises:
        DataError: source or arguments that cannot be used.
        TooManyRejects: ``out`` then holds ``rejected.tsv`` and no data set.
    """
    schema = schema if isinstance(schema, Schema) else Schema.load(schema)
    group = group or ""
    size = _check_arguments(schema, spacing, shape)
    cores = workers or available_cores()
    key = read_key(pseudonymise) if pseudonymise else b""
    table = read_table(source, schema, group, split_column, entities, rename, files_root or None)
    if key:
        table = pseudonymised(table, key)
    if not table.rows:
        raise DataError(f"{source}: the table has no rows")
    excluded = read_exclusions(exclusions) if exclusions else {}
    table = replace(
        table, rows=exclude(table.rows, excluded), notes=[*table.notes, *unknown_note(table.rows, excluded)]
    )
    allowed = _allowed_rejects(max_rejects, len(table.rows))
    rows = [row for row in table.rows if isinstance(row, Row)]
    groups = merge_groups([(row.subject, row.group) for row in rows])
    if split_column:  # a split that cannot be used is refused before hours of work
        _check_split_column(rows, groups, split_column)
    else:
        draw_fractions([], fractions or FRACTIONS, seed)
    derivative = read_derivative(Path(source))
    recipe, space = derivative or (None, None)
    size = size or _smallest_box(rows, schema, spacing, space, cores, keep_suspect)
    arrays: dict[str, dict[str, Any]] = {v.name: {"shape": size, **stored_as(dtype)} for v in schema.volumes}
    arrays |= {
        f"{v.name}_{label}": {"shape": size, "dtype": "|u1"}
        for v in schema.volumes
        for label in (space.maps if space else ())
    }
    target = grid(spacing, size, space)
    token = _token(table, schema, target | stored_as(dtype), storage, group, keep_suspect)
    arguments: dict[str, Any] = {
        "source": table.kind,
        "spacing": spacing,
        "shape": list(size),
        "format": storage,
        "dtype": dtype,
        "max_rejects": str(max_rejects),
        "fractions": [float(f) for f in fractions or ()],
        "group": group,
        "folds": folds,
        "seed": seed,
    }
    if keep_suspect:
        arguments["keep_suspect"] = True
    if key:
        arguments["pseudonyms"] = fingerprint(key)
    arguments |= {name: dict(pairs) for name, pairs in (("entities", entities), ("rename", rename)) if pairs}
    if split_column:
        arguments |= {"fractions": [], "split_column": split_column}
    writer = DatasetWriter(out, storage, "volumes", schema, arrays, target, group=group, token=token)
    with contextlib.closing(writer):
        _convert_and_write(writer, table.rows, groups, spacing, size, space, cores, keep_suspect, dtype)
        packed = [n for n in writer.notes if "sources" in n]
        rejects = [n for n in writer.notes if "reason" in n]
        listing = _listing(rejects)
        faulty = [n for n in rejects if n["reason"] != excluded.get(n["key"])]
        if len(faulty) > allowed or not packed:
            listed = writer.folder / REJECTED
            write_bytes(listed, listing)
            count = f"{len(faulty)} of {len(table.rows)} rows are faulty ({max_rejects} allowed)"
            remedy = "Correct them, or raise the limit: complete shards are then reused"
            if not packed:
                count, remedy = f"none of {len(table.rows)} rows can be packed", "Correct them"
            first = (faulty or rejects)[0]
            raise TooManyRejects(
                f"{count}, first {_one_line(first['key'])}: {_one_line(first['reason'])}; all are listed in "
                f"{listed}. {remedy}"
            )
        if split_column:
            part = {row.key: row.part for row in rows if row.part}
            assignment = {r.key: part[r.key] for r in writer.records if r.key in part}
            splits = {"default": Split("column", 0, [], [], group, assignment)}
        else:
            shares = fractions or default_fractions(len({r.subject for r in writer.records}))
            splits = {"default": draw_fractions(writer.records, shares, seed, group)}
        if folds:
            splits |= draw_folds(writer.records, folds, seed, group)
        provenance = {
            "software": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "arguments": arguments,
            "source_sha256": _digest([table.sha256, [[n["key"], n["sources"]] for n in packed]]),
            "rows": len(table.rows),
            "rejected": len(rejects),
        }
        if excluded:
            provenance["excluded"] = len(rejects) - len(faulty)
        if recipe is not None:
            provenance["recipe"] = recipe.to_dict()
        index = writer.finish(splits, provenance, files={REJECTED: listing})
    if recipe is not None and spacing < recipe.spacing:
        table.notes.append(
            f"the derivative has voxels of {recipe.spacing:g} mm, coarser than {spacing:g} mm: preprocess with "
            f"--spacing {spacing:g}"
        )
    return _summary(index, table, packed, len(rejects))


def _check_split_column(rows: Sequence[Row], groups: Mapping[str, str], column: str) -> None:
    """Refuse a split column without any value, or one that divides a group."""
    if rows and not any(row.part for row in rows):
        raise DataError(f"column {column!r} has no value in any row; expected train, validation or test")
    check_groups([(row.subject, groups[row.subject], row.part) for row in rows], column)


def _convert_and_write(
    writer: DatasetWriter,
    rows: Sequence[Row | Reject],
    groups: Mapping[str, str],
    spacing: float,
    shape: tuple[int, int, int],
    space: Space | None,
    workers: int,
    keep_suspect: bool,
    dtype: str,
) -> None:
    """Convert and write the rows that the writer has no note of yet; each row leaves one note."""
    done = len(writer.notes)
    with Progress("packing", len(rows), "volume", initial=done) as bar:
        for row, outcome in map_rows(
            partial(convert, spacing=spacing, shape=shape, space=space, dtype=dtype), rows[done:], workers
        ):
            suspect, flags = ("", []) if isinstance(outcome, str) else _judge(outcome, writer.schema)
            if isinstance(outcome, str) or isinstance(row, Reject):
                writer.note({"line": row.line, "key": row.key, "reason": outcome})
            elif suspect and not keep_suspect:
                writer.note({"line": row.line, "key": row.key, "reason": suspect})
            else:
                hashes = {name: volume.sha256 for name, volume in outcome.items()}
                note = {"key": row.key, "sources": hashes, "cropped": max(v.cropped for v in outcome.values())}
                writer.note(note | {"touches": sorted({side for v in outcome.values() for side in v.touches})})
                voxels: dict[str, Any] = {name: volume.voxels for name, volume in outcome.items()}
                for name, volume in outcome.items():
                    voxels |= {f"{name}_{label}": values for label, values in volume.maps.items()}
                figures = {f"{name}.{f}": x for name, volume in outcome.items() for f, x in volume.figures.items()}
                affines = {name: place(writer.grid, volume.origin) for name, volume in outcome.items()}
                writer.add(row.key, row.subject, row.values, voxels, groups[row.subject], figures, flags, affines)
            bar.update()


def _judge(volumes: Mapping[str, Canonical], schema: Schema) -> tuple[str, list[str]]:
    """Why a row's volumes should be rejected, '' for not at all; and ``VARIABLE.FIGURE`` of each violated limit."""
    reasons, flags = [], []
    for name, volume in volumes.items():
        figures, suffix = volume.figures, schema[name].suffix
        reasons += [f"{name}: {'; '.join(words)}" for words in [verdict(figures, suffix)] if words]
        limits = violated(figures, suffix) or violated(figures, suffix, rejects=False)
        flags += [f"{name}.{flag}" for flag in (*(limit.figure for limit in limits), *volume.flags)]
    return "; ".join(reasons), flags


def _listing(rejects: Sequence[dict[str, Any]]) -> bytes:
    """The content of ``rejected.tsv``."""
    lines = [f"{n['line']}\t{_one_line(n['key'])}\t{_one_line(n['reason'])}\n" for n in rejects]
    return "".join(["line\tkey\treason\n", *lines]).encode()


def _summary(index: Index, table: Table, packed: Sequence[dict[str, Any]], rejected: int) -> Summary:
    notes = list(table.notes)
    cropped = [n for n in packed if n["cropped"] > CROPPED]
    if cropped:
        worst = max(cropped, key=lambda n: n["cropped"])
        notes.append(
            f"{len(cropped)} volumes lose more than {CROPPED:.0%} of their signal to the box "
            f"({worst['key']} {worst['cropped']:.0%}): choose a larger --shape, or --shape auto"
        )
    touching = [n for n in packed if n["touches"]]
    if touching:
        sides = Counter(side for n in touching for side in n["touches"])
        more = f" and {len(touching) - NAMED} more" if len(touching) > NAMED else ""
        notes.append(
            f"{len(touching)} of {len(packed)} brains reach the edge of the box "
            f"({', '.join(f'{side} {count}' for side, count in sides.most_common())}): "
            f"{', '.join(n['key'] for n in touching[:NAMED])}{more}; --shape auto finds a box that holds all"
        )
    flagged = [r for r in index.records if r.flags]
    if flagged:
        notes.append(
            f"quality control flags {len(flagged)} of the packed rows (first {flagged[0].key}: "
            f"{', '.join(flagged[0].flags)}): see shards inspect"
        )
    records, schema = index.records, index.schema
    assignment = index.split().assignment
    parts = {part: len({r.subject for r in records if assignment.get(r.key) == part}) for part in PARTS}
    if not index.provenance["arguments"].get("split_column") and not index.provenance["arguments"]["fractions"]:
        share = parts["validation"] / max(1, sum(parts.values()))
        if share > 2 * FRACTIONS[1]:
            notes.append(
                f"{parts['validation']} of {sum(parts.values())} subjects are for validation, since 1 % would be too "
                "few to choose a step and to calibrate with; --split draws other fractions"
            )
    without = [r.key for r in records if r.key not in assignment]
    if without:
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        notes.append(
            f"{len(without)} rows have no value in the split column and belong to no part: "
            f"{', '.join(without[:NAMED])}{more}"
        )
    return Summary(
        rows=len(table.rows),
        packed=len(packed),
        rejected=rejected,
        subjects=len({r.subject for r in records}),
        split=parts,
        missing={
            **{v.name: sum(v.name not in r.checksums for r in records) for v in schema.volumes},
            **{v.name: sum(r.values[v.name] is None for r in records) for v in schema.scalars},
        },
        shape=list(index.grid["shape"]),
        cropped=len(cropped),
        touching=len(touching),
        bytes=sum(f["bytes"] for f in index.files.values()),
        notes=notes,
    )


def _smallest_box(
    rows: Sequence[Row], schema: Schema, spacing: float, space: Space | None, workers: int, keep_suspect: bool
) -> tuple[int, int, int]:
    """The smallest box that holds the brains of all rows that will be packed."""
    extents: list[NDArray[np.int64]] = []
    with Progress("box", len(rows), "volume") as bar:
        for _, outcome in map_rows(partial(brain_extents, spacing=spacing, space=space), rows, workers):
            for name, (bounds, figures) in ({} if isinstance(outcome, str) else outcome).items():
                if keep_suspect or not verdict(figures, schema[name].suffix):
                    extents.append(bounds)
            bar.update()
    if not extents:
        raise DataError("--shape auto: no scan can be packed; pack with a given --shape to see why")
    return smallest_shape(extents)


def _check_arguments(schema: Schema, spacing: float, shape: Sequence[int] | str) -> tuple[int, int, int] | None:
    """The shape; None for ``auto``."""
    if not schema.volumes:
        raise DataError("the schema has no volume variable: nothing to pack")
    if not 0.1 <= spacing <= 50:
        raise DataError(f"spacing {spacing:g}: expected millimetres, 0.1 to 50")
    if shape == "auto" or list(shape) == ["auto"]:
        return None
    try:
        height, width, depth = (int(n) for n in shape)
        if not all(2 <= n <= 1024 for n in (height, width, depth)):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"shape {shape}: expected auto, or three numbers of voxels, 2 to 1024") from None
    return height, width, depth


def _allowed_rejects(limit: str | int, rows: int) -> int:
    """The largest number of rejected rows."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(limit).strip())
    if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise DataError(f"max-rejects {limit!r}: expected a number of rows, or a share of them as in 5%")
    return int(float(match[1]) / 100 * rows + 1e-9) if match[2] else int(match[1])


def _one_line(text: str) -> str:
    """One line without tabs."""
    return " ".join(str(text).split())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _token(table: Table, schema: Schema, target: dict[str, Any], storage: str, group: str, keep_suspect: bool) -> str:
    """Hash of everything that decides the shards; an interrupted packing resumes only where it is the same."""
    files = [
        [row.key, row.values, name, path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for row in table.rows
        if isinstance(row, Row)
        for name, path in row.files.items()
    ]
    versions = [version(name) for name in PACKAGES]
    limits = [[limit.figure, str(limit.low), str(limit.high)] for limit in LIMITS]
    return _digest([table.sha256, files, schema.to_dict(), target, storage, group, versions, keep_suspect, limits])
