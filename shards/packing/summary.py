"""What a packing has done, in counts and notes for the user."""

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from shards.copies import copies
from shards.errors import named
from shards.index import PARTS, Index, Record
from shards.packing.places import Place
from shards.participant_rows import Table
from shards.split import FRACTIONS

CROPPED = 0.02  # share of a brain outside the box from which on a row is reported


class Summary(TypedDict):
    """Counts and messages of a packing.

    Attributes:
        rows: of the source.
        packed: rows packed.
        converted: rows whose files were converted now; the others were packed or rejected before.
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
    converted: int
    rejected: int
    subjects: int
    split: dict[str, int]
    missing: dict[str, int]
    shape: list[int]
    cropped: int
    touching: int
    bytes: int
    notes: list[str]


def summarize(index: Index, table: Table, places: Sequence[Place], converted: int) -> Summary:
    """The summary of a data set.

    Args:
        index: of the data set.
        table: that it was packed from.
        places: of the table's rows.
        converted: see :class:`Summary`.
    """
    records, schema, assignment = list(index.records), index.schema, dict(index.split().assignment)
    packed = [place for place in places if not place.reason]
    cropped = [place for place in packed if place.cropped > CROPPED]
    touching = [place for place in packed if place.touches]
    subjects: dict[str, set[str]] = {part: set() for part in PARTS}
    for record in records:
        if record.key in assignment:
            subjects[assignment[record.key]].add(record.subject)
    parts = {part: len(members) for part, members in subjects.items()}
    flagged = [r for r in records if r.flags]
    notes = [
        *table.notes,
        *_box_notes(packed, cropped, touching),
        *_copy_notes(records, [v.name for v in schema.volumes]),
    ]
    if flagged:
        notes.append(
            f"quality control flags {len(flagged)} of the packed rows (first {flagged[0].key}: "
            f"{', '.join(flagged[0].flags)}): see shards inspect"
        )
    arguments = index.provenance["arguments"]
    if not arguments.get("split_column") and not arguments["fractions"]:
        share = parts["validation"] / max(1, sum(parts.values()))
        if share > 2 * FRACTIONS[1]:
            notes.append(
                f"{parts['validation']} of {sum(parts.values())} subjects are for validation, since 1 % would be too "
                "few to choose a step and to calibrate with; --split draws other fractions"
            )
    without = [r.key for r in records if r.key not in assignment]
    if without:
        notes.append(f"{len(without)} rows have no value in the split column and belong to no part: {named(without)}")
    return Summary(
        rows=len(table.rows),
        packed=len(records),
        converted=converted,
        rejected=len(table.rows) - len(records),
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


def _copy_notes(records: Sequence[Record], volumes: Sequence[str]) -> list[str]:
    """Different subjects with equal volumes, bit for bit."""
    subjects = {record.key: record.subject for record in records}
    found = copies(records, volumes)
    others = [f"{key} is {other.key}" for key, (_, other) in found.items() if other.subject != subjects[key]]
    if not others:
        return []
    return [
        f"{len(others)} rows have the same volume as another subject ({named(others)}), which may be in another part "
        "of the split: remove the wrong rows from the source, or give one person's rows one id"
    ]


def _box_notes(packed: Sequence[Place], cropped: Sequence[Place], touching: Sequence[Place]) -> list[str]:
    notes = []
    if cropped:
        worst = max(cropped, key=lambda place: place.cropped)
        notes.append(
            f"{len(cropped)} volumes lose more than {CROPPED:.0%} of their signal to the box "
            f"({worst.key} {worst.cropped:.0%}): choose a larger --shape, or --shape auto"
        )
    if touching:
        sides = Counter(side for place in touching for side in place.touches)
        notes.append(
            f"{len(touching)} of {len(packed)} brains reach the edge of the box "
            f"({', '.join(f'{side} {count}' for side, count in sides.most_common())}): "
            f"{named([place.key for place in touching])}; --shape auto finds a box that holds all"
        )
    return notes
