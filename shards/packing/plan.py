"""Which shards have to be made, of which rows: a function of the table, of what is packed already and of nothing else.

A shard of a new data set holds the next rows of the table. When the table has changed, shards whose rows are unchanged
stay as they are. One with a changed or removed row is made again under a new number, with every row in its place; it
takes the volumes of unchanged files from the old shard. New rows fill new shards.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from shards.packing.places import Place
from shards.participant_rows import Row


@dataclass(frozen=True)
class Item:
    """A row that a shard is to hold.

    Attributes:
        place: in the shard.
        row: of the table.
        before: its place in the old data set, which the volumes are taken from; None where it is to be converted.
    """

    place: int
    row: Row
    before: Place | None = None


@dataclass(frozen=True)
class Task:
    """One shard to make.

    Attributes:
        number: of the shard.
        items: its rows.
    """

    number: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        kept: places in shards that stay as they are, without those of removed rows.
        tasks: shards to make.
    """

    kept: list[Place]
    tasks: list[Task]


def make_plan(
    rows: Sequence[Row],
    per_shard: int,
    before: Iterable[Place],
    unchanged: Collection[str],
    rewritten: Collection[str] = (),
) -> Plan:
    """The plan for a table.

    Args:
        rows: of the table, those that can be read.
        per_shard: places per shard.
        before: places in the data set as it is.
        unchanged: keys of the rows of ``before`` whose files are as they were.
        rewritten: of these, keys whose shard holds other values than the table.
    """
    present = {row.key: row for row in rows}
    shards: dict[int, list[Place]] = {}
    for place in before:
        shards.setdefault(place.shard, []).append(place)
    numbers = (number for number in count() if number not in shards)
    kept: list[Place] = []
    tasks: list[Task] = []
    settled: set[str] = set()
    for _, places in sorted(shards.items()):
        here = [p for p in places if p.key in present and (p.key in unchanged or not p.reason)]
        settled |= {p.key for p in here}  # a rejected row whose source has changed is a new one
        if all(p.key in unchanged and p.key not in rewritten for p in places if not p.reason):
            kept += here
        elif here:
            items = (Item(p.place, present[p.key], p if p.key in unchanged else None) for p in here)
            tasks.append(Task(next(numbers), tuple(items)))
    new = [row for row in rows if row.key not in settled]
    tasks += (Task(next(numbers), items) for items in _chunks(new, per_shard))
    return Plan(kept, tasks)


def _chunks(rows: Sequence[Row], per_shard: int) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(rows), per_shard):
        yield tuple(Item(place, row) for place, row in enumerate(rows[start : start + per_shard]))
