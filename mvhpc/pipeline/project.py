"""A single stage, started as part of a project.

A project is the folder (root) of one pipeline; ``ROOT/project.yaml`` is the pipeline's configuration. A stage that is
started without all of its paths belongs to a project: it has the project's preset, split and tracking store, and reads
and writes where the pipeline does. Values that the user sets override these.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mvhpc.config import CONFIGS, ConfigError, flatten, flatten_override, keys_without_default, load_config, to_yaml
from mvhpc.execute import PlannedStage, plan
from mvhpc.pipeline.plan import FINAL, Pipeline, PipelineConfig
from mvhpc.runs.folder import read_record
from mvhpc.stages import STAGES, Stage, query_name
from shards.files import write_text

RUNS = Path("runs")
FILE = "project.yaml"
DEFAULT = "main"


def find_root(named: str | None = None) -> Path:
    """The project's folder: the one named, else the one below ``runs/`` that was used last, else ``runs/main``."""
    if named:
        return Path(named)
    roots = [path.parent for path in RUNS.glob(f"*/{FILE}")]
    return max(roots, key=_last_used, default=RUNS / DEFAULT)


def _last_used(root: Path) -> float:
    """Time of the last record there, in seconds since 1970."""
    records = [root / FILE, *root.glob("*/stage.json"), *root.glob("*/*/stage.json")]
    return max(path.stat().st_mtime for path in records)


def record_project(config: PipelineConfig) -> None:
    """Write the project's configuration to its root."""
    Path(config.root).mkdir(parents=True, exist_ok=True)
    write_text(Path(config.root) / FILE, to_yaml(config))


def configure_pipeline(preset: str | None, overrides: Sequence[str], new: str) -> PipelineConfig:
    """The configuration of a whole pipeline.

    Args:
        preset: a preset or a YAML file. None: the project that is in the root already goes on with its own
            configuration.
        overrides: ``key=value``, of the pipeline.
        new: preset of a project that is not there yet.

    Raises:
        ConfigError: an invalid configuration, or project file.
        MissingKeys: keys without value.
    """
    config = load_config(PipelineConfig, "pipeline", preset or new, overrides)
    recorded = Path(config.root) / FILE
    if preset or not recorded.is_file():
        return config
    return load_config(PipelineConfig, "pipeline", str(recorded), overrides, {"root": config.root})


def open_project(root: Path, preset: str | None = None) -> Pipeline:
    """The project in ``root``; if there is none yet, a new one of ``preset``.

    Raises:
        ConfigError: the project file is invalid.
    """
    if (root / FILE).is_file():
        return Pipeline(load_config(PipelineConfig, "pipeline", str(root / FILE), (), {"root": str(root)}))
    known = preset if preset and (CONFIGS / "pipeline" / f"{preset}.yaml").is_file() else "default"
    values = {"root": str(root)} | ({"preset": preset} if preset and "/" not in preset else {})
    return Pipeline(load_config(PipelineConfig, "pipeline", known, (), values))


