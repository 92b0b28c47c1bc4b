"""``shards audit``: a packed data set -> one page that shows every volume, and takes verdicts on them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shards.audit.duplicates import compare_all
from shards.audit.measure import SKETCH
from shards.audit.outliers import histogram_distances
from shards.audit.page import write_page
from shards.audit.stream import Look, look, mean_brains
from shards.cpus import worker_count
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError

HEIGHTS = ((1_000, 160), (10_000, 96))  # records -> height of a picture, pixels; smaller ones keep large pages light
SMALLEST = 64
NO_SKETCH = np.zeros(0, np.float16)


class Summary(TypedDict):
    """The result of an audit.

    Attributes:
        records: of the data set.
        alike: pairs of different subjects that are likely one person.
        unlike: pairs of one subject that are likely different people; at most 300 are counted.
        bytes: of the page.
    """

    records: int
    alike: int
    unlike: int
    bytes: int


def audit(folder: str | Path, out: str | Path, workers: int = 0) -> Summary:
    """Write the page of a packed data set.

    The page is one file that loads nothing. It does not depend on ``workers``.

    Args:
        folder: of the data set, with volumes.
        out: HTML file, outside of the data set; one that exists is replaced.
        workers: processes; 0 for one per core.

    Raises:
        DataError: the data set or ``out`` cannot be used.
        IntegrityError: a damaged volume; names it.
    """
    folder, out = Path(folder), Path(out)
    dataset = open_dataset(folder)
    _check(dataset, out)
    references = mean_brains(dataset, [v.name for v in dataset.index.schema.volumes])
    if not references:
        raise DataError(f"{folder}: no record has a volume: nothing to look at")
    count = len(dataset)
    height = next((height for most, height in HEIGHTS if count <= most), SMALLEST)
    compared = next(iter(references))
    looks, sketches = split_sketches(look(folder, references, height, worker_count(workers)), count, compared)
    pairs = compare_all(sketches, [dataset.record(found.key).subject for found in looks])
    write_page(dataset, compared, _measures(dataset, looks, list(references)), [f.picture for f in looks], pairs, out)
    return Summary(records=count, alike=pairs.count, unlike=len(pairs.unlike), bytes=out.stat().st_size)


def _check(dataset: Dataset, out: Path) -> None:
    """Refuse what has no page."""
    if dataset.index.kind != "volumes":
        raise DataError(f"{dataset.folder}: holds {dataset.index.kind}; an audit looks at packed volumes")
    if not len(dataset):
        raise DataError(f"{dataset.folder}: has no records: nothing to look at")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of an HTML file")
    if out.resolve().is_relative_to(dataset.folder.resolve()):
        raise DataError(f"{out}: lies in the data set, which holds its own files alone; choose a file elsewhere")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first")


def _measures(dataset: Dataset, looks: Sequence[Look], variables: Sequence[str]) -> pd.DataFrame:
    """A column ``VARIABLE.MEASURE`` for each measure and each figure of quality control that varies."""
    rows = [
        {
            f"{name}.{measure}": value
            for name, volume in found.volumes.items()
            for measure, value in volume.values.items()
        }
        for found in looks
    ]
    keys = [found.key for found in looks]
    table = pd.DataFrame(rows, index=keys)
    for variable in variables:
        there = [n for n, found in enumerate(looks) if variable in found.volumes]
        distances = np.full(len(looks), np.nan)
        distances[there] = histogram_distances(np.stack([looks[n].volumes[variable].histogram for n in there]))
        table[f"{variable}.histogram"] = distances
    of_quality = pd.DataFrame([dataset.record(key).figures for key in keys], index=keys, dtype=float)
    return pd.concat([table, of_quality.loc[:, of_quality.nunique() > 1]], axis=1)


def split_sketches(looks: Iterable[Look], count: int, variable: str) -> tuple[list[Look], NDArray[np.float16]]:
    """Looks without their sketches, and the sketches of one variable, so that no sketch is in memory twice.

    Args:
        looks: at the records.
        count: of the records.
        variable: whose sketches are kept.

    Returns:
        The looks, and (count, SKETCH); 0 for records without the variable, which are like none.
    """
    sketches = np.zeros((count, SKETCH), np.float16)
    kept = []
    for found, row in zip(looks, sketches):
        if variable in found.volumes:
            row[:] = found.volumes[variable].sketch
        bare = {name: replace(measured, sketch=NO_SKETCH) for name, measured in found.volumes.items()}
        kept.append(replace(found, volumes=bare))
    return kept, sketches
