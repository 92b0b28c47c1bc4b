"""The main job: every stage of a preset in turn, reusing what is complete and unchanged, then the table of answers."""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvhpc.config import CONFIGS, load_config
from mvhpc.evaluation.report import report
from mvhpc.run import execute, identity, record, run_folder, stage_fingerprint
from mvhpc.stages import STAGES


@dataclass
class Question:
    """What is wanted, given what."""

    want: list[str]
    given: list[str]

    @property
    def name(self) -> str:
        """A file name that says it: ``age-given-image-sex``."""
        return f"{'-'.join(self.want)}-given-{'-'.join(self.given) or 'nothing'}"


@dataclass
class PipelineConfig:
    """`mvhpc run`: presets, places and questions; one free mapping of overrides per stage."""

    preset: str
    root: str
    source: str
    folds: int
    questions: list[Question]
    phantom: dict[str, Any]
    pack: dict[str, Any]
    vae: dict[str, Any]
    encode: dict[str, Any]
    joint: dict[str, Any]
    predict: dict[str, Any]
    generate: dict[str, Any]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Pipeline:
    """The stages of one pipeline, each with its resolved configuration.

    Attributes:
        steps: (stage, configuration) in order.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.root = Path(config.root)
        self.source = Path(config.source) if config.source else self.root / "source"
        self.splits = (
            {f"fold-{k}-of-{config.folds}": self.root / f"fold-{k}" for k in range(1, config.folds + 1)}
            if config.folds
            else {"default": self.root}
        )
        self.steps = list(self._steps())

    def _stage(self, stage: str, **values: Any) -> tuple[str, Any]:
        preset = self.config.preset
        if not (CONFIGS / stage / f"{preset}.yaml").is_file():
            preset = "default"
        overrides = _flat(getattr(self.config, stage))
        values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
        tracking = {"tracking.uri": f"sqlite:///{self.root / 'mlflow.db'}"}
        return stage, load_config(STAGES[stage].config, stage, preset, (), tracking | overrides | values)

    def _steps(self) -> Iterator[tuple[str, Any]]:
        if not self.config.source:
            yield self._stage("phantom", out=self.source)
        data = self.root / "packed"
        yield self._stage("pack", source=self.source, out=data, folds=self.config.folds)
        for split, folder in self.splits.items():
            vae, latents, joint = folder / "vae", folder / "latents", folder / "joint"
            yield self._stage("vae", data=data, split=split, out=vae)
            yield self._stage("encode", data=data, vae=vae, split=split, out=latents)
            yield self._stage("joint", latents=latents, vae=vae, split=split, out=joint)
            for question in self.config.questions:
                yield self._stage(
                    "predict",
                    model=joint,
                    data=data,
                    split_name=split,
                    want=question.want,
                    given=question.given,
                    out=self.predictions(folder, question),
                )
        yield self._stage("generate", model=joint, out=self.root / "synthetic")

    @staticmethod
    def predictions(folder: Path, question: Question) -> Path:
        """The TSV file of the answers to one question."""
        return folder / "predictions" / f"{question.name}.tsv"


def state(stage: str, config: Any) -> str:
    """``finished``, ``running`` (begun with this configuration and these inputs), ``changed`` or ``new``."""
    written, output = record(run_folder(stage, config.out)), Path(config.out)
    if not written:
        return "changed" if output.exists() else "new"
    try:
        inputs = {name: identity(getattr(config, name)) for name in STAGES[stage].inputs}
    except FileNotFoundError:
        return "changed"
    if written["fingerprint"] != stage_fingerprint(stage, config, inputs):
        return "changed"
    return written["status"] if output.exists() else "new"


def set_aside(path: Path) -> None:
    """Rename an outdated result to ``NAME.old-N``, so that nothing is lost."""
    if path.exists():
        number = 1 + len(list(path.parent.glob(f"{path.name}.old-*")))
        path.rename(path.with_name(f"{path.name}.old-{number}"))


def run_pipeline(config: PipelineConfig) -> Pipeline:
    """Do every stage that is not complete, print the table of answers and say what to open next.

    Raises:
        ConfigError: a stage's configuration cannot be used; before anything is started.
        whatever a stage raises.
    """
    pipeline = Pipeline(config)
    start = time.time()
    for number, (stage, step) in enumerate(pipeline.steps, 1):
        label = f"[{number}/{len(pipeline.steps)}] {stage:9s}"
        now = state(stage, step)
        if now == "finished":
            print(f"{label} complete and unchanged: reused {step.out}", file=sys.stderr)
            continue
        print(f"{label} -> {step.out}", file=sys.stderr)
        began = time.time()
        if now == "changed":
            print(f"{' ' * len(label)} made with other settings or inputs: set aside", file=sys.stderr)
            for outdated in {Path(step.out), run_folder(stage, step.out)}:
                set_aside(outdated)
        summary = execute(stage, step)
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in summary.items() if isinstance(v, int | float))
        print(f"{' ' * len(label)} done in {time.time() - began:.0f} s: {numbers}", file=sys.stderr)
    print(report(pipeline))
    print(f"complete after {time.time() - start:.0f} s", file=sys.stderr)
    return pipeline