@dataclass(frozen=True)
class Request:
    """A user's request to run one stage.

    Attributes:
        stage: the stage.
        preset: a preset of the stage or a YAML file; None: the project's, else ``default``.
        overrides: ``key=value``.
        flags: key -> text, or words.
        root: of the project; None: see :func:`find_root`.
    """

    stage: Stage
    preset: str | None
    overrides: Sequence[str]
    flags: Mapping[str, str | list[str]]
    root: str | None = None

    def sets(self, key: str) -> bool:
        """Whether the user sets a key: by a flag, an override, or in a YAML file."""
        if key in self.flags or any(key in flatten_override(override) for override in self.overrides):
            return True
        return self._from_file() and key in flatten(OmegaConf.to_container(OmegaConf.load(str(self.preset))))

    def _from_file(self) -> bool:
        return self.preset is not None and Path(self.preset).suffix in {".yaml", ".yml"}

    def needs_project(self) -> bool:
        """Whether a path is not set, or a project is named."""
        needed = keys_without_default(self.stage.name)
        paths = {"out", *(key for key, maker in self.stage.inputs.items() if maker and key in needed)}
        return self.root is not None or not all(self.sets(path) for path in paths)

    def configure(self) -> "Configured":
        """The stage's configuration.

        Raises:
            ConfigError: an invalid configuration.
        """
        kind, name = self.stage.config_class(), self.stage.name
        if not self.needs_project():
            config: Any = load_config(kind, name, self.preset or "default", self.overrides, self.flags)
            return Configured(self, config, None, "")
        project = open_project(find_root(self.root), self.preset)
        split = self._split(project)
        preset = self.preset or project.preset(name)
        defaults = project.values(name, split)
        config = load_config(kind, name, preset, self.overrides, self.flags, defaults)
        configured = Configured(self, config, project, split)
        if config.out == defaults["out"]:
            config.out = configured.own_place()
        print(f"{name}: project {project.root} (preset {preset})", file=sys.stderr)
        return configured

    def _split(self, project: Pipeline) -> str:
        """The fold that is named, else the split of the model that the project keeps."""
        words = {**dict(override.partition("=")[::2] for override in self.overrides), **self.flags}
        named = str(words.get("split_name", words.get("split", "")))
        return named if named in project.splits else FINAL


@dataclass(frozen=True)
class Configured:
    """A stage with its configuration and its project.

    Attributes:
        request: the user's request.
        config: its configuration.
        project: the project; None if every path was set.
        split: name of the project's split.
    """

    request: Request
    config: Any
    project: Pipeline | None
    split: str

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.request.stage

    def before(self) -> Iterator[tuple[str, Any]]:
        """(stage, configuration) of the project's stages that make the inputs, in order."""
        if self.project is None:
            return
        seen: set[str] = set()
        for key, maker in self.project.inputs(self.stage.name).items():
            if maker and getattr(self.config, key) == str(self.project.place(maker, self.split)):
                yield from _made_by(self.project, self.split, maker, seen)

    def own_place(self) -> str:
        """Path of this stage's result in the project; empty without a project."""
        if self.project is None:
            return ""
        query = ""
        if "{query}" in self.stage.out:
            want = [self.config.want] if isinstance(self.config.want, str) else self.config.want
            query = query_name(want, self.config.given)
        return str(self.project.place(self.stage.name, self.split, query, getattr(self.config, "name", "")))

    def plan(self) -> PlannedStage:
        """The stage with the identity of its result.

        Raises:
            ConfigError: an input is missing; the message has the command that makes it.
        """
        planned = plan(self.stage.name, self.config)
        makers = self.project.inputs(self.stage.name) if self.project else {}
        for key, path in planned.missing.items():
            maker = STAGES.get(makers.get(key, self.stage.inputs[key]))
            if maker is None or self._is_users(maker, path) or planned.state() == "finished":
                continue
            root = f" --root {self.project.root}" if self.project else ""
            source = "SOURCE " if maker.inputs else ""
            command = f"mvhpc {maker.command}{root}" if maker.command else f"shards {maker.name} {source}{path}"
            hint = f"make it with `{command}`" + (", or add --with-inputs" if key in makers else "")
            raise ConfigError(f"{key}={path}: no such file or folder; {hint}")
        return planned

    def _is_users(self, maker: Stage, path: str) -> bool:
        """Whether an input is the user's data, in place of which no phantoms are wanted."""
        drawn = self.project is not None and path == str(self.project.root / maker.out)
        return maker.name == "phantom" and not drawn


def _made_by(project: Pipeline, split: str, stage: str, seen: set[str]) -> Iterator[tuple[str, Any]]:
    if stage in seen or (stage == "phantom" and project.config.source):
        return
    seen.add(stage)
    place = project.place(stage, split)
    if place.exists() and not read_record(STAGES[stage].run_folder(place)):
        return  # the user's own, as what `shards pack` made: used as it is
    for maker in project.inputs(stage).values():
        if maker:
            yield from _made_by(project, split, maker, seen)
    yield stage, project.configure(stage, split)
