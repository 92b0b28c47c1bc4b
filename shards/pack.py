"""Packing: a table of participants -> a data set of canonical volumes; in parallel, in parts, and only what changed."""

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from shards.errors import FULL, DataError, TooManyRejects, counted
from shards.files import locked_folder, write_bytes
from shards.index import Split, own_files
from shards.index_copy import copy_is_current, write_copy
from shards.packing.make import Job, Shard, close_old, make_shard
from shards.packing.merge import clean, collect, draw_again, put, write_dataset
from shards.packing.options import Options, check_options
from shards.packing.parts import read_parts, record_part
from shards.packing.places import digest
from shards.packing.plan import Task
from shards.packing.pool import map_tasks
from shards.packing.prepare import Packing, check_folder, prepare, read_source
from shards.packing.rejected import REJECTED, write_rejected
from shards.packing.summary import Summary, summarize
from shards.participant_rows import Reject
from shards.progress import Progress
from shards.split import default_fractions, draw_folds, draw_fractions

PACKAGES = ("numpy", "scipy", "nibabel", "numcodecs", "mvhpc")
Map = Callable[[Job, Sequence[Task]], Iterable[Shard]]


class PartSummary(TypedDict):
    """What a part of a packing has done.

    Attributes:
        shards: of the part.
        made: of these, made now; the others were complete.
        converted: rows converted now.
        rejected: of these, rejected.
    """

    shards: int
    made: int
    converted: int
    rejected: int


def pack(
    source: str | Path,
    out: str | Path,
    *,
    spacing: float,
    shape: Sequence[int] | str,
    map_shards: Map | None = None,
    on_rows: Callable[[int], None] | None = None,
    **options: Any,
) -> Summary:
    """Pack a BIDS folder or a CSV into ``out``.

    A shard is one unit of work: a process converts its rows and writes it whole. The result does not depend on
    ``workers``, on parts (:func:`pack_part`) or on interruptions, bit for bit: called again with the same arguments, an
    interrupted packing resumes after the complete shards.

    Called again for a finished data set, it converts the rows that are new or whose files have changed, and no others;
    the old data set can be read until the new index replaces its own in one step.

    Args:
        source: see :func:`shards.participants.read_table`. Of a derivative of ``shards preprocess``, volumes stay where
            the template has them, and their tissue maps are stored beside them as ``VOLUME_TISSUE``.
        out: folder; new, or of a data set with the same grid, volumes and format.
        spacing: mm.
        shape: voxels, or ``auto``: the smallest box (:mod:`shards.box`) that holds every brain fit to be packed; that
            of ``out`` where it holds a data set.
        map_shards: runs :func:`shards.packing.make.make_shard` on all tasks; processes of this machine by default.
        on_rows: called with the number of rows of each shard that is made.
        options: further keyword arguments:

            * storage: ``zarr`` (default) or ``webdataset``.
            * dtype: of the stored volumes, see :data:`shards.quantization.LARGEST`; ``float16`` by default.
            * schema: a schema, or the name or file of one.
            * max_rejects: largest number of rejected rows, or share of all rows as in ``5%`` (default).
            * fractions: of subjects in the train, validation and test parts of the split ``default``; by default those
              of :func:`shards.split.default_fractions`.
            * split_column: column that gives the part of each row instead; see :func:`shards.split.parse_part`. Rows
              without a value are packed and belong to no part.
            * group: column of groups, whose subjects belong to one part of a split; None for none.
            * folds: number of cross-validation folds to record as well; 0 for none.
            * seed: of the draws of splits; 0 by default.
            * workers: processes, 1 by default; 0 for one per core.
            * keep_suspect: pack scans that fail quality control (:mod:`shards.qc`) too, and flag their records.
            * entities, rename, files_root: see :func:`shards.participants.read_table`.
            * pseudonymise: key file, for pseudonyms in place of the ids of subjects, sessions and groups; see
              :mod:`shards.pseudonyms`.
            * exclusions: table of verdicts, see :func:`shards.exclusions.read_exclusions`; rows that it rejects are not
              packed, and do not count as rejected for ``max_rejects``.

    Returns:
        A summary; ``out/rejected.tsv`` lists the rejected rows with their reasons.

    Raises:
        DataError: source or arguments that cannot be used, or a full disk.
        TooManyRejects: the data set is not made, or stays as it was. ``rejected.tsv`` is in ``out``, or in its folder
            ``.partial`` where ``out`` holds a data set.
    """
    checked, out = check_options(spacing=spacing, shape=shape, **options), Path(out)
    check_folder(Path(source), out)
    found = read_source(Path(source), checked)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):
        packing = prepare(found, out, checked)
        clean(out, packing.old, [name for shard in packing.journal.shards.values() for name in shard.files])
        if packing.old is not None and packing.done:
            if not copy_is_current(out, own := own_files(packing.old)):  # killed, or packed by an earlier version
                write_copy(out, own)
            summary = summarize(packing.old, found.table, packing.plan.kept, 0)
        else:
            made = _make(packing, packing.plan.tasks, checked, map_shards, on_rows)
            summary = _finish(packing, checked, sum(_converted(task) for task in made))
        packing.journal.remove()
    return summary


