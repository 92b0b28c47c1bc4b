"""Upgrading a data set of version 1: its index is written anew, its volumes stay where they are."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from shards.cpus import available_cores
from shards.dataset import Dataset, open_dataset
from shards.files import locked_folder
from shards.header import VERSION, read_header
from shards.index import Record
from shards.progress import progress


def upgrade(folder: str | Path) -> int:
    """Write the index of a data set of version 1 as one of the present version.

    Every volume is read once and compared with its SHA-256; the new index gets its CRC-32C. The old index stays in use
    until the new one is complete.

    Returns:
        The number of records; 0 where the data set has the present version already.

    Raises:
        DataError: no packed data set in the folder, or another process writes to it.
        IntegrityError: a damaged index or volume; the message names it, and the data set stays as it was.
    """
    folder = Path(folder)
    if read_header(folder)["version"] == VERSION:
        return 0
    with locked_folder(folder):
        dataset = open_dataset(folder)
        index = dataset.index
        with ThreadPoolExecutor(available_cores()) as pool:
            found = pool.map(partial(_examine, dataset), index.records)
            records = list(progress(found, "reading", len(index.records), "record"))
        per_shard = index.per_shard
        if index.storage == "webdataset":
            per_shard = max(Counter(r.shard for r in records).values(), default=1)
            records = _with_slots(records, per_shard)
        index.of_equal_data(records=records, per_shard=per_shard).save(folder)
        return len(records)


def _examine(dataset: Dataset, record: Record) -> Record:
    """The record with what the index of version 1 lacks."""
    places = {variable: dataset.locate(record.key, variable) for variable in record.checksums}
    return replace(
        record,
        offsets={name: place.offset for name, place in places.items()},
        sizes={name: place.size for name, place in places.items()},
        crcs={name: place.crc for name, place in places.items() if place.size},
    )


def _with_slots(records: Sequence[Record], per_shard: int) -> list[Record]:
    """The records of tar files with their slots."""
    found, used = [], Counter[str]()
    numbers = {shard: number for number, shard in enumerate(dict.fromkeys(r.shard for r in records))}
    for record in records:
        found.append(replace(record, slot=numbers[record.shard] * per_shard + used[record.shard]))
        used[record.shard] += 1
    return found
