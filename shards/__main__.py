"""The `shards` command, see :data:`COMMANDS`."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from shards.cpus import worker_count
from shards.errors import DataError, IntegrityError, TooManyRejects, explain
from shards.help_texts import AUDIT, ENTITIES, EXAMPLES, FILES_ROOT, MERGE, PACK, PREPROCESS, RENAME, SPLIT, VERIFY
from shards.numbers import parse_number

DEMO = (32, 32, 32)  # voxels of the preset demo
os.environ["MPLBACKEND"] = "Agg"  # a notebook names a backend to its commands that only its own Python has


class OneLineParser(argparse.ArgumentParser):
    """Prints errors in one line; takes numbers as :func:`shards.numbers.parse_number`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for kind in (int, float):
            self.register("type", kind, partial(parse_number, kind))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def pairs(text: str) -> dict[str, str]:
    """``a=b,c=d`` as a mapping."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(not (name and equals and value) for name, equals, value in pairs) or len({p[0] for p in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE,NAME=VALUE, each name once")
    return {name: value for name, _, value in pairs}


def workers(text: str) -> int:
    """A number of workers, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of processes, or 0 for one per core")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    style = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(
        prog="shards",
        description="Pack brain volumes and clinical data into verified shards for fast random access.",
        epilog=EXAMPLES,
        formatter_class=style,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shards {version('mvhpc')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=style, allow_abbrev=False
        )

    phantom = command(
        "phantom", "make procedural brains with a known joint law of anatomy, age and sex, as a BIDS tree"
    )
    phantom.add_argument("out", metavar="OUT", type=Path)
    phantom.add_argument("--config", default="default", metavar="NAME", help="preset under configs/phantom, or a file")
    phantom.add_argument("--subjects", type=int, metavar="N", help="number of brains")
    phantom.add_argument("--shape", type=int, nargs=3, metavar="N", help="voxels")
    phantom.add_argument("--rich", action="store_true", default=None, help="add T2w, five sites and a memory score")
    phantom.add_argument("--seed", type=int, metavar="N", help="random seed")
    phantom.add_argument("--workers", type=workers, default=0, metavar="N", help="processes; default one per core")

    preprocess = command(
        "preprocess", "make a BIDS derivative of raw scans: brains in the space of a template", PREPROCESS
    )
    preprocess.add_argument("source", metavar="SOURCE", type=Path)
    preprocess.add_argument("out", metavar="OUT", type=Path)
    preprocess.add_argument(
        "--config", default="default", metavar="NAME", help="preset under configs/preprocess, or a YAML file"
    )
    preprocess.add_argument("--steps", nargs="+", metavar="STEP", help="brain, bias, registration, tissue")
    preprocess.add_argument(
        "--tissue", action=argparse.BooleanOptionalAction, default=None, help="add or leave out the step tissue"
    )
    preprocess.add_argument("--brain", metavar="HOW", help="auto, deepbet, hd-bet, mask or none")
    preprocess.add_argument("--registration", metavar="KIND", help="affine or rigid")
    preprocess.add_argument(
        "--template", metavar="FILE", help="brain-extracted volume; default nilearn's MNI152 template"
    )
    preprocess.add_argument("--spacing", type=float, metavar="MM", help="of the results")
    preprocess.add_argument(
        "--keep-suspect", action="store_true", default=None, help="keep and flag scans that fail quality control"
    )
    preprocess.add_argument("--suffix", metavar="SUFFIX", help="of the scans in a BIDS folder; default T1w")
    preprocess.add_argument("--entities", type=pairs, metavar="KEY=VALUE,...", help=ENTITIES)
    preprocess.add_argument("--files-root", metavar="FOLDER", help=FILES_ROOT)
    preprocess.add_argument("--weights", metavar="FILE", help="zip file of HD-BET's weights")
    preprocess.add_argument("--weights-sha256", metavar="HASH", help="its SHA-256, as published")
    preprocess.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="for the network that extracts brains"
    )
    preprocess.add_argument("--workers", type=workers, metavar="N", help="processes; 0 for one per core")

    pack = command("pack", "pack a BIDS folder or a CSV into shards", PACK)
    pack.add_argument("source", metavar="SOURCE", type=Path)
    pack.add_argument("out", metavar="OUT", type=Path)
    pack.add_argument("--config", default="default", metavar="NAME", help="preset under configs/pack, or a YAML file")
    pack.add_argument("--format", choices=["zarr", "webdataset"], help="format of the shards")
    pack.add_argument("--dtype", choices=["float16", "uint8", "uint16"], help="of the stored volumes")
    pack.add_argument("--spacing", type=float, metavar="MM", help="edge of a voxel")
    pack.add_argument(
        "--shape", nargs="+", metavar="N", help="auto, or three numbers of voxels: right, anterior, superior"
    )
    pack.add_argument("--schema", metavar="NAME", help="variables: name under configs/schema, or a file")
    pack.add_argument("--max-rejects", metavar="N|P%", help="fail with more rejected rows")
    split_source = pack.add_mutually_exclusive_group()
    split_source.add_argument(
        "--split", type=float, nargs=3, metavar="F", help="draw a split: fractions of train, validation, test"
    )
    split_source.add_argument("--split-column", metavar="COLUMN", help="take the split from a column of the table")
    pack.add_argument("--group", metavar="COLUMN", help="keep rows of equal value in one part of a split")
    pack.add_argument("--folds", type=int, metavar="K", help="also record K cross-validation folds")
    pack.add_argument("--seed", type=int, metavar="N", help="of the splits")
    pack.add_argument("--workers", type=workers, metavar="N", help="processes; 0 for one per core")
    pack.add_argument(
        "--part", metavar="I/N", help="make the shards of one of N parts; `shards merge` makes a data set of them"
    )
    pack.add_argument(
        "--keep-suspect", action="store_true", default=None, help="pack and flag scans that fail quality control"
    )

    pack.add_argument("--entities", type=pairs, metavar="KEY=VALUE,...", help=ENTITIES)
    pack.add_argument("--rename", type=pairs, metavar="COLUMN=NAME,...", help=RENAME)
    pack.add_argument("--files-root", metavar="FOLDER", help=FILES_ROOT)
    pack.add_argument(
        "--pseudonymise", metavar="KEYFILE", help="replace the ids of subjects, sessions and groups by keyed hashes"
    )
    pack.add_argument("--exclude", metavar="FILE", help="table of verdicts of `shards audit`: leave rejected rows out")

    merge = command("merge", "make a data set of the parts of `shards pack --part`", MERGE)
    merge.add_argument("out", metavar="OUT", type=Path)

    split = command("split", "record another split, or cross-validation folds, in a packed data set", SPLIT)
    split.add_argument("out", metavar="OUT", type=Path)
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--folds", type=int, metavar="K", help="K splits, each with another K-th as its test part")
    how.add_argument("--fractions", type=float, nargs=3, metavar="F", help="train, validation, test")
    split.add_argument("--name", metavar="NAME", help="of the split; for folds, their prefix (default fold)")
    split.add_argument("--group", default=None, metavar="COLUMN", help="the column that the data set was packed with")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")

    audit = command("audit", "make a page that shows every volume, and on which people accept or reject them", AUDIT)
    audit.add_argument("folder", metavar="PACKED", type=Path)
    audit.add_argument("--out", metavar="FILE", type=Path, required=True, help="HTML file")
    audit.add_argument("--workers", type=workers, default=0, metavar="N", help="processes; default one per core")

    verify = command(
        "verify", "compare every file of a packed data set with its checksum; exit status 1 on damage", VERIFY
    )
    verify.add_argument("out", metavar="OUT", type=Path)
    verify.add_argument("--workers", type=workers, default=0, metavar="N", help="threads; default one per core")
    verify.add_argument("--repair", action="store_true", help="make what is damaged again, from --source")
    verify.add_argument("--source", metavar="SOURCE", type=Path, help="what OUT was packed from")
    verify.add_argument("--files-root", metavar="FOLDER", help=FILES_ROOT)
    verify.add_argument("--pseudonymise", metavar="KEYFILE", help="the key that OUT was packed with")

    upgrade = command("upgrade", "rewrite the index of a packed data set of an earlier version; volumes stay in place")
    upgrade.add_argument("out", metavar="OUT", type=Path)

    inspect = command("inspect", "show the content of a packed data set")
    inspect.add_argument("out", metavar="OUT", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command: its preset, with the flags that were given over it."""
    from shards.presets import load_preset

    options = load_preset(args.command, args.config)
    return options | {name: value for name, value in vars(args).items() if name in options and value is not None}


def _phantom(args: argparse.Namespace) -> None:
    from shards.phantom.brain import spacing
    from shards.phantom.make import make_phantoms

    options = _options(args)
    shape = tuple(options["shape"])
    try:
        make_phantoms(args.out, workers=args.workers, **{**options, "shape": shape})
    except ValueError as error:
        raise DataError(str(error)) from error
    grid = "--config demo" if shape == DEMO else f"--spacing {spacing(shape):g} --shape {' '.join(map(str, shape))}"
    schema = " --schema rich" if options["rich"] else ""
    path = shlex.quote(str(args.out))
    print(f"{options['subjects']} phantoms in {args.out}; pack them with: shards pack {path} OUT {grid}{schema}")


def _preprocess(args: argparse.Namespace) -> None:
    from shards.preprocess.recipe import Recipe
    from shards.preprocess.run import REJECTED, preprocess

    options = _options(args)
    steps = [step for step in options["steps"] if args.tissue is not False or step != "tissue"]
    recipe = Recipe(
        steps=(*steps, "tissue") if args.tissue else tuple(steps),
        brain=options["brain"],
        registration=options["registration"],
        spacing=float(options["spacing"]),
        weights=options["weights_sha256"],
    )
    summary = preprocess(
        args.source,
        args.out,
        recipe,
        template=options["template"] or None,
        weights=options["weights"] or None,
        device=args.device,
        workers=worker_count(options["workers"]),
        suffix=options["suffix"],
        keep_suspect=options["keep_suspect"],
        entities=options["entities"],
        files_root=options["files_root"],
    )
    print(
        f"processed {summary['processed']:,} of {summary['scans']:,} scans into {args.out}, "
        f"{summary['unchanged']:,} were there unchanged"
    )
    if summary["rejected"]:
        print(f"rejected {summary['rejected']:,}: see {args.out / REJECTED}")
    for note in summary["notes"]:
        print(f"note: {note}")


def _pack(args: argparse.Namespace) -> None:
    from shards.pack import pack, pack_part

    options = _options(args)
    if args.split:  # over a split column of the preset
        options["split_column"] = ""
    options |= {"storage": options.pop("format"), "fractions": options.pop("split") or None}
    options["exclusions"] = options.pop("exclude") or None
    if args.part:
        made = pack_part(args.source, args.out, args.part, **options)
        print(
            f"part {args.part}: {made['made']:,} of its {made['shards']:,} shards made now, {made['converted']:,} rows "
            f"converted, {made['rejected']:,} rows rejected; after all parts: shards merge {args.out}"
        )
        return
    summary = pack(args.source, args.out, **options)
    if not summary["converted"]:
        print("no file is new or changed: nothing was converted")
    _print_packed(args.out, summary)


def _merge(args: argparse.Namespace) -> None:
    from shards.pack import merge

    _print_packed(args.out, merge(args.out))


def _print_packed(out: Path, summary: Mapping[str, Any]) -> None:
    from shards.packing.rejected import REJECTED

    print(
        f"packed {summary['packed']:,} of {summary['rows']:,} rows ({summary['subjects']:,} subjects) "
        f"into {out}, {' x '.join(map(str, summary['shape']))} voxels, {summary['bytes'] / 2**20:,.1f} MiB"
    )
    if summary["rejected"]:
        print(f"rejected {summary['rejected']:,}: see {out / REJECTED}")
    parts = ", ".join(f"{part} {n:,}" for part, n in summary["split"].items())
    print(f"split of the subjects: {parts}")
    missing = [f"{name} {n:,}" for name, n in summary["missing"].items() if n]
    if missing:
        print(f"missing values, kept: {', '.join(missing)}")
    for note in summary["notes"]:
        print(f"note: {note}")


def _split(args: argparse.Namespace) -> None:
    from shards.split import record_split

    for name in record_split(args.out, args.fractions, args.folds, args.seed, args.group, args.name):
        print(name)


def _audit(args: argparse.Namespace) -> None:
    from shards.audit.run import audit

    summary = audit(args.folder, args.out, args.workers)
    print(f"{summary['records']:,} records in {args.out}, {summary['bytes'] / 2**20:,.1f} MiB; open it in a browser")
    if summary["alike"]:
        print(f"pairs of different subjects that are likely the same person: {summary['alike']:,}")
    if summary["unlike"]:
        print(f"pairs of scans of one subject that look like different people: {summary['unlike']:,}")


def _verify(args: argparse.Namespace) -> None:
    from shards.repair import repair
    from shards.verify import foreign_files, verify

    if args.repair != (args.source is not None):
        raise DataError("--repair and --source SOURCE belong together")
    damaged = 0
    if args.repair:
        choice = {"files_root": args.files_root, "pseudonymise": args.pseudonymise, "workers": args.workers}
        for damage, reason in repair(args.out, args.source, **choice):
            damaged += bool(reason)
            print(f"{damage}, {f'not repaired: {reason}' if reason else 'repaired'}", file=sys.stderr)
    else:
        for damage in verify(args.out, args.workers):
            damaged += 1
            print(damage, file=sys.stderr)
    if damaged:
        remedy = "restore these files or pack again" if args.repair else "restore or --repair them, or pack again"
        raise IntegrityError(f"{args.out}: {damaged} damaged; {remedy}")
    for name in foreign_files(args.out):
        print(f"note: {name} does not belong to the data set", file=sys.stderr)
    print(f"{args.out}: intact")


def _upgrade(args: argparse.Namespace) -> None:
    from shards.upgrade import upgrade

    records = upgrade(args.out)
    print(f"{args.out}: {records:,} records upgraded" if records else f"{args.out}: has the present version already")


def _inspect(args: argparse.Namespace) -> None:
    from shards.index import Index
    from shards.summary import format_summary, summarize

    summary = summarize(Index.load(args.out))
    print(json.dumps(summary, indent=2) if args.json else format_summary(summary))


COMMANDS = {
    "phantom": _phantom,
    "preprocess": _preprocess,
    "pack": _pack,
    "merge": _merge,
    "split": _split,
    "audit": _audit,
    "verify": _verify,
    "upgrade": _upgrade,
    "inspect": _inspect,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `shards` command.

    Returns:
        0; 1 for damaged data or too many rejected rows; 2 for input or arguments that cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"shards: unknown command {arguments[0]!r}.{hint} Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    try:
        COMMANDS[args.command](args)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"shards {args.command}: {explain(error, args.out)}", file=sys.stderr)
        return 1 if isinstance(error, IntegrityError | TooManyRejects) else 2
    except KeyboardInterrupt:
        print(f"shards {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
