"""From what was asked for to jobs: which stages, with which configuration, on how many nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.allocation import Assignment
from launchers.site import Site
from mvhpc.config import ConfigError, load_config, to_dict
from mvhpc.execute import plan
from mvhpc.pipeline.plan import Pipeline, PipelineConfig
from mvhpc.stages import STAGES

ALL = "all"


@dataclass
class Step:
    """One stage to be submitted.

    Attributes:
        stage: its name.
        config: its configuration.
        nodes: for it.
        gpus: of each.
        chained: it is one stage of a pipeline.
        finished: it is complete, and so is all before it: nothing to do.
    """

    stage: str
    config: Any
    nodes: int
    gpus: int
    chained: bool
    finished: bool = False

    @property
    def run(self) -> Path:
        """Its run folder."""
        return STAGES[self.stage].run_folder(self.config.out)

    def assignment(self, site: Site) -> Assignment:
        """What its job does."""
        return Assignment(
            stage=self.stage,
            run=str(self.run.absolute()),
            values=to_dict(self.config),
            inputs={
                # What an earlier job of the chain has yet to make is there when this one starts.
                name: str(getattr(self.config, name))
                for name in STAGES[self.stage].inputs
                if getattr(self.config, name)
            },
            chained=self.chained,
            trains=STAGES[self.stage].trains,
            nodes=self.nodes,
            place=str(Path.cwd()),
            scratch=site.scratch,
            interface=site.interface,
            signal_delay=site.signal_delay,
        )


def single(stage: str, preset: str, overrides: Sequence[str], nodes: int, gpus: int, slurm: bool) -> Step:
    """One stage.

    Raises:
        ConfigError: a configuration, or a number of nodes, that cannot be used.
    """
    config: Any = load_config(STAGES[stage].config_class(), stage, preset, overrides)
    if nodes > 1 and not STAGES[stage].uses_nodes:
        raise ConfigError(f"--nodes {nodes}: {stage} runs on one node; take --nodes 1")
    named = any(word.partition("=")[0] == "compute.workers" for word in overrides)
    return _step(stage, config, nodes, gpus, chained=False, workers_named=named, slurm=slurm)


def chain(preset: str, overrides: Sequence[str], nodes: int, gpus: int, slurm: bool) -> list[Step]:
    """All stages of a pipeline preset, in order."""

    pipeline = Pipeline(load_config(PipelineConfig, "pipeline", preset, overrides))
    steps: list[Step] = []
    for stage, config in pipeline.steps():
        named = getattr(pipeline.config, stage, {}).get("compute", {}).get("workers", 0)
        most = -(-named // max(1, gpus)) if named else nodes  # no more nodes than workers have a place for
        step = _step(stage, config, min(nodes, most) if STAGES[stage].uses_nodes else 1, gpus, True, bool(named), slurm)
        # Behind one that has yet to run, what is there may be outdated by then: its job looks again.
        step.finished = all(s.finished for s in steps) and plan(stage, step.config).state() == "finished"
        steps.append(step)
    return steps


def _step(stage: str, config: Any, nodes: int, gpus: int, chained: bool, workers_named: bool, slurm: bool) -> Step:
    compute = getattr(config, "compute", None)
    gpus = gpus if compute is not None and compute.device != "cpu" else 0
    if slurm and STAGES[stage].uses_nodes and not workers_named:
        config.compute.workers = nodes * max(1, gpus)
    if STAGES[stage].trains:
        parts = config.compute.workers * config.training.accumulate
        if config.training.batch % parts:
            raise ConfigError(
                f"training.batch={config.training.batch} does not divide evenly among {config.compute.workers} "
                f"workers x training.accumulate={config.training.accumulate}; change --nodes, or the batch"
            )
    return Step(stage, config, nodes, gpus, chained)
