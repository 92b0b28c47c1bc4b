"""Runs the stages of a project in order, reuses complete and unchanged ones, and prints the table of results."""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mvhpc.config import ConfigError, to_dict
from mvhpc.execute import PlannedStage, execute, plan, reconcile, set_aside
from mvhpc.pipeline.busy import check_project
from mvhpc.pipeline.plan import RESULTS, Pipeline, PipelineConfig
from mvhpc.pipeline.project import record_project
from mvhpc.runs.pipeline_run import PipelineRun
from mvhpc.stages import STAGES


def do(planned: PlannedStage, label: str = "", numbers: bool = True) -> dict[str, Any] | None:
    """Run a stage that is not complete, and print its notes. A result of other settings or inputs is set aside first.

    Args:
        planned: the stage.
        label: beginning of the printed lines.
        numbers: also print those of the summary.

    Returns:
        Its summary; None if it was complete.

    Raises:
        ConfigError: the path of the result holds something that the stage did not make.
        Exception: as the stage raises.
    """
    state = planned.state()
    if state == "finished":
        reconcile(planned)
        print(f"{label}complete and unchanged: reused {planned.out}", file=sys.stderr)
        return None
    planned.check_inputs()
    if state == "unknown":
        found = next((path for path in planned.files if path.exists()), planned.out)
        raise ConfigError(
            f"{found} exists, and no record says that stage {planned.stage.name} made it; "
            "move it, or choose another root or out"
        )
    print(f"{label}-> {planned.out}", file=sys.stderr)
    if state == "changed":
        print(f"{' ' * len(label)}made with other settings or inputs: set aside", file=sys.stderr)
        set_aside(planned)
    start = time.monotonic()
    summary = execute(planned)
    shown = ", ".join(f"{k} {_number(v)}" for k, v in summary.items() if isinstance(v, int | float))
    took = f"{' ' * len(label)}done in {time.monotonic() - start:.0f} s"
    print(f"{took}: {shown}" if numbers else took, file=sys.stderr)
    if summary.get("rejected"):
        print(f"rejected {summary['rejected']:,}: see {planned.out / 'rejected.tsv'}", file=sys.stderr)
    for note in summary.get("notes", ()):
        print(f"note: {note}", file=sys.stderr)
    return summary


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """A stage's summary, one line a value, without the notes, which :func:`do` prints."""
    for name, value in summary.items():
        if not isinstance(value, list):
            yield f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}"


def run_pipeline(config: PipelineConfig) -> Pipeline:
    """Run every stage that is not complete, and print the table of results and further commands.

    Raises:
        ConfigError: a stage's configuration is invalid, the source is missing, or jobs or processes are at work in the
            project; raised before any stage is started.
        Exception: as a stage raises.
    """
    pipeline = Pipeline(config)
    steps = list(pipeline.steps())  # checks all configurations
    check_project(pipeline.root, [STAGES[stage].run_folder(step.out) for stage, step in steps])
    if (first := plan(*steps[0])).state() != "finished":
        first.check_inputs()  # a project without its source is none
    record_project(config)
    start = time.monotonic()
    tracking = steps[0][1].tracking
    values = {key: value for key, value in to_dict(config).items() if key not in {"root", "source"}}
    with PipelineRun(pipeline.root, values, tracking.uri, tracking.experiment) as tracked:
        found: dict[str, dict[str, Any]] = {}
        for number, (stage, step) in enumerate(steps, 1):
            planned = plan(stage, step)
            done = do(planned, f"[{number}/{len(steps)}] {stage:9s} ")
            tracked.changed |= done is not None
            if stage == "predict" and not config.folds:  # of folds the table has the results over all of them
                found.setdefault(" and ".join(step.given) or "nothing", {}).update(done or planned.summary())
        from mvhpc.pipeline.summary import summarize  # imports torch, which other commands do not need

        before = results.read_text() if (results := pipeline.root / RESULTS).is_file() else ""
        print(summarize(pipeline))
        tracked.changed |= not tracked.reported or results.read_text() != before  # jobs may have run all stages
        if tracked.changed:
            tracked.results(found)
            tracked.run.keep(results, "results")
            for picture in sorted((pipeline.root / "figures").glob("*.png")):
                tracked.run.keep(picture, "figures")
    print(f"complete after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return pipeline
