"""The `mvhpc` command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mvhpc.config import ConfigError, load_config, refuse_password
from mvhpc.runtime.watchdog import Interrupted
from mvhpc.stages import STAGES, Stage
from shards.errors import DataError, nearest

USAGE = """mvhpc: joint diffusion models of brain MRI and clinical data

usage: mvhpc COMMAND [--config NAME_OR_FILE] [options] [key=value ...]

commands:
{commands}

`mvhpc COMMAND --help` shows a command's options and examples. --config takes a preset (configs/COMMAND/NAME.yaml)
or a YAML file; key=value overrides a single key, as in training.epochs=20.

examples:
  mvhpc run --config demo
  mvhpc train joint compute.workers=4
  mvhpc predict --given image,sex --want age
  mvhpc generate --count 100 --given age=70,sex=F --out synthetic
"""
PIPELINE = "run all stages of a preset in order; complete and unchanged ones are reused"
OTHERS = {
    "export": "write the model of a checkpoint, of any number of workers",
    "mlflow-sync": "send metrics of run folders to an MLflow store",
    "dashboard": "open the MLflow store, on this machine only",
}


def _usage() -> str:
    """Help of the command: one line for each stage and each other command."""
    lines = {"run": PIPELINE, **{stage.command: stage.help for stage in STAGES.values() if stage.command}, **OTHERS}
    return USAGE.format(commands="\n".join(f"  {name:15s} {text}" for name, text in lines.items()))


def _parser(command: str, examples: Sequence[str], about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"mvhpc {command}",
        description=about,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _stage(stage: Stage, arguments: Sequence[str]) -> int:
    from mvhpc.execute import execute, plan
    from mvhpc.pipeline.project import Request, record_project
    from mvhpc.pipeline.run import do

    parser = _parser(stage.command, stage.examples, stage.help[0].upper() + stage.help[1:] + ".")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="preset or YAML file (default: the project's)")
    parser.add_argument("--root", metavar="FOLDER", help="project (default: the one below runs/ that was used last)")
    parser.add_argument("--with-inputs", action="store_true", help="first run the stages that make missing inputs")
    for name, text in stage.flags.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    options = vars(parser.parse_intermixed_args(arguments))
    preset, overrides, root, with_inputs = (options.pop(k) for k in ("config", "overrides", "root", "with_inputs"))
    flags = {name: text for name, text in options.items() if text is not None}
    configured = Request(stage, preset, overrides, flags, root).configure()
    config = configured.config
    if with_inputs:
        for name, before in configured.before():
            do(plan(name, before), f"{name}: ")
    planned = configured.plan()
    if configured.project:
        record_project(configured.project.config)
    own = configured.project and config.out == configured.own_place()
    if own or not stage.trains:  # a training continues in its folder, and refuses another one's
        summary = do(planned, f"{stage.name}: ") or planned.summary()
    else:
        summary = execute(planned)
    for name, value in summary.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    out = Path(config.out)
    print(f"{'written to':32s} {out if out.exists() else out.parent}")
    return 0


def _run(arguments: Sequence[str]) -> int:
    from mvhpc.pipeline.plan import PipelineConfig
    from mvhpc.pipeline.run import run_pipeline

    parser = _parser(
        "run",
        ("mvhpc run --config demo", "mvhpc run --config demo root=/tmp/demo vae.training.epochs=5"),
        "Run the whole pipeline of a preset: data, autoencoder, latents, joint model, predictions, synthetic people. "
        "Complete and unchanged stages are reused. STAGE.key=value overrides a key of one stage.",
    )
    parser.add_argument("--config", default="demo", metavar="NAME_OR_FILE", help="pipeline preset or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(PipelineConfig, "pipeline", options.config, options.overrides)
    run_pipeline(config)
    return 0


def _export(arguments: Sequence[str]) -> int:
    from mvhpc.export import export

    parser = _parser(
        "export",
        ("mvhpc export runs/joint/checkpoints/step-00001000 --out model", "mvhpc export runs/joint --out model"),
        "Write the model of a checkpoint to a folder, on this machine, whatever the number of workers that wrote it. "
        "Of a run folder the newest checkpoint is used.",
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="model folder to write")
    options = parser.parse_args(arguments)
    print(f"step {export(Path(options.source), Path(options.out))} written to {options.out}")
    return 0


def _mlflow_sync(arguments: Sequence[str]) -> int:
    from mvhpc.runs.mlflow_store import PATIENCE
    from mvhpc.runs.mlflow_sync import sync

    parser = _parser(
        "mlflow-sync",
        ("mvhpc mlflow-sync runs/vae runs/joint", "mvhpc mlflow-sync runs/joint --uri http://127.0.0.1:5000"),
        "Send the journals of run folders to an MLflow store, for runs on machines that cannot reach it. "
        "Points that the store already has are not sent again.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--uri", default="", help="tracking URI (default: that of each run's configuration)")
    options = parser.parse_args(arguments)
    refuse_password(options.uri)
    os.environ |= PATIENCE
    for folder in map(Path, options.folders):
        sync(folder, options.uri)
        print(f"{folder} is up to date")
    return 0


def _dashboard(arguments: Sequence[str]) -> int:
    from mvhpc.runs.dashboard import dashboard

    parser = _parser(
        "dashboard",
        ("mvhpc dashboard", "mvhpc dashboard runs/demo --port 5001"),
        "Open the MLflow store of a folder of runs, on this machine only, protected by a password.",
    )
    parser.add_argument("store", nargs="?", default="runs/demo", help="folder with mlflow.db, or a tracking URI")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    dashboard(options.store, port=options.port)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `mvhpc` command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage(), end="")
        return 0
    handlers: dict[str, Callable[[Sequence[str]], int]] = {
        "run": _run,
        "export": _export,
        "mlflow-sync": _mlflow_sync,
        "dashboard": _dashboard,
    }
    stages = {stage.command: stage for stage in STAGES.values() if stage.command}
    command = " ".join(arguments[:2]) if arguments[0] == "train" else arguments[0]
    rest = arguments[len(command.split()) :]
    try:
        if command == "predict" and any(word.partition("=")[0] == "--bids" for word in rest):
            from mvhpc.bids_app import predict_command

            return predict_command(rest)
        if command in handlers:
            return handlers[command](rest)
        if command in stages:
            return _stage(stages[command], rest)
        raise ConfigError(nearest(command, [*stages, *handlers], "command"))
    except KeyboardInterrupt:
        print(
            "mvhpc: interrupted; run the same command again to continue from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except Interrupted as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 75  # EX_TEMPFAIL
    except (ConfigError, DataError) as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mvhpc: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"mvhpc {command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
