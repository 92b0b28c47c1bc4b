"""Subject-level splits: whoever shares a subject or a group stays on one side.

Groups are ordered by a hash of seed and name, so a draw does not depend on the order of the table, and adding people
moves few of those already there.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from shards.errors import DataError
from shards.index import Index, Record, Split

FOLD_VALIDATION = 0.05  # share of a fold's training side that is set apart for validation
FEWEST = 20  # subjects to set apart all the same: fewer tell neither the best step nor how sure a model may be
MOST = 0.2  # share that this may take


def draw_fractions(records: Sequence[Record], fractions: Sequence[float], seed: int, group: str = "") -> Split:
    """Split subjects into train, validation and test.

    Args:
        records: of the index, with their groups.
        fractions: of subjects in train, validation and test; they sum to one.
        seed: of the draw.
        group: column that the records' groups come from, for the record.

    Returns:
        A split in which validation and test hold someone each where there are three groups or more (and their
        fraction is not zero). A group larger than what a side still needs goes to training where that is possible.

    Raises:
        DataError: fractions that are not three shares of one.
    """
    shares = [float(f) for f in fractions]
    if len(shares) != 3 or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6) or shares[0] == 0:
        raise DataError(f"fractions {shares}: need train, validation and test, summing to 1, train above 0")
    sizes = _sizes(records)
    side = _sides(sizes, {"test": shares[2], "validation": shares[1]}, seed)
    return Split("fractions", seed, shares, [], group, {r.key: side[r.group] for r in records})


def draw_folds(
    records: Sequence[Record], folds: int, seed: int, group: str = "", name: str = "fold"
) -> dict[str, Split]:
    """Split subjects into ``folds`` parts of nearly equal size; each is the test side of one split.

    Of the rest a twentieth is for validation, in small datasets 20 subjects or a fifth, whichever is less.

    Args:
        records: of the index, with their groups.
        folds: how many.
        seed: of the draw.
        group: column that the records' groups come from, for the record.
        name: of the splits, as in ``fold-1-of-5``.

    Raises:
        DataError: fewer than two folds, or not enough groups for a test, a validation and a training side.
    """
    sizes = _sizes(records)
    if folds < 2 or len(sizes) < max(folds, 3):
        raise DataError(
            f"{folds} folds of {len(sizes)} groups of subjects: need 2 or more, and at least as many groups"
        )
    fold: dict[str, int] = {}
    filled = [0] * folds
    for member in sorted(_ordered(sizes, seed), key=lambda g: -sizes[g]):  # large groups first: folds come out even
        fold[member] = filled.index(min(filled))
        filled[fold[member]] += sizes[member]
    splits = {}
    for k in range(folds):
        rest = {g: n for g, n in sizes.items() if fold[g] != k}
        share = max(FOLD_VALIDATION, min(MOST, FEWEST / sum(rest.values())))
        side = _sides(rest, {"validation": share}, seed)
        side |= {g: "test" for g in sizes if fold[g] == k}
        assignment = {r.key: side[r.group] for r in records}
        splits[f"{name}-{k + 1}-of-{folds}"] = Split("folds", seed, [], [k + 1, folds], group, assignment)
    return splits


def merge_groups(subjects: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Subject -> name of the set of subjects that must stay together, which is its first subject.

    Args:
        subjects: (subject, group value or '') of each row. Two subjects are together where a chain of rows links them.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for subject, value in subjects:
        node = root(f"s{subject}")
        if value:
            parent[root(f"g{value}")] = node
    first: dict[str, str] = {}
    return {subject: first.setdefault(root(f"s{subject}"), subject) for subject, _ in subjects}


def _sizes(records: Sequence[Record]) -> dict[str, int]:
    """Group -> number of its subjects."""
    return Counter(group for group, _ in {(r.group, r.subject) for r in records})


def _ordered(sizes: dict[str, int], seed: int) -> list[str]:
    return sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())


def _sides(sizes: dict[str, int], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Group -> side: fill each side of ``shares`` to its share of the subjects; the rest trains."""
    side: dict[str, str] = {}
    wanted = [name for name, share in shares.items() if share > 0]
    for later, name in zip(range(len(wanted), 0, -1), wanted):  # `later` groups stay free: one for each side to come
        need = max(1, round(shares[name] * sum(sizes.values())))
        free = [g for g in _ordered(sizes, seed) if g not in side]
        taken = []
        for group in free:
            if sizes[group] <= need:
                taken.append(group)
                need -= sizes[group]
        taken = taken or sorted(free, key=lambda g: sizes[g])[:1]
        side.update(dict.fromkeys(taken[: max(0, len(free) - later)], name))
    return {group: side.get(group, "train") for group in sizes}


def record_split(
    folder: Path, fractions: Sequence[float] | None, folds: int | None, seed: int, group: str | None, name: str | None
) -> list[str]:
    """Draw a split, or folds, of a packed dataset and record them in its index.

    Args:
        folder: of the dataset.
        fractions: train, validation and test; or None for folds.
        folds: how many, where ``fractions`` is None.
        seed: of the draw.
        group: None for the groups the dataset was packed with; their column otherwise.
        name: of the split; for folds, what their names begin with.

    Returns:
        The names recorded.

    Raises:
        DataError: another split of that name, a group column the dataset was not packed with, bad fractions or folds.
    """
    index = Index.load(folder)
    if group is not None and group != index.group:
        known = f"with --group {index.group}" if index.group else "without --group"
        raise DataError(
            f"{folder} was packed {known}, so it knows no column {group!r}; pack again with --group {group}"
        )
    if fractions is not None:
        if not name:
            raise DataError("give the split a --name")
        drawn = {name: draw_fractions(index.records, fractions, seed, index.group)}
    else:
        drawn = draw_folds(index.records, folds or 0, seed, index.group, name or "fold")
    for key, split in drawn.items():
        if key in index.splits and index.splits[key] != split:
            raise DataError(
                f"{folder} has another split named {key!r} already, which results may rest on; take another --name"
            )
    dataclasses.replace(index, splits={**index.splits, **drawn}).save(folder)
    return list(drawn)
