"""Stages of benchmarks: those that are complete are reused, chains of them run side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvhpc.config import load_config
from mvhpc.execute import plan
from mvhpc.pipeline.run import do
from mvhpc.stages import STAGES
from shards.processes import process_pool

Stage = tuple[str, str, dict[str, Any]]  # name, preset, values


def complete(root: Path, stage: str, preset: str, values: dict[str, Any]) -> None:
    """Run a stage whose result is not complete; one of other settings or inputs is set aside."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    values["tracking.uri"] = f"sqlite:///{root / 'mlflow.db'}"
    config: Any = load_config(STAGES[stage].config_class(), stage, preset, (), values)
    do(plan(stage, config), f"{stage} ", numbers=False)


def complete_chain(root: Path, stages: Sequence[Stage]) -> None:
    """Run the stages of one chain that are not complete."""
    for stage in stages:
        complete(root, *stage)


def complete_chains(root: Path, chains: Sequence[Sequence[Stage]]) -> None:
    """Run chains of stages, two at a time: one core each is faster than both for one after the other."""
    with process_pool(2) as two:
        for future in [two.submit(complete_chain, root, chain) for chain in chains]:
            future.result()
