"""Converting the rows of a table to volumes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from shards.errors import DataError
from shards.files import file_state
from shards.nifti import PAIR
from shards.participant_rows import Row
from shards.preprocess.derivative import quality_file, read_quality
from shards.qc.limits import verdict, violated
from shards.schema import Schema
from shards.volumes import Canonical, Space, brain_extent, canonical, map_file

CONVERSION = 3  # of the arrays and figures that a file gives; to be raised where these change
CHANGED = "the file changed while it was read; pack again when it is complete"

T = TypeVar("T")
Extent = tuple[NDArray[Any], dict[str, float]]  # see shards.volumes.brain_extent


@dataclass(frozen=True)
class Converted:
    """What a row gives.

    Attributes:
        volumes: by variable.
        reason: why the row cannot be packed; empty where it can.
        passing: the reason may pass without a change of the files, as a file system that does not answer.
        flags: ``VARIABLE.FIGURE`` of each limit of quality control that is violated.
    """

    volumes: dict[str, Canonical] = field(default_factory=dict)
    reason: str = ""
    passing: bool = False
    flags: list[str] = field(default_factory=list)


def convert(
    row: Row,
    schema: Schema,
    spacing: float,
    shape: tuple[int, int, int],
    space: Space | None,
    dtype: str,
    keep_suspect: bool,
) -> Converted:
    """A row's canonical volumes, or why it is rejected.

    Args:
        row: of the table.
        schema: the variables.
        spacing, shape, space, dtype: see :func:`shards.volumes.canonical`.
        keep_suspect: flag scans that fail quality control, instead of rejecting them.
    """

    def one(path: Path) -> Canonical:
        volume = canonical(path, spacing, shape, space, dtype)
        if space is not None:
            volume = _with_quality(volume, path)
        for figure, value in volume.figures.items():
            if not math.isfinite(value):
                raise ValueError(f"the figure {figure} of quality control is {value}")
        return volume

    before = _states(row, space)
    found = _of_each(row, one)
    if isinstance(found, Converted) and found.passing:
        return found
    if before != _states(row, space):
        return Converted(reason=CHANGED, passing=True)
    if isinstance(found, Converted):
        return found
    suspect, flags = _assess(found, schema)
    return Converted(reason=suspect) if suspect and not keep_suspect else Converted(found, flags=flags)


def row_files(row: Row, space: Space | None) -> list[Path]:
    """All files that a row's volumes are made of, in a fixed order.

    Args:
        row: of the table.
        space: of registered volumes, which have probability maps and a sidecar beside them.
    """
    found = []
    for path in row.files.values():
        found += [path.with_suffix(suffix) for suffix in PAIR] if path.suffix in PAIR else [path]
        if space is not None:
            found += [quality_file(path), *(map_file(path, label) for label in space.maps)]
    return found


def brain_extents(row: Row, spacing: float, space: Space | None) -> dict[str, Extent]:
    """The extents of a row's brains by variable; empty where it is rejected.

    Raises:
        DataError: a file that cannot be read now, and may be read later.
    """
    found = _of_each(row, lambda path: brain_extent(path, spacing, space))
    if isinstance(found, Converted):
        if found.passing:
            raise DataError(
                f"{row.key}: {found.reason}; --shape auto depends on this scan: run the same command again when it can "
                "be read, leave it out, or give a --shape"
            )
        return {}
    return found


def _of_each(row: Row, function: Callable[[Path], T]) -> dict[str, T] | Converted:
    """``function`` of each file of a row, or why it cannot be used."""
    found = {}
    for name, path in row.files.items():
        try:
            found[name] = function(path)
        except ValueError as error:
            return Converted(reason=f"{name}: {error}")
        except OSError as error:
            return Converted(reason=f"{name}: {error.strerror or 'file cannot be read'}", passing=True)
        except MemoryError:
            return Converted(reason=f"{name}: too large for this machine's memory", passing=True)
    return found


def _states(row: Row, space: Space | None) -> list[tuple[int, ...]]:
    """The state of each file; nothing for a missing one."""
    found: list[tuple[int, ...]] = []
    for path in row_files(row, space):
        try:
            found.append(file_state(path))
        except OSError:
            found.append(())
    return found


def _with_quality(volume: Canonical, path: Path) -> Canonical:
    """A preprocessed volume with the figures and flags of its preprocessing, named ``preprocess.FIGURE``."""
    figures, flags = read_quality(path)
    before = {f"preprocess.{figure}": value for figure, value in figures.items()}
    return replace(volume, figures=volume.figures | before, flags=[f"preprocess.{flag}" for flag in flags])


def _assess(volumes: Mapping[str, Canonical], schema: Schema) -> tuple[str, list[str]]:
    """Why a row's volumes should be rejected, '' for not at all; and ``VARIABLE.FIGURE`` of each violated limit."""
    reasons, flags = [], []
    for name, volume in volumes.items():
        figures, suffix = volume.figures, schema[name].suffix
        reasons += [f"{name}: {'; '.join(words)}" for words in [verdict(figures, suffix)] if words]
        limits = violated(figures, suffix) or violated(figures, suffix, rejects=False)
        flags += [f"{name}.{flag}" for flag in (*(limit.figure for limit in limits), *volume.flags)]
    return "; ".join(reasons), flags
