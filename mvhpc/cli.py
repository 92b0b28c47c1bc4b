"""The `mvhpc` command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, load_config, refuse_password
from mvhpc.run import Interrupted
from shards.errors import DataError, nearest

USAGE = """mvhpc: one diffusion model over everything known of a person, and every question answered from it

usage: mvhpc COMMAND [--config NAME_OR_FILE] [options] [key=value ...]

commands:
  run             the whole pipeline of a preset, stage after stage; complete, unchanged stages are reused
  train vae       train the autoencoder of the volumes
  encode          encode all volumes to latents
  train joint     train the joint diffusion of latents, numbers and categories
  train baseline  train a DenseNet121 for one question alone, to compare with
  predict         answer a question about every subject of a packed data set
  generate        make synthetic people, as a BIDS tree
  translate       draw one volume of every subject from the others: a contrast that was not taken
  inpaint         fill in the part of a volume that a mask does not call known
  export          write the model of any checkpoint, of any number of workers
  mlflow-sync     bring an MLflow store up to date with run folders
  dashboard       open the MLflow store, on this machine only

`mvhpc COMMAND --help` shows a command's options and examples. --config takes a preset (configs/COMMAND/NAME.yaml)
or a YAML file; key=value sets any single key over it, as in training.epochs=20.

examples:
  mvhpc run --config demo
  mvhpc train joint --config paper latents=runs/latents vae=runs/vae out=runs/joint compute.workers=4
  mvhpc predict --model runs/joint --data runs/packed --given image,sex --want age --out age.tsv
  mvhpc generate --model runs/joint --count 100 --given age=70,sex=F --out synthetic
