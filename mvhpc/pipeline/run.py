"""The stages of a project in turn, reusing what is complete and unchanged; then the table of answers."""

import sys
import time
from typing import Any

from mvhpc.execute import PlannedStage, execute, plan, reconcile, set_aside
from mvhpc.pipeline.plan import Pipeline, PipelineConfig
from mvhpc.pipeline.project import record_project


def do(planned: PlannedStage, label: str = "") -> dict[str, Any] | None:
    """Do a stage that is not complete; a result of other settings or inputs is set aside first.

    Args:
        planned: the stage.
        label: what its lines begin with.

    Returns:
        its summary; None where it was complete.

    Raises:
        Exception: whatever the stage raises.
    """
    state = planned.state()
    if state == "finished":
        reconcile(planned)
        print(f"{label}complete and unchanged: reused {planned.out}", file=sys.stderr)
        return None
    planned.check_inputs()
    print(f"{label}-> {planned.out}", file=sys.stderr)
    if state == "changed":
        print(f"{' ' * len(label)}made with other settings or inputs: set aside", file=sys.stderr)
        set_aside(planned)
    start = time.monotonic()
    summary = execute(planned)
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in summary.items() if isinstance(v, int | float))
    print(f"{' ' * len(label)}done in {time.monotonic() - start:.0f} s: {numbers}", file=sys.stderr)
    return summary


def run_pipeline(config: PipelineConfig) -> Pipeline:
    """Do every stage that is not complete, print the table of answers and say what to open next.

    Raises:
        ConfigError: a stage's configuration cannot be used; before anything is started.
        Exception: whatever a stage raises.
    """
    pipeline = Pipeline(config)
    record_project(config)
    steps = list(pipeline.steps())
    start = time.monotonic()
    for number, (stage, step) in enumerate(steps, 1):
        do(plan(stage, step), f"[{number}/{len(steps)}] {stage:9s} ")
    from mvhpc.pipeline.summary import summarize  # imports torch, which other commands do not need

    print(summarize(pipeline))
    print(f"complete after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return pipeline
