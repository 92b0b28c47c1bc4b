"""The process that runs a job's stage once its nodes form one cluster: `python -m launchers.driver ASSIGNMENT.json`.

Its exit status tells node 0 what to do next.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, load_config
from mvhpc.execute import execute, plan
from mvhpc.pipeline.run import do
from mvhpc.runtime.watchdog import Interrupted
from mvhpc.stages import STAGES
from shards.errors import DataError, explain

# Exit statuses, from sysexits.h. Any other one, as 1 after a hang, is treated as RETRY.
SUCCEEDED, FAILED, RETRY, INTERRUPTED = 0, 65, 70, 75


def run_stage(stage: str, values: dict[str, Any], chained: bool) -> dict[str, Any] | None:
    """Run one stage, from plain values that any process can rebuild its configuration from.

    Args:
        stage: its name.
        values: its complete configuration.
        chained: the stage is one of a pipeline.

    Returns:
        The stage's summary; None where it was complete before. It is skipped then, and an outdated result is set aside;
        a training that is not of a pipeline continues in its folder.
    """
    planned = plan(stage, load_config(STAGES[stage].config_class(), stage, values=values))
    return do(planned, f"{stage}: ") if chained or not planned.stage.trains else execute(planned)


def main(path: Path) -> int:
    """Entry point; returns one of the statuses above."""
    assignment = json.loads(path.read_text())
    try:
        run_stage(assignment["stage"], assignment["values"], assignment["chained"])
        return SUCCEEDED
    except Exception as error:
        print(f"{type(error).__name__}: {explain(error)}", file=sys.stderr, flush=True)
        return exit_status(error)


def exit_status(error: Exception) -> int:
    """The exit status for an exception. One that the command line explains in one line has no traceback here either."""
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, ConfigError | DataError):
        return FAILED
    retry = type(error).__module__.partition(".")[0] == "ray" or isinstance(error, ConnectionError)
    if retry or not isinstance(error, OSError):
        traceback.print_exception(error)
    return RETRY if retry else FAILED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
