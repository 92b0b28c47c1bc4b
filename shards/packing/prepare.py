"""From the options of a packing to the shards that have to be made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shards.convert import CONVERSION
from shards.errors import DataError
from shards.exclusions import exclude, unknown_note
from shards.files import check_output, sha256
from shards.header import NAME
from shards.index import Index, Record
from shards.packing.box import find_shape
from shards.packing.journal import Journal
from shards.packing.make import Job
from shards.packing.merge import old_places
from shards.packing.options import Options
from shards.packing.places import Place, digest, find_unchanged, stamp, stored_values
from shards.packing.plan import Plan, Task, make_plan
from shards.packing.rejected import with_reasons
from shards.participant_rows import Row, Table
from shards.participants import read_table
from shards.preprocess.recipe import DESCRIPTION, Recipe, read_derivative
from shards.pseudonyms import pseudonymised
from shards.qc.limits import LIMITS
from shards.quantization import stored_as
from shards.shard_writer import records_per_shard
from shards.split import check_folds, check_groups, merge_groups
from shards.volumes import Space, grid


@dataclass(frozen=True)
class Source:
    """A table, ready to be packed.

    Attributes:
        table: as it was read.
        rows: of the table that can be read.
        groups: subject -> its group.
        recipe, space: of a derivative of ``shards preprocess``; else None.
    """

    table: Table
    rows: list[Row]
    groups: dict[str, str]
    recipe: Recipe | None
    space: Space | None


def check_folder(source: Path, out: Path) -> None:
    """Refuse a folder that holds a source, whose files a data set would replace.

    Raises:
        DataError: ``out`` is ``source``, another BIDS folder, or a file.
    """
    check_output(source, out)
    for name in (DESCRIPTION, "participants.tsv"):
        if (out / name).exists():
            raise DataError(f"{out} is a BIDS folder: it holds {name}; choose another folder for the data set")


def read_source(path: Path, options: Options) -> Source:
    """Read the table of a source.

    Raises:
        DataError: a source, a number of folds, or a column of groups or of a split, that cannot be used.
    """
    choice = (options.group, options.split_column, options.entities, options.rename, options.files_root)
    table = read_table(path, options.schema, *choice)
    recipe, space = read_derivative(path) or (None, None)
    if recipe:
        table = with_reasons(table, path)
    if options.key:
        table = pseudonymised(table, options.key)
    notes = unknown_note(table.rows, options.exclusions, bool(options.key))
    table = replace(table, rows=exclude(table.rows, options.exclusions), notes=[*table.notes, *notes])
    if not table.rows:
        raise DataError(f"{path}: the table has no rows")
    rows = [row for row in table.rows if isinstance(row, Row)]
    groups = merge_groups([(row.subject, row.group) for row in rows])
    if options.folds:  # a split that cannot be used is refused before hours of work
        check_folds(options.folds, len(set(groups.values())))
    if options.split_column:
        if rows and not any(row.part for row in rows):
            raise DataError(
                f"column {options.split_column!r} has no value in any row; expected train, validation or test"
            )
        check_groups([(row.subject, groups[row.subject], row.part) for row in rows], options.split_column)
    return Source(table, rows, groups, recipe, space)


@dataclass(frozen=True)
class Packing:
    """A packing, before its shards are made.

    Attributes:
        source: what is packed.
        job: what all shards have in common.
        plan: the shards.
        journal: of complete shards.
        old: the index of the data set that is there; None for none.
        state: hash of all that decides the data set.
    """

    source: Source
    job: Job
    plan: Plan
    journal: Journal
    old: Index | None
    state: str

    @property
    def done(self) -> bool:
        """Whether the data set that is there is the one that would be made."""
        same = self.old is not None and self.old.provenance["packing"]["state"] == self.state
        return same and not self.plan.tasks

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Those tasks whose shards are not complete."""
        return [task for task in tasks if task.number not in self.journal.shards]


