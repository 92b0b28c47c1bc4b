"""The `mvhpc` command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mvhpc import __version__
from mvhpc.config import ConfigError, MissingKeys, check_store, to_yaml
from mvhpc.parsers import (
    COMMANDS,
    GROUP,
    commands_elsewhere,
    completion,
    group_help,
    help_elsewhere,
    in_words,
    parser_of,
    required_keys,
)
from mvhpc.runtime.importing import require
from mvhpc.runtime.watchdog import Interrupted
from mvhpc.stages import STAGES, Stage
from shards.errors import DataError, explain, nearest

USAGE = """mvhpc: joint diffusion models of brain MRI and clinical data

usage: mvhpc COMMAND [--config NAME_OR_FILE] [options] [key=value ...]

commands:
{commands}

`mvhpc COMMAND --help` shows a command's options and examples. --config takes a preset (configs/COMMAND/NAME.yaml)
or a YAML file; key=value overrides a single key, as in training.epochs=20; --show-config prints what results.

examples:
  mvhpc run --config demo
  mvhpc train joint compute.workers=4
  mvhpc predict --given image,sex --want age
  mvhpc generate --count 100 --given age=70,sex=F --out synthetic
"""
KEPT = "complete stages are kept, and the same command continues"


def _usage() -> str:
    """Help of the command: one line for each command."""
    lines = {name: command.help for name, command in COMMANDS.items()}
    lines |= {name: help_elsewhere(name) for name in commands_elsewhere()}
    width = max(map(len, lines))
    return USAGE.format(commands="\n".join(f"  {name:{width}s}  {text}" for name, text in lines.items()))


def _loading() -> None:
    """Say why nothing happens for some seconds."""
    if "torch" not in sys.modules:
        print("mvhpc: loading PyTorch and MONAI", file=sys.stderr, flush=True)


def _stage(stage: Stage, options: argparse.Namespace) -> int:
    from mvhpc.pipeline.project import Request, record_project

    flags = {name: text for name in stage.flags if (text := getattr(options, name)) is not None}
    _loading()
    try:
        configured = Request(stage, options.config, options.overrides, flags, options.root).configure()
    except MissingKeys as error:
        keys = [key for key in error.keys if key in required_keys(stage)] or error.keys
        raise ConfigError(f"{stage.command}: give {in_words(stage, keys)}") from error
    if options.show_config:
        print(to_yaml(configured.config), end="")
        return 0
    from mvhpc.execute import execute, plan
    from mvhpc.pipeline.busy import check_stage
    from mvhpc.pipeline.run import do, summary_lines

    config = configured.config
    root = configured.project.root if configured.project else None
    try:
        if options.with_inputs:
            for name, before in configured.before():
                check_stage(plan(name, before), root)
                do(plan(name, before), f"{name}: ")
        planned = configured.plan()
        check_stage(planned, root)
        if configured.project:
            record_project(configured.project.config)
        own = configured.project and config.out == configured.own_place()
        if own or not stage.trains:  # a training continues in its folder, and refuses another one's
            summary = do(planned, f"{stage.name}: ", numbers=False) or planned.summary()
        else:
            summary = execute(planned)
    except KeyboardInterrupt:
        return _interrupted(stage.command, _left(stage, Path(config.out)))
    for line in summary_lines(summary):
        print(line)
    out = Path(config.out)
    print(f"{'written to':32s} {out if out.exists() else out.parent}")
    return 0


def _left(stage: Stage, out: Path) -> str:
    """What is left of an interrupted stage."""
    if not stage.trains:
        return "the same command continues" if stage.resumes else "the same command begins anew"
    from mvhpc.checkpoints.manifest import resumption

    return resumption(out)


def _interrupted(command: str, consequence: str) -> int:
    print(f"mvhpc {command}: interrupted; {consequence}", file=sys.stderr)
    return 130


def _run(options: argparse.Namespace) -> int:
    from mvhpc.pipeline.project import configure_pipeline
    from mvhpc.pipeline.run import run_pipeline

    config = configure_pipeline(options.config, options.overrides, "demo")
    if options.show_config:
        print(to_yaml(config), end="")
        return 0
    print(f"run: project {config.root} (preset {config.preset})", file=sys.stderr)
    _loading()
    try:
        run_pipeline(config)
    except KeyboardInterrupt:
        return _interrupted("run", KEPT)
    return 0


def _export(options: argparse.Namespace) -> int:
    from mvhpc.export import export

    print(f"{export(Path(options.source), Path(options.out))} is written to {options.out}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from mvhpc.pipeline.report import write_report  # imports torch

    root = Path(options.root)
    out = Path(options.out) if options.out else root / "report.html"
    write_report(root, out)
    print(f"written to {out}")
    return 0


def _mlflow_sync(options: argparse.Namespace) -> int:
    from mvhpc.runs.mlflow_store import PATIENCE
    from mvhpc.runs.mlflow_sync import sync

    require("train", "mvhpc mlflow-sync", "mlflow")
    check_store(options.uri)
    os.environ |= PATIENCE
    for folder in map(Path, options.folders):
        sync(folder, options.uri)
        print(f"{folder} is up to date")
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from mvhpc.pipeline.project import find_root
    from mvhpc.runs.dashboard import dashboard

    require("train", "mvhpc dashboard", "mlflow")
    dashboard(options.store or str(find_root()), port=options.port)
    return 0


def _completion(options: argparse.Namespace) -> int:
    print(completion(options.shell), end="")
    return 0


HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "export": _export,
    "report": _report,
    "mlflow-sync": _mlflow_sync,
    "dashboard": _dashboard,
    "completion": _completion,
}


def _do(command: str, rest: Sequence[str]) -> int:
    """Carry out one command."""
    if command == "predict" and any(word.partition("=")[0] == "--bids" for word in rest):
        from mvhpc.bids_app import predict_command

        return predict_command(rest)
    if command in COMMANDS:
        options = parser_of(command).parse_intermixed_args(rest)
        if command in HANDLERS:
            return HANDLERS[command](options)
        return _stage(next(stage for stage in STAGES.values() if stage.command == command), options)
    if command == GROUP:
        print(group_help(), end="", file=sys.stderr)
        return 2
    elsewhere = commands_elsewhere()
    if command in elsewhere:
        return int(elsewhere[command].load()(rest))
    raise ConfigError(nearest(command, [*COMMANDS, *elsewhere], "command"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `mvhpc` command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"mvhpc {__version__}")
        return 0
    if arguments[0] == GROUP and arguments[1:2] in (["-h"], ["--help"]):
        print(group_help(), end="")
        return 0
    command = " ".join(arguments[:2]) if arguments[0] == GROUP else arguments[0]
    rest = arguments[len(command.split()) :]
    try:
        return _do(command, rest)
    except KeyboardInterrupt:
        return _interrupted(command, "nothing was changed")
    except Interrupted as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 75  # EX_TEMPFAIL
    except (ConfigError, DataError) as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mvhpc: {explain(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"mvhpc {command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
