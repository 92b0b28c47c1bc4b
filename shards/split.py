"""Splits of a data set into training, validation and test parts.

Subjects are never divided between parts, nor are groups of subjects, such as families. A draw orders the groups by a
hash of seed and name, so it does not depend on the order of the table, and adding subjects moves few of the others.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import DataError, nearest
from shards.files import locked_folder
from shards.index import PARTS, Index, Record, Split

FRACTIONS = (0.89, 0.01, 0.10)  # train, validation, test of the MetaVoxel paper: 9,078 / 108 / 968 subjects
FOLD_VALIDATION = 0.05  # share of a fold's other subjects that is used for validation
MIN_VALIDATION = 20  # subjects: fewer are too few to choose a step or to calibrate with
MAX_VALIDATION = 0.2  # share that MIN_VALIDATION may take in a small data set
PART_NAMES = {  # spellings of the parts in a table
    **{part: part for part in PARTS},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
}


def parse_part(cell: str) -> str:
    """The part that a cell of a split column names, whatever its case.

    Raises:
        ValueError: an unknown word; the message names the nearest known one.
    """
    word = cell.strip().casefold()
    if word not in PART_NAMES:
        raise ValueError(nearest(word, PART_NAMES, "part of a split"))
    return PART_NAMES[word]


def check_groups(rows: Sequence[tuple[str, str, str]], column: str) -> None:
    """Check that a given split divides no subject and no group.

    Args:
        rows: (subject, group name, part or '') of each row; group names as :func:`merge_groups` gives them.
        column: the table's column that gives the parts.

    Raises:
        DataError: naming the first group that is divided, and who is in which part.
    """
    first: dict[str, tuple[str, str]] = {}  # group -> first subject with a part, its part
    for subject, group, part in rows:
        if not part:
            continue
        other, other_part = first.setdefault(group, (subject, part))
        if part != other_part:
            rows_of = other if subject == other else f"{other} and {subject}, one group,"
            raise DataError(
                f"column {column!r} puts {rows_of} into both {other_part} and {part}; a group belongs to one part"
            )


def draw_fractions(records: Sequence[Record], fractions: Sequence[float], seed: int, group: str = "") -> Split:
    """Draw a split of the subjects into training, validation and test parts.

    Args:
        records: of the index, with their groups.
        fractions: of subjects in train, validation and test, each from 0 to 1; they sum to one.
        seed: of the draw.
        group: column that the records' groups come from, for the record.

    Returns:
        A split in which no part with a fraction above zero is empty, where there are as many groups as such parts. A
        group larger than what a part still needs goes to another part where that is possible.

    Raises:
        DataError: fractions that are not three shares of one.
    """
    shares = [float(f) for f in fractions]
    if len(shares) != 3 or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise DataError(f"fractions {shares}: expected three shares (train, validation, test) that sum to 1")
    sizes = _group_sizes(records)
    drawn = {"test": shares[2], "validation": shares[1]}
    rest = "train"
    if not shares[0]:  # a data set without training part: its largest part takes what the other leaves
        rest = max(drawn, key=lambda name: drawn[name])
        del drawn[rest]
    part = _assign_parts(sizes, drawn, seed, rest)
    return Split("fractions", seed, shares, [], group, {r.key: part[r.group] for r in records})


def default_fractions(subjects: int) -> tuple[float, float, float]:
    """Fractions of train, validation and test where none are asked for: the paper's, with more for validation if few.

    Validation gets 1 %, but 20 subjects where these are at most a fifth of all, else a fifth.

    Args:
        subjects: how many there are.
    """
    train, validation, test = FRACTIONS
    wanted = max(validation, min(MAX_VALIDATION, MIN_VALIDATION / max(1, subjects)))
    return train + validation - wanted, wanted, test


def draw_folds(
    records: Sequence[Record], folds: int, seed: int, group: str = "", name: str = "fold"
) -> dict[str, Split]:
    """Divide subjects into ``folds`` folds of nearly equal size; each is the test part of one split.

    Of the other subjects 5 % are for validation; in small data sets 20 subjects or 20 %, whichever is less.

    Args:
        records: of the index, with their groups.
        folds: how many.
        seed: of the draw.
        group: column that the records' groups come from, for the record.
        name: prefix of the splits' names, as in ``fold-1-of-5``.

    Raises:
        DataError: fewer than two folds, or not enough groups for a test, a validation and a training part.
    """
    sizes = _group_sizes(records)
    check_folds(folds, len(sizes))
    fold: dict[str, int] = {}
    filled = [0] * folds
    for member in sorted(_hash_order(sizes, seed), key=lambda g: -sizes[g]):  # large groups first: folds are even
        fold[member] = filled.index(min(filled))
        filled[fold[member]] += sizes[member]
    splits = {}
    for k in range(folds):
        rest = {g: n for g, n in sizes.items() if fold[g] != k}
        share = max(FOLD_VALIDATION, min(MAX_VALIDATION, MIN_VALIDATION / sum(rest.values())))
        part = _assign_parts(rest, {"validation": share}, seed)
        part |= {g: "test" for g in sizes if fold[g] == k}
        assignment = {r.key: part[r.group] for r in records}
        splits[f"{name}-{k + 1}-of-{folds}"] = Split("folds", seed, [], [k + 1, folds], group, assignment)
    return splits


def check_folds(folds: int, groups: float = math.inf) -> None:
    """Refuse folds that cannot be drawn.

    Args:
        folds: how many.
        groups: of subjects; as many as are needed where they are not known yet.

    Raises:
        DataError: fewer than two folds, or not enough groups for a test, a validation and a training part.
    """
    if folds < 2:
        raise DataError(f"{folds} folds: at least 2 are needed")
    if groups < max(folds, 3):
        raise DataError(f"{folds} folds of {groups} groups of subjects: at least {max(folds, 3)} groups are needed")


def merge_groups(subjects: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Subject -> name of its group, which is the group's first subject.

    Args:
        subjects: (subject, group value or '') of each row. Subjects that are linked by a chain of rows are one group.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = node = parent[above]  # shortens the chain, which else grows with each subject of a group
        return node

    for subject, value in subjects:
        node = root(f"s{subject}")
        if value:
            parent[root(f"g{value}")] = node
    first: dict[str, str] = {}
    return {subject: first.setdefault(root(f"s{subject}"), subject) for subject, _ in subjects}


def _group_sizes(records: Sequence[Record]) -> dict[str, int]:
    """Group -> number of its subjects."""
    return Counter(group for group, _ in {(r.group, r.subject) for r in records})


def _hash_order(sizes: Mapping[str, int], seed: int) -> list[str]:
    return sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())


def _assign_parts(
    sizes: Mapping[str, int], shares: Mapping[str, float], seed: int, rest: str = "train"
) -> dict[str, str]:
    """Group -> part: each part of ``shares`` is filled to its share of the subjects; ``rest`` takes the others."""
    part: dict[str, str] = {}
    wanted = [name for name, share in shares.items() if share > 0]
    for later, name in zip(range(len(wanted), 0, -1), wanted):  # `later` groups stay free: one for each part to come
        need = max(1, round(shares[name] * sum(sizes.values())))
        free = [g for g in _hash_order(sizes, seed) if g not in part]
        taken = []
        for group in free:
            if sizes[group] <= need:
                taken.append(group)
                need -= sizes[group]
        taken = taken or sorted(free, key=lambda g: sizes[g])[:1]
        part.update(dict.fromkeys(taken[: max(0, len(free) - later)], name))
    return {group: part.get(group, rest) for group in sizes}


def record_split(
    folder: Path, fractions: Sequence[float] | None, folds: int | None, seed: int, group: str | None, name: str | None
) -> list[str]:
    """Draw a split, or folds, of a packed data set and record them in its index.

    Args:
        folder: of the data set.
        fractions: train, validation and test; or None for folds.
        folds: how many, where ``fractions`` is None.
        seed: of the draw.
        group: the column of the groups that the data set was packed with; None for that column.
        name: of the split; for folds, the prefix of their names.

    Returns:
        The names recorded.

    Raises:
        DataError: another split of that name, a group column the data set was not packed with, bad fractions or folds.
    """
    with locked_folder(folder):
        index = Index.load(folder)
        drawn = _draw(folder, index, fractions, folds, seed, group, name)
        index.of_equal_data(splits={**index.splits, **drawn}).save(folder)
    return list(drawn)


def _draw(
    folder: Path,
    index: Index,
    fractions: Sequence[float] | None,
    folds: int | None,
    seed: int,
    group: str | None,
    name: str | None,
) -> dict[str, Split]:
    if group is not None and group != index.group:
        packed = f"with --group {index.group}" if index.group else "without --group"
        raise DataError(f"{folder} was packed {packed} and has no column {group!r}; pack it again with --group {group}")
    if fractions is not None:
        if not name:
            raise DataError("give the split a --name")
        drawn = {name: draw_fractions(index.records, fractions, seed, index.group)}
    else:
        drawn = draw_folds(index.records, folds or 0, seed, index.group, name or "fold")
    for key, split in drawn.items():
        if key in index.splits and index.splits[key] != split:
            raise DataError(
                f"{folder} already has another split named {key!r}, which results may depend on; choose another --name"
            )
    return drawn
