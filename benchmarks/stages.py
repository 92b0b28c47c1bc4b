"""Stages of benchmarks: those that are complete are reused, chains of them run side by side."""

import ctypes
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mvhpc.config import load_config
from mvhpc.execute import plan
from mvhpc.pipeline.run import do
from mvhpc.stages import STAGES

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
    with ProcessPoolExecutor(2, get_context("spawn"), end_with_parent, (os.getpid(),)) as two:
        for future in [two.submit(complete_chain, root, chain) for chain in chains]:
            future.result()


def end_with_parent(parent: int) -> None:
    """Kill a process of the pool when the script dies: it would write into the folders of the next run."""
    pr_set_pdeathsig = 1  # of prctl(2)
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
