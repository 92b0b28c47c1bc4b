"""The stages of a project, their configurations and the paths of their results."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mvhpc.config import CONFIGS, ConfigError, load_config
from mvhpc.stages import STAGES, query_name
from shards.schema import Schema

FINAL = "default"  # the split of the model that a project keeps
RESULTS = "results.md"  # below the root: the table of `mvhpc run`


@dataclass
class Query:
    """Wanted and given variables."""

    want: list[str]
    given: list[str]

    @property
    def name(self) -> str:
        """Its name in files: ``age-given-image-sex``."""
        return query_name(self.want, self.given)


@dataclass
class PipelineConfig:
    """`mvhpc run`: presets, paths and queries, and a mapping of overrides per stage."""

    HINT: ClassVar[str] = " A key of one stage begins with its name: STAGE.key=value, as joint.training.epochs=20."

    preset: str
    root: str
    source: str
    folds: int
    queries: list[Query]
    preprocess_source: bool
    phantom: dict[str, Any]
    preprocess: dict[str, Any]
    pack: dict[str, Any]
    vae: dict[str, Any]
    encode: dict[str, Any]
    joint: dict[str, Any]
    scalars: dict[str, Any]
    predict: dict[str, Any]
    generate: dict[str, Any]


class Pipeline:
    """A project: its splits, the paths of its results, and the configuration of each stage.

    Args:
        config: of the pipeline.

    Attributes:
        root: the project's folder.
        source: BIDS tree or CSV that is preprocessed, or packed as it is.
        splits: name of each split whose test part is predicted -> folder of the models trained on it. With folds, the
            model to keep is trained once more, on the split :data:`FINAL`, and is in ``root``.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.root = Path(config.root)
        self.source = Path(config.source) if config.source else self.root / STAGES["phantom"].out
        self.splits = (
            {f"fold-{k}-of-{config.folds}": self.root / f"fold-{k}" for k in range(1, config.folds + 1)}
            if config.folds
            else {FINAL: self.root}
        )

    @cached_property
    def uses_scalars(self) -> bool:
        """Whether a model of scalars is a part of the joint model."""
        joint = self._settings("joint", ("out", "latents", "vae"))
        packing = self._settings("pack", ("out", "source"))
        return bool(joint.model.scalars != "early" and Schema.load(packing.schema).scalars)

    def _settings(self, stage: str, paths: Sequence[str]) -> Any:
        """The configuration of a stage without its paths."""
        return self._load(stage, dict.fromkeys(paths, "") | getattr(self.config, stage))

    def _load(self, stage: str, values: Mapping[str, Any]) -> Any:
        try:
            return load_config(STAGES[stage].config_class(), stage, self.preset(stage), (), values)
        except ConfigError as error:
            raise ConfigError(f"stage {stage}: {error}") from error

    def inputs(self, stage: str) -> Mapping[str, str]:
        """Configuration key -> the stage that makes this input, in this project."""
        if stage == "pack" and self.config.preprocess_source:
            return {"source": "preprocess"}
        if stage == "joint" and not self.uses_scalars:
            return {key: maker for key, maker in STAGES[stage].inputs.items() if maker != "scalars"}
        return STAGES[stage].inputs

    def place(self, stage: str, split: str, query: str = "", name: str = "") -> Path:
        """Path of a stage's result, for one split and, if it depends on them, a query and a network's name."""
        if stage == "phantom":
            return self.source
        folder = "" if split == FINAL else f"{self.splits[split].name}/"
        return self.root / STAGES[stage].out.format(split=folder, query=query, name=name)

    def predictions(self, split: str, query: Query) -> Path:
        """The TSV file of the predictions for one query."""
        return self.place("predict", split, query.name)

    def values(self, stage: str, split: str, query: str = "") -> dict[str, Any]:
        """The project's values of a stage's configuration: paths, split, tracking store and overrides.

        Keys that the stage's configuration does not have are left out.
        """
        entry = STAGES[stage]
        fields = {field.name for field in dataclasses.fields(entry.config_class())}
        values: dict[str, Any] = {"tracking.uri": f"sqlite:///{self.root / 'mlflow.db'}"}
        values |= getattr(self.config, stage, {})
        values["out"] = str(self.place(stage, split, query))
        values |= {key: str(self.place(made_by, split)) for key, made_by in self.inputs(stage).items() if made_by}
        if stage == "pack":
            values["folds"] = self.config.folds
        elif "split_name" in fields:
            if "{split}" in entry.out:  # otherwise the stage is about all splits
                values["split_name"] = split
        elif "split" in fields:
            values["split"] = split
        return values

    def preset(self, stage: str) -> str:
        """The preset of a stage: the project's, or ``default`` if the stage has none of that name."""
        preset = self.config.preset
        return preset if (CONFIGS / stage / f"{preset}.yaml").is_file() else "default"

    def configure(self, stage: str, split: str, query: Query | None = None) -> Any:
        """The configuration of one stage.

        Raises:
            ConfigError: an invalid value of the project; the message names the stage.
        """
        values = self.values(stage, split, query.name if query else "")
        if query:
            values |= {"want": query.want, "given": query.given}
        return self._load(stage, values)

    def steps(self) -> Iterator[tuple[str, Any]]:
        """(stage, configuration) in the order in which they run."""
        if not self.config.source:
            yield "phantom", self.configure("phantom", FINAL)
        if self.config.preprocess_source:
            yield "preprocess", self.configure("preprocess", FINAL)
        yield "pack", self.configure("pack", FINAL)
        for split in dict.fromkeys([*self.splits, FINAL]):
            for stage in (*["scalars"] * self.uses_scalars, "vae", "encode", "joint"):
                yield stage, self.configure(stage, split)
            for query in self.config.queries if split in self.splits else ():
                yield "predict", self.configure("predict", split, query)
        yield "generate", self.configure("generate", FINAL)
