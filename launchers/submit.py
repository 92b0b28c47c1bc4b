"""Submit stages as jobs, to SLURM or to this machine: `mvhpc submit --stage joint --nodes 4`.

The same as `python launchers/submit.py`.
"""

import sys
from importlib.util import find_spec

if __name__ == "__main__" and not (find_spec("launchers") and find_spec("omegaconf")):
    print(
        f"submit.py: {sys.executable} lacks mvhpc or a package that it needs; activate the environment that has them, "
        "as by `source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

import argparse
import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers import conflicts, jobs, jobs_cli, local, plan, slurm
from launchers.jobs import PROG, Job
from launchers.plan import Step
from launchers.queries import check_queries
from launchers.site import Site, check_time, load_site
from launchers.supervisor import supervise
from mvhpc.config import ConfigError, choose, to_yaml
from mvhpc.pipeline.plan import Pipeline
from mvhpc.pipeline.project import Request, record_project
from mvhpc.pipeline.run import summary_lines
from mvhpc.runs.folder import read_record
from mvhpc.runs.holder import process_start
from mvhpc.stages import STAGES
from shards.__main__ import OneLineParser
from shards.errors import DataError, counted, explain

EXAMPLES = """examples:
  mvhpc submit --stage pack --config demo source=scans out=runs/packed
  mvhpc submit --stage vae --config demo data=runs/packed out=runs/vae compute.workers=2
  mvhpc submit --stage joint --nodes 4 --gpus-per-node 8 --dry-run latents=runs/latents vae=runs/vae \\
      out=runs/joint
  mvhpc submit --stage all --config demo --nodes 2 root=runs/demo
  mvhpc submit status
  mvhpc submit logs 1234 --follow
  mvhpc submit cancel 1234

`python launchers/submit.py` is the same command. key=value sets any key of the stage's configuration (of the
pipeline's, with --stage all); --dry-run shows them all. The job's files and logs are in `jobs` in the run folder. An
interrupted stage resumes from its last checkpoint when it is submitted again; while its job is pending or running, it
cannot be submitted a second time.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done or submitted, 1 job failed, 2 invalid arguments, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in {"status", "logs", "cancel"}:
            return jobs_cli.main(words)
        return _submit(_parser().parse_intermixed_args(words))
    except (ConfigError, DataError, OSError) as error:
        print(f"{PROG}: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; `{PROG} status` shows what was submitted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROG,
        description="Submit one stage of the pipeline, or all of them, as jobs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", required=True, help=", ".join([*STAGES, plan.ALL]))
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="number of nodes (default: 1); without SLURM, of workers on this machine",
    )
    parser.add_argument(
        "--min-nodes", type=int, metavar="M", help="number of nodes to start with at least (default: N)"
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each node (default: the site's)")
    parser.add_argument(
        "--time", metavar="LIMIT", help="minutes, hours:minutes:seconds or days-hours (default: the site's)"
    )
    parser.add_argument("--partition", help="of SLURM (default: the site's)")
    parser.add_argument("--account", help="of SLURM (default: the site's)")
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="preset or YAML file of the stage, or with --stage all of the pipeline (default: the project's)",
    )
    parser.add_argument(
        "--root",
        metavar="FOLDER",
        help="project (default: the one below runs/ that was used last; with --stage all that of the configuration)",
    )
    parser.add_argument("--given", metavar="A,B", help="known variables, of a stage that has them, as predict")
    parser.add_argument("--want", metavar="A,B", help="variables to predict or to sample")
    parser.add_argument("--with-inputs", action="store_true", help="first do the stages that make missing inputs")
    parser.add_argument("--cluster", default="auto", help="auto (default: slurm if it is available), slurm or local")
    parser.add_argument(
        "--cluster-config", default="default", metavar="NAME_OR_FILE", help="site in configs/cluster, or a YAML file"
    )
    parser.add_argument("--wait", action="store_true", help="follow the job until it ends (always on this machine)")
    parser.add_argument("--dry-run", action="store_true", help="show configuration and job; submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    return parser


def _submit(options: argparse.Namespace) -> int:
    stage = choose(options.stage, [*STAGES, plan.ALL], "stage")
    cluster = choose(options.cluster, ["auto", "slurm", "local"], "cluster")
    if cluster == "auto":
        cluster = "slurm" if slurm.available() else "local"
    on_slurm = cluster == "slurm"
    site = load_site(
        options.cluster_config,
        {
            "partition": options.partition,
            "account": options.account,
            "time": options.time,
            "gpus_per_node": options.gpus_per_node,
        },
    )
    if on_slurm:
        check_time(site)
    if options.nodes < 1:
        raise ConfigError(f"--nodes {options.nodes}: give at least 1")
    if options.min_nodes is not None and not 1 <= options.min_nodes <= options.nodes:
        raise ConfigError(f"--min-nodes {options.min_nodes} --nodes {options.nodes}: give 1 <= M <= N")
    layout = (options.nodes, site.gpus_per_node, on_slurm)
    project: Pipeline | None
    query = {key: text for key in ("given", "want") if (text := getattr(options, key)) is not None}
    if stage == plan.ALL:
        if query:
            raise ConfigError(f"--{next(iter(query))} is of a single stage; a pipeline has `queries` in its YAML")
        root = [] if options.root is None else [f"root={json.dumps(options.root)}"]
        project, steps = plan.chain(options.config, [*options.overrides, *root], *layout)
    else:
        for key in query.keys() - {field.name for field in dataclasses.fields(STAGES[stage].config_class())}:
            raise ConfigError(f"--{key}: stage {stage} has no key {key}")
        configured = Request(STAGES[stage], options.config, options.overrides, query, options.root).configure()
        project, steps = configured.project, plan.single(configured, options.with_inputs, *layout)
    start: Callable[[Step, str | None], Job] = (
        (lambda step, after: _to_slurm(step, site, options.min_nodes, after)) if on_slurm else _to_local(site)
    )
    notes = dict.fromkeys(f"{step.stage}: {step.note}" for step in steps if step.note and not step.finished)
    for note in notes:  # of several queries one
        print(note, file=sys.stderr)
    if on_slurm:
        _warn_of_nodes(steps, site, options.min_nodes)
    if options.dry_run:
        for step in steps:
            _show(step, site, options.min_nodes, on_slurm)
        return 0
    plan.check_first(steps)
    check_queries(steps)
    conflicts.check_steps(steps, project.root if project else None, on_slurm)
    if project:
        with _writable():
            record_project(project.config)
    after: str | None = None
    status = 0
    for step in steps:
        if step.finished:
            print(f"{step.stage}: complete and unchanged: reused {step.config.out}", file=sys.stderr)
            continue
        job = _submit_step(step, site, after, start)
        after = job.id
        if not on_slurm or (options.wait and step is steps[-1]):
            status = _watch(job, step.config.out)
            if status:
                return status
        else:
            print(f"job {job.id}: {step.stage}, log in {job.log}", file=sys.stderr)
            print(job.id)
    if on_slurm and not options.wait and after:
        print(f"follow it with `{PROG} logs {after} --follow`, or see `{PROG} status`", file=sys.stderr)
    if stage == plan.ALL and project and after:
        print(f"when all jobs are done, `mvhpc run root={project.root}` prints the results", file=sys.stderr)
    return status


def _warn_of_nodes(steps: Sequence[Step], site: Site, min_nodes: int | None) -> None:
    """Say where a job needs more nodes than its partition has, and so waits for ever."""
    needed = max((min(min_nodes or step.nodes, step.nodes) for step in steps if not step.finished), default=1)
    there = slurm.nodes_of(site.partition) if needed > 1 else 0
    if there and there < needed:
        name = f"partition {site.partition}" if site.partition else "the default partition"
        print(f"warning: {name} has {counted(there, 'node')}, so a job on {needed} waits for ever", file=sys.stderr)


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Raises ConfigError where a folder cannot be made or written inside."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be made or written ({error.strerror}); choose another root or out"
        ) from error


def _submit_step(step: Step, site: Site, after: str | None, start: Callable[[Step, str | None], Job]) -> Job:
    """Submit a step and make its job the holder of the run folder.

    An earlier job of a chained step that is pending or running, with the same values, is returned as it is.

    Raises:
        ConfigError: another job holds the run folder (:mod:`launchers.conflicts`); the folder cannot be made, or SLURM
            refuses the job.
    """
    with _writable():
        step.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    with jobs.locked(step.run) as lock:
        holder = lock.holder
        if holder is not None and (now := jobs_cli.state(holder)):
            conflicts.check_holder(step, holder, now)
            print(f"{step.stage}: job {holder.id} is already {now}", file=sys.stderr)
            return holder
        job = start(step, after)
        lock.set_holder(job)
        job.save(step.assignment(site))
    return job


def _to_slurm(step: Step, site: Site, min_nodes: int | None, after: str | None) -> Job:
    submitter = _slurm_executor(step, site, min_nodes, after)
    number = slurm.submit(submitter, supervise, step.assignment(site))
    return jobs.new_job(step.run, number, "slurm", step.stage, step.nodes)


def _slurm_executor(step: Step, site: Site, min_nodes: int | None, after: str | None) -> Any:
    least = min(min_nodes or step.nodes, step.nodes)
    folder = (step.run / "jobs").absolute()
    return slurm.executor(folder, site, step.stage, step.nodes, least, step.gpus, after)


def _to_local(site: Site) -> Callable[[Step, str | None], Job]:
    def start(step: Step, after: str | None) -> Job:
        found = local.submit(step.run / "jobs", step.assignment(site))
        _STARTED.append(found)
        return jobs.new_job(step.run, found.job_id, "local", step.stage, 1, process_start(found.job_id))

    return start


_STARTED: list[Any] = []  # submitit ends a local job whose object is garbage collected


def _show(step: Step, site: Site, min_nodes: int | None, on_slurm: bool) -> None:
    """Print what would be submitted, as YAML with the job in comments."""
    if on_slurm:
        script = slurm.script(_slurm_executor(step, site, min_nodes, None))
    else:
        script = local.script(step.run / "jobs")
    print(f"# stage {step.stage}, run folder {step.run}; the job:")
    print("".join(f"#   {line}\n" for line in script.splitlines()) + to_yaml(step.config), end="")


def _watch(job: Job, out: str) -> int:
    """Show a job's log as it grows, then its result. An interrupt cancels a local job."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` or nohup has set it to be ignored
        signal.signal(number, signal.default_int_handler)
    print(f"job {job.id}: {job.stage}, log in {job.log}", file=sys.stderr)
    try:
        for line in jobs_cli.log_lines(job):
            print(line, file=sys.stderr, flush=True)
        while jobs_cli.goes_on(job):
            time.sleep(jobs_cli.POLL_S)
    except KeyboardInterrupt:
        if job.cluster == "slurm":
            print(f"job {job.id} continues; end it with `{PROG} cancel {job.id}`", file=sys.stderr)
            return 130
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends the second one to the job too
        first = "; it writes a checkpoint first, and Ctrl-C again ends it at once" if STAGES[job.stage].trains else ""
        print(f"ending job {job.id}{first}", file=sys.stderr, flush=True)
        jobs_cli.cancel(job)
        print(f"job {job.id} cancelled; {jobs_cli.restart(job)}", file=sys.stderr)
        return 130
    if not jobs.outcome(job).startswith("finished"):
        print(f"job {job.id} {jobs.outcome(job)}; log in {job.log}", file=sys.stderr)
        return 1
    for line in summary_lines(read_record(Path(job.run)).get("summary", {})):
        print(line)
    print(f"{'written to':32s} {out}")
    return 0


if __name__ == "__main__":
    from launchers.submit import main as imported  # a job imports its function by this name

    sys.exit(imported())
