"""The options of every `mvhpc` command, for its help, for reading it and for completion in shells."""

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from mvhpc.config import CONFIGS, keys_without_default
from mvhpc.stages import STAGES, Stage
from shards.__main__ import OneLineParser, make_parser

GROUP = "train"  # commands of two words
ELSEWHERE = "mvhpc.commands"  # entry points of commands that are no part of this package
HELP_ELSEWHERE = {"submit": "run stages as jobs, on SLURM or on this machine"}
WIDTH = 100  # columns of what help says in sentences


class Parser(OneLineParser):
    """Shows options as required that may also be given as key=value."""

    def format_help(self) -> str:
        for action in self._actions:
            action.required = action.required or getattr(action, "needed", False)
        return super().format_help()


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: one line.
        about: what it does.
        examples: complete commands.
        fill: adds its options to a parser.
    """

    help: str
    about: str
    examples: Sequence[str]
    fill: Callable[[argparse.ArgumentParser], None]

    def complete(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """``parser`` with the description, the examples and the options of this command."""
        parser.description, parser.epilog = textwrap.fill(self.about, WIDTH), "\n  ".join(["examples:", *self.examples])
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        self.fill(parser)
        return parser


def required_keys(stage: Stage) -> list[str]:
    """The keys that a user has to set: those without default, less the paths that the project knows."""
    known = {"out", *(key for key, maker in stage.inputs.items() if maker)}
    return [key for key in keys_without_default(stage.name) if key not in known]


def in_words(stage: Stage, keys: Sequence[str]) -> str:
    """Keys as they are set on the command line: ``--want VALUE`` where there is a flag, else ``want=VALUE``."""
    return " ".join(f"--{key} VALUE" if key in stage.flags else f"{key}=VALUE" for key in keys)


def _stage_command(stage: Stage) -> Command:
    required = required_keys(stage)

    def fill(parser: argparse.ArgumentParser) -> None:
        _add_preset(parser, stage.name, "preset or YAML file (default: the project's)")
        parser.add_argument(
            "--root", metavar="FOLDER", help="project (default: the one below runs/ that was used last)"
        )
        parser.add_argument("--with-inputs", action="store_true", help="first run the stages that make missing inputs")
        parser.add_argument("--show-config", action="store_true", help="print the configuration as YAML, run nothing")
        for name, text in stage.flags.items():
            place = name == "out" or stage.inputs.get(name)
            note = " (required)" if name in required else " (default: the project's)" if place else ""
            several = {"nargs": "+"} if name in stage.lists else {}
            option = parser.add_argument(f"--{name}", help=f"{text}{note}", **several)  # type: ignore[arg-type]
            option.needed = name in required  # type: ignore[attr-defined]
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")

    about = stage.help[0].upper() + stage.help[1:] + "."
    keys = [key for key in required if key not in stage.flags]
    if keys:
        about += f" Required: {in_words(stage, keys)}."
    return Command(stage.help, about, stage.examples, fill)


def _add_preset(parser: argparse.ArgumentParser, folder: str, text: str) -> None:
    option = parser.add_argument("--config", metavar="NAME_OR_FILE", help=text)
    option.presets = folder  # type: ignore[attr-defined]  # for completion


def _run(parser: argparse.ArgumentParser) -> None:
    _add_preset(parser, "pipeline", "pipeline preset or YAML file (default: that of the project in root, else demo)")
    parser.add_argument("--show-config", action="store_true", help="print the configuration as YAML, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key; of one stage as STAGE.key=value")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="run folder, model folder or checkpoint")
    parser.add_argument("out", metavar="DIR", help="folder to write")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="RUN", help="folder of a pipeline, the root of `mvhpc run`")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write (default: report.html in that folder)")


def _mlflow_sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--uri", default="", help="tracking URI (default: that of each run's configuration)")


def _dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store",
        nargs="?",
        help="folder of runs, or a tracking URI (default: the project below runs/ that was used last)",
    )
    parser.add_argument("--port", type=int, help="of this machine (default: the first free one from 5000 on)")


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


COMMANDS: dict[str, Command] = {
    "run": Command(
        "run all stages of a preset in order; complete and unchanged ones are reused",
        "Run the whole pipeline of a preset: data, autoencoder, latents, joint model, predictions, synthetic people. "
        "Complete and unchanged stages are reused. STAGE.key=value overrides a key of one stage.",
        ("mvhpc run --config demo", "mvhpc run --config demo root=/tmp/demo vae.training.epochs=5"),
        _run,
    ),
    **{stage.command: _stage_command(stage) for stage in STAGES.values() if stage.command},
    "export": Command(
        "write a trained model, or that of a checkpoint, with its card, as a folder to give away",
        "Write the trained model of a run folder with its configuration, schema, recipe of the preprocessing, model "
        "card and a known answer that is checked on loading; the folder is a MONAI bundle too. Of a checkpoint, or of "
        "a run that has not ended, the model is made on this machine, whatever the number of workers.",
        ("mvhpc export runs/joint model", "mvhpc export runs/joint/checkpoints/step-00001000 model"),
        _export,
    ),
    "report": Command(
        "write what a pipeline found, on one HTML page",
        "Write one HTML page that loads nothing: results, pictures, calibration, error by group, data sheet, model "
        "card and provenance of a complete pipeline.",
        ("mvhpc report runs/demo", "mvhpc report runs/demo --out report.html"),
        _report,
    ),
    "mlflow-sync": Command(
        "send metrics of run folders to an MLflow store",
        "Send the journals of run folders to an MLflow store, for runs on machines that cannot reach it. "
        "Points that the store already has are not sent again.",
        ("mvhpc mlflow-sync runs/vae runs/joint", "mvhpc mlflow-sync runs/joint --uri http://127.0.0.1:5000"),
        _mlflow_sync,
    ),
    "dashboard": Command(
        "open the MLflow store, on this machine only",
        "Open the MLflow store of a folder of runs, on this machine only, protected by a password.",
        ("mvhpc dashboard", "mvhpc dashboard runs/demo --port 5001"),
        _dashboard,
    ),
    "completion": Command(
        "print the completion of commands and options for a shell",
        "Print a script that completes commands, options, presets and files of `mvhpc` and `shards` in a shell.",
        (
            'eval "$(mvhpc completion bash)"          in ~/.bashrc',
            'eval "$(mvhpc completion zsh)"           in ~/.zshrc, after compinit',
        ),
        _completion,
    ),
}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    return COMMANDS[command].complete(Parser(prog=f"mvhpc {command}"))


def commands_elsewhere() -> dict[str, EntryPoint]:
    """Commands of other packages, by their entry points: ``submit`` of ``launchers``."""
    return {point.name: point for point in entry_points(group=ELSEWHERE)}


def help_elsewhere(name: str) -> str:
    """One line about a command of another package."""
    return HELP_ELSEWHERE.get(name, f"see mvhpc {name} --help")


def group_help() -> str:
    """What `mvhpc train` shows."""
    of_group = ((name, command) for name, command in COMMANDS.items() if name.startswith(f"{GROUP} "))
    lines = "\n".join(f"  {name:16s} {command.help}" for name, command in of_group)
    return f"usage: mvhpc {GROUP} COMMAND [options] [key=value ...]\n\ncommands:\n{lines}\n\n" + (
        f"`mvhpc {GROUP} COMMAND --help` shows a command's options and examples.\n"
    )


def completion(shell: str) -> str:
    """A script for ``bash`` or ``zsh`` that completes `mvhpc` and `shards`."""
    import shtab

    root = argparse.ArgumentParser(prog="mvhpc")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    group = commands.add_parser(GROUP, help="train a model").add_subparsers()
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        parser = (group if second else commands).add_parser(second or first, help=command.help)
        command.fill(parser)
        for action in parser._actions:
            _complete(action, shtab.FILE)
    for name in commands_elsewhere():
        commands.add_parser(name, help=help_elsewhere(name))
    of_shards = make_parser()
    for parser in (of_shards, *subparsers(of_shards)):
        for action in parser._actions:
            _complete(action, shtab.FILE)
    return "\n".join(shtab.complete(parser, shell) for parser in (root, of_shards))


def subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of a parser's commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _complete(action: argparse.Action, file: dict[str, str]) -> None:
    """Let presets be completed by their names, and all other values as files."""
    presets = getattr(action, "presets", None)
    if presets:
        action.choices = list(preset_names(presets))
    elif action.nargs != 0 and action.choices is None and action.metavar != "N":
        action.complete = file  # type: ignore[attr-defined]


def preset_names(folder: str) -> Iterator[str]:
    """The names of the presets in ``configs/FOLDER``."""
    return (path.stem for path in sorted((CONFIGS / folder).glob("*.yaml")))