def prepare(source: Source, out: Path, options: Options, part: tuple[int, int] | None = None) -> Packing:
    """Find out what is to be done; the folder is locked.

    Args:
        source: what is packed.
        out: folder of the data set.
        options: of the packing.
        part: (I, N), to make the shards of the I-th of N parts; None for all.

    Raises:
        DataError: ``out`` holds another data set, or no scan is fit to be packed where the box is to be found.
    """
    old, places = _old(out, options)
    space, schema = source.space, options.schema
    limits = [[limit.figure, str(limit.low), str(limit.high)] for limit in LIMITS]
    volumes = [[v.name, v.suffix] for v in schema.volumes]
    conversion = [CONVERSION, options.spacing, options.dtype, str(space), volumes, limits, options.keep_suspect]
    shape = options.shape or (tuple(old.grid["shape"]) if old is not None else None)
    if shape is None:
        shape = find_shape(
            source.rows,
            {row.key: stamp(row, "", space) for row in source.rows},
            Journal.folder_of(out),
            schema,
            options.spacing,
            space,
            options.keep_suspect,
            options.workers,
            first=(part[0] - 1) / part[1] if part else 0.0,
        )
    target = grid(options.spacing, shape, space)
    number_format = stored_as(options.dtype)
    arrays: dict[str, dict[str, Any]] = {v.name: {"shape": list(shape), **number_format} for v in schema.volumes}
    arrays |= {
        f"{v.name}_{label}": {"shape": list(shape), "dtype": "|u1"}
        for v in schema.volumes
        for label in (space.maps if space else ())
    }
    parameters = digest([conversion, target])
    job = Job(
        folder=out,
        old=sha256(out / NAME) if old is not None else "",
        partial=Journal.folder_of(out),
        storage=options.storage,
        dtype=options.dtype,
        schema=schema,
        arrays=arrays,
        per_shard=records_per_shard(arrays),
        grid=target,
        space=space,
        keep_suspect=options.keep_suspect,
        parameters=parameters,
    )
    if old is not None:
        _check_same(out, old, job)
    stamps = {row.key: stamp(row, parameters, space) for row in source.rows}
    unchanged_of = partial(
        find_unchanged, source.rows, stamps, parameters=parameters, space=space, workers=options.workers
    )
    same = old is not None and old.provenance["packing"]["parameters"] == parameters
    unchanged = unchanged_of(places if same else [])
    rewritten = _other_values(source.rows, old.records if old is not None else [], job)
    plan = make_plan(source.rows, job.per_shard, places, unchanged, rewritten)
    plan = Plan([replace(p, stamp=stamps[p.key]) for p in plan.kept], plan.tasks)
    name = f"{part[0]}-of-{part[1]}" if part else ""
    journal = Journal(out, name, digest([parameters, options.storage, schema.to_dict(), job.per_shard]))
    _forget_outdated(journal, plan.tasks, source.rows, job, unchanged_of)
    arguments = options.arguments(source.table.kind, shape)
    state = digest([source.table.sha256, arguments, schema.to_dict(), parameters, _rows(source, stamps)])
    return Packing(source, job, plan, journal, old, state)


def _rows(source: Source, stamps: Mapping[str, str]) -> list[Any]:
    """All that a data set has of the rows of a table."""
    return [
        [row.key, row.subject, source.groups[row.subject], row.part, row.values, stamps[row.key]]
        if isinstance(row, Row)
        else [row.line, row.key, row.reason]
        for row in source.table.rows
    ]


def _old(out: Path, options: Options) -> tuple[Index | None, list[Place]]:
    """The index and the places of the data set that is there."""
    if not (out / NAME).exists():
        return None, []
    index = Index.load(out)
    places = old_places(out, index)
    if places is None:
        raise DataError(f"{out} already holds a packed data set; remove it or choose another folder")
    return index, places


def _check_same(out: Path, old: Index, job: Job) -> None:
    """Refuse a data set that cannot take other shards of this packing."""
    ours = {"format": job.storage, "grid": job.grid, "volumes": job.arrays}
    theirs = {"format": old.storage, "grid": old.grid, "volumes": old.arrays}
    for name, value in ours.items():
        if theirs[name] != value:
            raise DataError(
                f"{out} already holds a packed data set with another {name}: {_short(theirs[name])}, not "
                f"{_short(value)}; choose another folder, or remove it"
            )


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "spacing" in value:
        return f"{' x '.join(map(str, value['shape']))} voxels of {value['spacing']:g} mm"
    return ", ".join(value)


def _other_values(rows: Sequence[Row], records: Iterable[Record], job: Job) -> set[str]:
    """The keys of the rows that have other values than the records in the shards, which hold them in tar files only."""
    if job.storage != "webdataset":
        return set()
    known = {row.key: (row.subject, stored_values(row, job.schema)) for row in rows}
    return {r.key for r in records if r.key in known and (r.subject, r.values) != known[r.key]}


def _forget_outdated(
    journal: Journal,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    job: Job,
    unchanged_of: Callable[[list[Place]], set[str]],
) -> None:
    """Keep those shards of the journals that are what a task would make."""
    wanted = {task.number: [(item.place, item.row.key) for item in task.items] for task in tasks}
    complete = {
        number: shard
        for number, shard in journal.shards.items()
        if wanted.get(number) == [(place.place, place.key) for place in shard.places] and journal.has_files(shard)
    }
    places = [place for shard in complete.values() for place in shard.places]
    unchanged = unchanged_of(places)
    unchanged -= _other_values(rows, (record for shard in complete.values() for record in shard.records), job)
    for number in [*journal.shards]:
        shard = complete.get(number)
        if shard is None or not all(place.key in unchanged for place in shard.places):
            del journal.shards[number]
