"""The stages of the pipeline by name: configuration, inputs, function."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvhpc.config import SCHEMAS, JointConfig, PackConfig, PhantomConfig

if TYPE_CHECKING:
    from mvhpc.run import Run


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        config: its configuration's dataclass.
        target: ``module:function`` of ``run(config, run) -> summary``; imported when needed, since some are slow.
        inputs: configuration keys that name inputs, in the order of the pipeline.
        help: one line.
    """

    config: type
    target: str
    inputs: tuple[str, ...]
    help: str

    def function(self) -> "Callable[[Any, Run], dict[str, Any]]":
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)


def _stage(name: str, target: str, inputs: tuple[str, ...], text: str) -> tuple[str, Stage]:
    return name, Stage(SCHEMAS[name], target, inputs, text)


STAGES: dict[str, Stage] = dict(
    [
        _stage("phantom", "mvhpc.stages:phantom", (), "make procedural brains with a known joint law"),
        _stage("pack", "mvhpc.stages:pack", ("source",), "pack a BIDS tree or CSV into shards"),
        _stage("vae", "mvhpc.training.vae:run", ("data",), "train the autoencoder"),
        _stage("encode", "mvhpc.inference.encode:run", ("data", "vae"), "encode all volumes to latents"),
        _stage("joint", "mvhpc.stages:joint", ("latents", "vae"), "train the joint diffusion"),
        _stage("baseline", "mvhpc.training.baseline:run", ("data",), "train a DenseNet121 for one question"),
        _stage("predict", "mvhpc.inference.predict:run", ("model", "data"), "answer questions about subjects"),
        _stage("generate", "mvhpc.inference.generate:run", ("model",), "generate synthetic people"),
        _stage(
            "translate",
            "mvhpc.inference.translate:run",
            ("model", "data"),
            "draw one volume of each subject from others",
        ),
        _stage("inpaint", "mvhpc.inference.inpaint:run", ("model", "image", "mask"), "fill in part of a volume"),
    ]
)


def phantom(config: PhantomConfig, run: "Run") -> dict[str, Any]:
    """Stage ``phantom``: see :func:`shards.phantom.make_phantoms`."""
    from shards.phantom import make_phantoms

    height, width, depth = config.shape
    make_phantoms(Path(config.out), config.subjects, (height, width, depth), config.seed, rich=config.rich)
    return {"subjects": config.subjects}


def pack(config: PackConfig, run: "Run") -> dict[str, Any]:
    """Stage ``pack``: see :func:`shards.pack.pack`."""
    from shards.pack import pack as pack_shards
    from shards.schema import Schema

    height, width, depth = config.shape
    summary = pack_shards(
        Path(config.source),
        Path(config.out),
        storage=config.format,
        schema=Schema.load(config.schema),
        spacing=config.spacing,
        shape=(height, width, depth),
        max_rejects=config.max_rejects,
        fractions=tuple(config.split),
        group=config.group or None,
        folds=config.folds,
        seed=config.seed,
        workers=config.workers,
    )
    return dict(summary)


def joint(config: JointConfig, run: "Run") -> dict[str, float]:
    """Stage ``joint``: see :func:`mvhpc.training.joint.worker`; networks are for the workers alone to import.

    Returns:
        the best validation's metrics, steps and samples per second.
    """
    from mvhpc.training.cluster import launch

    return launch("mvhpc.training.joint:worker", config, run.folder, config.compute.workers)
