"""The `shards` command: phantom, preprocess, pack, audit, verify, inspect, split."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from shards.errors import DataError, IntegrityError, TooManyRejects

EXAMPLES = """examples:
  shards phantom data/phantom --subjects 200 --seed 0
  shards pack data/phantom data/packed --config demo
  shards preprocess bids/ derivative/ --spacing 2
  shards pack my_scans.csv packed --spacing 1 --shape 160 192 160 --max-rejects 5% --group family
  shards split packed --folds 5 --seed 0
  shards verify packed
  shards inspect packed --json
"""
PREPROCESS = """SOURCE is a BIDS folder (sessions too) or a CSV with the columns participant_id and path (session_id is
optional), with T1-weighted scans as NIfTI (.nii, .nii.gz, .hdr with .img) or FreeSurfer's .mgz. OUT becomes a BIDS
derivative, which `shards pack` takes as its source. Steps, in this order:

  brain         extract the brain: deepbet, except where the scan is extracted already (--brain auto)
  bias          correct the scanner's intensity inhomogeneity (N4)
  registration  register to a template (affine or rigid); follow-ups to the subject's first registered session
  tissue        probabilities of grey matter, white matter and cerebrospinal fluid

The same command again processes only what has changed: a scan is skipped where its file and the recipe are the same.
Scans that cannot be processed are listed with their reasons in OUT/rejected.tsv. With --brain mask, the mask of each
scan is the file *_mask.nii.gz beside it, or stands in the column mask of the CSV.

Options that are not given come from the preset: configs/preprocess/NAME.yaml, over configs/preprocess/default.yaml.

examples:
  shards preprocess bids/ derivative/ --spacing 2
  shards preprocess fmriprep/ derivative/ --entities desc=preproc --brain mask    in fMRIPrep's own masks
  shards preprocess scans.csv derivative/ --registration rigid --steps brain bias registration
  shards preprocess bids/ derivative/ --brain hd-bet --weights release_2.0.0.zip --weights-sha256 HASH
"""
PACK = """SOURCE is a BIDS folder (participants.tsv, sub-X[/ses-Y]/anat/*_SUFFIX.nii.gz) or a CSV with the columns
participant_id and path (absolute, or in the folder of the CSV; session_id is optional; with several volume
variables, one column per variable, with its name), or a derivative of `shards preprocess`, whose volumes stay where
the template has them and whose tissue maps are packed too. Each volume is resampled to RAS, the spacing and the
shape, centred on the brain, with intensities in [0, 1]. A scan that is no brain-extracted T1w brain (a head with
skull, a CT, a label map, a slab) is rejected, or with --keep-suspect packed and flagged. Rejected rows are listed
with their reasons in OUT/rejected.tsv. After an interruption, the same command resumes after the complete shards. For
a finished data set, it packs the rows that are new or whose files have changed, and no others.

Options that are not given come from the preset: configs/pack/NAME.yaml, over configs/pack/default.yaml.

examples:
  shards pack bids/ packed
  shards pack bids/ packed --split 0 0 1          a data set for testing only
  shards pack bids/ packed --rename gender=sex    the table's column `gender` is the schema's `sex`
  shards pack bids/ packed --entities space=MNI152NLin2009cAsym,desc=preproc    of several files of a scan, this one
  shards pack bids/ packed --split-column set     column `set` holds train, validation (val, dev) or test
  shards pack scans.csv packed --config h200 --format webdataset --schema my_schema.yaml --workers 8
  shards pack bids/ packed --part 1/4             on one of four machines; then, on any of them, without --part
"""
SPLIT = """A recorded split never changes; another split needs another NAME. A data set that was packed with --group
keeps each group in one part here too.

examples:
  shards split packed --folds 5 --seed 0          fold-1-of-5 ... fold-5-of-5
  shards split packed --fractions 0.8 0.05 0.15 --name wide-test
"""
AUDIT = """The page is one file that loads nothing: pictures of every volume, sorted by how unusual it is, likely
duplicates, the correlation of intensities with the scalars, and their distributions by split and category. Verdicts
are downloaded from it as verdicts.tsv, and `shards pack --exclude verdicts.tsv` leaves the rejected records out.

examples:
  shards audit packed --out audit.html
  shards pack bids/ packed-2 --exclude verdicts.tsv
"""
VERIFY = """Every byte is read once, on all cores. A line for each damage names the file, the record with its variable,
and the byte where it begins. With --repair the damaged volumes are converted from SOURCE again, as they were when OUT
was packed; a file is replaced where all of it has its recorded SHA-256. Files that do not belong to OUT are noted, and
stay.

examples:
  shards verify packed
  shards verify packed --repair --source bids/
"""

RENAME = "columns of the table under the schema's names, as gender=sex"
FILES_ROOT = "all files of a CSV must lie in this folder, where its relative paths begin (default: that of the CSV)"
ENTITIES = "of the volumes' names in a BIDS folder, as space=MNI152NLin2009cAsym,desc=preproc"


class OneLineParser(argparse.ArgumentParser):
    """Prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def pairs(text: str) -> dict[str, str]:
    """``a=b,c=d`` as a mapping."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(not (name and equals and value) for name, equals, value in pairs) or len({p[0] for p in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE,NAME=VALUE, each name once")
    return {name: value for name, _, value in pairs}


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
    phantom.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default one per core")

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
    preprocess.add_argument("--workers", type=int, metavar="N", help="processes; 0 for one per core")

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
    pack.add_argument("--workers", type=int, metavar="N", help="processes; 0 for one per core")
    pack.add_argument(
        "--part", metavar="I/N", help="make the shards of one of N parts; the command without --part ends the packing"
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
    audit.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default one per core")

    verify = command(
        "verify", "compare every file of a packed data set with its checksum; exit status 1 on damage", VERIFY
    )
    verify.add_argument("out", metavar="OUT", type=Path)
    verify.add_argument("--workers", type=int, default=0, metavar="N", help="threads; default one per core")
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
    from shards.phantom.make import make_phantoms

    options = _options(args)
    try:
        make_phantoms(args.out, workers=args.workers, **{**options, "shape": tuple(options["shape"])})
    except ValueError as error:
        raise DataError(str(error)) from error
    print(f"{options['subjects']} phantoms in {args.out}; pack them with: shards pack {args.out} OUT --config demo")


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
        workers=options["workers"],
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
            f"converted, {made['rejected']:,} rows rejected; the command without --part ends the packing"
        )
        return
    summary = pack(args.source, args.out, **options)
    if not summary["converted"]:
        print("no row is new or changed: nothing was converted")
    print(
        f"packed {summary['packed']:,} of {summary['rows']:,} rows ({summary['subjects']:,} subjects) "
        f"into {args.out}, {' x '.join(map(str, summary['shape']))} voxels, {summary['bytes'] / 2**20:,.1f} MiB"
    )
    if summary["rejected"]:
        print(f"rejected {summary['rejected']:,}: see {args.out / 'rejected.tsv'}")
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
        print(f"shards {args.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, IntegrityError | TooManyRejects) else 2
    except KeyboardInterrupt:
        print(f"shards {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
