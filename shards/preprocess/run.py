"""Preprocessing of a whole source: subject by subject, in parallel, resumable and incremental."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from shards.cpus import worker_count
from shards.errors import DataError, TooManyRejects, counted
from shards.files import check_output, lock_file, sha256, write_bytes, write_text
from shards.participant_rows import PATH, Reject, Row
from shards.participants import read_table
from shards.preprocess.derivative import clear_others, versions
from shards.preprocess.pool import map_processes
from shards.preprocess.recipe import (
    DESCRIPTION,
    LOCK,
    MNI,
    Recipe,
    derived_suffix,
    describe,
    differences,
    read_derivative,
)
from shards.preprocess.registration import load_template
from shards.preprocess.requirements import check_packages, check_weights, find_device
from shards.preprocess.subject import Job, Outcome
from shards.preprocess.tables import carried_tables
from shards.progress import Progress
from shards.schema import Schema

REJECTED = "rejected.tsv"
Map = Callable[[Job, Sequence[list[Row]]], Iterable[list[Outcome]]]


class Summary(TypedDict):
    """Counts of a preprocessing.

    Attributes:
        scans: of the source.
        processed: scans that were processed.
        unchanged: scans whose results were there.
        rejected: scans without a result, which ``rejected.tsv`` lists.
        notes: messages for the user.
    """

    scans: int
    processed: int
    unchanged: int
    rejected: int
    notes: list[str]


def preprocess(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    template: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    suffix: str = "T1w",
    keep_suspect: bool = False,
    map_subjects: Map | None = None,
    on_scans: Callable[[int], None] | None = None,
    entities: Mapping[str, str] | None = None,
    files_root: str | Path | None = None,
) -> Summary:
    """Preprocess the scans of a BIDS folder or a CSV into a BIDS derivative.

    Called again, it processes only what has changed: a scan is skipped where its results are complete and its file,
    the recipe and, of a follow-up, the subject's first scan are the same. Results of scans that the source no longer
    has are removed. Results do not depend on ``workers`` or on interruptions. A complete derivative of another recipe
    is left alone.

    Args:
        source: a BIDS folder, or a CSV with the columns participant_id and path (session_id optional; for brain masks
            a column mask). In a BIDS folder, masks are the files ``*_mask.nii.gz`` beside the scans.
        out: folder of the derivative.
        recipe: the steps.
        template: a brain-extracted volume in place of the MNI152 template.
        weights: the zip file of HD-BET's weights, whose SHA-256 is ``recipe.weights``.
        device: ``auto``, ``cpu`` or ``cuda``, for the network that extracts brains.
        workers: processes; 0 for one per core.
        suffix: of the scans in a BIDS folder.
        keep_suspect: keep scans that fail quality control (:mod:`shards.qc`) too, and flag them in their sidecars.
        map_subjects: runs :class:`shards.preprocess.subject.Worker` on all subjects; processes of this machine by
            default.
        on_scans: called with the number of results of each subject that are new.
        entities, files_root: see :func:`shards.participants.read_table`.

    Returns:
        A summary; ``out/rejected.tsv`` lists the scans without a result with the reasons.

    Raises:
        DataError: a source, folder or argument that cannot be used, a complete derivative of another recipe, or a
            missing package or file of weights.
        TooManyRejects: no scan can be processed; ``out/rejected.tsv`` is written.
    """
    out = Path(out)
    recipe = with_template(recipe, template)
    check_packages(recipe)
    weights = Path(weights) if weights is not None else None
    check_weights(recipe, weights)
    job = Job(
        out=out.absolute(),
        recipe=recipe,
        suffix=suffix,
        template=Path(template).absolute() if template is not None else None,
        weights=weights.absolute() if weights is not None else None,
        device=find_device(device) if "brain" in recipe.steps and recipe.brain not in {"mask", "none"} else "cpu",
        keep_suspect=keep_suspect,
    )
    table = read_table(source, _schema(suffix, recipe), entities=entities, files_root=files_root or None)
    if not table.rows:
        raise DataError(f"{source}: the table has no rows")
    _check_folder(Path(source), out, recipe, suffix)
    visits = [row for row in table.rows if isinstance(row, Row)]
    subjects: dict[str, list[Row]] = {}
    for row in visits:
        subjects.setdefault(row.subject, []).append(row)
    workers = min(worker_count(workers), max(1, len(subjects)))
    _announce(len(visits), len(subjects), recipe, 0 if map_subjects else workers)
    tables = carried_tables(Path(source), table.kind, visits)
    centre = load_template(job.template, recipe).centre if "registration" in recipe.steps else None
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(out / LOCK, patience=0):
            (out / DESCRIPTION).unlink(missing_ok=True)  # it marks a complete derivative
            run = map_subjects or (lambda job, all_rows: map_processes(job, all_rows, workers))
            outcomes: dict[str, Outcome] = {}
            with Progress("preprocessing", len(visits), "scan") as bar:
                for batch in run(job, list(subjects.values())):
                    outcomes |= {outcome.key: outcome for outcome in batch}
                    bar.update(len(batch))
                    if on_scans and (new := sum(not (o.unchanged or o.reason) for o in batch)):
                        on_scans(new)
            rejects = list(_rejects(table.rows, outcomes))
            lines = ["\t".join(" ".join(str(cell).split()) for cell in row) + "\n" for row in rejects]
            write_bytes(out / REJECTED, "".join(["line\tkey\treason\n", *lines]).encode())
            done = [outcome for outcome in outcomes.values() if not outcome.reason]
            if not done:
                line, key, reason = rejects[0]
                raise TooManyRejects(
                    f"no scan could be processed; {key or f'line {line}'}: {reason}; see {out / REJECTED}"
                )
            removed = clear_others(out, {outcome.key for outcome in done})
            if removed:
                table.notes.append(f"old results of {removed} scans, which the source no longer gives, were removed")
            for name, content in tables.items():
                if (out / name).parent.is_dir():
                    write_bytes(out / name, content)
            description = describe(recipe, versions()["mvhpc"], centre, suffix)
            write_text(out / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    except BlockingIOError:
        raise DataError(f"{out} is being written by another process") from None
    return Summary(
        scans=len(table.rows),
        processed=sum(not outcome.unchanged for outcome in done),
        unchanged=sum(outcome.unchanged for outcome in done),
        rejected=len(rejects),
        notes=table.notes,
    )


def other_recipe(out: Path, recipe: Recipe) -> str:
    """How the recipe of a complete derivative differs from ``recipe``, in words; empty where it does not, and for any
    other folder."""
    try:
        found = read_derivative(out)
    except DataError:  # not complete, or of a version with other recipes: it is made anew
        return ""
    return differences(found[0], recipe) if found else ""


def with_template(recipe: Recipe, template: str | Path | None) -> Recipe:
    """The recipe with the hash and the label of a template file; a recipe that has a hash keeps it.

    Raises:
        DataError: a file that cannot be read, is not the recipe's, or is missing.
    """
    if template is None:
        if recipe.template != MNI and "registration" in recipe.steps:
            raise DataError(
                f"scans are registered to a template file with SHA-256 {recipe.template}: give it with --template"
            )
        return recipe
    try:
        own = sha256(Path(template))
    except OSError as error:
        raise DataError(f"--template {template}: {error.strerror}; give a brain-extracted NIfTI file") from error
    if recipe.template == MNI:
        return replace(recipe, template=own, space=_space(Path(template)))
    if own != recipe.template:
        raise DataError(f"{template}: SHA-256 is {own}, that of the recipe's template {recipe.template}")
    return recipe


def _announce(scans: int, subjects: int, recipe: Recipe, workers: int) -> None:
    """Say what begins, since the first scan takes a minute: templates and networks are loaded."""
    work = f"{counted(scans, 'scan')} of {counted(subjects, 'subject')}: {', '.join(recipe.steps)}"
    grid = f"; to {recipe.spacing:g} mm" if "registration" in recipe.steps else ""
    where = f"; in {counted(workers, 'process', 'processes')}" if workers else ""
    print(f"preprocessing {work}{grid}{where}", file=sys.stderr, flush=True)


def _schema(suffix: str, recipe: Recipe) -> Schema:
    """The scans, and their masks where the recipe takes masks."""
    specs = {"image": {"kind": "volume", "column": PATH, "suffix": suffix}}
    if "brain" in recipe.steps and recipe.brain == "mask":
        specs["mask"] = {"kind": "volume", "suffix": "mask"}
    return Schema.from_dict(specs)


def _rejects(rows: Sequence[Row | Reject], outcomes: dict[str, Outcome]) -> Iterator[tuple[int, str, str]]:
    """(line, key, reason) of each row without a result."""
    for row in rows:
        if isinstance(row, Reject):
            yield row.line, row.key, row.reason
        elif outcomes[row.key].reason:
            yield row.line, row.key, outcomes[row.key].reason


def _check_folder(source: Path, out: Path, recipe: Recipe, suffix: str) -> None:
    """Refuse a folder with content of something else, or of another recipe."""
    check_output(source, out)
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists() and read_derivative(out) is None:
        raise DataError(f"{out} holds something other than a derivative of this command; choose another folder")
    before = derived_suffix(out)
    found = f"suffix {before} there, {suffix} now" if before and before != suffix else other_recipe(out, recipe)
    if found:
        raise DataError(f"{out} is complete, with other settings: {found}; choose another folder, or remove it")


def _space(template: Path) -> str:
    """The label of a template file's space: letters and digits of its name."""
    return "".join(c for c in template.name.partition(".")[0] if c.isascii() and c.isalnum()) or "template"
