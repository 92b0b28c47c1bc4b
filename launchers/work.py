"""What a job does once its nodes are one cluster: `python -m launchers.work WORK.json`, a process of its own.

Its exit status tells the supervisor what to do next.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, load_config
from mvhpc.run import Interrupted, execute, run_folder
from mvhpc.stages import STAGES

DONE, WRONG, AGAIN, STOPPED = 0, 65, 70, 75  # sysexits; the last wrote a checkpoint. 1, of a hang, is tried again


def prepare(stage: str, config: Any) -> bool:
    """Make way for a stage of a pipeline: whether there is anything to do.

    A result of other settings or inputs is set aside, as `mvhpc run` does, but for the folder of this very job.
    """
    from mvhpc.pipeline import set_aside, state

    now = state(stage, config)
    if now == "finished":
        print(f"complete and unchanged: reused {config.out}", file=sys.stderr)
        return False
    if now != "changed":
        return True
    folder = run_folder(stage, config.out)
    outdated = [child for child in folder.iterdir() if child.name != "jobs"] if folder.is_dir() else []
    if outdated or Path(config.out) != folder:
        print(f"{config.out} was made with other settings or inputs: set aside", file=sys.stderr)
    if Path(config.out) != folder:
        set_aside(Path(config.out))
    if outdated:
        number = 1 + len(list(folder.parent.glob(f"{folder.name}.old-*")))
        old = folder.with_name(f"{folder.name}.old-{number}")
        old.mkdir(mode=0o700)
        for child in outdated:
            child.rename(old / child.name)
    return True


def run(stage: str, values: dict[str, Any], chained: bool) -> dict[str, Any] | None:
    """Do one stage, from plain values that any process can rebuild its configuration from.

    Args:
        stage: its name.
        values: its whole configuration.
        chained: it is one of a pipeline, whose finished stages are not done again.

    Returns:
        its summary; None where it was finished before.
    """
    config: Any = load_config(STAGES[stage].config, stage, values=values)
    if chained and not prepare(stage, config):
        return None
    return execute(stage, config)


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
