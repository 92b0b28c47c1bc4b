"""From the request to jobs: which stages, with which configuration, on how many nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.allocation import Assignment
from launchers.site import Site
from mvhpc.config import ConfigError, Training, flatten, to_dict
from mvhpc.execute import plan
from mvhpc.pipeline.plan import Pipeline
from mvhpc.pipeline.project import Configured, configure_pipeline
from mvhpc.stages import STAGES

ALL = "all"
WORKERS = "compute.workers"


@dataclass
class Step:
    """One stage to be submitted.

    Attributes:
        stage: its name.
        config: its configuration.
        nodes: number of nodes.
        gpus: GPUs of each node.
        chained: it is one stage of a pipeline.
        note: what was changed in its number of workers or nodes, one line; empty: nothing.
        finished: it is complete, and so are all stages before it.
    """

    stage: str
    config: Any
    nodes: int
    gpus: int
    chained: bool
    note: str = ""
    finished: bool = False

    @property
    def run(self) -> Path:
        """Its run folder."""
        return STAGES[self.stage].run_folder(self.config.out)

    def values(self) -> dict[str, Any]:
        """Its complete configuration."""
        return to_dict(self.config)

    def assignment(self, site: Site) -> Assignment:
        """What its job is to do."""
        return Assignment(
            stage=self.stage,
            run=str(self.run.absolute()),
            values=self.values(),
            # An input that an earlier job of the chain has yet to make exists when this one starts.
            inputs={
                name: paths if isinstance(paths, list) else [paths]
                for name in STAGES[self.stage].inputs
                if (paths := getattr(self.config, name))
            },
            chained=self.chained,
            trains=STAGES[self.stage].trains,
            nodes=self.nodes,
            cwd=str(Path.cwd()),
            scratch=site.scratch,
            interface=site.interface,
            signal_delay=site.signal_delay,
        )


def single(configured: Configured, with_inputs: bool, nodes: int, gpus: int, slurm: bool) -> list[Step]:
    """One stage, and before it the stages of its project that make its inputs, if ``with_inputs`` is set.

    Args:
        configured: the stage.
        with_inputs: whether stages that make missing inputs are done first.
        nodes: number of nodes that was requested.
        gpus: GPUs of each node.
        slurm: whether it is for SLURM; else for this machine.

    Raises:
        ConfigError: a configuration, or a number of nodes, that cannot be used; a missing input.
    """
    stage, project = configured.stage, configured.project
    if nodes > 1 and not stage.uses_nodes:
        raise ConfigError(f"--nodes {nodes}: {stage.name} runs on one node; take --nodes 1")
    steps: list[Step] = []
    if with_inputs and project:
        for name, config in configured.before():
            workers_set = project_sets_workers(project, name)
            _append(steps, make_step(name, config, nodes, gpus, True, workers_set, slurm))
    own, workers_set = False, configured.request.sets(WORKERS)
    if project:
        own = configured.config.out == configured.own_place()
        workers_set = workers_set or project_sets_workers(project, stage.name)
        if all(step.finished for step in steps):
            configured.plan()  # refuses a missing input
    _append(steps, make_step(stage.name, configured.config, nodes, gpus, own, workers_set, slurm))
    return steps


def chain(
    preset: str | None, overrides: Sequence[str], nodes: int, gpus: int, slurm: bool
) -> tuple[Pipeline, list[Step]]:
    """All stages of a pipeline, in order; the arguments are those of :func:`single`.

    Without a preset, that of the project in the root, else ``default``.
    """
    pipeline = Pipeline(configure_pipeline(preset, overrides, "default"))
    steps: list[Step] = []
    for stage, config in pipeline.steps():
        workers_set = project_sets_workers(pipeline, stage)
        _append(steps, make_step(stage, config, nodes, gpus, True, workers_set, slurm))
    return pipeline, steps


def _append(steps: list[Step], step: Step) -> None:
    """Add a step; a chained one is finished where its result is, and those of all steps before it."""
    # Behind a stage that has yet to run, a result may be outdated by then; the job itself finds out.
    step.finished = (
        step.chained and all(s.finished for s in steps) and plan(step.stage, step.config).state() == "finished"
    )
    steps.append(step)


def check_first(steps: Sequence[Step]) -> None:
    """Check that the inputs of the first step that is to run exist; those of the others are made before they run.

    Raises:
        ConfigError: naming the first missing key and path.
    """
    first = next((step for step in steps if not step.finished), None)
    if first is not None:
        plan(first.stage, first.config).check_inputs()


def project_sets_workers(project: Pipeline, stage: str) -> bool:
    """Whether the project's own section of a stage sets the number of workers."""
    return WORKERS in flatten(getattr(project.config, stage, {}))


def make_step(stage: str, config: Any, nodes: int, gpus: int, chained: bool, workers_set: bool, slurm: bool) -> Step:
    """A stage with its numbers of nodes and workers.

    On SLURM there is one worker per GPU, or per node without GPUs; on this machine one per requested node. A number of
    workers that the user sets is kept, with no more nodes than it needs. A stage of a chain takes the most nodes whose
    workers divide its batch.

    Args:
        stage: its name.
        config: its configuration; ``compute.workers`` is set here.
        nodes: number of nodes that was requested.
        gpus: GPUs of each node.
        chained: it is one stage of a pipeline.
        workers_set: the user sets ``compute.workers``.
        slurm: whether it is for SLURM; else for this machine.

    Raises:
        ConfigError: the batch cannot be divided among the workers.
    """
    compute = getattr(config, "compute", None)
    gpus = gpus if getattr(compute, "device", "cpu") != "cpu" else 0
    per_node = max(1, gpus) if slurm else 1
    note = ""
    if not STAGES[stage].uses_nodes:
        nodes = 1
    elif workers_set:
        needed = -(-config.compute.workers // per_node) if slurm else 1
        if needed < nodes:
            place = f"{needed} of {nodes} nodes" if slurm else f"this machine, not {nodes} nodes"
            note = f"{WORKERS}={config.compute.workers}, as configured: runs on {place}"
            nodes = needed
    elif slurm or nodes > 1:
        if chained and STAGES[stage].trains:  # of all nodes of the chain, as many as divide this stage's batch
            nodes = next((n for n in range(nodes, 1, -1) if _divides(config.training, n * per_node)), 1)
        preset, config.compute.workers = config.compute.workers, nodes * per_node
        if preset != config.compute.workers:
            layout = f"{nodes} node{'s' * (nodes > 1)} x {per_node}" if slurm else "on this machine"
            note = f"{WORKERS}={config.compute.workers} ({layout}), in place of the preset's {preset}"
    if STAGES[stage].trains and not _divides(config.training, config.compute.workers):
        raise ConfigError(
            f"training.batch={config.training.batch} does not divide evenly among {config.compute.workers} "
            f"workers x training.accumulate={config.training.accumulate}; change --nodes, or the batch"
        )
    return Step(stage, config, nodes if slurm else 1, gpus, chained, note)


def _divides(training: Training, workers: int) -> bool:
    return training.batch % (workers * training.accumulate) == 0
