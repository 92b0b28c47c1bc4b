"""What a job does once its nodes are one cluster: `python -m launchers.driver WORK.json`, a process of its own.

Its exit status tells the supervisor what to do next.
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

DONE, WRONG, AGAIN, STOPPED = 0, 65, 70, 75  # sysexits; the last wrote a checkpoint. 1, of a hang, is tried again


def run(stage: str, values: dict[str, Any], chained: bool) -> dict[str, Any] | None:
    """Do one stage, from plain values that any process can rebuild its configuration from.

    Args:
        stage: its name.
        values: its whole configuration.
        chained: it is one of a pipeline: what is finished is not done again, what is outdated is set aside.

    Returns:
        its summary; None where it was finished before.
    """
    planned = plan(stage, load_config(STAGES[stage].config_class(), stage, values=values))
    return do(planned, f"{stage}: ") if chained else execute(planned)


def main(path: Path) -> int:
    """Entry point; returns one of the statuses above."""
    work = json.loads(path.read_text())
    try:
        run(work["stage"], work["values"], work["chained"])
        return DONE
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return verdict(error)


def verdict(error: Exception) -> int:
    """The exit status that an exception stands for."""
    if isinstance(error, Interrupted):
        return STOPPED
    if isinstance(error, ConfigError):
        return WRONG
    traceback.print_exception(error)
    origin = type(error).__module__.partition(".")[0]
    return AGAIN if origin == "ray" or isinstance(error, ConnectionError) else WRONG


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
