"""The stages ``phantom`` and ``pack``; both call :mod:`shards`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvhpc.config import Tracking
from mvhpc.runs.folder import Run
from shards.pack import pack
from shards.phantom.make import make_phantoms
from shards.schema import Schema


@dataclass
class PhantomConfig:
    """`shards phantom`: procedural brains as a BIDS tree."""

    out: str
    subjects: int
    shape: list[int]
    rich: bool  # add a second contrast, a site and a memory score
    seed: int
    tracking: Tracking


@dataclass
class PackConfig:
    """`shards pack`: a BIDS tree or CSV -> canonical volumes in shards."""

    source: str
    out: str
    format: str  # zarr | webdataset
    schema: str  # name under configs/schema or a YAML file
    spacing: float  # mm
    shape: list[int]  # voxels
    max_rejects: str  # "5%" or a count
    split: list[float]  # fractions of train, validation, test
    split_column: str  # column of the table with the split; "" for none
    group: str  # column whose groups stay in one part of a split; "" for none
    folds: int  # number of cross-validation folds to record; 0 for none
    seed: int
    workers: int  # processes; 0 for one per core
    keep_suspect: bool  # pack and flag scans that fail quality control, instead of rejecting them
    tracking: Tracking


def run_phantom(config: PhantomConfig, run: Run) -> dict[str, Any]:
    """Stage ``phantom``: see :func:`shards.phantom.make.make_phantoms`."""
    height, width, depth = config.shape
    make_phantoms(Path(config.out), config.subjects, (height, width, depth), config.seed, rich=config.rich)
    return {"subjects": config.subjects}


def run_pack(config: PackConfig, run: Run) -> dict[str, Any]:
    """Stage ``pack``: see :func:`shards.pack.pack`."""
    height, width, depth = config.shape
    summary = pack(
        Path(config.source),
        Path(config.out),
        storage=config.format,
        schema=Schema.load(config.schema),
        spacing=config.spacing,
        shape=(height, width, depth),
        max_rejects=config.max_rejects,
        fractions=tuple(config.split),
        split_column=config.split_column,
        group=config.group or None,
        folds=config.folds,
        seed=config.seed,
        workers=config.workers,
        keep_suspect=config.keep_suspect,
    )
    return dict(summary)
