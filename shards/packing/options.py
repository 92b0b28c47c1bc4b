"""The options of a packing, checked before any file is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.cpus import worker_count
from shards.errors import DataError, nearest
from shards.exclusions import read_exclusions
from shards.numbers import parse_number
from shards.participant_rows import Reject
from shards.pseudonyms import fingerprint, read_key
from shards.quantization import stored_as
from shards.schema import Schema
from shards.shard_writer import STORAGES
from shards.split import FRACTIONS, check_folds, draw_fractions


@dataclass(frozen=True)
class Options:
    """The options of :func:`shards.pack.pack`; ``shape`` is None for ``auto``.

    ``key`` is that of the pseudonyms, empty for none; ``exclusions`` are the reasons of excluded rows, by key.
    """

    storage: str
    dtype: str
    schema: Schema
    spacing: float
    shape: tuple[int, int, int] | None
    max_rejects: str
    fractions: list[float]
    split_column: str
    group: str
    folds: int
    seed: int
    workers: int
    keep_suspect: bool
    entities: dict[str, str] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    files_root: str | Path | None = None
    key: bytes = field(default=b"", repr=False)
    exclusions: dict[str, str] = field(default_factory=dict)

    def arguments(self, kind: str, shape: Sequence[int]) -> dict[str, Any]:
        """The options for the record, without paths.

        Args:
            kind: of the source.
            shape: of the box, voxels.
        """
        found: dict[str, Any] = {
            "source": kind,
            "spacing": self.spacing,
            "shape": list(shape),
            "format": self.storage,
            "dtype": self.dtype,
            "max_rejects": self.max_rejects,
            "fractions": self.fractions,
            "group": self.group,
            "folds": self.folds,
            "seed": self.seed,
        }
        if self.keep_suspect:
            found["keep_suspect"] = True
        if self.key:
            found["pseudonyms"] = fingerprint(self.key)
        found |= {name: pairs for name, pairs in (("entities", self.entities), ("rename", self.rename)) if pairs}
        if self.split_column:
            found |= {"fractions": [], "split_column": self.split_column}
        return found

    def is_exclusion(self, reject: Reject) -> bool:
        """Whether a row is left out by a verdict, and not for a fault."""
        return self.exclusions.get(reject.key) == reject.reason

    def allowed_rejects(self, rows: int) -> int:
        """The largest number of rejected rows.

        Raises:
            DataError: neither a number nor a share.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", self.max_rejects.strip())
        if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
            raise DataError(f"max-rejects {self.max_rejects!r}: expected a number of rows, or a share of them as in 5%")
        return int(float(match[1]) / 100 * rows + 1e-9) if match[2] else int(match[1])


def check_options(
    *,
    schema: Schema | Any = "default",
    spacing: float,
    shape: Sequence[int] | str,
    storage: str = "zarr",
    dtype: str = "float16",
    max_rejects: str | int = "5%",
    fractions: Sequence[float] | None = None,
    split_column: str = "",
    group: str | None = None,
    folds: int = 0,
    seed: int = 0,
    workers: int = 1,
    keep_suspect: bool = False,
    entities: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    files_root: str | Path | None = None,
    pseudonymise: str | Path | None = None,
    exclusions: str | Path | None = None,
    **unknown: Any,
) -> Options:
    """The options of :func:`shards.pack.pack`, with its defaults.

    Raises:
        DataError: an option that cannot be used, or is none.
    """
    if unknown:
        known = ["spacing", "shape", *(check_options.__kwdefaults__ or {})]
        raise DataError(nearest(next(iter(unknown)), known, "option"))
    schema = schema if isinstance(schema, Schema) else Schema.load(schema)
    if storage not in STORAGES:
        raise DataError(nearest(storage, STORAGES, "format"))
    stored_as(dtype)
    if not schema.volumes:
        raise DataError("the schema has no volume variable: nothing to pack")
    if not 0.1 <= spacing <= 50:
        raise DataError(f"spacing {spacing:g}: expected millimetres, 0.1 to 50")
    if folds != 0:
        check_folds(folds)
    options = Options(
        storage=storage,
        dtype=dtype,
        schema=schema,
        spacing=spacing,
        shape=_check_shape(shape),
        max_rejects=str(max_rejects),
        fractions=[float(f) for f in fractions or ()],
        split_column=split_column,
        group=group or "",
        folds=folds,
        seed=seed,
        workers=worker_count(workers),
        keep_suspect=keep_suspect,
        entities=dict(entities or {}),
        rename=dict(rename or {}),
        files_root=files_root or None,
        key=read_key(pseudonymise) if pseudonymise else b"",
        exclusions=read_exclusions(exclusions) if exclusions else {},
    )
    options.allowed_rejects(0)
    if not split_column:
        draw_fractions([], options.fractions or FRACTIONS, seed)
    return options


def _check_shape(shape: Sequence[int] | str) -> tuple[int, int, int] | None:
    """The shape; None for ``auto``."""
    if shape == "auto" or list(shape) == ["auto"]:
        return None
    try:
        height, width, depth = (parse_number(int, n) for n in shape)
        if not all(2 <= n <= 1024 for n in (height, width, depth)):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"shape {shape}: expected auto, or three numbers of voxels, 2 to 1024") from None
    return height, width, depth
