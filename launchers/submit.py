"""Submit a stage as a job, watch it, and report how it ended: `python launchers/submit.py --stage joint --nodes 1`."""

import argparse
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers import local
from mvhpc.config import ConfigError, choose, load_config, to_dict, to_yaml
from mvhpc.run import execute, run_folder
from mvhpc.stages import STAGES

CLUSTERS = {"local": local}  # name -> module with executor(folder, nodes) and script(folder, nodes)
POLL_S = 0.5
TAIL = 8  # lines of the log that a failure shows

EXAMPLES = """examples:
  python launchers/submit.py --stage pack --config demo source=scans out=runs/packed
  python launchers/submit.py --stage vae --config demo data=runs/packed out=runs/vae compute.workers=2
  python launchers/submit.py --stage joint --nodes 1 --dry-run latents=runs/latents vae=runs/vae out=runs/joint
  python launchers/submit.py --stage predict model=runs/joint data=runs/packed "given=[image]" "want=[age]" out=age.tsv

key=value sets any key of the stage's configuration; --dry-run shows them all. The job's files and its log are in
`jobs` in the run folder. A stage that was interrupted goes on from its last checkpoint when it is submitted again.
"""


def work(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """What the job does: the stage, from plain values that any process can rebuild its configuration from."""
    return execute(stage, load_config(STAGES[stage].config, stage, values=values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the job failed, 2 wrong arguments, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Submit one stage of the pipeline as a job, show its progress, and report how it ended.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", required=True, help=", ".join(STAGES))
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines to run on (default: 1)")
    parser.add_argument("--config", default="default", metavar="NAME_OR_FILE", help="preset of the stage or YAML file")
    parser.add_argument("--cluster", default="auto", help=f"auto (default), {', '.join(CLUSTERS)}")
    parser.add_argument("--dry-run", action="store_true", help="show configuration and job, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    try:
        stage = choose(options.stage, list(STAGES), "stage")
        name = choose(options.cluster, ["auto", *CLUSTERS], "cluster")
        config: Any = load_config(STAGES[stage].config, stage, options.config, options.overrides)
        cluster = CLUSTERS["local" if name == "auto" else name]
        folder = run_folder(stage, config.out)
        if options.dry_run:
            script = cluster.script(folder / "jobs", options.nodes).splitlines()
            print(f"# stage {stage}, run folder {folder}; the job:")
            print("".join(f"#   {line}\n" for line in script) + to_yaml(config), end="")
            return 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        executor = cluster.executor(folder / "jobs", options.nodes)
    except ConfigError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` or nohup had it ignored
        signal.signal(number, signal.default_int_handler)
    return _watch(executor.submit(work, stage, to_dict(config)), stage, config.out)


def _watch(job: Any, stage: str, out: str) -> int:
    """Show a job's log as it grows, then its result; an interrupt cancels it."""
    log = Path(job.paths.stdout)
    print(f"job {job.job_id}: {stage}, log in {log}", file=sys.stderr)
    try:
        for line in _lines(job, log):
            print(line, file=sys.stderr, flush=True)
        summary = job.result()
    except KeyboardInterrupt:
        job.cancel()
        while not job.done():
            time.sleep(POLL_S)
        print(f"job {job.job_id} cancelled; submit it again to go on from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:  # as many kinds as there are ways to end
        tail = deque(log.open(errors="replace"), TAIL) if log.is_file() else [str(error)]
        print(f"job {job.job_id} failed; the end of {log}:\n" + "".join(tail), file=sys.stderr)
        return 1
    for name, value in summary.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    print(f"{'written to':32s} {out}")
    return 0


def _lines(job: Any, log: Path) -> Iterator[str]:
    """The lines of a job's log as they come, until it ends; submitit's own and the traceback of a failure left out."""
    position, rest, over = 0, "", False
    while not over:
        over = job.done()
        if log.is_file():
            with log.open(errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                if line.startswith("submitit ERROR"):
                    return
                if not line.startswith("submitit "):
                    yield line
        if not over:
            time.sleep(POLL_S)


if __name__ == "__main__":
    from launchers.submit import main as imported  # under its importable name, which is how a job finds `work`

    sys.exit(imported())