def pack_part(
    source: str | Path, out: str | Path, part: str, *, spacing: float, shape: Sequence[int] | str, **options: Any
) -> PartSummary:
    """Make the shards of one part of a packing; parts may run at the same time, on machines that share ``out``.

    :func:`merge` makes a data set of all parts; :func:`pack` with the same arguments makes missing shards too.

    Args:
        source, out: see :func:`pack`.
        part: ``I/N``, the I-th of N parts, from 1.
        spacing, shape, options: of :func:`pack`.

    Raises:
        DataError: as :func:`pack`, or no part of that form.
    """
    number, count = _parse_part(part)
    checked, out = check_options(spacing=spacing, shape=shape, **options), Path(out)
    check_folder(Path(source), out)
    found = read_source(Path(source), checked)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out, f"{number}-of-{count}"):
        packing = prepare(found, out, checked, (number, count))
        record_part(out, (number, count), Path(source), {**options, "spacing": spacing, "shape": shape}, checked.schema)
        tasks = [task for task in packing.plan.tasks if task.number % count == number - 1]
        made = _make(packing, tasks, checked)
        places = [place for task in made for place in packing.journal.shards[task.number].places]
    return PartSummary(
        shards=len(tasks),
        made=len(made),
        converted=sum(map(_converted, made)),
        rejected=sum(bool(place.reason) for place in places),
    )


def merge(out: str | Path) -> Summary:
    """Make a data set of the shards of all parts (:func:`pack_part`), with their arguments. No row is converted.

    Returns:
        As :func:`pack`.

    Raises:
        DataError: as :func:`pack`; parts that differ in their arguments, or that are not complete.
        TooManyRejects: as :func:`pack`.
    """
    out = Path(out)
    count, source, options = read_parts(out)

    def refuse(job: Job, missing: Sequence[Task]) -> Iterable[Shard]:
        if missing:
            parts = ", ".join(f"{number + 1}/{count}" for number in sorted({task.number % count for task in missing}))
            raise DataError(
                f"{out}: {len(missing):,} shards of {parts} are missing, or their sources have changed: run these "
                "parts again, which keep their complete shards, then merge again"
            )
        return ()

    return pack(source, out, map_shards=refuse, **options)


def _parse_part(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"part {part!r}: expected I/N, the I-th of N parts, as 1/4")
    return int(match[1]), int(match[2])


def _converted(task: Task) -> int:
    """Rows of a shard that are not taken from the old data set."""
    return sum(item.before is None for item in task.items)