"""

# command -> (stage, examples, {flag: help}); a flag sets the configuration key of its name
COMMANDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "train vae": (
        "vae",
        "mvhpc train vae --config demo\n  mvhpc train vae data=runs/packed out=runs/vae training.epochs=100",
        {},
    ),
    "train joint": (
        "joint",
        "mvhpc train joint --config paper latents=runs/latents vae=runs/vae out=runs/joint compute.workers=4",
        {},
    ),
    "train baseline": (
        "baseline",
        "mvhpc train baseline data=runs/packed want=age given=[image,sex] out=runs/densenet-age",
        {},
    ),
    "encode": ("encode", "mvhpc encode data=runs/packed vae=runs/vae out=runs/latents", {}),
    "predict": (
        "predict",
        "mvhpc predict --model runs/joint --data runs/packed --split test --given image,sex --want age "
        "--out age.tsv\n"
        "  mvhpc predict --model runs/joint --data runs/packed --given image --want age,sex --draws 100 --out both.tsv",
        {
            "model": "run folder of a joint model or a baseline",
            "data": "packed data set",
            "split": "train, validation, test or all",
            "given": "variables that are known, by comma; empty for none",
            "want": "variables to predict, by comma",
            "samples": "chains per subject, for models that are asked by chains",
            "draws": "joint draws per subject of all that is wanted, into a second table",
            "out": "TSV file to write, one row a subject",
        },
    ),
    "generate": (
        "generate",
        "mvhpc generate --model runs/joint --count 100 --out synthetic\n"
        "  mvhpc generate --model runs/joint --count 8 --given age=70,sex=F --out women70",
        {
            "model": "run folder of the joint model",
            "count": "number of people",
            "given": "what is fixed, as name=value,name=value",
            "out": "BIDS tree to write",
        },
    ),
    "translate": (
        "translate",
        "mvhpc translate --model runs/joint --data runs/packed --given image,age --want t2w --out synthetic-t2w",
        {
            "model": "run folder of the joint model",
            "data": "packed data set",
            "split": "train, validation, test or all",
            "given": "variables that are known, by comma",
            "want": "the volume to draw",
            "out": "BIDS derivative to write",
        },
    ),
    "inpaint": (
        "inpaint",
        "mvhpc inpaint --model runs/joint --image scan.nii.gz --mask known.nii.gz --out filled.nii.gz",
        {
            "model": "run folder of the joint model",
            "image": "NIfTI volume",
            "mask": "NIfTI volume, non-zero where the image is known",
            "given": "what is known besides, as name=value,name=value",
            "samples": "completions to draw",
            "out": "NIfTI file to write",
        },
    ),
}
LISTS = {"predict": {"given", "want"}, "translate": {"given"}}
MAPPINGS = {"generate": {"given"}, "inpaint": {"given"}}


def _values(command: str, flags: dict[str, str | None]) -> dict[str, Any]:
    """Flags as configuration values: ``image,sex`` as a list, ``age=70,sex=F`` as a mapping."""
    values: dict[str, Any] = {}
    for name, text in flags.items():
        if text is None:
            continue
        parts = [p.strip() for p in text.split(",") if p.strip()]
        if name in LISTS.get(command, ()):
            values[name] = parts
        elif name in MAPPINGS.get(command, ()):
            for part in parts:
                key, equals, value = part.partition("=")
                if not equals:
                    raise ConfigError(f"--{name} {text!r}: {part!r} is not of the form name=value")
                if f"{name}.{key}" in values:
                    raise ConfigError(f"--{name} {text!r}: {key} is named twice")
                values[f"{name}.{key}"] = value
        else:
            values[name] = text
    return values


def _parser(command: str, examples: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"mvhpc {command}",
        description=about,
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _stage(command: str, arguments: Sequence[str]) -> int:
    from mvhpc.run import execute
    from mvhpc.stages import STAGES

    stage, examples, flags = COMMANDS[command]
    definition = STAGES[stage]
    parser = _parser(command, examples, definition.help[0].upper() + definition.help[1:] + ".")
    parser.add_argument("--config", default="default", metavar="NAME_OR_FILE", help="preset or YAML file")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    options = vars(parser.parse_intermixed_args(arguments))
    preset, overrides = options.pop("config"), options.pop("overrides")
    config: Any = load_config(definition.config, stage, preset, overrides, _values(command, options))
    summary = execute(stage, config)
    for name, value in summary.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    out = Path(config.out)
    print(f"{'written to':32s} {out if out.exists() else out.parent}")
    return 0


def _run(arguments: Sequence[str]) -> int:
    from mvhpc.pipeline import PipelineConfig, run_pipeline

    parser = _parser(
        "run",
        "mvhpc run --config demo\n  mvhpc run --config demo root=/tmp/demo vae.training.epochs=5",
        "Run the whole pipeline of a preset: data, autoencoder, latents, joint model, predictions, synthetic people. "
        "A stage that is complete and unchanged is reused. STAGE.key=value reaches into one stage.",
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
        "mvhpc export runs/joint/checkpoints/step-00001000 --out model\n  mvhpc export runs/joint --out model",
        "Write the model of a checkpoint as a folder of its own, on this machine, whatever number of workers wrote it. "
        "Of a run folder the newest checkpoint is taken.",
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="model folder to write")
    options = parser.parse_args(arguments)
    print(f"step {export(Path(options.source), Path(options.out))} written to {options.out}")
    return 0


def _mlflow_sync(arguments: Sequence[str]) -> int:
    from mvhpc.store import PATIENCE
    from mvhpc.tracking import sync

    parser = _parser(
        "mlflow-sync",
        "mvhpc mlflow-sync runs/vae runs/joint\n  mvhpc mlflow-sync runs/joint --uri http://127.0.0.1:5000",
        "Bring an MLflow store up to date with the journals of run folders, for runs on machines that do not reach it. "
        "What the store has already is not sent again.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--uri", default="", help="tracking URI; without it the one that each run was configured with")
    options = parser.parse_args(arguments)
    refuse_password(options.uri)
    os.environ |= PATIENCE
    for folder in map(Path, options.folders):
        if not (folder / "tracking.json").is_file():
            raise ConfigError(f"{folder}: no run folder (it has no tracking.json)")
        sync(folder, options.uri)
        print(f"{folder} is up to date")
    return 0


def _dashboard(arguments: Sequence[str]) -> int:
    from mvhpc.dashboard import dashboard

    parser = _parser(
        "dashboard",
        "mvhpc dashboard\n  mvhpc dashboard runs/demo --port 5001",
        "Open the MLflow store of a folder of runs, on this machine only and behind a password.",
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
        print(USAGE, end="")
        return 0
    handlers: dict[str, Callable[[Sequence[str]], int]] = {
        "run": _run,
        "export": _export,
        "mlflow-sync": _mlflow_sync,
        "dashboard": _dashboard,
    }
    command = " ".join(arguments[:2]) if arguments[0] == "train" else arguments[0]
    rest = arguments[len(command.split()) :]
    try:
        if command in handlers:
            return handlers[command](rest)
        if command in COMMANDS:
            return _stage(command, rest)
        raise ConfigError(nearest(command, [*COMMANDS, *handlers], "command"))
    except KeyboardInterrupt:
        print(
            "mvhpc: interrupted; run the same command again to go on from the last checkpoint",
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
