"""The `shards` command: phantom, pack, verify, inspect, split."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shards.errors import DataError, IntegrityError, TooManyRejects

EXAMPLES = """examples:
  shards phantom data/phantom --subjects 200 --shape 32 32 32 --seed 0
  shards pack data/phantom data/packed --format zarr --spacing 6 --shape 32 32 32
  shards pack my_scans.csv packed --format webdataset --spacing 2 --shape 80 96 80 --max-rejects 5% --group family
  shards split packed --folds 5 --seed 0
  shards verify packed
  shards inspect packed --json
"""
PACK = """SOURCE is a BIDS folder (participants.tsv, sub-X[/ses-Y]/anat/*_SUFFIX.nii.gz) or a CSV with the columns
participant_id and path (relative to the CSV; session_id is optional; with several volume variables, one column for
each, by its name). Each volume is brought to RAS, the spacing and the shape, centred on the brain, intensities in
[0, 1]; it should be brain-extracted. Faulty rows are listed with their reasons in OUT/rejected.tsv. Interrupted, the
same command goes on behind the last complete shard.

examples:
  shards pack bids/ packed --spacing 2 --shape 80 96 80
  shards pack scans.csv packed --format webdataset --spacing 1 --shape 160 192 160 --schema my_schema.yaml --workers 8
"""
SPLIT = """A recorded split never changes: give another one another NAME. Where the dataset was packed with --group,
people of one group stay on one side here too.

examples:
  shards split packed --folds 5 --seed 0          fold-1-of-5 ... fold-5-of-5
  shards split packed --fractions 0.8 0.05 0.15 --name wide-test
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest right command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="shards",
        description="Brain volumes and what is known of the people -> checked, shuffled, fast-loading shards.",
        epilog=EXAMPLES,
        formatter_class=style,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=style, allow_abbrev=False
        )

    phantom = command("phantom", "make procedural brains with a known law of anatomy, as a BIDS folder")
    phantom.add_argument("out", metavar="OUT", type=Path)
    phantom.add_argument("--subjects", type=int, default=200, metavar="N", help="default 200")
    phantom.add_argument(
        "--shape", type=int, nargs=3, default=[32, 32, 32], metavar="N", help="voxels; default 32 32 32"
    )
    phantom.add_argument("--rich", action="store_true", help="also a T2w-like contrast, five sites and a memory score")
    phantom.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    phantom.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default one per core")

    pack = command("pack", "pack a BIDS folder or a CSV into shards", PACK)
    pack.add_argument("source", metavar="SOURCE", type=Path)
    pack.add_argument("out", metavar="OUT", type=Path)
    pack.add_argument("--format", default="zarr", choices=["zarr", "webdataset"], help="default zarr")
    pack.add_argument("--spacing", type=float, required=True, metavar="MM", help="edge of a voxel")
    pack.add_argument(
        "--shape", type=int, nargs=3, required=True, metavar="N", help="voxels: right, anterior, superior"
    )
    pack.add_argument(
        "--schema", default="default", metavar="NAME", help="variables: name under configs/schema, or a file"
    )
    pack.add_argument(
        "--max-rejects", default="5%", metavar="N|P%", help="fail above this many faulty rows; default 5%%"
    )
    pack.add_argument(
        "--split", type=float, nargs=3, default=[0.89, 0.01, 0.10], metavar="F", help="default 0.89 0.01 0.10"
    )
    pack.add_argument("--group", default="", metavar="COLUMN", help="keep rows of equal value on one side of a split")
    pack.add_argument("--folds", type=int, default=0, metavar="K", help="also record K cross-validation folds")
    pack.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits; default 0")
    pack.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default one per core")

    split = command("split", "record another split, or cross-validation folds, in a packed dataset", SPLIT)
    split.add_argument("out", metavar="OUT", type=Path)
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--folds", type=int, metavar="K", help="K splits, each with another K-th as its test side")
    how.add_argument("--fractions", type=float, nargs=3, metavar="F", help="train, validation, test")
    split.add_argument("--name", metavar="NAME", help="of the split; for folds, what they begin with (default fold)")
    split.add_argument("--group", default=None, metavar="COLUMN", help="the column the dataset was packed with")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")

    verify = command("verify", "check every bit of a packed dataset; exit status 1 where one is wrong")
    verify.add_argument("out", metavar="OUT", type=Path)

    inspect = command("inspect", "show what a packed dataset holds")
    inspect.add_argument("out", metavar="OUT", type=Path)
    inspect.add_argument("--json", action="store_true", help="for programs")
    return parser


def _phantom(args: argparse.Namespace) -> None:
    from shards.phantom.make import make_phantoms

    try:
        make_phantoms(args.out, args.subjects, tuple(args.shape), args.seed, args.workers, args.rich)
    except ValueError as error:
        raise DataError(str(error)) from error
    print(
        f"{args.subjects} phantoms in {args.out}; pack them with: shards pack {args.out} OUT --spacing MM --shape N N N"
    )


def _pack(args: argparse.Namespace) -> None:
    from shards.pack import pack

    summary = pack(
        args.source,
        args.out,
        storage=args.format,
        schema=args.schema,
        spacing=args.spacing,
        shape=args.shape,
        max_rejects=args.max_rejects,
        fractions=args.split,
        group=args.group,
        folds=args.folds,
        seed=args.seed,
        workers=args.workers,
    )
    print(
        f"packed {summary['packed']:,} of {summary['rows']:,} rows ({summary['subjects']:,} subjects) "
        f"into {args.out}, {summary['bytes'] / 2**20:,.1f} MiB"
    )
    if summary["rejected"]:
        print(f"rejected {summary['rejected']:,}: see {args.out / 'rejected.tsv'}")
    missing = [f"{name} {n:,}" for name, n in summary["missing"].items() if n]
    if missing:
        print(f"missing values, kept: {', '.join(missing)}")
    for note in summary["notes"]:
        print(f"note: {note}")


def _split(args: argparse.Namespace) -> None:
    from shards.split import record_split

    for name in record_split(args.out, args.fractions, args.folds, args.seed, args.group, args.name):
        print(name)


def _verify(args: argparse.Namespace) -> None:
    from shards.verify import verify

    damages = 0
    for line in verify(args.out):
        damages += 1
        print(line, file=sys.stderr)
    if damages:
        raise IntegrityError(f"{args.out}: {damages} damaged; restore these files or pack again")
    print(f"{args.out}: every bit as written")


def _inspect(args: argparse.Namespace) -> None:
    from shards.index import Index
    from shards.report import describe, render

    content = describe(Index.load(args.out))
    print(json.dumps(content, indent=2) if args.json else render(content))


COMMANDS = {"phantom": _phantom, "pack": _pack, "split": _split, "verify": _verify, "inspect": _inspect}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `shards` command.

    Returns:
        0; 1 for damaged data or too many faulty rows; 2 for input or arguments that cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"shards: unknown command {arguments[0]!r}.{hint} Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    try:
        COMMANDS[args.command](args)
    except BrokenPipeError:  # the reader of our output, `head` say, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"shards {args.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, IntegrityError | TooManyRejects) else 2
    except KeyboardInterrupt:
        print(f"shards {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