def _make(
    packing: Packing,
    tasks: Sequence[Task],
    options: Options,
    map_shards: Map | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[Task]:
    """Make the shards that are not complete; returns their tasks."""
    missing = packing.missing(tasks)
    rows, done = sum(len(task.items) for task in tasks), sum(len(task.items) for task in missing)
    run = map_shards or (lambda job, tasks: map_tasks(partial(make_shard, job=job), tasks, options.workers))
    try:
        with Progress("packing", rows, "volume", initial=rows - done) as bar:
            if missing and not map_shards:  # the first shard may take a while
                where = counted(min(options.workers, len(missing)), "process", "processes")
                bar.say(f"packing {counted(done, 'row')} into {counted(len(missing), 'shard')}, in {where}")
            for shard in run(packing.job, missing):
                packing.journal.add(shard)
                bar.update(len(shard.places))
                if on_rows:
                    on_rows(len(shard.places))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{packing.job.folder}: {error.strerror}; free some space and run the same command again, which takes the "
            f"{len(packing.journal.shards)} complete shards"
        ) from error
    finally:
        close_old()
    return missing


def _finish(packing: Packing, options: Options, converted: int) -> Summary:
    """Write the data set."""
    source, job, table = packing.source, packing.job, packing.source.table
    shards = [packing.journal.shards[task.number] for task in packing.plan.tasks]
    kept = packing.plan.kept
    records, places = collect(source.rows, source.groups, job.schema, shards, kept, packing.old)
    listing = write_rejected(table.rows, places)
    _check_rejects(packing, options, len(records), listing)
    if options.split_column:
        part = {row.key: row.part for row in source.rows if row.part}
        assignment = {r.key: part[r.key] for r in records if r.key in part}
        splits = {"default": Split("column", 0, [], [], options.group, assignment)}
    else:
        shares = options.fractions or default_fractions(len({r.subject for r in records}))
        splits = {"default": draw_fractions(records, shares, options.seed, options.group)}
    if options.folds:
        splits |= draw_folds(records, options.folds, options.seed, options.group)
    if packing.old is not None:
        splits |= draw_again(packing.old, records, splits, options.group)
    provenance: dict[str, Any] = {
        "software": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "arguments": options.arguments(table.kind, job.grid["shape"]),
        "source_sha256": digest([table.sha256, [[p.key, p.content] for p in places if not p.reason]]),
        "rows": len(table.rows),
        "rejected": len(table.rows) - len(records),
        "packing": {"state": packing.state, "parameters": job.parameters},
    }
    if options.exclusions:
        provenance["excluded"] = sum(isinstance(row, Reject) and options.is_exclusion(row) for row in table.rows)
    if source.recipe is not None:
        provenance["recipe"] = source.recipe.to_dict()
        if options.spacing < source.recipe.spacing:
            table.notes.append(
                f"the derivative has voxels of {source.recipe.spacing:g} mm, coarser than {options.spacing:g} mm: "
                f"preprocess with --spacing {options.spacing:g}"
            )
    files = {REJECTED: listing}
    index = write_dataset(packing.journal, job, packing.old, records, places, splits, options.group, provenance, files)
    return summarize(index, table, places, converted)


def _check_rejects(packing: Packing, options: Options, packed: int, listing: bytes) -> None:
    """Refuse a data set with too many rejected rows, or without any other."""
    table = packing.source.table
    excluded = {row.line for row in table.rows if isinstance(row, Reject) and options.is_exclusion(row)}
    lines = listing.decode().splitlines()[1:]
    faulty = [line for line in lines if int(line.split("\t")[0]) not in excluded]
    rows = len(table.rows)
    if packed and len(faulty) <= options.allowed_rejects(rows):
        return
    listed = (packing.job.folder if packing.old is None else packing.job.partial) / REJECTED
    if packing.old is None:
        put(packing.journal, REJECTED, listing)
    else:
        write_bytes(listed, listing)
    _, key, reason = (faulty or lines)[0].split("\t")
    count = f"{len(faulty)} of {rows} rows are faulty ({options.max_rejects} allowed)"
    limit = f"`shards pack --max-rejects {len(faulty)}`, or `mvhpc run pack.max_rejects={len(faulty)}`"
    remedy = f"Correct them, or raise the limit ({limit}): complete shards are then reused"
    if not packed:
        count, remedy = f"none of {rows} rows can be packed", "Correct them"
    raise TooManyRejects(f"{count}, first {key}: {reason}; all are listed in {listed}. {remedy}")
