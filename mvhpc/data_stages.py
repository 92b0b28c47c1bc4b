"""The stages ``phantom``, ``preprocess`` and ``pack``; they call :mod:`shards`."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, Tracking, at_least
from mvhpc.runs.folder import Run
from shards.pack import pack
from shards.phantom.make import make_phantoms
from shards.preprocess.recipe import Recipe
from shards.preprocess.run import preprocess
from shards.schema import Schema

INTERVAL_S = 30


@dataclass
class PhantomConfig:
    """`shards phantom`: procedural brains as a BIDS tree."""

    out: str
    subjects: int
    shape: list[int]  # voxels
    rich: bool  # add a second contrast, a site and a memory score
    seed: int
    tracking: Tracking

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ConfigError(f"shape={self.shape}: three numbers of voxels are needed, as [32, 32, 32]")


@dataclass
class PreprocessWorkers:
    """Where scans are preprocessed."""

    device: str  # auto | cpu | cuda, of the network that extracts brains
    workers: int  # one: processes of this machine; several: all cores of the Ray cluster, or with cuda all GPUs

    def __post_init__(self) -> None:
        at_least(1, {"compute.workers": self.workers})


@dataclass
class PreprocessConfig:
    """`shards preprocess`: raw scans -> a BIDS derivative in a template's space."""

    source: str
    out: str
    steps: list[str]
    brain: str  # auto | deepbet | hd-bet | mask | none
    registration: str  # affine | rigid
    template: str  # file; "" for the MNI152 template of nilearn
    spacing: float  # mm, of the results
    suffix: str  # of the scans in a BIDS folder
    entities: dict[str, str]  # that the names of these scans must have
    files_root: str  # folder that all files of a CSV must lie in; "": relative paths begin at the CSV
    weights: str  # file of HD-BET's weights
    weights_sha256: str
    keep_suspect: bool  # keep and flag scans that fail quality control, instead of rejecting them
    workers: int  # processes of this machine; 0 for one per core
    compute: PreprocessWorkers
    tracking: Tracking


@dataclass
class PackWorkers:
    """Where rows are packed."""

    workers: int  # one: processes of this machine; several: all cores of the Ray cluster

    def __post_init__(self) -> None:
        at_least(1, {"compute.workers": self.workers})


@dataclass
class PackConfig:
    """`shards pack`: a BIDS tree or CSV -> canonical volumes in shards."""

    source: str
    out: str
    format: str  # zarr | webdataset
    dtype: str  # of the stored volumes: float16 | uint8 | uint16
    schema: str  # name under configs/schema or a YAML file
    spacing: float  # mm
    shape: list[Any]  # voxels, or [auto]
    max_rejects: str  # "5%" or a count
    split: list[float]  # fractions of train, validation, test; empty: see shards.split.default_fractions
    split_column: str  # column of the table with the split; "" for none
    group: str  # column whose groups stay in one part of a split; "" for none
    folds: int  # number of cross-validation folds to record; 0 for none
    seed: int
    workers: int  # processes; 0 for one per core
    keep_suspect: bool  # pack and flag scans that fail quality control, instead of rejecting them
    entities: dict[str, str]  # that the names of the volumes in a BIDS folder must have
    rename: dict[str, str]  # column of the table -> the schema's name for it
    files_root: str  # folder that all files of a CSV must lie in; "": relative paths begin at the CSV
    pseudonymise: str  # key file, for pseudonyms in place of ids; "" for none
    exclude: str  # table of verdicts of `shards audit`, whose rejected rows are left out; "" for none
    compute: PackWorkers
    tracking: Tracking


class _Advance:
    """Records in the journal that a stage advances, and how fast: at once, then every :data:`INTERVAL_S`.

    Near a job's time limit, a stage that has advanced is requeued (:mod:`launchers.head`).
    """

    def __init__(self, run: Run) -> None:
        self._journal, self._start, self._done, self._next = run.journal, time.monotonic(), 0, 0.0

    def __call__(self, number: int) -> None:
        now = time.monotonic()
        self._done += number
        if now >= self._next:
            rate = self._done / max(now - self._start, 1e-9)
            self._journal.write("metrics", step=self._done, metrics={"system/samples_per_second": rate})
            self._next = now + INTERVAL_S


def run_phantom(config: PhantomConfig, run: Run) -> dict[str, Any]:
    """Stage ``phantom``: see :func:`shards.phantom.make.make_phantoms`."""
    height, width, depth = config.shape
    make_phantoms(Path(config.out), config.subjects, (height, width, depth), config.seed, rich=config.rich)
    return {"subjects": config.subjects}


def run_preprocess(config: PreprocessConfig, run: Run) -> dict[str, Any]:
    """Stage ``preprocess``: see :func:`shards.preprocess.run.preprocess`. Several workers share the subjects by Ray."""
    map_subjects = None
    if config.compute.workers > 1:
        from mvhpc.runtime.ray_subjects import map_subjects_by_ray  # imports Ray Data

        map_subjects = partial(map_subjects_by_ray, logs=run.folder / "logs")
    recipe = Recipe(
        steps=tuple(config.steps),
        brain=config.brain,
        registration=config.registration,
        spacing=config.spacing,
        weights=config.weights_sha256,
    )
    summary = preprocess(
        Path(config.source),
        Path(config.out),
        recipe,
        template=config.template or None,
        weights=config.weights or None,
        device=config.compute.device,
        workers=config.workers,
        suffix=config.suffix,
        keep_suspect=config.keep_suspect,
        map_subjects=map_subjects,
        on_scans=_Advance(run),
        entities=config.entities,
        files_root=config.files_root,
    )
    return dict(summary)


def run_pack(config: PackConfig, run: Run) -> dict[str, Any]:
    """Stage ``pack``: see :func:`shards.pack.pack`. Several workers share the shards by Ray."""
    map_shards = None
    if config.compute.workers > 1:
        from mvhpc.runtime.ray_shards import map_shards_by_ray  # imports Ray

        map_shards = partial(map_shards_by_ray, logs=run.folder / "logs")
    summary = pack(
        Path(config.source),
        Path(config.out),
        storage=config.format,
        dtype=config.dtype,
        schema=Schema.load(config.schema),
        spacing=config.spacing,
        shape=config.shape,
        max_rejects=config.max_rejects,
        fractions=config.split or None,
        split_column=config.split_column,
        group=config.group or None,
        folds=config.folds,
        seed=config.seed,
        workers=config.workers,
        keep_suspect=config.keep_suspect,
        entities=config.entities,
        rename=config.rename,
        files_root=config.files_root,
        pseudonymise=config.pseudonymise,
        exclusions=config.exclude or None,
        map_shards=map_shards,
        on_rows=_Advance(run),
    )
    return dict(summary)
